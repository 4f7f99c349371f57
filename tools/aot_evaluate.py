"""Run a traced function's integers, and nothing else.

What a kernel reads and writes is decided by integers and truth values: page tables,
work lists, masks, counts of turns. They are computed here for real, by numpy, while
every float is `UNKNOWN`. All programs of a grid run side by side: each array has a
leading axis of programs, of length 1 where all agree, and each branch or turn of a loop
is run by those programs alone that take it.

An address, a mask or a count that hangs on something unknown raises: no guesses.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

Value = Any
"""A numpy array [programs or 1, *shape], a memory, or `UNKNOWN`."""


class Unknown:
    """The only thing that is known of a float."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = Unknown()


class Memory(Protocol):
    """An array that programs read from and write to."""

    def load(
        self, offsets: np.ndarray, lanes: np.ndarray, shape: tuple[int, ...]
    ) -> Value:
        """Return what lies at `offsets`; arrays broadcast to `shape`."""

    def store(
        self, offsets: np.ndarray, lanes: np.ndarray, shape: tuple[int, ...]
    ) -> None:
        """Take note of a store."""


class Evaluator:
    """Evaluates jaxprs for some programs of a grid.

    Args:
      program_ids: i[programs] for each axis of the grid; none outside of a kernel.
      call_kernel: given an equation of a `pallas_call` and its operands.
    """

    def __init__(
        self,
        program_ids: Sequence[np.ndarray] = (),
        call_kernel: Callable[[Any, list[Value]], None] | None = None,
    ) -> None:
        self._ids = program_ids
        self._programs = len(program_ids[0]) if program_ids else 1
        self._call_kernel = call_kernel

    def run(
        self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]
    ) -> list[Value]:
        """Return the results of a jaxpr for all programs."""
        return self._run(jaxpr, consts, args, np.ones(self._programs, bool))

    def _run(
        self,
        jaxpr: Any,
        consts: Sequence[Value],
        args: Sequence[Value],
        live: np.ndarray,  # bool[programs]
    ) -> list[Value]:
        known: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= zip(jaxpr.invars, args, strict=True)

        def read(atom: Any) -> Value:
            return lift(atom.val) if hasattr(atom, "val") else known[atom]

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            known |= zip(eqn.outvars, self._apply(eqn, values, live), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, values: list[Value], live: np.ndarray) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name == "jit":
            inner = params["jaxpr"]
            return self._run(inner.jaxpr, lift_all(inner.consts), values, live)
        if name == "cond":
            return self._cond(params["branches"], values, live)
        if name == "while":
            return self._while(params, values, live)
        if name == "scan":
            return self._scan(params, values, live)
        if name == "pallas_call":
            assert self._call_kernel is not None
            self._call_kernel(eqn, values)
            return [UNKNOWN] * len(eqn.outvars)
        if name == "program_id":
            return [self._ids[params["axis"]]]
        if name in ("get", "masked_load"):
            return [self._load(eqn, values, live)]
        if name in ("swap", "masked_swap"):
            self._store(eqn, values, live)
            return [UNKNOWN]
        rule = ELEMENTWISE.get(name)
        shape = getattr(eqn.outvars[0].aval, "shape", ())
        if any(value is UNKNOWN for value in values):
            rule = None
        elif rule is not None:
            return [elementwise(rule, values, shape, eqn.outvars[0].aval.dtype)]
        elif name in STRUCTURAL:
            return [STRUCTURAL[name](values, shape, params)]
        return [UNKNOWN] * len(eqn.outvars)

    def _cond(
        self, branches: Sequence[Any], values: list[Value], live: np.ndarray
    ) -> list[Value]:
        index, *operands = values
        index = demand(index, "a branch")
        merged: list[Value] | None = None
        for number, branch in enumerate(branches):
            taken = live & (np.clip(index, 0, len(branches) - 1) == number)
            if not taken.any():
                continue
            out = self._run(branch.jaxpr, lift_all(branch.consts), operands, taken)
            merged = out if merged is None else _merge(taken, out, merged)
        return merged or []

    def _while(self, params: Any, values: list[Value], live: np.ndarray) -> list[Value]:
        split = params["cond_nconsts"], params["body_nconsts"]
        of_cond, rest = values[: split[0]], values[split[0] :]
        of_body, carry = rest[: split[1]], rest[split[1] :]
        condition, body = params["cond_jaxpr"], params["body_jaxpr"]
        while True:
            (goes_on,) = self._run(
                condition.jaxpr, lift_all(condition.consts), [*of_cond, *carry], live
            )
            live = live & demand(goes_on, "a loop")
            if not live.any():
                return carry
            out = self._run(body.jaxpr, lift_all(body.consts), [*of_body, *carry], live)
            carry = _merge(live, out, carry)

    def _scan(self, params: Any, values: list[Value], live: np.ndarray) -> list[Value]:
        consts, carries = params["num_consts"], params["num_carry"]
        if len(values) != consts + carries:
            raise NotImplementedError("a scan over arrays")
        of_body, carry = values[:consts], values[consts:]
        body = params["jaxpr"]
        for _ in range(params["length"]):
            carry = self._run(
                body.jaxpr, lift_all(body.consts), [*of_body, *carry], live
            )
        return carry

    def _load(self, eqn: Any, values: list[Value], live: np.ndarray) -> Value:
        if "tree" in eqn.params:
            memory, mask, other = values[0], None, None
            transforms = jax.tree.unflatten(eqn.params["tree"], values[1:])
        else:
            memory, transforms, mask, other = jax.tree.unflatten(
                eqn.params["args_tree"], values
            )
        shape = eqn.outvars[0].aval.shape
        offsets = _offsets(transforms, shape)
        lanes = _lanes(mask, live, shape)
        value = memory.load(offsets, lanes, shape)
        if value is UNKNOWN or mask is None or other is None:
            return value
        return elementwise(_select, [mask, other, value], shape, value.dtype)

    def _store(self, eqn: Any, values: list[Value], live: np.ndarray) -> None:
        if "tree" in eqn.params:
            memory, mask = values[0], None
            transforms = jax.tree.unflatten(eqn.params["tree"], values[2:])
        else:
            memory, transforms, _, mask = jax.tree.unflatten(
                eqn.params["args_tree"], values
            )
        shape = eqn.outvars[0].aval.shape  # a swap: the old values, unused
        memory.store(_offsets(transforms, shape), _lanes(mask, live, shape), shape)


def lift(value: Any) -> Value:
    """Return a constant as all programs have it."""
    array = np.asarray(value)
    return array[None] if array.dtype.kind in "iub" else UNKNOWN


def lift_all(values: Sequence[Any]) -> list[Value]:
    """Return constants as all programs have them."""
    return [lift(value) for value in values]


def demand(value: Value, what: str) -> np.ndarray:
    """Return a value that must be known.

    Raises:
      ValueError: it is not.
    """
    if value is UNKNOWN:
        raise ValueError(f"{what} depends on a value that is not computed here")
    return value


def thin(array: np.ndarray) -> np.ndarray:
    """Return an array without a broadcast's repeats: axes of stride 0 get size 1."""
    return array[tuple(slice(1) if s == 0 else slice(None) for s in array.strides)]


def align(value: np.ndarray, rank: int) -> np.ndarray:
    """Return a value thin, with `rank` axes behind the programs' one."""
    if value.ndim == 1:
        value = value.reshape(value.shape + (1,) * rank)
    assert value.ndim == rank + 1, (value.shape, rank)
    return thin(value)


def spread(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a view of a thin value with all of `shape` behind the programs' axis."""
    return np.broadcast_to(value, (value.shape[0], *shape))


def elementwise(
    rule: Callable[..., np.ndarray],
    values: Sequence[np.ndarray],
    shape: tuple[int, ...],
    dtype: Any,
) -> Value:
    """Return `rule` of the values, computed once for what a broadcast repeats."""
    if dtype.kind not in "iub":
        return UNKNOWN
    out = rule(*(align(value, len(shape)) for value in values))
    return spread(out.astype(dtype, copy=False), shape)


def _merge(
    taken: np.ndarray, new: Sequence[Value], old: Sequence[Value]
) -> list[Value]:
    """Return `new` where `taken`, else `old`."""
    return [
        UNKNOWN
        if after is UNKNOWN or before is UNKNOWN
        else elementwise(
            np.where, [taken, after, before], np.shape(after)[1:], after.dtype
        )
        for after, before in zip(new, old, strict=True)
    ]


def _offsets(transforms: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the thin offsets, in elements, of an indexed access.

    Index arrays come first in the result, slices of the array behind them (Pallas'
    Triton lowering, `_compute_offsets_from_indices`).
    """
    if not transforms:  # all of the array
        return np.arange(math.prod(shape)).reshape(1, *shape)
    (indexer,) = transforms
    ints = len(indexer.int_indexer_shape)
    sizes = indexer.shape
    total = np.zeros((1,) * (len(shape) + 1), np.int64)
    axis = ints
    for dim, index in enumerate(indexer.indices):
        if hasattr(index, "stride"):
            start = index.start
            start = np.asarray([start]) if isinstance(start, int) else start
            start = align(demand(start, "an address"), len(shape))
            places = np.arange(index.size) * index.stride
            places = places.reshape((-1,) + (1,) * (len(shape) - axis - 1))
            part = start + places
            axis += 1
        else:
            index = np.asarray([index]) if isinstance(index, int) else index
            part = demand(index, "an address")
            if part.ndim > 1:
                part = part.reshape(part.shape + (1,) * (len(shape) - ints))
            part = align(part, len(shape))
        total = total + part.astype(np.int64) * math.prod(sizes[dim + 1 :])
    return total


def _lanes(mask: Value | None, live: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return thin bool[programs, *shape], the elements that an access touches."""
    lanes = align(live, len(shape))
    if mask is None:
        return lanes
    return lanes & align(demand(mask, "a mask"), len(shape))


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.choose(which.astype(np.intp), np.broadcast_arrays(*cases))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Round towards zero, as XLA does; programs that are elsewhere may have zeros."""
    b = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _invert(a: np.ndarray) -> np.ndarray:
    return ~a


ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "add": operator.add,
    "and": operator.and_,
    "convert_element_type": np.asarray,
    "div": _divide,
    "eq": operator.eq,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "max": np.maximum,
    "min": np.minimum,
    "mul": operator.mul,
    "multiple_of": np.asarray,
    "ne": operator.ne,
    "neg": operator.neg,
    "not": _invert,
    "or": operator.or_,
    "rem": _remainder,
    "select_n": _select,
    "sign": np.sign,
    "sub": operator.sub,
}


def _iota(_: list[np.ndarray], shape: tuple[int, ...], params: Any) -> np.ndarray:
    dim = params["dimension"]
    line = np.arange(shape[dim], dtype=params["dtype"])
    return spread(line.reshape(1, -1, *(1,) * (len(shape) - dim - 1)), shape)


def _broadcast_in_dim(
    values: list[np.ndarray], shape: tuple[int, ...], params: Any
) -> np.ndarray:
    (value,) = values
    sizes = [1] * len(shape)
    for axis, size in zip(params["broadcast_dimensions"], value.shape[1:], strict=True):
        sizes[axis] = size
    return spread(value.reshape(value.shape[0], *sizes), shape)


def _broadcast_to(
    values: list[np.ndarray], shape: tuple[int, ...], _: Any
) -> np.ndarray:
    (value,) = values
    missing = len(shape) + 1 - value.ndim
    return spread(
        value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:]), shape
    )


def _reshape(values: list[np.ndarray], shape: tuple[int, ...], _: Any) -> np.ndarray:
    return values[0].reshape(values[0].shape[0], *shape)


def _transpose(values: list[np.ndarray], _: tuple[int, ...], params: Any) -> np.ndarray:
    return values[0].transpose(0, *(axis + 1 for axis in params["permutation"]))


def _concatenate(
    values: list[np.ndarray], _: tuple[int, ...], params: Any
) -> np.ndarray:
    programs = max(value.shape[0] for value in values)
    parts = [np.broadcast_to(v, (programs, *v.shape[1:])) for v in values]
    return np.concatenate(parts, axis=params["dimension"] + 1)


STRUCTURAL: dict[str, Callable[[list[np.ndarray], tuple[int, ...], Any], Any]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "broadcast_to": _broadcast_to,
    "concatenate": _concatenate,
    "iota": _iota,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
}
