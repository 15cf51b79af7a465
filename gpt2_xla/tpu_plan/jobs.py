"""Processes that may abort, hang or take gigabytes: some at a time, each with a time limit, none left behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpt2_xla.child_environment import child_environment

POLL = 0.1  # seconds


@dataclass
class Job:
    """`python -m module file`, which writes `answer`."""

    name: str
    module: str
    file: Path
    answer: Path
    memory: float = 1e9  # bytes that it will take, roughly
    failure: str = ""  # why there is no answer
    seconds: float = 0.0  # that it ran
    _process: subprocess.Popen | None = field(default=None, repr=False)
    _errors: Path = Path()
    _began: float = 0.0
    _held: int = 0  # bytes of memory, the most that was seen

    def start(self) -> None:
        """Start the process, in a group of its own."""
        with tempfile.NamedTemporaryFile(dir=self.file.parent, suffix=".err", delete=False) as errors:
            self._errors = Path(errors.name)
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, str(self.file)],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        self._began = time.monotonic()

    def has_ended(self, limit: float) -> bool:
        """Whether it came to its end, or to its time limit's."""
        assert self._process is not None
        self.seconds = time.monotonic() - self._began
        self._held = max(self._held, self._resident())
        code = self._process.poll()
        if code is None and self.seconds <= limit:
            return False
        if code is None:
            self.failure = f"did not end within {limit:.0f} s and was killed; a longer --time-limit may help"
        elif not self.answer.exists():
            self.failure = _how_it_ended(code, self._errors.read_text(errors="replace"), self._held)
        self.kill()
        return True

    def _resident(self) -> int:
        """Bytes of memory that it holds now."""
        assert self._process is not None
        try:
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it has ended
            return 0

    @property
    def to_come(self) -> float:
        """Bytes of memory that it will take yet."""
        return max(0.0, self.memory - self._held)

    def kill(self) -> None:
        """End it with all that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.unlink(missing_ok=True)


def run_jobs(
    jobs: list[Job], at_a_time: int | None, limit: float, tick: Callable[[list[Job], int], None]
) -> Iterator[Job]:
    """Run them, yield each as it ends; `tick` hears now and then what runs and how many have ended.

    Without `at_a_time`, as many as there are cores and memory for; one alone is always tried.
    """
    waiting, running, ended = list(jobs), list[Job](), 0
    try:
        while waiting or running:
            while waiting and _has_room(waiting[0], running, at_a_time):
                job = waiting.pop(0)
                running.append(job)
                job.start()
            tick(running, ended)  # before any of them can end: each is heard of
            time.sleep(POLL)
            for job in [job for job in running if job.has_ended(limit)]:
                running.remove(job)
                ended += 1
                yield job
    finally:
        for job in running:
            job.kill()


def _has_room(job: Job, running: list[Job], at_a_time: int | None) -> bool:
    if at_a_time is not None:
        return len(running) < at_a_time
    if not running:
        return True
    fits = job.memory + sum(one.to_come for one in running) <= free_memory()
    return fits and len(running) < len(os.sched_getaffinity(0))


def free_memory() -> float:
    """Bytes that new processes could take without swapping."""
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available[1]) * 1024 if available else 0.0


def _how_it_ended(code: int, errors: str, held: int) -> str:
    """A sentence on a process that left no answer and held that many bytes of memory."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if code == -signal.SIGKILL or any(
        re.search("bad_alloc|Cannot allocate memory|MemoryError", line) for line in lines
    ):
        return (
            f"{'was killed' if code == -signal.SIGKILL else 'ended'} when it held {held / 1e9:.1f} GB; this machine's memory "
            "was too small for it, most likely (--jobs 1 leaves it all of it)"
        )
    telling = [line for line in lines if "rror" in line or line.startswith("F")]
    last = (telling or lines or ["it said nothing"])[-1][:500]
    return f"{'crashed with ' + signal.Signals(-code).name if code < 0 else 'failed'}: {last}"
