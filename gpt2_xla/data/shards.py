"""The shard format: a 1-D .npy array of token ids, uint16 or uint32; any tool that reads numpy reads it."""

import hashlib
import io
import os
import threading
import tokenize
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path

import numpy as np

from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError

DTYPES = ("uint16", "uint32")
MAX_OPEN_FILES = 256  # the usual limit of a process is 1024


def dtype_for(vocab_size: int) -> str:
    """The smallest shard dtype that holds ids 0..vocab_size-1; UserError beyond 32 bits."""
    if vocab_size > 2**32:
        raise UserError(f"a vocabulary of {vocab_size} ids does not fit the 32 bits of a shard's tokens")
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write 1-D uint16 or uint32 `tokens` (a memory map will do) as a .npy file; return the file's sha256 (hex)."""
    parts = (tokens[start : start + 2**22] for start in range(0, len(tokens), 2**22))
    return write_shard_parts(path, tokens.dtype, len(tokens), parts)


def write_shard_parts(path: Path, dtype: np.dtype, count: int, parts: Iterable[np.ndarray]) -> str:
    """The same for `count` tokens that come in parts, so that a shard never is in memory whole."""
    header = io.BytesIO()
    descr = dtype.newbyteorder("<").str
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (count,)})
    digest = hashlib.sha256(header.getvalue())
    with atomic_write(path) as file:
        file.write(header.getvalue())
        written = 0
        for part in parts:
            data = np.ascontiguousarray(part.astype(descr, copy=False)).data
            digest.update(data)
            file.write(data)
            written += len(part)
        if written != count:
            raise UserError(f"{path} would hold {written} tokens instead of {count}: prepare the data again")
    return digest.hexdigest()


@dataclass(frozen=True)
class ShardHeader:
    """What a shard's header says."""

    dtype: np.dtype
    tokens: int
    offset: int  # bytes before the first token


def read_header(path: Path) -> ShardHeader:
    """Read a shard's header and hold it against the file's size.

    Raises UserError that names the file if it is missing, no 1-D uint16/uint32 .npy file, or not of the promised size.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"shard {path} can't be read: {error.strerror or error}") from error
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(
            f"shard {path} has no valid .npy header ({error}): copy it again or prepare the data again"
        ) from error
    if len(shape) != 1 or dtype.name not in DTYPES:
        raise UserError(
            f"shard {path} is {dtype} of shape {shape}; expected one dimension of uint16 or uint32 token ids"
        )
    promised = offset + shape[0] * dtype.itemsize
    if size != promised:
        raise UserError(
            f"shard {path} holds {size} bytes, its header promises {promised}: copy it again or prepare the data again"
        )
    return ShardHeader(dtype, shape[0], offset)


def open_shard(path: Path) -> np.ndarray:
    """A shard's tokens (N,), memory-mapped read-only, after the checks of `read_header`."""
    header = read_header(path)
    if header.tokens == 0:  # nothing can be mapped
        return np.empty(0, header.dtype)
    return np.memmap(path, header.dtype, mode="r", offset=header.offset, shape=(header.tokens,))


class TokenStream:
    """Shards as one long stream of tokens; any stretch is read in O(log shards), with at most 256 files open.

    Reads with pread rather than through a memory map: pages of a map count as the process's own memory, and a shard that
    shrinks while it is mapped kills the process with SIGBUS instead of raising an error. Threads may share a stream.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads every header; raises UserError with all the bad ones, and for shards of different dtypes."""
        self.paths = list(paths)
        self._headers: list[ShardHeader] = []
        mistakes: list[str] = []
        for path in self.paths:
            try:
                self._headers.append(read_header(path))
            except UserError as error:
                mistakes += error.mistakes
        if mistakes:
            raise UserError(mistakes)
        dtypes = {header.dtype for header in self._headers}
        if len(dtypes) > 1:
            names = " and ".join(sorted(dtype.str for dtype in dtypes))
            raise UserError(f"the shards of {self.paths[0].parent} mix {names}: prepare the data again")
        self._dtype = dtypes.pop() if dtypes else np.dtype(np.uint16)
        # Stream position at which each shard starts, and the stream's length at the end.
        self._starts = [0, *accumulate(header.tokens for header in self._headers)]
        self._files: dict[int, io.FileIO] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, position: int) -> tuple[Path, int]:
        """The shard that holds a stream position, and the token's index in it."""
        shard = bisect_right(self._starts, position) - 1
        return self.paths[shard], position - self._starts[shard]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with tokens start..start+n-1 of the stream. IndexError beyond its end."""
        if start < 0 or start + len(out) > len(self):
            raise IndexError(f"tokens {start}..{start + len(out) - 1} of a stream of {len(self)}")
        done = 0
        shard = bisect_right(self._starts, start) - 1
        while done < len(out):
            first = start + done - self._starts[shard]
            count = min(len(out) - done, self._headers[shard].tokens - first)
            if count > 0:  # a shard may be empty
                out[done : done + count] = self._read(shard, first, count)
                done += count
            shard += 1

    def chunks(self, size: int = 2**22) -> Iterator[tuple[int, np.ndarray]]:
        """The whole stream in pieces of `size` tokens: the position of the first, and the tokens (n,) as int64."""
        for start in range(0, len(self), size):
            tokens = np.empty(min(size, len(self) - start), np.int64)
            self.read_into(start, tokens)
            yield start, tokens

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of stream positions (n,), as int64 (n, length). IndexError beyond the stream's end."""
        if len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"tokens {starts.min()}..{starts.max() + length - 1} of a stream of {len(self)}")
        bounds = np.array(self._starts)
        shards = np.searchsorted(bounds, starts, side="right") - 1
        inside = starts + length <= bounds[shards + 1]
        rows = np.empty((len(starts), length), np.int64)
        for row in np.flatnonzero(~inside):  # those that cross into another shard
            self.read_into(int(starts[row]), rows[row])
        found = np.unique(shards[inside])
        for first in range(0, len(found), MAX_OPEN_FILES):
            group = found[first : first + MAX_OPEN_FILES]
            own = np.flatnonzero(inside & (shards >= group[0]) & (shards <= group[-1]))
            rows[own] = self._read_many(shards[own], starts[own] - bounds[shards[own]], length)
        return rows

    def _read_many(self, shards: np.ndarray, firsts: np.ndarray, length: int) -> np.ndarray:
        """The tokens (n, length) from index `firsts` (n,) of `shards` (n,), which are at most MAX_OPEN_FILES different ones."""
        size = length * self._dtype.itemsize
        offsets = np.array([header.offset for header in self._headers])[shards] + firsts * self._dtype.itemsize
        with self._lock:
            handles = np.zeros(len(self.paths), np.int64)
            for shard in np.unique(shards).tolist():
                handles[shard] = self._open(shard).fileno()
            try:
                # A system call a row, and no Python between them: 1 µs a row from the page cache.
                parts = list(map(os.pread, handles[shards].tolist(), repeat(size), offsets.tolist()))
            except OSError as error:
                raise UserError(f"a shard in {self.paths[0].parent} can't be read: {error.strerror}") from error
        data = b"".join(parts)
        if len(data) != len(parts) * size:
            short = next(row for row, part in enumerate(parts) if len(part) != size)
            raise self._shrunk(shards[short])
        return np.frombuffer(data, self._dtype).reshape(-1, length)

    def _read(self, shard: int, first: int, count: int) -> np.ndarray:
        header = self._headers[shard]
        size = header.dtype.itemsize
        with self._lock:
            handle = self._open(shard).fileno()
            try:
                data = os.pread(handle, count * size, header.offset + first * size)
            except OSError as error:
                raise UserError(f"shard {self.paths[shard]} can't be read: {error.strerror}") from error
        if len(data) != count * size:
            raise self._shrunk(shard)
        return np.frombuffer(data, header.dtype)

    def _shrunk(self, shard: int) -> UserError:
        return UserError(f"shard {self.paths[shard]} has become shorter since it was opened: prepare the data again")

    def _open(self, shard: int) -> io.FileIO:
        """The shard's file; the one used longest ago makes room for it."""
        file = self._files.pop(shard, None)
        if file is None:
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            try:
                file = self.paths[shard].open("rb", buffering=0)
            except OSError as error:
                raise UserError(f"shard {self.paths[shard]} can't be read: {error.strerror}") from error
        self._files[shard] = file
        return file

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()
