"""A few bytes that the replicas of one host share: how far they are, where to stop, what went wrong.

xmp.spawn's replicas run in threads of child processes, where no signal handler can be installed, and its arguments are
pickled, so a multiprocessing.Value cannot reach them. A small locked file can.
"""

import fcntl
import json
import mmap
import os
import shutil
import struct
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_xla.errors import HangError, UserError

_LAYOUT = struct.Struct("=qq")  # newest poll that any replica made, poll to stop at (-1: none)
_PREFIX = "gpt2_xla-"
_STALE_SECONDS = 60.0  # a younger folder may not be locked yet


class ReplicaBoard:
    """Opened once by each replica and by the parent; every access holds the file's lock.

    Replicas poll at the same points of their program, so the number of a poll says where in it a replica is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), _LAYOUT.size)
        self._polls = 0
        self._owned: int | None = None  # the descriptor that holds the folder's lock

    @classmethod
    def create(cls) -> "ReplicaBoard":
        """A new board in a temporary folder of its own, which is locked as long as this process lives."""
        _sweep(Path(tempfile.gettempdir()))
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        (folder / "board").write_bytes(_LAYOUT.pack(-1, -1))
        board = cls(folder / "board")
        board._owned = _lock_folder(folder)
        return board

    def poll(self) -> bool:
        """Whether this replica shall stop here.

        The poll to stop at lies beyond every poll that any replica has made, and both are read and written under one
        lock, so all replicas of the host stop at the same one without talking to each other.
        """
        number, self._polls = self._polls, self._polls + 1
        with self._locked():
            newest, stop = _LAYOUT.unpack_from(self._memory)
            _LAYOUT.pack_into(self._memory, 0, max(newest, number), stop)
        return 0 <= stop <= number

    def request_stop(self) -> None:
        """Stop all replicas at the first poll that none of them has made; asking again changes nothing."""
        with self._locked():
            newest, stop = _LAYOUT.unpack_from(self._memory)
            _LAYOUT.pack_into(self._memory, 0, newest, stop if stop >= 0 else newest + 1)

    def report_failure(self, error: BaseException) -> None:
        """Leave word of what ended this replica; the first one to say counts."""
        mistakes = list(error.mistakes) if isinstance(error, UserError) else None
        report = {
            "mistakes": mistakes,
            "hang": isinstance(error, HangError),
            "traceback": "".join(traceback.format_exception(error)),
        }
        with self._locked():
            if not self._failure_path.exists():
                temporary = self._failure_path.with_suffix(".tmp")
                temporary.write_text(json.dumps(report))
                temporary.replace(self._failure_path)

    def failure(self) -> dict[str, object] | None:
        """What `report_failure` left: {"mistakes": [...] or None, "hang": bool, "traceback": text}."""
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
        if self._owned is not None:
            os.close(self._owned)

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


def _lock_folder(folder: Path) -> int | None:
    """Hold the folder's lock with the returned descriptor; None if another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove the folders of runs that were killed before they could: nobody holds their lock."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if not (folder / "board").is_file() or time.time() - folder.stat().st_mtime < _STALE_SECONDS:
                continue
            descriptor = _lock_folder(folder)
        except OSError:  # another user's, or gone by now
            continue
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
