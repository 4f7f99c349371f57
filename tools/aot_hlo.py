"""Read XLA's own account of a program: optimised HLO text and its thunk sequence."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping

from aot_kernels import Launch

ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|body|condition)=%?([\w.\-]+)")
_SAME_VALUE = ("bitcast", "get-tuple-element", "reshape")
_IN_PLACE = ("scatter", "dynamic-update-slice")
_PARTIAL_READS = ("gather", "dynamic-slice", "slice")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One line of HLO.

    Attributes:
      shapes: (element type, elements) of the result, one for each part of a tuple.
      attributes: text behind the operands.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, int], ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the result."""
        return sum(ITEM_BYTES.get(kind, 0) * elems for kind, elems in self.shapes)

    @property
    def called(self) -> str | None:
        """Fused computation or body of a loop."""
        found = re.search(r"\b(?:calls|body)=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def scope(self) -> str:
        """Path of named scopes that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """Computations by name; instructions by name within each, in order."""

    computations: Mapping[str, Computation]
    entry: str

    def launched(self) -> Iterator[tuple[str, Instruction]]:
        """Yield (computation, instruction) outside of fusions: entry and loops."""
        waiting = [self.entry]
        seen = set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            for one in self.computations[name].values():
                yield name, one
                if one.opcode in ("while", "call", "conditional", "async-start"):
                    waiting += _CALLED.findall(one.attributes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Thunks:
    """What the host does for one call of a program.

    Attributes:
      commands: thunks inside of command buffers.
      kernels: launches in the text; a loop's body counts once.
      launches: threads and dynamic shared memory by kernel.
    """

    command_buffers: int
    commands: int
    kernels: int
    launches: Mapping[str, Launch]


def parse_module(text: str) -> Module:
    """Return the module that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            current = computations[head[2]] = {}
            if head[1]:
                entry = head[2]
        elif line.startswith("}"):
            current = None
        elif current is not None:
            one = _parse_instruction(line)
            if one is not None:
                current[one.name] = one
    return Module(computations=computations, entry=entry)


def read_thunks(text: str) -> Thunks:
    """Read a dumped thunk sequence; nesting is its indentation."""
    buffers = commands = kernels = 0
    launches = {}
    inside: int | None = None  # indentation of the command buffer being read
    for line in text.splitlines():
        found = re.match(r"( *)\d+: (k\w+)", line)
        if found is None:
            continue
        indent = len(found[1])
        if inside is not None and indent > inside:
            commands += 1
        else:
            inside = None
        if found[2] == "kCommandBuffer":
            buffers += 1
            inside = indent
        launch = re.search(
            r"\] (\S+) grid: \[[^\]]*\] threads: \[([^\]]*)\]\s+shared_memory: (\d+)",
            line,
        )
        if launch is not None:
            kernels += 1
            launches[launch[1]] = Launch(
                threads=math.prod(int(n) for n in launch[2].split(",")),
                dynamic_shared_bytes=int(launch[3]),
            )
    return Thunks(
        command_buffers=buffers, commands=commands, kernels=kernels, launches=launches
    )


def weight_copies(module: Module, elems: Collection[int]) -> list[str]:
    """Return instructions that write a whole parameter anew: copied, cast or sliced.

    Args:
      elems: sizes of the weights; other parameters are not looked at.
    """
    return [
        one.name
        for place, one, sources in _rewrites(module, elems)
        if any(_is_parameter(module.computations[place], name) for name in sources)
    ]


def pool_copies(module: Module, elems: Collection[int]) -> list[str]:
    """Return instructions that write a whole pool anew; in place does not count."""
    return [one.name for _, one, _ in _rewrites(module, elems)]


def count_rematerialised(module: Module) -> int:
    """Return the instructions that compute a value a second time to save memory."""
    return sum("remat" in one.name for _, one in module.launched())


def own_kernels(module: Module) -> set[str]:
    """Return the names of hand-written kernels that the module calls."""
    return {
        kernel_name(one)
        for _, one in module.launched()
        if one.opcode == "custom-call" and one.scope.endswith("/pallas_call")
    }


def kernel_name(one: Instruction) -> str:
    """Return the name of the hand-written kernel that an instruction calls."""
    return one.scope.split("/")[-2]


def moved_bytes(
    module: Module,
    trips: Callable[[Instruction], int],
    kernel_bytes: Callable[[Instruction], int],
) -> int:
    """Return the bytes that launched instructions read and write, caches ignored.

    A fusion reads its operands once, and of one that it only gathers or slices from
    what the gather yields; it writes its result, or in place what it updates.

    Args:
      trips: of a loop, for the step in question.
      kernel_bytes: bytes of one call of a hand-written kernel.
    """

    def of_computation(name: str) -> int:
        total = 0
        for one in module.computations[name].values():
            if one.opcode == "while":
                assert one.called is not None
                total += of_computation(one.called) * trips(one)
            elif one.opcode == "custom-call" and one.scope.endswith("/pallas_call"):
                total += kernel_bytes(one)
            else:
                total += _instruction_bytes(module, name, one)
        return total

    return of_computation(module.entry)


def _instruction_bytes(module: Module, place: str, one: Instruction) -> int:
    known = module.computations[place]
    operands = [known[name] for name in one.operands if name in known]
    if one.opcode in ("copy", "custom-call", "dot", "transpose", "convert", "reduce"):
        return one.num_bytes + sum(operand.num_bytes for operand in operands)
    if one.opcode != "fusion" or one.called is None:
        return 0
    body = module.computations[one.called]
    updates = [inner for inner in body.values() if inner.opcode in _IN_PLACE]
    parameters = sorted(
        (inner for inner in body.values() if inner.opcode == "parameter"),
        key=lambda inner: int(inner.attributes),
    )
    read = sum(
        _read_bytes(body, parameter, operand)
        for parameter, operand in zip(parameters, operands, strict=True)
    )
    # The last operand of a scatter, the second of an update, are the new values.
    written = sum(
        body[update.operands[-1 if update.opcode == "scatter" else 1]].num_bytes
        for update in updates
    )
    return read + (written if updates else one.num_bytes)


def _read_bytes(body: Computation, parameter: Instruction, operand: Instruction) -> int:
    """Return the bytes that a fusion reads of one operand."""
    names = {parameter.name}
    partial = 0
    for inner in body.values():  # in order: a use comes after what it uses
        used = names.intersection(inner.operands)
        if not used:
            continue
        if inner.opcode in _SAME_VALUE:
            names.add(inner.name)
        elif inner.operands[0] in names and inner.opcode in _PARTIAL_READS:
            partial += inner.num_bytes
        elif inner.operands[0] in names and inner.opcode in _IN_PLACE:
            pass  # only what is updated is touched, and that counts as written
        else:
            return operand.num_bytes
    return min(partial, operand.num_bytes)


def _rewrites(
    module: Module, elems: Collection[int]
) -> Iterator[tuple[str, Instruction, list[str]]]:
    """Yield instructions that yield one of these sizes, and the operands it comes from.

    Such an operand has the size itself, for a copy, a cast or a transposition, or is a
    stack that a slice of this size is taken from. Updates in place do not count.
    """
    for place, one in module.launched():
        if one.opcode not in ("copy", "copy-start", "fusion", "transpose", "convert"):
            continue
        sizes = {count for _, count in one.shapes}.intersection(elems)
        body = module.computations.get(one.called or "", {})
        if not sizes or any(inner.opcode in _IN_PLACE for inner in body.values()):
            continue
        known = module.computations[place]
        operands = [name for name in one.operands if name in known]
        sliced = any(
            inner.opcode == "dynamic-slice" and inner.shapes[0][1] in sizes
            for inner in body.values()
        )
        sources = [
            name
            for name in operands
            if any(count in sizes for _, count in known[name].shapes)
            or sliced
            and any(count > max(sizes) for _, count in known[name].shapes)
        ]
        if sources:
            yield place, one, sources


def _is_parameter(computation: Computation, name: str) -> bool:
    one = computation.get(name)
    while one is not None and one.opcode in _SAME_VALUE:
        one = computation.get(one.operands[0])
    return one is not None and one.opcode == "parameter"


def _parse_instruction(line: str) -> Instruction | None:
    left, separator, right = line.strip().partition(" = ")
    if not separator:
        return None
    shape, rest = _split_shape(right)
    opcode, _, rest = rest.partition("(")
    operands, attributes = _split_closed("(" + rest)
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode.strip(),
        shapes=tuple(
            (kind, math.prod(int(n) for n in dims.split(",") if n))
            for kind, dims in _SHAPE.findall(shape)
        ),
        operands=tuple(_NAME.findall(operands)),
        # A parameter's number stands where others have operands.
        attributes=operands[1:-1] if opcode == "parameter" else attributes,
        is_root=left.startswith("ROOT "),
    )


def _split_shape(text: str) -> tuple[str, str]:
    if text.startswith("("):
        return _split_closed(text)
    shape, _, rest = text.partition(" ")
    return shape, rest


def _split_closed(text: str) -> tuple[str, str]:
    """Split behind the parenthesis that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""
