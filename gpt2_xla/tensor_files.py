"""Safetensors files: written tensor by tensor, without a second copy of them all; read memory-mapped."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2_xla.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
PIECE = 2**24  # bytes written and hashed at a time


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written. `read` gives it, on the CPU, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def parts(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece; at most one tensor is copied (to be contiguous) at a time."""
    # The library's own order: a tensor's data is then aligned to its elements.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in ordered:
        data = entry.read()
        assert data.dtype == entry.dtype
        assert tuple(data.shape) == entry.shape
        view = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(view), PIECE):
            yield view[start : start + PIECE]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is read into UserErrors that name it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        # RuntimeError: torch's, for a shape that it can't hold; KeyError: a dtype that safetensors knows and torch not.
        raise UserError(f"{path} is not a valid safetensors file: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped; raises UserError for a file that is none."""
    with reading(path):
        return load_file(path)
