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


def put_together(tensor: Tensor) -> Tensor:
    """A CPU copy of a tensor of which this process's devices hold all parts; compiles nothing, waits for the device."""
    (shards,) = torch_xla._XLAC._get_local_shards([tensor])
    (places,) = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for (shard, _device), (_replica, indices) in zip(shards, places, strict=True):
        # Where parts are uneven the last one is filled up; its indices are not.
        whole[tuple(indices)] = shard[tuple(slice(0, index.stop - index.start) for index in indices)]
    return whole
