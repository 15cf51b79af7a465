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

ROOT = Path(__file__).resolve().parent.parent.parent
JOB_MEMORY = 4e9  # bytes to keep for one compilation: GPT-2 124M took 3.7 GB
POLL = 0.1  # seconds


@dataclass
class Job:
    """`python -m module file`, which writes `answer`."""

    name: str
    module: str
    file: Path
    answer: Path
    failure: str = ""  # why there is no answer
    seconds: float = 0.0  # that it ran
    _process: subprocess.Popen | None = field(default=None, repr=False)
    _errors: Path = Path()
    _began: float = 0.0

    def start(self) -> None:
        """Start the process, in a group of its own."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with tempfile.NamedTemporaryFile(dir=self.file.parent, suffix=".err", delete=False) as errors:
            self._errors = Path(errors.name)
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, str(self.file)],
                env={**os.environ, "PYTHONPATH": path},
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
        code = self._process.poll()
        if code is None and self.seconds <= limit:
            return False
        if code is None:
            self.failure = f"did not end within {limit:.0f} s and was killed; a longer --time-limit may help"
        elif not self.answer.exists():
            self.failure = _how_it_ended(code, self._errors.read_text(errors="replace"))
        self.kill()
        return True

    def kill(self) -> None:
        """End it with all that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.unlink(missing_ok=True)


def run_jobs(jobs: list[Job], at_a_time: int, limit: float, tick: Callable[[list[Job], int], None]) -> Iterator[Job]:
    """Run them, yield each as it ends; `tick` hears now and then what runs and how many have ended."""
    waiting, running, ended = list(jobs), list[Job](), 0
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                running.append(job)
                job.start()
            time.sleep(POLL)
            for job in [job for job in running if job.has_ended(limit)]:
                running.remove(job)
                ended += 1
                yield job
            tick(running, ended)
    finally:
        for job in running:
            job.kill()


def parallel_jobs() -> int:
    """Compilations that cores and free memory allow at a time."""
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    by_memory = int(int(available[1]) * 1024 // JOB_MEMORY) if available else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def _how_it_ended(code: int, errors: str) -> str:
    """A sentence on a process that left no answer."""
    if code == -signal.SIGKILL:
        return "was killed; this machine's memory was too small for it, most likely (--jobs 1 leaves it all of it)"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or line.startswith("F")]
    last = (telling or lines or ["it said nothing"])[-1][:500]
    return f"{'crashed with ' + signal.Signals(-code).name if code < 0 else 'failed'}: {last}"
