"""Copies of finished checkpoints to --remote-dir, made in a thread of its own: a slow store holds up neither training nor saving."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt2_xla.remote_checkpoints import RemoteRun
from gpt2_xla.remote_store import StoreError

POLL = 5.0  # seconds between two signs of life while somebody waits


class Uploads:
    """One copy at a time, always of the checkpoint offered last: those offered meanwhile are passed by."""

    def __init__(self, url: str, run_dir: Path, keep: int, failed: Callable[[StoreError], None]) -> None:
        """`keep`: --saved-checkpoint-limit. `failed` hears, in the thread, of each copy that could not be made."""
        self._remote, self._run_dir, self._keep, self._failed = RemoteRun(url), run_dir, keep, failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._changed = threading.Condition()
        self._next: Path | None = None
        self._current: Path | None = None
        self._running = False
        self.failure: StoreError | None = None  # of the last copy

    def offer(self, folder: Path) -> None:
        """Copy this checkpoint as soon as the copy in flight has ended."""
        with self._changed:
            self._next = folder
            if not self._running:
                self._running = True
                self._thread.submit(self._work)

    def in_use(self) -> set[Path]:
        """Checkpoints that must not be deleted now."""
        with self._changed:
            return {folder for folder in (self._current, self._next) if folder is not None}

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until all is copied that was offered last; `alive` is called now and then."""
        with self._changed:
            while self._running:
                alive()
                self._changed.wait(POLL)

    def withdraw_after(self, step: int, alive: Callable[[], None] = lambda: None) -> None:
        """Delete the copies of checkpoints after `step`, once none is in flight; raises StoreError. For `alive` see `wait`."""
        with self._changed:
            self._next = None
        self.wait(alive)
        self._remote.withdraw_after(step)

    def close(self) -> None:
        """Let the copy in flight end, and end the thread."""
        self._thread.shutdown()

    def _work(self) -> None:
        while True:
            with self._changed:
                folder, self._next = self._next, None
                self._current, self._running = folder, folder is not None
                self._changed.notify_all()
            if folder is None:
                return
            try:
                # The records first: those of the steps before a checkpoint must not be missing beside it.
                self._remote.copy_records(self._run_dir)
                self._remote.publish(folder, self._keep)
                self.failure = None
            except StoreError as error:
                self.failure = error
                self._failed(error)
            except Exception as error:  # noqa: BLE001 - whatever a store's package raises, training goes on
                self.failure = StoreError(f"{folder.name} could not be copied: {error!r}")
                self._failed(self.failure)
