"""Count what our kernels load and store, by running them without their arithmetic.

A kernel's own text is run, program by program, for the step in question: page tables,
work lists, masks, branches and trip counts are evaluated for real, numbers of the model
are left out. Every load and store that is executed counts the lanes that its mask
leaves; nobody has to say what a kernel moves, and what it says would not count.

Lanes, not distinct addresses: what several programs read counts for each of them,
though a GPU's cache may serve all but one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import tree_util

_FLOAT = None
"""Value of everything that is not known here: the model's numbers."""

Reader = Callable[[list[Any], Any], Any]


@dataclasses.dataclass(slots=True)
class Traffic:
    """Bytes that loads and stores of one call of a kernel move."""

    loaded_bytes: int = 0
    stored_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Both together."""
        return self.loaded_bytes + self.stored_bytes


def count_step(
    step: Callable[..., Any],
    *args: Any,
) -> dict[str, Traffic]:
    """Return the traffic of each kernel that a traced function calls, by name.

    Args:
      step: a function that calls kernels; traced, not run.
      args: pytrees; numpy arrays of integers are known, what else describes arrays is
        not. Kernels of one name are called alike in every layer: one of them is run.
    """
    jaxpr = jax.make_jaxpr(step)(*args)
    found: dict[str, Traffic] = {}
    known = [_known(leaf) for leaf in jax.tree.leaves(args)]
    _run_outer(jaxpr.jaxpr, jaxpr.consts, known, found)
    return found


def _known(leaf: Any) -> Any:
    is_known = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iub"
    return leaf if is_known else _FLOAT


def _run_outer(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], found: dict[str, Traffic]
) -> list[Any]:
    """Evaluate what is known of a step; run each kernel when its call is reached."""
    env: dict[Any, Any] = {}
    env.update(zip(jaxpr.constvars, map(_known_const, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, jax.extend.core.Literal):
            return _known_const(atom.val)
        return env.get(atom, _FLOAT)

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if name == "pallas_call":
            if eqn.params["name"] not in found:
                found[eqn.params["name"]] = count_call(eqn, values)
            continue
        if name in ("jit", "pjit", "closed_call", "custom_jvp_call", "remat"):
            outs = _run_outer(
                getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values,
                found,
            )  # fmt: skip
        elif any(value is _FLOAT for value in values) or not _is_integer(eqn.outvars):
            continue
        else:
            outs = _bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def count_call(eqn: Any, operands: Sequence[Any]) -> Traffic:
    """Return the traffic of one `pallas_call`.

    Args:
      operands: known integers, None for what is not known.
    """
    grid = eqn.params["grid_mapping"].grid
    refs = [
        _Ref(value, atom.aval.dtype.itemsize)
        for value, atom in zip(operands, eqn.invars, strict=True)
    ]
    refs += [_Ref(_FLOAT, aval.dtype.itemsize) for aval in eqn.params["out_avals"]]
    kernel = _Program(eqn.params["jaxpr"])
    traffic = Traffic()
    for place in np.ndindex(*grid):
        kernel.run([], refs, _Machine(place, traffic))
    return traffic


@dataclasses.dataclass(frozen=True, slots=True)
class _Ref:
    """An array in device memory; `known` if its integers are."""

    known: np.ndarray | None
    item_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Machine:
    """One program of a grid."""

    place: tuple[int, ...]
    traffic: Traffic


class _Program:
    """A jaxpr of a kernel, ready to run many times.

    Equations whose results are not known, and that touch no memory, are left out.
    """

    def __init__(self, jaxpr: Any) -> None:
        places: dict[Any, int] = {}
        self._consts = [places.setdefault(v, len(places)) for v in jaxpr.constvars]
        self._args = [places.setdefault(v, len(places)) for v in jaxpr.invars]
        self._literals: list[tuple[int, Any]] = []
        self._code: list[tuple[Any, list[int], list[int]]] = []

        def place(atom: Any) -> int:
            if not isinstance(atom, jax.extend.core.Literal):
                return places.setdefault(atom, len(places))
            self._literals.append((len(places), _known_const(atom.val)))
            return places.setdefault(object(), len(places))

        for eqn in jaxpr.eqns:
            run = _instruction(eqn)
            if run is not None:
                ins = [place(atom) for atom in eqn.invars]
                self._code.append((run, ins, [place(v) for v in eqn.outvars]))
        self._outs = [place(atom) for atom in jaxpr.outvars]
        self._size = len(places)

    def run(
        self, consts: Sequence[Any], args: Sequence[Any], machine: _Machine
    ) -> list[Any]:
        """Run once; return what the outputs are."""
        env: list[Any] = [_FLOAT] * self._size
        for where, value in self._literals:
            env[where] = value
        for where, value in zip(self._consts, consts, strict=True):
            env[where] = value
        for where, value in zip(self._args, args, strict=True):
            env[where] = value
        for run, ins, outs in self._code:
            results = run([env[i] for i in ins], machine)
            for where, value in zip(outs, results, strict=True):
                env[where] = value
        return [env[i] for i in self._outs]


def _instruction(eqn: Any) -> Any:
    """Return what runs an equation: (values, machine) -> results; None to skip it."""
    name = eqn.primitive.name
    maker = _MAKERS.get(name)
    if maker is not None:
        return maker(eqn)
    if not _is_integer(eqn.outvars):
        return None
    compute = _COMPUTE.get(name)

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        if any(value is _FLOAT for value in values):
            return [_FLOAT] * len(eqn.outvars)
        if compute is None:
            return _bind(eqn, values)
        return [compute(eqn.params, *values)]

    return run


def _load(eqn: Any) -> Any:
    item = eqn.invars[0].aval.dtype.itemsize
    shape = eqn.outvars[0].aval.shape
    lanes = int(np.prod(shape))
    is_masked = eqn.primitive.name == "masked_load"
    tree = eqn.params["args_tree" if is_masked else "tree"]
    integer = _is_integer(eqn.outvars)

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        mask, ref = None, values[0]
        if is_masked:
            ref, transforms, mask, _ = tree_util.tree_unflatten(tree, values)
        moved = lanes if mask is None else _true_lanes(mask, shape)
        machine.traffic.loaded_bytes += moved * item
        if not integer or ref.known is None:
            return [_FLOAT]
        if not is_masked:
            transforms = tree_util.tree_unflatten(tree, values[1:])
        return [_read(ref.known, transforms, mask).reshape(shape)]

    return run


def _store(eqn: Any) -> Any:
    item = eqn.invars[0].aval.dtype.itemsize
    is_masked = eqn.primitive.name == "masked_swap"
    shape = eqn.outvars[0].aval.shape
    lanes = int(np.prod(shape))
    tree = eqn.params["args_tree"] if is_masked else None

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        mask = None
        if is_masked:
            _, _, _, mask = tree_util.tree_unflatten(tree, values)
        moved = lanes if mask is None else _true_lanes(mask, shape)
        machine.traffic.stored_bytes += moved * item
        return [_FLOAT]

    return run


def _true_lanes(mask: Any, shape: tuple[int, ...]) -> int:
    return int(np.broadcast_to(mask, shape).sum())


def _read(array: np.ndarray, transforms: Any, mask: Any) -> np.ndarray:
    """Return what an index of a ref selects; masked lanes read element 0."""
    if not transforms:
        return array
    (indexer,) = transforms
    indices = []
    for index in indexer.indices:
        if hasattr(index, "size") and hasattr(index, "start"):
            assert index.stride == 1, "nothing here strides"
            start = int(index.start)
            indices.append(slice(start, start + int(index.size)))
        elif mask is None:
            indices.append(np.asarray(index))
        else:
            indices.append(np.where(np.broadcast_to(mask, np.shape(index)), index, 0))
    return array[tuple(indices)]


def _cond(eqn: Any) -> Any:
    branches = [_closed(branch) for branch in eqn.params["branches"]]

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        assert values[0] is not _FLOAT, "a branch on the model's numbers"
        index = min(max(int(values[0]), 0), len(branches) - 1)
        program, consts = branches[index]
        return program.run(consts, values[1:], machine)

    return run


def _while(eqn: Any) -> Any:
    condition, condition_consts = _closed(eqn.params["cond_jaxpr"])
    body, body_consts = _closed(eqn.params["body_jaxpr"])
    first = eqn.params["cond_nconsts"]
    second = first + eqn.params["body_nconsts"]

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        carry = values[second:]
        while True:
            (goes_on,) = condition.run(
                condition_consts, [*values[:first], *carry], machine
            )
            assert goes_on is not _FLOAT, "a loop on the model's numbers"
            if not goes_on:
                return carry
            carry = body.run(body_consts, [*values[first:second], *carry], machine)

    return run


def _scan(eqn: Any) -> Any:
    body, consts = _closed(eqn.params["jaxpr"])
    num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    length = eqn.params["length"]
    assert num_consts + num_carry == len(eqn.invars), "a scan over arrays"

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        carry = values[num_consts:]
        for _ in range(length):
            carry = body.run(consts, [*values[:num_consts], *carry], machine)
        return carry

    return run


def _call(eqn: Any) -> Any:
    inner, consts = _closed(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        return inner.run(consts, values, machine)

    return run


def _program_id(eqn: Any) -> Any:
    axis = eqn.params["axis"]

    def run(values: list[Any], machine: _Machine) -> list[Any]:
        return [np.int32(machine.place[axis])]

    return run


def _closed(jaxpr: Any) -> tuple[_Program, list[Any]]:
    if hasattr(jaxpr, "jaxpr"):
        return _Program(jaxpr.jaxpr), [_known_const(one) for one in jaxpr.consts]
    return _Program(jaxpr), []


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "get": _load,
    "masked_load": _load,
    "swap": _store,
    "masked_swap": _store,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "program_id": _program_id,
}


def _divide(params: Any, left: Any, right: Any) -> Any:
    """Return a quotient cut towards zero, as lax has it."""
    return (np.sign(left) * np.sign(right)) * (np.abs(left) // np.abs(right))


def _broadcast(params: Any, value: Any, *dynamic: Any) -> Any:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], np.shape(value), strict=True):
        shape[axis] = size
    return np.broadcast_to(np.reshape(value, shape), params["shape"])


def _iota(params: Any) -> np.ndarray:
    shape, axis = params["shape"], params["dimension"]
    ones = [1] * len(shape)
    ones[axis] = shape[axis]
    line = np.arange(shape[axis], dtype=params["dtype"]).reshape(ones)
    return np.broadcast_to(line, shape)


_COMPUTE: dict[str, Callable[..., Any]] = {
    "add": lambda params, a, b: a + b,
    "sub": lambda params, a, b: a - b,
    "mul": lambda params, a, b: a * b,
    "div": _divide,
    "rem": lambda params, a, b: np.fmod(a, b),
    "sign": lambda params, a: np.sign(a),
    "neg": lambda params, a: -a,
    "max": lambda params, a, b: np.maximum(a, b),
    "min": lambda params, a, b: np.minimum(a, b),
    "eq": lambda params, a, b: a == b,
    "ne": lambda params, a, b: a != b,
    "lt": lambda params, a, b: a < b,
    "le": lambda params, a, b: a <= b,
    "gt": lambda params, a, b: a > b,
    "ge": lambda params, a, b: a >= b,
    "and": lambda params, a, b: a & b,
    "or": lambda params, a, b: a | b,
    "not": lambda params, a: ~a,
    "select_n": lambda params, which, *cases: np.choose(np.asarray(which, int), cases),
    "convert_element_type": lambda params, a: np.asarray(a).astype(params["new_dtype"]),
    "broadcast_in_dim": _broadcast,
    "broadcast_to": lambda params, a: np.broadcast_to(a, params["shape"]),
    "iota": _iota,
    "reshape": lambda params, a: np.reshape(a, params["new_sizes"]),
    "squeeze": lambda params, a: np.squeeze(a, params["dimensions"]),
    "transpose": lambda params, a: np.transpose(a, params["permutation"]),
    "multiple_of": lambda params, a: a,
}
"""Integer operations in numpy; any other is run by jax, slowly."""


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Run an equation in jax."""
    out = eqn.primitive.bind(*map(jax.numpy.asarray, values), **eqn.params)
    outs = out if eqn.primitive.multiple_results else [out]
    return [np.asarray(one) for one in outs]


def _known_const(value: Any) -> Any:
    array = np.asarray(value)
    return array if array.dtype.kind in "iub" else _FLOAT


def _is_integer(variables: Sequence[Any]) -> bool:
    return all(
        getattr(v.aval, "dtype", None) is not None and v.aval.dtype.kind in "iub"
        for v in variables
    )
