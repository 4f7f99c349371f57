"""Products of small matrices in vector registers, inside functions compiled by numba.

numba's vectoriser keeps sums in memory between turns of an outer loop. Here a tile of
`ROWS` x `WIDTH` sums stays in registers for the whole of the inner dimension: one load
of the right matrix serves `ROWS` rows, one element of the left `WIDTH` columns (Goto
and van de Geijn, 2008, "Anatomy of high-performance matrix multiplication").
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
"""Elements of a vector register."""

WIDTH = 2 * LANES
"""Columns of a tile."""

ROWS = 8 if LANES == 16 else 4
"""Rows of a tile: with two sums each, and what they are made of, they fit in the 32
registers of AVX-512 or the 16 of AVX, and are enough for additions to overlap."""

AHEAD = 2
"""Tiles between the one that is computed and the one that is fetched. A core's own
prefetching follows rows one by one, and stops at their pages' ends."""

_ELEMENT = ir.FloatType()
_VECTOR = ir.VectorType(_ELEMENT, LANES)
_INDEX = ir.IntType(64)
_ELEMENT_BYTES = 4
_FLAGS = ("contract",)  # fused multiply-add; NaN and infinity keep their meaning


def round_up(size: int, multiple: int) -> int:
    """Return the next multiple; also for compiled code."""
    return (size + multiple - 1) // multiple * multiple


def _address(builder: Any, pointer: Any, at: Any) -> Any:
    """Return the address of element `at` of a bare pointer, as an i64."""
    return builder.add(builder.ptrtoint(pointer, _INDEX), _bytes(builder, at))


def _bytes(builder: Any, elements: Any) -> Any:
    return builder.mul(elements, _INDEX(_ELEMENT_BYTES))


def _load(builder: Any, address: Any, llvm_type: ir.Type) -> Any:
    pointer = builder.inttoptr(address, llvm_type.as_pointer())
    return builder.load(pointer, align=_ELEMENT_BYTES)


def _prefetch(builder: Any, address: Any) -> None:
    """Have the cache line of an address come from memory, if there is one."""
    byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    # To read, into all levels, data.
    builder.call(fetch, [builder.inttoptr(address, byte), i32(0), i32(3), i32(1)])


def _spread(builder: Any, element: Any) -> Any:
    """Return a vector of one element in all lanes."""
    vector = builder.insert_element(
        ir.Constant(_VECTOR, ir.Undefined), element, ir.IntType(32)(0)
    )
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(vector, vector, lanes)


def _tile_product(vectors: int, *, streams: bool = False) -> Any:
    """Return the product for tiles of `vectors` vectors a row.

    Args:
      streams: fetch the rows of A that come `AHEAD` tiles later. They must follow each
        other in memory, `a_row` products each.
    """

    @intrinsic
    def tile_product(
        typing_context: Any,
        c: Any,
        c_at: Any,
        c_row: Any,
        a: Any,
        a_at: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_at: Any,
        b_step: Any,
        inner: Any,
        fresh: Any,
    ) -> Any:
        """Add A @ B to a tile of C, or set the tile to it where `fresh` is not 0.

        C[m, n] is element `c_at + m * c_row + n` of `c`, A[m, k] element
        `a_at + m * a_row + k * a_step` of `a` and B[k, n] element
        `b_at + k * b_step + n` of `b`, with `ROWS` rows, `vectors * LANES` columns and
        `inner` products a sum. Buffers are bare pointers to f32; the other arguments
        are i64.
        """
        del typing_context, c, c_at, c_row, a, a_at, a_row, a_step, b, b_at, b_step
        del inner, fresh
        i64 = types.int64
        f32s = types.CPointer(types.float32)
        kinds = (f32s, i64, i64, f32s, i64, i64, i64, f32s, i64, i64, i64, i64)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del signature
            _emit_product(builder, args, vectors, streams)
            return context.get_dummy_value()

        return types.void(*kinds), generate

    return tile_product


product = _tile_product(WIDTH // LANES)
"""A tile of `WIDTH` columns."""

stream_product = _tile_product(WIDTH // LANES, streams=True)
"""The same, while later rows of A come from memory."""

stream_thin_product = _tile_product(1, streams=True)
"""The same for a tile of `LANES` columns."""


def _emit_product(builder: Any, args: Any, vectors: int, streams: bool) -> None:
    """Write the loop over the inner dimension."""
    c, c_at, c_row, a, a_at, a_row, a_step, b, b_at, b_step, inner, fresh = args
    c_start = _address(builder, c, c_at)
    a_start = _address(builder, a, a_at)
    b_start = _address(builder, b, b_at)
    c_row, a_row, a_step, b_step = (
        _bytes(builder, stride) for stride in (c_row, a_row, a_step, b_step)
    )
    offsets = [_INDEX(v * LANES * _ELEMENT_BYTES) for v in range(vectors)]
    is_fresh = builder.icmp_signed("!=", fresh, _INDEX(0))
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    places, sums, a_rows = [], [], []
    for m in range(ROWS):
        place = builder.add(c_start, builder.mul(c_row, _INDEX(m)))
        a_rows.append(builder.mul(a_row, _INDEX(m)))
        for offset in offsets:
            address = builder.add(place, offset)
            places.append(address)
            sums.append(
                builder.select(is_fresh, zero, _load(builder, address, _VECTOR))
            )
    before = builder.block
    loop = builder.append_basic_block("product")
    after = builder.append_basic_block("product.end")
    some = builder.icmp_signed(">", inner, _INDEX(0))
    builder.cbranch(some, loop, after)

    builder.position_at_end(loop)
    k, a_here, b_here = (builder.phi(_INDEX) for _ in range(3))
    running = [builder.phi(_VECTOR) for _ in sums]
    columns = [
        _load(builder, builder.add(b_here, offset), _VECTOR) for offset in offsets
    ]
    if streams:
        # As many elements a turn as this one uses: all of those rows by its end.
        skipped = builder.mul(a_row, _INDEX(AHEAD))
        later = builder.mul(builder.add(skipped, _bytes(builder, k)), _INDEX(ROWS))
        _prefetch(builder, builder.add(a_start, later))
    new = []
    for m in range(ROWS):
        element = _load(builder, builder.add(a_here, a_rows[m]), _ELEMENT)
        scale = _spread(builder, element)
        own = running[vectors * m : vectors * (m + 1)]
        for vector, total in zip(columns, own, strict=True):
            part = builder.fmul(scale, vector, flags=_FLAGS)
            new.append(builder.fadd(total, part, flags=_FLAGS))
    next_k = builder.add(k, _INDEX(1))
    next_a, next_b = builder.add(a_here, a_step), builder.add(b_here, b_step)
    for phi, first, later in zip(
        [k, a_here, b_here, *running],
        [_INDEX(0), a_start, b_start, *sums],
        [next_k, next_a, next_b, *new],
        strict=True,
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    builder.cbranch(builder.icmp_signed("<", next_k, inner), loop, after)

    builder.position_at_end(after)
    totals = [builder.phi(_VECTOR) for _ in sums]
    for phi, first, later in zip(totals, sums, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    for address, total in zip(places, totals, strict=True):
        pointer = builder.inttoptr(address, _VECTOR.as_pointer())
        builder.store(total, pointer, align=_ELEMENT_BYTES)
