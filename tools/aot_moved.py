"""Count what our kernels move: every executed load and store of a traced step.

A step is traced at its real shapes, and each of its kernels is run on the step's real
work lists as `aot_evaluate` runs it: addresses, masks, turns and branches for real, no
floats. Nobody's word is taken for what a kernel reads.
"""

import dataclasses
import functools
import math
from typing import Any

import aot_hlo
import jax
import numpy as np
from aot_evaluate import UNKNOWN, Evaluator, Value, lift_all, spread
from aot_floor import Traffic, batch_pages, traffic_batch
from aot_programs import Program, Shapes

from jchameleon.pallas.paged_attention import CONTEXT_TOKENS_PER_STEP
from jchameleon.runtime.programs import StepBatch, model_step

PROGRAMS_AT_ONCE = 256
"""Programs of a grid that are evaluated side by side; more take more memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """Bytes that one launch of a kernel moves.

    Attributes:
      executed_bytes: elements of all loads and stores, masked ones left out.
      distinct_bytes: elements that are loaded at least once, and elements that are
        stored at least once: what is left where a cache holds all that a launch reads
        again.
    """

    name: str
    executed_bytes: int
    distinct_bytes: int


class DeviceArray:
    """An array in device memory, and which of its elements a launch has touched.

    Args:
      values: the array if its values are known, i[*shape].
    """

    def __init__(self, name: str, size: int, item_bytes: int, values: Value) -> None:
        self._name = name
        self._item_bytes = item_bytes
        self._values = None if values is UNKNOWN else np.ravel(values)
        self._loaded = np.zeros(size, bool)
        self._stored = np.zeros(size, bool)
        self.executed_bytes = 0

    @property
    def distinct_bytes(self) -> int:
        """Bytes of elements that were loaded, and of those that were stored."""
        touched = np.count_nonzero(self._loaded) + np.count_nonzero(self._stored)
        return int(touched) * self._item_bytes

    def load(
        self, offsets: np.ndarray, lanes: np.ndarray, shape: tuple[int, ...]
    ) -> Value:
        """Count a load; return its values, those of masked elements anything."""
        self._touch(self._loaded, offsets, lanes, shape)
        if self._values is None:
            return UNKNOWN
        return spread(self._values[np.where(lanes, offsets, 0)], shape)

    def store(
        self, offsets: np.ndarray, lanes: np.ndarray, shape: tuple[int, ...]
    ) -> None:
        """Count a store; what is stored is not kept."""
        self._touch(self._stored, offsets, lanes, shape)
        self._values = None

    def _touch(
        self,
        seen: np.ndarray,
        offsets: np.ndarray,
        lanes: np.ndarray,
        shape: tuple[int, ...],
    ) -> None:
        # Lanes always have the programs' axis: all run the same access.
        repeats = math.prod(
            full // part for full, part in zip(shape, lanes.shape[1:], strict=True)
        )
        self.executed_bytes += int(np.count_nonzero(lanes)) * repeats * self._item_bytes
        offsets, lanes = np.broadcast_arrays(offsets, lanes)
        touched = offsets[lanes]
        if touched.size and not 0 <= touched.min() <= touched.max() < len(seen):
            raise IndexError(
                f"{self._name}: elements {touched.min()}..{touched.max()} of an array "
                f"of {len(seen)}"
            )
        seen[touched] = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What all launches of one kind move in a program.

    Attributes:
      kind: our kernel's name, or what XLA calls its own launches.
    """

    kind: str
    launches: int
    executed_bytes: int
    distinct_bytes: int


def program_parts(shapes: Shapes, program: Program, traffic: Traffic) -> list[Part]:
    """Return what a program moves, the largest part first.

    Of launches that XLA generates both figures are the same: their operands and
    results (`aot_hlo.moved_bytes`).
    """
    kind, _, size = program.name.rstrip("]").partition("[")
    trips: dict[str, int] = {}
    own: dict[str, Moved] = {}
    if kind != "commit":
        batch = traffic_batch(shapes, int(size), traffic, prefill=kind == "prefill")
        context = int(batch.context_tokens.max())
        trips["paged_attention"] = -(-context // CONTEXT_TOKENS_PER_STEP)
        trips["multi_lora"] = int(getattr(batch.lora, "count", 1))
        if aot_hlo.own_kernels(program.module):
            own = step_moved(shapes, batch)

    def of_loop(one: aot_hlo.Instruction) -> int:
        return next((n for scope, n in trips.items() if scope in one.scope), 1)

    def of_kernel(one: aot_hlo.Instruction) -> int:
        return own[one.kernel_name].executed_bytes

    parts: dict[str, Part] = {}
    for one, runs, moved in aot_hlo.moved_bytes(program.module, of_loop, of_kernel):
        mine = own.get(one.kernel_name)
        name = one.kernel_name if mine else f"{one.opcode} {one.scope.split('/')[-1]}"
        before = parts.get(name)
        parts[name] = Part(
            kind=name,
            launches=runs + (before.launches if before else 0),
            executed_bytes=moved + (before.executed_bytes if before else 0),
            distinct_bytes=(runs * mine.distinct_bytes if mine else moved)
            + (before.distinct_bytes if before else 0),
        )
    return sorted(parts.values(), key=lambda part: -part.executed_bytes)


def step_moved(shapes: Shapes, batch: StepBatch) -> dict[str, Moved]:
    """Return by name what each launch of a kernel moves in a step.

    Raises:
      ValueError: launches of one kernel differ.
    """
    # Kernels do not ask how large the pool is; a small one is faster to keep track of.
    pages = batch_pages(batch)
    pools = [
        jax.ShapeDtypeStruct((pages, pool.shape[1]), pool.dtype)
        for pool in shapes.pools
    ]
    step = functools.partial(
        model_step,
        treedef=shapes.params.treedef,
        layout=shapes.layout,
        block_tokens=shapes.config.kv_block_tokens,
        ops=shapes.ops,
    )
    traced = jax.make_jaxpr(step)(shapes.params.leaves, pools, batch)
    known = [np.asarray(leaf)[None] for leaf in jax.tree.leaves(batch)]
    unknown = [UNKNOWN] * (len(traced.jaxpr.invars) - len(known))
    found: dict[str, Moved] = {}
    for launch in count_moved(traced, [*unknown, *known]):
        if found.setdefault(launch.name, launch) != launch:
            raise ValueError(f"launches of {launch.name} move different bytes")
    return found


def count_moved(traced: Any, args: list[Value]) -> list[Moved]:
    """Return what each kernel launch of a closed jaxpr moves.

    A launch that is like an earlier one (the same kernel on the same integers, as in
    the next layer) is not evaluated again.

    Args:
      args: as `aot_evaluate.Value`s.
    """
    found: list[Moved] = []
    known: dict[Any, Moved] = {}

    def call(eqn: Any, values: list[Value]) -> None:
        key = (
            id(eqn.params["jaxpr"]),
            tuple(None if v is UNKNOWN else v.tobytes() for v in values),
        )
        if key not in known:
            known[key] = launch_moved(eqn, values)
        found.append(known[key])

    Evaluator(call_kernel=call).run(traced.jaxpr, lift_all(traced.consts), args)
    return found


def launch_moved(eqn: Any, values: list[Value]) -> Moved:
    """Return what a `pallas_call` moves, given what is known of its operands."""
    params = eqn.params
    jaxpr, grid, name = params["jaxpr"], params["grid_mapping"].grid, params["name"]
    shared = {output: place for place, output in params["input_output_aliases"]}
    refs: list[DeviceArray] = []
    for place, ref in enumerate(jaxpr.invars):
        output = place - len(values)
        if output >= 0 and output in shared:
            refs.append(refs[shared[output]])  # one memory
            continue
        aval = ref.aval
        value = UNKNOWN if output >= 0 else values[place]
        refs.append(
            DeviceArray(
                f"{name}, operand {place}",
                math.prod(aval.shape),
                aval.dtype.itemsize,
                value,
            )
        )
    count = math.prod(grid)
    for first in range(0, count, PROGRAMS_AT_ONCE):
        programs = np.arange(first, min(first + PROGRAMS_AT_ONCE, count))
        ids = [axis.astype(np.int32) for axis in np.unravel_index(programs, grid)]
        Evaluator(ids).run(jaxpr, (), refs)
    memories = {id(ref): ref for ref in refs}.values()
    return Moved(
        name=name,
        executed_bytes=sum(ref.executed_bytes for ref in memories),
        distinct_bytes=sum(ref.distinct_bytes for ref in memories),
    )
