"""batches.jsonl in the run folder: which data every optimizer step saw, over all restarts; rank 0 writes it.

One JSON object a line, appended:
    {"kind": "start", "step": S, "samples": N, ...}   training begins after step S, N sequences into the run. Lines of later
                                                      steps that stand before this one are replaced by those after it.
    {"kind": "batch", "step": s, "first": n, "count": c, "windows": ..., "tokens": ...}
                                                      step s took samples n to n + c - 1; hashes: see data/batch_hash.py.
                                                      `windows` is of the whole global batch, `tokens` of rank 0's part.
    {"kind": "rollback", "step": S, "samples": N, ...} after a loss spike: back to step S, with the data from sample N on.
`scripts/verify_run.py` replays it.
"""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2_xla.config import PretrainConfig
from gpt2_xla.data.batch_hash import BatchOrder, token_hash
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.data.training_set import TrainingSet

FILE = "batches.jsonl"
BUFFER = 8192  # bytes of lines that are kept back at most, if the disk takes them
Hashes = tuple[str, str]  # of the global batch's windows, of the tokens that this process read


class Ledger:
    """The ledger of a process that keeps none: all but rank 0."""

    def follow(self, batches: Iterator[Tensor], first_sample: int, steps_done: int) -> Iterator[Tensor]:  # noqa: ARG002
        """Pass on the host's batches (A, B, T+1) after `steps_done`, the first beginning with `first_sample`, and hash them.

        Whoever reads ahead does the hashing, in the background. A new call forgets what the last one read ahead.
        """
        return batches

    def batch(self, step: int, first_sample: int) -> None:
        """Step number `step` (from 1) was launched, with the next of the batches followed."""

    def rollback(self, step: int, samples: int, reason: dict[str, Any]) -> None:
        """The run goes on after step `step`, with the data from sample `samples` on. On disk when this returns."""

    def sync(self) -> None:
        """Force all lines to the disk. Call before a checkpoint appears: it must not know of steps that this does not."""

    def close(self) -> None:
        """Write what is buffered, and end."""


class LedgerFile(Ledger):
    """Rank 0's. A disk that cannot be written is told once, and ends no run: the lines are kept until there is room."""

    def __init__(self, path: Path, train: TrainingSet, order: BatchOrder, say: Callable[[str], None]) -> None:
        self._train, self._order, self._say = train, order, say
        self._hashes: deque[Hashes] = deque()
        self._path, self._failed = path, False
        self._pending = bytearray()  # lines that are not in the file yet
        self._file = path.open("ab+", buffering=0)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # a crash cut the last line short; the next must not join it
                self._pending += b"\n"

    def start(self, step: int, samples: int, checkpoint: str | None) -> None:
        """Training begins after `step`, from a checkpoint if there was one."""
        now = round(time.time(), 3)
        self._write("start", step=step, samples=samples, checkpoint=checkpoint, time=now, **asdict(self._order))
        self.sync()

    def follow(self, batches: Iterator[Tensor], first_sample: int, steps_done: int) -> Iterator[Tensor]:
        self._hashes = deque()  # the thread that read ahead before may still fill the old one
        windows = self._order.window_hashes(self._train, first_sample, 2**40, steps_done)
        return self._followed(batches, windows, self._hashes)

    def _followed(self, batches: Iterator[Tensor], windows: Iterator[str], hashes: deque[Hashes]) -> Iterator[Tensor]:
        for batch, of_windows in zip(batches, windows, strict=False):
            hashes.append((of_windows, token_hash(batch.numpy())))
            yield batch

    def batch(self, step: int, first_sample: int) -> None:
        windows, tokens = self._hashes.popleft()
        count = self._order.sizes.sequences(step - 1)
        self._write("batch", step=step, first=first_sample, count=count, windows=windows, tokens=tokens)

    def rollback(self, step: int, samples: int, reason: dict[str, Any]) -> None:
        self._write("rollback", step=step, samples=samples, time=round(time.time(), 3), **reason)
        self.sync()

    def sync(self) -> None:
        with self._warned():
            self._flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._warned():
            self._flush()
        self._file.close()

    def _write(self, kind: str, **values: Any) -> None:
        self._pending += (json.dumps({"kind": kind, **values}) + "\n").encode()
        if len(self._pending) >= BUFFER:
            with self._warned():
                self._flush()

    def _flush(self) -> None:
        while self._pending:  # the system may take less than it is given
            del self._pending[: self._file.write(self._pending)]

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                self._say(f"warning: {self._path}: {error.strerror}; training goes on")
            self._failed = True


def open_ledger(
    config: PretrainConfig,
    data: PretrainingData,
    step: int,
    samples: int,
    source: Path | None,
    say: Callable[[str], None],
) -> Ledger:
    """The run's ledger, told that training begins after `step`, by the checkpoint `source`, with the data from `samples` on."""
    if data.rank != 0 or data.train is None:
        return Ledger()
    order = BatchOrder(
        fingerprint=data.fingerprint,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        seq_length=config.model.seq_length,
        batch_size=config.data.train_batch_size,
        batch_sizes=str(config.batch_sizes),
        world_size=data.world_size,
    )
    try:
        ledger = LedgerFile(Path(config.run.checkpoints_dir) / FILE, data.train, order, say)
    except OSError as error:
        say(f"warning: {Path(config.run.checkpoints_dir) / FILE}: {error.strerror}; training goes on without it")
        return Ledger()
    ledger.start(step, samples, str(source) if source else None)
    return ledger
