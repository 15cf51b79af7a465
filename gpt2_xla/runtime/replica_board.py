"""A few bytes that the processes of one host share: who is at which step, when to stop, what went wrong.

xmp.spawn's replicas run in threads of child processes, where no signal handler can be installed, and its arguments are
pickled, so a multiprocessing.Value cannot reach them. A small locked file can.
"""

import fcntl
import json
import mmap
import struct
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_xla.errors import UserError

_LAYOUT = struct.Struct("=qq")  # newest step that any replica entered, step to stop before (-1: none)


class ReplicaBoard:
    """Opened once by each replica and by the parent; every access holds the file's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), _LAYOUT.size)

    @classmethod
    def create(cls) -> "ReplicaBoard":
        """A new board in a temporary folder of its own."""
        path = Path(tempfile.mkdtemp(prefix="gpt2_xla-")) / "board"
        path.write_bytes(_LAYOUT.pack(-1, -1))
        return cls(path)

    def enter_step(self, step: int) -> bool:
        """Record that this replica is about to run `step`; True if it shall stop instead.

        The stop step lies beyond every step that any replica has entered, and both are read and written under one
        lock, so all replicas of the host stop before the same step without talking to each other.
        """
        with self._locked():
            newest, stop = _LAYOUT.unpack_from(self._memory)
            _LAYOUT.pack_into(self._memory, 0, max(newest, step), stop)
        return 0 <= stop <= step

    def request_stop(self) -> bool:
        """Stop all replicas before the first step that none of them has entered.

        False if none has entered a step yet, or if they were asked before: nobody may be listening.
        """
        with self._locked():
            newest, stop = _LAYOUT.unpack_from(self._memory)
            _LAYOUT.pack_into(self._memory, 0, newest, stop if stop >= 0 else newest + 1)
        return newest >= 0 and stop < 0

    def report_failure(self, error: BaseException) -> None:
        """Leave word of what ended this replica; the first one to say counts."""
        mistakes = list(error.mistakes) if isinstance(error, UserError) else None
        report = {"mistakes": mistakes, "traceback": "".join(traceback.format_exception(error))}
        with self._locked():
            if not self._failure_path.exists():
                temporary = self._failure_path.with_suffix(".tmp")
                temporary.write_text(json.dumps(report))
                temporary.replace(self._failure_path)

    def failure(self) -> dict[str, object] | None:
        """What `report_failure` left: {"mistakes": [...] or None, "traceback": text}."""
        return json.loads(self._failure_path.read_text()) if self._failure_path.exists() else None

    def close(self) -> None:
        """Release the file; the parent also removes it."""
        self._memory.close()
        self._file.close()

    def remove(self) -> None:
        """Delete the board and its folder."""
        self.close()
        for path in (self.path, self._failure_path):
            path.unlink(missing_ok=True)
        self.path.parent.rmdir()

    @property
    def _failure_path(self) -> Path:
        return self.path.with_name("failure")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)  # held per open file: works between threads and between processes
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
