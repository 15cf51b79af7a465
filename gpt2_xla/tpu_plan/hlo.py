"""A compiled TPU program's text, parsed: its computations, their instructions, and how often each runs."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
    "f64": 8, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
ON_CHIP = re.compile(r"S\([1-9]\)")  # a memory space of the layout; none, or S(0), is HBM
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(
    r"(calls|body|condition|to_apply|called_computations|true_computation|false_computation)=%([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
INDEX = re.compile(r"index=(\d+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Array:
    """One array of a type."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """Without padding to tiles."""
        return int(math.prod(self.shape) * BYTES[self.dtype])

    @property
    def hbm(self) -> int:
        """Bytes that moving it costs: none on the chip."""
        return 0 if self.on_chip else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result
    operands: tuple[str, ...]
    text: str  # what follows the operands, and they
    is_root: bool

    @cached_property
    def calls(self) -> dict[str, str]:
        """Computations by the attribute that names them; a conditional's branches by their numbers."""
        found: dict[str, str] = dict(CALLED.findall(self.text))
        if branches := BRANCHES.search(self.text):
            found |= {f"branch{i}": name.strip().lstrip("%") for i, name in enumerate(branches[1].split(","))}
        return found

    @property
    def source(self) -> str:
        """file.py:line of the Python that asked for it, where the trace kept it; else its operation's name."""
        place, name = SOURCE.search(self.text), NAME.search(self.text)
        words = [name[1].split("/")[-1]] if name else []
        if place:
            words.append(f"{'/'.join(place[1].split('/')[-2:])}:{place[2]}")
        return " ".join(words)


class Program:
    """A module."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line[:1] not in (" ", "}", "") and (header := HEADER.match(line)):
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif found := INSTRUCTION.match(line):
                instruction = _instruction(found[2], found[3], bool(found[1]))
                current[instruction.name] = instruction

    def trips(self, loop: Instruction) -> int:
        """How often a while loop runs: as the compiler says, or as its condition and its step show; 1 if nothing does."""
        if found := TRIPS.search(loop.text):
            return int(found[1])
        condition = {i.name: i for _, i in self._inside(loop.calls["condition"])}
        bounds = [value for i in condition.values() if (value := _count(i)) is not None]
        index = next((INDEX.search(i.text) for i in condition.values() if i.opcode == "get-tuple-element"), None)
        if not bounds or index is None:
            return 1
        return max(1, math.ceil(max(bounds) / self._step(loop.calls["body"], int(index[1]))))

    def _step(self, body: str, index: int) -> int:
        """What a loop adds to the count that its state holds at that place; 1 if that is not plain."""
        scope, step = self.computations[body], 0
        root = next(i for i in scope.values() if i.is_root)
        count = scope.get(root.operands[index]) if root.opcode == "tuple" else None
        while count is not None and count.opcode == "add":
            one, other = (scope[name] for name in count.operands)
            value = _count(other)
            step += value if value is not None else (_count(one) or 0)
            count = one if value is not None else other
        return step or 1

    def executed(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that runs as itself (not inside a fusion): its computation, it, and how often it runs."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations[name].values():
            calls = instruction.calls
            if instruction.opcode == "while":
                yield from self._executed(calls["body"], times * self.trips(instruction))
            elif instruction.opcode == "call":
                yield from self._executed(calls["to_apply"], times)
            elif instruction.opcode == "conditional":
                for branch in calls.values():
                    yield from self._executed(branch, times)
            else:
                yield name, instruction, times

    def everywhere(self) -> Iterator[tuple[str, Instruction, int]]:
        """The same with those inside fusions and asynchronous calls."""
        for computation, instruction, times in self.executed():
            yield computation, instruction, times
            if instruction.opcode in ("fusion", "async-start") and "calls" in instruction.calls:
                for inside, inner in self._inside(instruction.calls["calls"]):
                    yield inside, inner, times

    def _inside(self, name: str) -> Iterator[tuple[str, Instruction]]:
        for instruction in self.computations[name].values():
            yield name, instruction
            if instruction.opcode == "fusion":
                yield from self._inside(instruction.calls["calls"])


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Parse `TYPE opcode(operands), attributes`."""
    split = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, call = rest[:split], rest[split:].strip()
    opcode, _, arguments = call.partition("(")
    end = _closing("(" + arguments) - 1
    return Instruction(
        name, opcode, arrays_of(kind), tuple(re.findall(r"%([\w.\-]+)", arguments[:end])), arguments, is_root
    )


def _count(instruction: Instruction) -> int | None:
    """The value of a constant that is a whole number."""
    if instruction.opcode != "constant" or [str(array) for array in instruction.arrays] not in (["s32[]"], ["u32[]"]):
        return None
    return int(instruction.text.partition(")")[0])


def _closing(text: str) -> int:
    """The position after the bracket that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def arrays_of(kind: str) -> tuple[Array, ...]:
    """The arrays of a type's text."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(ON_CHIP.search(layout)))
        for dtype, dims, layout in ARRAY.findall(kind)
    )
