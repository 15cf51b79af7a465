"""SIGTERM and Ctrl-C in a process that trains itself: the first asks it to stop, the second ends it."""

import os
import signal
from typing import Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSource(Protocol):
    """What tells a runtime to stop: `ReplicaBoard` for replicas, `StopSignals` for a process of its own."""

    def enter_step(self, step: int) -> bool:
        """Whether to stop instead of running `step`."""
        ...

    def request_stop(self) -> bool:
        """Stop before the next step; False if that was asked before, or nobody is listening yet."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class StopSignals:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._announce = False

    def watch(self, announce: bool) -> None:
        """From now on the first signal only makes `requested` true (and says so); a second one ends the process at once."""
        self._announce = announce
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def enter_step(self, step: int) -> bool:  # noqa: ARG002
        """Whether this process was asked to stop."""
        return self.requested

    def request_stop(self) -> bool:
        """Stop before the next step; False if that was asked before."""
        before, self.requested = self.requested, True
        return not before

    def close(self) -> None:
        """There is nothing to release."""

    def _on_signal(self, *_: object) -> None:
        self.requested = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self._announce:
            os.write(2, b"\nstopping after this step; once more to quit at once\n")  # print is not safe in a handler
