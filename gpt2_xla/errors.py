"""The one kind of error that is the user's to mend: a sentence and exit status 2, never a traceback."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")
LEAST_PATIENCE, MOST_PATIENCE = 5.0, 30.0  # seconds that a host's other processes leave its first one to tell a mistake
BEGAN = time.monotonic()  # about when this process did


class UserError(Exception):
    """One or more mistakes in a command, a configuration or a file, each one clear sentence.

    A sentence names the flag or file, the value, what was expected and how to mend it.
    """

    status = 2  # of the process that it ends

    def __init__(self, mistakes: str | Sequence[str]) -> None:
        self.mistakes: tuple[str, ...] = (mistakes,) if isinstance(mistakes, str) else tuple(mistakes)
        super().__init__("\n".join(self.mistakes))

    def __reduce__(self) -> tuple[type["UserError"], tuple[tuple[str, ...]]]:
        # Errors travel between the replicas' processes; the default would pickle one joined string.
        return type(self), (self.mistakes,)


class HangError(UserError):
    """No progress for --hang-timeout: nobody's mistake in the command, but a sentence says all there is to say too."""

    status = 70


class Stopped(Exception):
    """The command was asked to stop before it had done anything: no mistake; its sentence is printed, and the status is 0."""


def attempt(make: Callable[[], Result], mistakes: list[str]) -> Result | None:
    """The result, or None with the mistakes noted: so that a command can look on, and tell them all together."""
    try:
        return make()
    except UserError as error:
        mistakes += error.mistakes
        return None


def print_mistakes(error: UserError) -> None:
    """Write the mistakes to standard error, numbered when there are several; at once, as several processes may tell them together."""
    lines = [f"error: {error.mistakes[0]}"]
    if len(error.mistakes) > 1:
        numbered = (f"  {number}. {mistake}" for number, mistake in enumerate(error.mistakes, start=1))
        lines = [f"{len(error.mistakes)} errors:", *numbered]
    sys.stderr.write("\n".join((*lines, "")))
    sys.stderr.flush()


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's main(); return its exit status: 2 for a `UserError`, 70 for a hang, 130 for a run that was interrupted."""
    try:
        return main() or 0
    except UserError as error:
        _let_the_first_tell()
        print_mistakes(error)
        return error.status
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 0
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _let_the_first_tell() -> None:
    """Wait, where torchrun started this process beside a first one: that likely makes the same mistake, and torchrun ends this one.

    Else each of a host's processes would print it. One that only this process makes is told after the wait: a while
    after the start that is as long as the process has lived, for the first one may come to the mistake that much later.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        with contextlib.suppress(KeyboardInterrupt):
            lived = time.monotonic() - BEGAN
            time.sleep(lived if LEAST_PATIENCE < lived < MOST_PATIENCE else LEAST_PATIENCE)
