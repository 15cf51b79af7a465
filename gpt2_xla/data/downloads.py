"""Downloads of the hub's files ahead of the workers that will read them."""

import contextlib
import threading
from collections import Counter
from types import TracebackType

from gpt2_xla.data import hub
from gpt2_xla.data.units import Columns, Unit

AHEAD = 4  # files that are downloaded and not yet tokenized, besides those that the workers are at


class DownloadsAhead:
    """A thread that downloads the files of some units in their order; does nothing for local and streamed ones.

    It tells nobody about errors: the worker that needs the file meets them again, and has a sentence for them. A download
    that a worker wants meanwhile is waited for, not made twice: huggingface_hub locks it.
    """

    def __init__(self, units: list[Unit], columns: Columns, workers: int) -> None:
        """`units`: those still to do, in the order of the workers."""
        urls = [] if columns.streaming else [file.url for unit in units for file in unit.files]
        self._left = Counter(url for url in urls if url.startswith("hf://"))  # units to come of each file
        self._cache_dir = columns.cache_dir
        self._room = threading.Semaphore(workers + AHEAD)
        self._stopped = False
        # A daemon, because a download can't be interrupted: a run that ends early does not wait for it.
        self._thread = threading.Thread(target=self._download, args=(list(self._left),), daemon=True)

    def finished(self, unit: Unit) -> None:
        """A unit is done; when it was its file's last, there is room for another file."""
        for file in unit.files:
            if file.url in self._left:
                self._left[file.url] -= 1
                if self._left[file.url] == 0:
                    self._room.release()

    def _download(self, urls: list[str]) -> None:
        for url in urls:
            self._room.acquire()
            if self._stopped:
                return
            with contextlib.suppress(Exception):
                hub.downloaded(url, self._cache_dir)

    def __enter__(self) -> "DownloadsAhead":
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._stopped = True
        self._room.release()
