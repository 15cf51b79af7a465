"""The state of a run in shares: each process writes the blocks of tensors that it holds, any number of processes loads them.

The files are those of torch.distributed.checkpoint's Hugging Face storage: safetensors, with the offsets of each block in
the header. Its reader and planner load them into tensors of any layout (plain ones or DTensors). Its writer is not used:
it builds each file in memory first (`safetensors.torch.save`), a second copy of the state.
"""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gpt2_xla.errors import UserError
from gpt2_xla.tensor_files import DTYPE_NAMES, Entry, read_tensors, reading

OFFSETS = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's key: JSON {name: {"saved_offsets": [...]}}
LARGEST = 2**48  # offset that a file may claim
MAX_BLOCKS = 4096  # of one tensor


_importing = threading.Lock()  # replicas may be threads, and the modules import one another in a circle


@dataclass(frozen=True)
class Share:
    """A block of a tensor in host memory, or all of it."""

    name: str
    data: Tensor
    offsets: tuple[int, ...]  # of the block's first element in the tensor
    shape: tuple[int, ...]  # of the tensor

    @classmethod
    def whole(cls, name: str, data: Tensor) -> "Share":
        """A share that is all of its tensor."""
        return cls(name, data, (0,) * data.dim(), tuple(data.shape))

    @property
    def is_whole(self) -> bool:
        return tuple(self.data.shape) == self.shape


def whole_shares(tensors: Mapping[str, Tensor]) -> list[Share]:
    """Tensors that one process holds whole."""
    return [Share.whole(name, tensor) for name, tensor in tensors.items()]


def put_together(shares: Sequence[Share]) -> Tensor:
    """The tensor of which these are all blocks: without a copy if there is only one."""
    if len(shares) == 1:
        return shares[0].data
    whole = torch.empty(whole_shape(shares), dtype=shares[0].data.dtype)
    for share in shares:
        whole[tuple(slice(at, at + n) for at, n in zip(share.offsets, share.data.shape, strict=True))] = share.data
    return whole


def whole_shape(shares: Sequence[Share]) -> tuple[int, ...]:
    """The shape of the tensor of which these are all blocks."""
    shape = _tiled([(share.offsets, tuple(share.data.shape)) for share in shares])
    if shape is None:
        raise RuntimeError(f"the processes' blocks of {shares[0].name} overlap or leave a gap")
    return shape


def by_name(shares: Sequence[Share]) -> dict[str, list[Share]]:
    """The blocks of each tensor, but empty ones."""
    found: dict[str, list[Share]] = {}
    for share in shares:
        if share.data.numel():
            found.setdefault(share.name, []).append(share)
    return found


def share_files(shares: Sequence[Share]) -> list[tuple[list[Entry], dict[str, str]]]:
    """Entries and metadata of the files that hold one process's shares: as many as the blocks that it has of one tensor."""
    blocks = list(by_name(shares).values())
    files = []
    for index in range(max(map(len, blocks), default=1)):
        group = [own[index] for own in blocks if index < len(own)]
        entries = [Entry(s.name, s.data.dtype, tuple(s.data.shape), lambda data=s.data: data) for s in group]  # type: ignore[misc]
        info = {OFFSETS: json.dumps({share.name: {"saved_offsets": share.offsets} for share in group})}
        files.append((entries, {} if all(share.is_whole for share in group) else {**info, "DCP_VERSION": "1.0"}))
    return files


def read_shares(file: Path) -> list[Share]:
    """The shares of a file, memory-mapped; the tensors' shapes, which it doesn't tell, are those of the blocks' ends."""
    layout = _layout(file)
    return [
        Share(name, data, layout[name][0], tuple(map(sum, zip(*layout[name], strict=True))))
        for name, data in read_tensors(file).items()
    ]


def load(files: Sequence[Path], targets: dict[str, Tensor]) -> None:
    """Copy the tensors of share files of one folder into `targets`, whatever their devices and layouts, one after another.

    `files` must be all .safetensors files of the folder. Raises UserError, before anything is copied, if one is malformed,
    if blocks overlap or leave a gap, if a target is missing or has another shape.
    """
    shapes = _whole_shapes(files)
    mistakes = [f"{name} is missing in {files[0].parent}" for name in targets if name not in shapes]
    for name, target in targets.items():
        if name in shapes and shapes[name] != tuple(target.shape):
            mistakes.append(f"{name} in {files[0].parent} is {list(shapes[name])}; the model's is {list(target.shape)}")
    if mistakes:
        raise UserError(mistakes[:8] + ([f"and {len(mistakes) - 8} more"] if len(mistakes) > 8 else []))
    with _importing:
        # Here, because they take 0.2 s to import.
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    # Not as scalars: XLA would take the step counts, all alike, for one number, and compile a step of its own for that.
    scalars = {name: torch.empty_like(target, device="cpu") for name, target in targets.items() if not target.dim()}
    reader = HuggingFaceStorageReader(str(files[0].parent))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # What checkpoint.load() does in one process. Each process plans for itself, so that no collective is needed.
    with reading(files[0].parent):
        metadata = reader.read_metadata()
        planner.set_up_planner({**targets, **scalars}, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    for name, value in scalars.items():
        targets[name].copy_(value.reshape(1).to(targets[name].device).reshape(()))


def _whole_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in share files; raises UserError if its blocks don't tile it."""
    blocks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for file in files:
        for name, block in _layout(file).items():
            blocks.setdefault(name, []).append(block)
    shapes, mistakes = {}, []
    for name, found in blocks.items():
        shape = _tiled(found)
        if shape is None:
            mistakes.append(f"the blocks of {name} in {files[0].parent} overlap or leave a gap")
        else:
            shapes[name] = shape
    if mistakes:
        raise UserError(mistakes[:8])
    return shapes


def _layout(file: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of each block in a file, from its header; raises UserError."""
    found = {}
    with reading(file), safe_open(file, framework="pt") as opened:
        info = json.loads((opened.metadata() or {}).get(OFFSETS, "null"))
        for name in opened.keys():  # noqa: SIM118 - no mapping
            block = opened.get_slice(name)
            sizes = tuple(block.get_shape())
            offsets = _offsets(info, name, sizes)
            if offsets is None or not all(sizes) or block.get_dtype() not in DTYPE_NAMES.values():
                raise ValueError(f"the place, size or type of {name[:80]!r} is odd")
            found[name] = (offsets, sizes)
    return found


def _offsets(info: Any, name: str, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where a block begins, by the file's metadata; None if they are malformed."""
    if info is None:
        return (0,) * len(sizes)
    entry = info.get(name) if isinstance(info, dict) else None
    offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != len(sizes):
        return None
    return tuple(offsets) if all(type(at) is int and 0 <= at < LARGEST for at in offsets) else None


def _tiled(blocks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, ...] | None:
    """The shape that blocks (offsets, sizes) fill without gap or overlap; None if they don't."""
    if len(blocks) > MAX_BLOCKS or len({len(sizes) for _, sizes in blocks}) != 1:
        return None
    starts = np.array([offsets for offsets, _ in blocks], np.int64).reshape(len(blocks), -1)  # (N, dims)
    ends = starts + np.array([sizes for _, sizes in blocks], np.int64).reshape(len(blocks), -1)
    overlap = np.ones((len(blocks), len(blocks)), bool)
    for start, end in zip(starts.T, ends.T, strict=True):
        overlap &= np.maximum(start[:, None], start) < np.minimum(end[:, None], end)
    shape = tuple(ends.max(axis=0).tolist())
    filled = sum(math.prod(sizes) for _, sizes in blocks)
    return shape if overlap.sum() == len(blocks) and filled == math.prod(shape) else None
