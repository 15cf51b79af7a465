"""What each device really holds of a tensor, as torch_xla knows it. Private calls, checked on torch_xla 2.9.0."""

import math
import re

import torch
import torch_xla
from torch import Tensor


def tiles(tensor: Tensor) -> tuple[int, ...]:
    """Parts that each dimension of a tensor on the devices is cut into; all 1 where every device holds everything."""
    # "{devices=[4,1,2]0,1,… last_tile_dim_replicate}", "{replicated}", or "" for a tensor that was never marked
    spec = torch_xla._XLAC._get_xla_sharding_spec(tensor)
    found = re.match(r"\{devices=\[([\d,]+)\]", spec)
    if found is None:
        return (1,) * tensor.dim()
    return tuple(int(count) for count in found[1].split(","))[: tensor.dim()]


def shard_bytes(tensor: Tensor) -> int:
    """Bytes that one device holds of a tensor."""
    return tensor.element_size() * math.prod(
        -(-size // count) for size, count in zip(tensor.shape, tiles(tensor), strict=True)
    )


def own_blocks(tensor: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """CPU copies of the parts that this process's devices hold, each with the offsets of its first element.

    Of parts with copies on several devices, only that of the first; so over all processes each part is there once.
    Compiles nothing, waits for the device.
    """
    (shards,) = torch_xla._XLAC._get_local_shards([tensor])
    (places,) = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])
    found = []
    for (shard, _device), (replica, indices) in zip(shards, places, strict=True):
        # Where parts are uneven the last one is filled up; its indices are not.
        block = shard[tuple(slice(0, index.stop - index.start) for index in indices)]
        if replica <= 0 and block.numel():  # -1: there are no copies
            found.append((block, tuple(index.start for index in indices)))
    return found


def put_together(tensor: Tensor) -> Tensor:
    """A CPU copy of a tensor of which this process's devices hold all parts; compiles nothing, waits for the device."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for block, start in own_blocks(tensor):
        whole[tuple(slice(at, at + size) for at, size in zip(start, block.shape, strict=True))] = block
    return whole


def copied(tensor: Tensor) -> Tensor:
    """A CPU copy of a tensor, also of one that is there already."""
    return tensor.to("cpu", copy=True)
