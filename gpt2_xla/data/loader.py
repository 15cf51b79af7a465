"""Token shards to batches: every batch is a pure function of (seed, position, rank).

All shards of a folder are one stream of N tokens. Window i of an epoch is the T+1 tokens from `offset + i*T`: T inputs and,
one to the right, T targets. Samples are numbered 0, 1, 2, ... over the whole run; sample n is window
`permutation(n mod W)` of epoch `n div W`, W windows making an epoch. World size, micro-steps and batch size only decide who
reads a sample when.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from gpt2_xla.data.data_mistakes import windows_per_epoch
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.permutation import permute
from gpt2_xla.data.shards import TokenStream
from gpt2_xla.errors import UserError
from gpt2_xla.loss import IGNORED

TOKENS_READ_TOGETHER = 2**18  # 2 MiB of batches


class TokenWindows:
    """The windows of T+1 tokens of one data folder. Opening reads only the shards' headers.

    An epoch has W = max(1, N div T - 1) windows and leaves out fewer than 2T tokens as targets: the first `offset`+1 and
    those after the last window. `offset` is 0 unshuffled; shuffled it is drawn anew from [0, T) each epoch (from a smaller
    range where there are fewer than 2T tokens), so that over the epochs every token is seen, at every place in a window.
    """

    def __init__(self, folder: Path, manifest: Manifest, seq_length: int) -> None:
        """`seq_length` is T. Raises UserError for shards that are missing, cut short or no shards."""
        self.folder = folder
        self.seq_length = seq_length
        self.stream = TokenStream(manifest.paths(folder))

    @property
    def tokens(self) -> int:
        """N, the tokens in all shards."""
        return len(self.stream)

    def __len__(self) -> int:
        """W, the windows of one epoch; 0 if there are fewer than T+1 tokens."""
        return windows_per_epoch(self.tokens, self.seq_length)

    def starts(self, samples: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Stream positions (n,) at which the windows of samples (n,) start."""
        epochs, windows = np.divmod(samples, len(self))
        if not shuffle:
            return windows * self.seq_length
        # Not more than T offsets, and none that pushes the last window out of the stream.
        offsets = min(self.seq_length, self.tokens - len(self) * self.seq_length)
        starts = np.empty_like(windows)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            # SeedSequence's words are the same in every numpy (NEP 19); a Generator's draws may change.
            words = np.random.SeedSequence(seed % 2**64, spawn_key=(int(epoch),)).generate_state(9, np.uint64)
            order = permute(windows[in_epoch], len(self), words[1:])
            starts[in_epoch] = int(words[0] % np.uint64(offsets)) + order * self.seq_length
        return starts

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with the n tokens from stream position `start`."""
        self.stream.read_into(start, out)

    def rows(self, samples: np.ndarray, *, seed: int, shuffle: bool, vocab_size: int) -> np.ndarray:
        """The T+1 tokens of each of samples (n,), as int64 (n, T+1).

        Raises UserError for fewer than T+1 tokens, for a token >= vocab_size and for a shard that can't be read.
        """
        if len(self) == 0:
            raise UserError(f"data folder {self.folder} holds {self.tokens} tokens, fewer than --seq-length + 1")
        starts = self.starts(samples, seed, shuffle)
        rows = self.stream.gather(starts, self.seq_length + 1)
        self.check_vocabulary(rows, starts, vocab_size)
        return rows

    def check_vocabulary(self, rows: np.ndarray, starts: np.ndarray, vocab_size: int) -> None:
        """UserError if a row (n, length) read at `starts` (n,) holds an id that the model has no embedding for."""
        if rows.size == 0 or int(rows.max()) < vocab_size:
            return
        row, column = (int(index) for index in np.argwhere(rows >= vocab_size)[0])
        token = int(rows[row, column])
        shard, index = self.stream.locate(int(starts[row]) + column)
        raise UserError(
            f"data folder {self.folder}: token {index} of {shard.name} is {token}, but --vocab-size {vocab_size} allows only "
            f"0..{vocab_size - 1}; use --vocab-size {token + 1} or more, or prepare the data with another --tokenizer"
        )


class Samples(Protocol):
    """A numbered sequence of training samples: a folder's windows, or a mixture of several folders'."""

    seq_length: int

    def rows(self, samples: np.ndarray, *, seed: int, shuffle: bool, vocab_size: int) -> np.ndarray:
        """The T+1 tokens of each of samples (n,), as int64 (n, T+1); a pure function of its arguments."""
        ...


def training_batches(
    source: Samples,
    *,
    seed: int,
    shuffle: bool,
    first_sample: int,
    steps: int,
    micro_steps: int,
    batch_size: int,
    rank: int,
    world_size: int,
    vocab_size: int,
) -> Iterator[torch.Tensor]:
    """One int64 tensor (A, B/world_size, T+1) per optimizer step, `steps` of them; A = micro_steps, B = batch_size.

    Step s takes the A*B samples from `first_sample + s*A*B`; micro-step m the m-th B of them, rank r the r-th contiguous
    B/world_size of those. Starting at a later `first_sample` costs nothing. Raises UserError as `source.rows` does.
    """
    rows_per_rank = _rows_per_rank(batch_size, rank, world_size)
    # (A, B/world_size): this rank's samples of step 0, counted from the step's first
    own = np.arange(micro_steps)[:, None] * batch_size + rank * rows_per_rank + np.arange(rows_per_rank)
    # Small steps are read several at a time: a call of numpy costs as much for 10 samples as for 1,000.
    together = max(1, TOKENS_READ_TOGETHER // (own.size * (source.seq_length + 1)))
    for step in range(0, steps, together):
        firsts = first_sample + np.arange(step, min(step + together, steps)) * micro_steps * batch_size
        samples = firsts[:, None] + own.ravel()  # (steps read together, A*B/world_size)
        rows = source.rows(samples.ravel(), seed=seed, shuffle=shuffle, vocab_size=vocab_size)
        yield from torch.from_numpy(rows).view(len(firsts), micro_steps, rows_per_rank, -1)


def evaluation_batches(
    windows: TokenWindows, *, steps: int | None, batch_size: int, rank: int, world_size: int, vocab_size: int
) -> Iterator[torch.Tensor]:
    """int64 tensors (B/world_size, 2, T) of inputs and targets, in order; every token but the first is a target once.

    The last window and the last batch are filled up with input 0 and target -100, so every batch has the same shape; a
    rank's rows may all be filling. `steps` limits the number of batches. Raises UserError as `training_batches` does.
    """
    rows_per_rank = _rows_per_rank(batch_size, rank, world_size)
    length = windows.seq_length
    for step in range(evaluation_steps(windows, batch_size, steps)):
        first = step * batch_size + rank * rows_per_rank
        starts = (first + np.arange(rows_per_rank)) * length
        batch = np.zeros((rows_per_rank, 2, length), np.int64)
        batch[:, 1] = IGNORED
        for row, start in zip(batch, starts.tolist(), strict=True):
            count = min(length, windows.tokens - 1 - start)
            if count > 0:
                tokens = np.empty(count + 1, np.int64)
                windows.read(start, tokens)
                row[0, :count], row[1, :count] = tokens[:-1], tokens[1:]
        windows.check_vocabulary(batch[:, 0], starts, vocab_size)
        windows.check_vocabulary(batch[:, 1], starts + 1, vocab_size)
        yield torch.from_numpy(batch)


def evaluation_steps(windows: TokenWindows, batch_size: int, steps: int | None = None) -> int:
    """Number of evaluation batches: the whole split's, or `steps` if that is fewer."""
    rows = -(-max(windows.tokens - 1, 0) // windows.seq_length)
    whole = -(-rows // batch_size)
    return whole if steps is None else min(steps, whole)


def predicted_tokens(windows: TokenWindows, batch_size: int, steps: int | None = None) -> int:
    """Number of targets, over all ranks, that are not filling in `evaluation_batches` of the same arguments."""
    batches = evaluation_steps(windows, batch_size, steps)
    return min(max(windows.tokens - 1, 0), batches * batch_size * windows.seq_length)


def _rows_per_rank(batch_size: int, rank: int, world_size: int) -> int:
    if batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} can't share a batch of {batch_size}")
    return batch_size // world_size
