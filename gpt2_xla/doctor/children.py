"""Checks that may crash or hang run in a process of their own, which reports facts line by line and has a time limit."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from gpt2_xla.child_environment import child_environment

MARK = "gpt2_xla.doctor "  # a reported line; whatever libraries print besides is passed over
TELLING = re.compile(r"error|unknown flag|\bF external|already in use|denied|not permitted", re.IGNORECASE)


def report(**facts: Any) -> None:
    """Called in the child: send facts to the parent. Short lines of several processes do not mix in a pipe."""
    os.write(sys.stdout.fileno(), (MARK + json.dumps(facts) + "\n").encode())


@dataclass(frozen=True)
class Outcome:
    """What a child reported, and why it ended early, if it did."""

    facts: list[dict[str, Any]]
    failure: str | None  # a sentence; None where it ended well


class Deadline:
    """The seconds that are left of the whole time limit."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def share(self, part: float) -> float:
        """A part of the whole limit, or what is left of it if that is less; at least a second, to be tried at all."""
        return max(1.0, min(self._seconds * part, self._end - time.monotonic()))


def run_child(module: str, *arguments: str, seconds: float, environ: Mapping[str, str]) -> Outcome:
    """Run `python -m module arguments…`; past the limit it is killed with all that it started."""
    # Into files, not pipes: a grandchild that escaped would keep a pipe open, and us waiting for its end.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=child_environment(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        failure = None
        try:
            if process.wait(seconds):
                failure = f"{_how_it_ended(process.returncode)}: {_telling_line(_text(errors))}"
        except subprocess.TimeoutExpired:
            failure = f"did not end within {seconds:.0f} s and was killed"
        finally:
            _kill_group(process.pid)
            process.wait()
        lines = [line.partition(MARK)[2] for line in _text(output).splitlines() if MARK in line]
    return Outcome([json.loads(line) for line in lines if line.endswith("}")], failure)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # all have ended


def _how_it_ended(returncode: int) -> str:
    if returncode < 0:
        return f"crashed with {signal.Signals(-returncode).name}"
    return "failed"


def _telling_line(errors: str) -> str:
    """The line of standard error that most likely says why; the last one, if none looks like it."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if TELLING.search(line) and not line.startswith("File ")]
    last = (telling or lines or ["it said nothing"])[-1]
    return re.sub(r"^[-0-9:. ]+[FEW] \S+\] ", "", last)[:300]  # absl's time and place
