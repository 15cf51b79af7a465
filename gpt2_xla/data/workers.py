"""Worker processes: they get descriptions of work and return summaries; text and tokens never pass between processes."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

from gpt2_xla.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """One process per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Runs methods of an object that each process makes for itself. One worker is this process."""

    def __init__(self, workers: int, make: Callable[..., Any], *arguments: Any) -> None:
        """`make(*arguments)` gives the object; the arguments are pickled once per process."""
        self.workers = workers
        self._local = make(*arguments) if workers == 1 else None
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            # spawn, because fork would copy the threads' locks of pyarrow and tiktoken in whatever state they are.
            self._executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (make, arguments))

    def run(self, method: str, tasks: Iterable[Task]) -> Generator[Any, None, None]:
        """The results, as they come. An error of a worker is raised here; UserError if one dies."""
        if self._executor is None:
            yield from (getattr(self._local, method)(task) for task in tasks)
            return
        waiting: set[Future] = set()
        try:
            for task in tasks:
                with _interrupts_held():
                    waiting.add(self._executor.submit(_call, method, task))
                if len(waiting) >= 2 * self.workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of the {self.workers} tokenizing processes died (killed, or out of memory); "
                "try again with fewer --num-workers: finished work is kept"
            ) from error

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back. Processes started meanwhile never see it: the parent alone decides when they end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: Any  # what a worker process runs methods of, set when it starts


def _start_worker(make: Callable[..., Any], arguments: tuple) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = make(*arguments)


def _end_with_parent() -> None:
    """Without this, the workers of a killed parent would wait for tasks for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(method: str, task: Any) -> Any:
    return getattr(_worker, method)(task)
