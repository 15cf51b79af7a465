"""Which block of a tensor this process holds: its own part of a DTensor, all of any other tensor."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def held(tensor: Tensor) -> Tensor:
    """The block that this process holds, in the tensor's own memory; no elements where there are fewer rows than processes."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def offsets(tensor: Tensor) -> tuple[int, ...]:
    """Where in the tensor the held block begins."""
    first, sizes = [0] * tensor.dim(), list(tensor.shape)
    if isinstance(tensor, DTensor):
        place = tensor.device_mesh.get_coordinate()
        assert place is not None  # every process is part of the mesh
        for axis, (placement, index) in enumerate(zip(tensor.placements, place, strict=True)):
            if isinstance(placement, Shard):  # as torch.chunk cuts: the last parts may be smaller, or empty
                size = sizes[placement.dim]
                length = -(-size // tensor.device_mesh.size(axis))
                begin = min(index * length, size)
                first[placement.dim] += begin
                sizes[placement.dim] = min(length, size - begin)
    return tuple(first)


@torch.no_grad()
def copy_held(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` what its process holds of the tensor `whole`, which every process has, or maps from a file."""
    block = held(target)
    if isinstance(target, DTensor):
        whole = whole[tuple(slice(at, at + size) for at, size in zip(offsets(target), block.shape, strict=True))]
    block.copy_(whole)
