"""What a compiled program moves: bytes between HBM and the chip, bytes between chips, and its matrix multiplications.

XLA's own "bytes accessed" counts every operand in full, on the chip or not, and twice too much on v5e. Here an array in
the chip's own memory is free, a prefetch moves its slice once, and a fusion that reads or writes only a slice of a buffer
moves that slice. Loops count as often as they run.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from gpt2_xla.tpu_plan.hlo import Array, Instruction, Program

# They name data, or wait for it; what moved it is counted where it started.
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "copy-done", "slice-done", "async-done",
    "async-update", "partition-id", "replica-id", "iota", "all-reduce-done", "all-gather-done", "collective-permute-done",
    "opt-barrier", "add-dependency",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
PASSES = {
    "bitcast",
    "reshape",
    "copy",
    "convert",
    "transpose",
}  # in front of a fusion's slice they move nothing themselves


@dataclass(frozen=True)
class Mover:
    """Instructions of one kind from one place."""

    what: str
    source: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """What one device's program moves in one run of it."""

    hbm: int  # bytes
    movers: list[Mover]  # the most first
    collectives: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # kind → how many, bytes of their larger sides
    dot_flops: float = 0.0  # of matrix multiplications; kernels are not in it
    bf16_dots: int = 0
    other_dots: int = 0
    kernels: list[tuple[str, tuple[Array, ...], int]] = field(
        default_factory=list
    )  # custom calls: source, operands, times
    host_transfers: int = 0


def count_traffic(program: Program) -> Traffic:
    """Walk the scheduled program."""
    moved: Counter[tuple[str, str]] = Counter()
    times_of: Counter[tuple[str, str]] = Counter()
    kernels = []
    for computation, instruction, times in program.executed():
        scope = program.computations[computation]
        amount = _moved(program, scope, instruction) * times
        if amount:
            key = (_label(instruction), instruction.source)
            moved[key] += amount
            times_of[key] += times
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.text:
            operands = tuple(array for name in instruction.operands for array in scope[name].arrays)
            kernels.append((instruction.source, operands, times))
    movers = [Mover(*key, times_of[key], amount) for key, amount in moved.most_common()]
    collectives, flops, bf16, other, host = _compute(program)
    return Traffic(sum(moved.values()), movers, collectives, flops, bf16, other, kernels, host)


def _label(instruction: Instruction) -> str:
    arrays = " ".join(map(str, instruction.arrays[:2]))
    return f"{instruction.opcode} {arrays}"


def _moved(program: Program, scope: dict[str, Instruction], instruction: Instruction) -> int:
    """Bytes to and from HBM of one run of an instruction."""
    if instruction.opcode in FREE:
        return 0
    operands = [scope[name] for name in instruction.operands if name in scope]
    if instruction.opcode in ("slice-start", "copy-start", "async-start"):
        return _prefetched(instruction, operands)
    if instruction.opcode == "fusion":
        return _fused(program.computations[instruction.calls["calls"]], instruction, operands)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].arrays[0].hbm
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return sum(array.hbm for array in instruction.arrays) + (
            0 if operands[0].arrays[0].on_chip else sum(array.bytes for array in instruction.arrays)
        )
    read = sum(array.hbm for operand in operands for array in operand.arrays)
    return read + sum(array.hbm for array in instruction.arrays)


def _prefetched(instruction: Instruction, operands: list[Instruction]) -> int:
    """An asynchronous copy moves the smaller of its two sides: once if one is on the chip, twice within HBM."""
    source = operands[0].arrays if operands else ()
    target = instruction.arrays
    if not source or not target:
        return 0
    size = min(array.bytes for array in (*source, *target) if array.shape or len(target) == 1)
    in_hbm = sum(not any(array.on_chip for array in side) for side in (source, target))
    return size * max(1, in_hbm)


def _fused(inner: dict[str, Instruction], fusion: Instruction, operands: list[Instruction]) -> int:
    """A fusion reads each operand once, or the slices it takes of it, and writes its results, or the slices it changes."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in inner.values():
        for name in instruction.operands:
            users[name].append(instruction)
    parameters = {
        int(re.match(r"(\d+)", instruction.text)[1]): instruction  # type: ignore[index]
        for instruction in inner.values()
        if instruction.opcode == "parameter"
    }
    total = 0
    for i, operand in enumerate(operands):
        whole = sum(array.hbm for array in operand.arrays)
        if whole and i in parameters:
            total += min(whole, _used(parameters[i].name, users, whole))
    written = [_written(inner, array, root) for array, root in zip(fusion.arrays, _roots(inner), strict=False)]
    return total + sum(written)


def _used(name: str, users: dict[str, list[Instruction]], whole: int) -> int:
    """Bytes of a parameter that a fusion reads."""
    total = 0
    for user in users[name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            continue  # changed in place
        elif user.opcode in PASSES and len(users[name]) == 1:
            total += _used(user.name, users, whole)
        else:
            return whole
    return total


def _roots(inner: dict[str, Instruction]) -> list[Instruction]:
    root = next(instruction for instruction in inner.values() if instruction.is_root)
    return [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(inner: dict[str, Instruction], array: Array, root: Instruction) -> int:
    """Bytes of a result that a fusion writes."""
    while root.opcode in ("bitcast", "copy") and root.operands:
        root = inner[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return 0 if array.on_chip else inner[root.operands[1]].arrays[0].bytes
    return array.hbm


def _compute(program: Program) -> tuple[dict[str, tuple[int, int]], float, int, int, int]:
    """Collectives, matrix multiplications and transfers to the host, also those inside fusions."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    flops, bf16, other, host = 0.0, 0, 0, 0
    arrays = {name: i.arrays for instructions in program.computations.values() for name, i in instructions.items()}
    for computation, instruction, times in program.everywhere():
        kind = _collective(computation, instruction)
        if kind in COLLECTIVES:
            counts[kind] += times
            sizes[kind] += times * _whole_bytes(kind, instruction, arrays)
        elif kind in ("convolution", "dot"):
            sides = [arrays[name][0] for name in instruction.operands[:2] if arrays.get(name)]
            flops += times * _dot_flops(instruction, sides)
            if len(sides) == 2 and all(side.dtype == "bf16" for side in sides):
                bf16 += 1
            else:
                other += 1
        elif kind in ("send", "recv", "infeed", "outfeed"):
            host += times
    return {kind: (counts[kind], sizes[kind]) for kind in counts}, flops, bf16, other, host


def _collective(computation: str, instruction: Instruction) -> str:
    """What an instruction does; from v4 on the compiler writes a reduce-scatter as a fusion of an all-reduce and a slice."""
    kind = instruction.opcode.removesuffix("-start")
    return "reduce-scatter" if kind == "all-reduce" and computation.startswith("all-reduce-scatter") else kind


def _whole_bytes(kind: str, instruction: Instruction, arrays: dict[str, tuple[Array, ...]]) -> int:
    """Bytes of the larger side: what an all-gather makes, a reduce-scatter takes. Operands stand in a -start's result too."""
    taken = sum(array.bytes for name in instruction.operands for array in arrays.get(name, ()))
    made = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        made -= taken
    return max(taken, made)


def _dot_flops(instruction: Instruction, sides: list[Array]) -> float:
    """2 x results x summed length. The TPU writes batched products as convolutions whose window meets one element each."""
    result = math.prod(instruction.arrays[0].shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if len(sides) < 2:
        return 0.0
    if labels:
        kernel = sides[1].shape
        summed = kernel[labels[2].index("i")]
        window = re.search(r"window=\{([^}]*)\}", instruction.text)
        return 2.0 * result * summed * (_window(window[1]) if window else 1)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    return (
        2.0 * result * math.prod(sides[0].shape[int(d)] for d in contracted[1].split(",") if d) if contracted else 0.0
    )


def _window(text: str) -> int:
    """Elements of a window that meet data: its size where it is neither padded nor dilated; else one, a batch dimension."""
    fields = dict(part.split("=") for part in text.split())
    sizes = [int(n) for n in fields["size"].split("x")]
    count = len(sizes)
    marked = [False] * count
    for name in ("pad", "lhs_dilate", "rhs_dilate", "stride"):
        for i, value in enumerate(fields.get(name, "x".join(["0_0" if name == "pad" else "1"] * count)).split("x")):
            marked[i] |= value not in ("0_0", "1")
    return math.prod(1 if batch else size for size, batch in zip(sizes, marked, strict=True))
