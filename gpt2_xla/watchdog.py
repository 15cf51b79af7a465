"""--hang-timeout: a run that makes no progress says where each rank is, and ends, instead of waiting for ever."""

import contextlib
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gpt2_xla.config import PretrainConfig
from gpt2_xla.errors import HangError
from gpt2_xla.runtime.base import Runtime

FOLDER = "progress"  # in the run folder while the run lasts: where each rank was when last heard of
COMPILE_SECONDS = 3600.0  # that a compilation, or the start-up, may take if --hang-timeout is shorter
COMPILED = ("step", "eval", "sample")  # phases whose first time compiles a program, on a runtime that compiles


@dataclass(frozen=True)
class Progress:
    """What a rank does since a moment."""

    phase: str  # start-up, data, compile, step, eval, sample, save, end
    step: int  # optimizer steps done
    since: float  # time.monotonic()


class Phases(Protocol):
    """What the loop tells of itself."""

    def mark(self, phase: str, step: int) -> None:
        """From now on this rank is in `phase`, with `step` optimizer steps done. Every mark counts as progress."""
        ...

    def expect_compilation(self, phase: str) -> None:
        """The next time of `phase` compiles a program, as its first did."""
        ...

    def close(self) -> None:
        """Stop watching."""
        ...


class Unwatched:
    """Phases that nobody asks for."""

    def mark(self, phase: str, step: int) -> None:
        """Nothing."""

    def expect_compilation(self, phase: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_watchdog(config: PretrainConfig, runtime: Runtime) -> Phases:
    """The watchdog of this rank, which has begun to watch; one that does nothing with --hang-timeout 0."""
    if not config.run.hang_timeout:
        return Unwatched()
    folder = None if config.run.do_test else Path(config.run.checkpoints_dir) / FOLDER
    return Watchdog(
        config.run.hang_timeout,
        runtime.rank,
        runtime.world_size,
        folder,
        compiles=runtime.compiles,
        abandon=runtime.abandon,
    )


class Watchdog:
    """A thread that looks for progress ten times per `timeout` seconds; without any it ends the process, status 70.

    Only time in which the thread itself runs counts: a process that was suspended for an hour does not hang.
    """

    def __init__(
        self,
        timeout: float,
        rank: int,
        world_size: int,
        folder: Path | None,
        compiles: bool = False,
        abandon: Callable[[Exception], None] = lambda _: None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._timeout, self._rank, self._world_size, self._folder = timeout, rank, world_size, folder
        self._compiles, self._abandon, self._end = compiles, abandon, end
        self._interval = min(timeout / 10, 10.0)
        self._seen: set[str] = set()
        self._progress = Progress("start-up", 0, time.monotonic())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def mark(self, phase: str, step: int) -> None:
        if self._compiles and phase in COMPILED and phase not in self._seen:
            self._seen.add(phase)
            phase = "compile"
        self._progress = Progress(phase, step, time.monotonic())  # one assignment: the thread sees all of it or nothing

    def expect_compilation(self, phase: str) -> None:
        self._seen.discard(phase)

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                _file(self._folder, self._rank).unlink(missing_ok=True)
                _file(self._folder, self._rank).with_suffix(".new").unlink(missing_ok=True)  # of a full disk
                self._folder.rmdir()  # the last one out; it fails for the others

    def _watch(self) -> None:
        stuck, awake, last = self._progress, 0.0, time.monotonic()
        while not self._done.wait(self._interval):
            now, progress = time.monotonic(), self._progress
            awake = awake + min(now - last, 2 * self._interval) if progress is stuck else 0.0
            stuck, last = progress, now
            self._publish(progress)
            if awake > self._allowance(progress):
                self._bark(progress)
                awake = 0.0

    def _allowance(self, progress: Progress) -> float:
        slow = progress.phase in ("compile", "start-up")
        return max(self._timeout, COMPILE_SECONDS) if slow else self._timeout

    def _bark(self, progress: Progress) -> None:
        """Tell everything, and end the process unless it went on meanwhile."""
        sentence = (
            f"no progress for {time.monotonic() - progress.since:.0f} s (--hang-timeout {self._timeout:g}): "
            f"rank {self._rank} of {self._world_size} is in phase {progress.phase} after step {progress.step}"
        )
        _say(f"\n{sentence}\n{_thread_names()}")
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._done.wait(2 * self._interval)  # the others notice now, too
        if self._done.is_set() or self._progress is not progress:
            _say(f"rank {self._rank} went on after all\n")
            return
        table = self._table()
        _say(table + "\n")
        self._abandon(HangError(f"{sentence}\n{table}\nthe same command continues from the newest checkpoint"))
        self._end(HangError.status)

    def _publish(self, progress: Progress) -> None:
        """Leave word of where this rank is, for the others' tables; a disk that takes none costs only that."""
        if self._folder is None:
            return
        word = {
            "phase": progress.phase,
            "step": progress.step,
            "seconds": round(time.monotonic() - progress.since, 1),
            "time": time.time(),
        }
        path = _file(self._folder, self._rank)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".new").write_text(json.dumps(word))
            path.with_suffix(".new").replace(path)  # in one go: another rank may be reading it

    def _table(self) -> str:
        """Where every rank is, a line each."""
        lines = []
        for rank in range(self._world_size):
            try:
                word = json.loads(_file(self._folder, rank).read_text()) if self._folder else None
                silent = time.time() - word["time"] if word else 0.0
                text = f"{word['phase']} after step {word['step']}, for {word['seconds']:.0f} s" if word else "no word"
            except (OSError, ValueError, KeyError, TypeError):
                text, silent = "no word", 0.0
            if silent > 4 * self._interval:
                text += f"; silent for {silent:.0f} s, so its process is stopped or gone"
            lines.append(f"  rank {rank}: {text}")
        return "\n".join(lines)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _thread_names() -> str:
    """Names for the numbers in faulthandler's report."""
    return "".join(f"  thread 0x{thread.ident or 0:016x} is {thread.name}\n" for thread in threading.enumerate())


def _say(text: str) -> None:
    """Straight to the file: a hung thread may hold the lock of sys.stderr."""
    os.write(2, text.encode())
