"""Which device holds which part of which tensor: the mesh of the sharded path and the layout of every parameter.

Arithmetic alone: nothing here needs torch_xla or a device.
"""

import math
from dataclasses import dataclass

from gpt2_xla.cli import did_you_mean
from gpt2_xla.config import PretrainConfig
from gpt2_xla.errors import UserError

# Outermost first: devices that are neighbours in the runtime's order, and so have the shortest way to each other, share
# a tensor group, which communicates within every layer.
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes over which a batch's sequences are spread

# For each dimension of a tensor the axes that divide it; () where every device holds the whole dimension.
Layout = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return (self.data, self.fsdp, self.tensor)

    @property
    def devices(self) -> int:
        """Devices in all."""
        return math.prod(self.sizes)

    @property
    def row_shards(self) -> int:
        """Parts that a batch is cut into; the devices of a tensor group work on the same one."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        axes = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return ",".join(axes) or "fsdp=1"


def parse_mesh(text: str) -> MeshShape:
    """`data=2,fsdp=4` as a mesh; raises `UserError` with all that is wrong with it."""
    sizes: dict[str, int] = {}
    mistakes = []
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if axis not in AXES:
            mistakes.append(
                f"--mesh {text}: unknown axis {axis!r}{did_you_mean(axis, AXES)}; axes are {', '.join(AXES)}"
            )
        elif axis in sizes:
            mistakes.append(f"--mesh {text} names the axis {axis} twice")
        elif not equals or not size.isdecimal() or int(size) < 1:
            mistakes.append(f"--mesh {text}: {axis} needs a number of devices, 1 or more, as in {axis}=2")
        sizes[axis] = int(size) if size.isdecimal() else 1
    if mistakes:
        raise UserError(mistakes)
    return MeshShape(**sizes)


def mesh_shape(mesh: str | None, devices: int) -> MeshShape:
    """What --mesh says; all devices on fsdp where it says nothing."""
    return MeshShape(fsdp=devices) if mesh is None else parse_mesh(mesh)


def mesh_mistakes(config: PretrainConfig, mesh: str | None, devices: int, hosts: int) -> list[str]:
    """Why a run cannot be spread over these devices, with what would work. `mesh` must parse."""
    shape = mesh_shape(mesh, devices)
    if shape.devices != devices:
        if devices == 1:
            return [
                f"--mesh {shape} is for {shape.devices} devices, but there is one; leave --mesh out "
                f"(or, to try it on the CPU, set CPU_NUM_DEVICES={shape.devices})"
            ]
        return [
            f"--mesh {shape} is for {shape.devices} devices, but there are {devices}; "
            f"use --mesh {nearest_mesh(shape, devices)}, for example"
        ]
    # Several hosts send each device rows of its own, those of a tensor group too (see XlaSpmdRuntime.batches).
    parts, axes = (shape.row_shards, ROWS) if hosts == 1 else (devices, AXES)
    mistakes = []
    for flag, size, among, count in (
        ("--train-batch-size", config.data.train_batch_size, axes, parts),
        ("--eval-batch-size", config.data.eval_batch_size, axes, parts),
    ):
        if size % count:
            fits = [n for n in (size - size % count, size - size % count + count) if n]
            mistakes.append(
                f"{flag} {size} is not divisible by the {count} devices of the mesh's {' × '.join(among)} axes "
                f"({shape}); use {' or '.join(map(str, fits))}"
            )
    cut_by_tensor = [("--num-heads", config.model.num_heads), ("--d-ff", config.model.hidden_dim)]
    if config.model.kv_heads != config.model.num_heads:
        cut_by_tensor.append(("--num-kv-heads", config.model.kv_heads))
    for flag, size in cut_by_tensor:
        if size % shape.tensor:
            fits = [n for n in range(1, devices + 1) if devices % n == 0 and size % n == 0]
            mistakes.append(
                f"{flag} {size} is not divisible by tensor={shape.tensor} of --mesh {shape}; "
                f"use tensor={' or '.join(map(str, fits))}"
            )
    return mistakes


def nearest_mesh(wanted: MeshShape, devices: int) -> MeshShape:
    """As much of the wanted mesh as divides the devices, the rest of them on fsdp."""
    tensor = math.gcd(wanted.tensor, devices)
    data = math.gcd(wanted.data, devices // tensor)
    return MeshShape(data, devices // tensor // data, tensor)


# The dimensions of a parameter that tensor and that fsdp would divide, best first. A Linear's weight is (out, in).
# Megatron's way (Shoeybi et al. 2019): the first matrix of a pair by its outputs (column-wise), the second by its inputs
# (row-wise), so that a pair needs one all-reduce; the embedding, which is also the output layer, by the vocabulary.
# fsdp takes the other dimension. c_attn is a fused [q | k | v]: a cut through its outputs would run through the middle of k,
# so it is stored cut by its inputs, and cut by heads in use (see `XlaSpmdRuntime`).
_DIMENSIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "wte.weight": ((0, 1), (1, 0)),
    "lm_head.weight": ((0, 1), (1, 0)),
    "wpe.weight": ((1, 0), (1, 0)),
    "c_attn.weight": ((1,), (1, 0)),
    "c_fc.weight": ((0,), (1, 0)),
    "c_gate.weight": ((0,), (1, 0)),
    "c_proj.weight": ((1,), (0, 1)),
}


def parameter_layout(name: str, shape: tuple[int, ...], mesh: MeshShape) -> Layout:
    """How a parameter, its gradient and its optimizer state lie on the devices: tensor and fsdp where they divide it.

    Along `data`, and along an axis that divides no dimension, every device holds the same.
    """
    dimensions = tuple(range(len(shape)))
    kind = ".".join(name.split(".")[-2:])
    by_tensor, by_fsdp = _DIMENSIONS.get(kind, (dimensions, dimensions))
    parts = [1] * len(shape)
    layout: list[set[str]] = [set() for _ in shape]
    for axis, size, candidates in (("tensor", mesh.tensor, by_tensor), ("fsdp", mesh.fsdp, by_fsdp)):
        for dim in candidates if size > 1 else ():
            if shape[dim] % (parts[dim] * size) == 0:
                parts[dim] *= size
                layout[dim].add(axis)
                break
    return tuple(tuple(axis for axis in AXES if axis in axes) for axes in layout)


# Where a matrix stays cut by tensor while it is used: each device multiplies by its own part.
_IN_USE = {"wte.weight": 0, "lm_head.weight": 0, "c_proj.weight": 1} | {
    f"{matrix}.{kind}": 0 for matrix in ("c_fc", "c_gate") for kind in ("weight", "bias")
}


def layout_in_use(name: str, stored: Layout) -> Layout:
    """How a parameter lies while it is used: gathered over fsdp, and over tensor unless the computation is cut there."""
    cut = _IN_USE.get(".".join(name.split(".")[-2:]))
    return tuple(("tensor",) if dim == cut and "tensor" in axes else () for dim, axes in enumerate(stored))
