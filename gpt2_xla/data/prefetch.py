"""Items made ahead of their use, by a thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(iterator: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """The iterator's items, made up to `depth` (1 or more) ahead by a background thread.

    An exception of the iterator is raised where its item would have come. Closing the generator ends the thread.
    """
    # (item, None), or (None, exception) last; StopIteration marks the end
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def fill() -> None:
        try:
            for item in iterator:
                ready.put((item, None))
                if closed.is_set():
                    return
            end: BaseException = StopIteration()
        except BaseException as error:  # noqa: BLE001  raised again in the consumer
            end = error
        if not closed.is_set():
            ready.put((None, end))

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, end = ready.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        # The thread may wait for room in the queue. After one more put it sees `closed`, so emptying once is enough.
        while not ready.empty():
            ready.get_nowait()
        thread.join()
