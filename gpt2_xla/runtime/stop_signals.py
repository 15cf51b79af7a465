"""Being asked to stop: SIGTERM, Ctrl-C, SIGUSR1. The first one saves and ends the run, a second one ends the process."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun passes on the Ctrl-C that the terminal has sent to its processes already: that is one request, not two.
ECHO_SECONDS = 2.0


class StopSource(Protocol):
    """Who is asked whether to stop: `StopRequest` by a process alone, `Votes` and `ReplicaBoard` by several."""

    def poll(self) -> bool:
        """Whether to stop here; the same answer on every replica, as all ask at the same points of their program."""
        ...

    def request_stop(self) -> None:
        """Have all replicas stop at a coming poll."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def poll(self) -> bool:
        return self.requested

    def request_stop(self) -> None:
        self.requested = True

    def close(self) -> None:
        """There is nothing to release."""


class StopSignals(StopRequest):
    """Inside this context the stop signals are requests. Enter it first of all, in the main thread: no signal is lost then.

    A thread reads them from a pipe, so they are heard, and answered, while the main thread is in a compiler for minutes.
    With `patient` the first one only sets `requested`, and a second SIGTERM or Ctrl-C calls `quit`; else the first does.
    """

    def __init__(self, patient: bool = True) -> None:
        super().__init__()
        self.quit: Callable[[int], None] = _end_process
        self._quit_after = None if patient else 0.0  # a time; None: nobody pressed yet
        self._announce = os.environ.get("RANK", "0") == "0"  # once, not once per process of torchrun

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # as set_wakeup_fd wants it
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The handler has nothing to do: Python's own writes the signal's number into the pipe.
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True, name="stop signals")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number == 0:
                    return
                if number in STOP_SIGNALS:
                    self._heard(number)

    def _heard(self, number: int) -> None:
        now = time.monotonic()
        first = not self.requested
        self.requested = True
        if number == signal.SIGUSR1:  # schedulers send it ahead of SIGTERM; nobody insists with it
            pass
        elif self._quit_after is None:
            self._quit_after = now + ECHO_SECONDS
        elif now >= self._quit_after:
            self.quit(number)
            return
        if first and self._announce:
            os.write(2, b"\nstopping after this step; once more to quit at once\n")


def _end_process(number: int) -> None:
    os._exit(128 + number)  # as the shell reports a process that the signal ended
