"""Documents to token arrays, in worker processes, in the documents' order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process

import numpy as np

from gpt2_xla.data.shards import dtype_for
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer, replace_surrogates

CHUNK_CHARACTERS = 2**18  # text per task: 20 ms of tiktoken, long against the cost of handing it over


@dataclass(frozen=True)
class Encoded:
    """Some documents in a row, each followed by end-of-text."""

    tokens: np.ndarray  # uint16 or uint32, as the vocabulary demands
    documents: int
    text_bytes: int  # UTF-8


def default_workers() -> int:
    """One process per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode(tokenizer: Tokenizer, documents: list[str]) -> Encoded:
    """Tokens of some documents, each followed by end-of-text."""
    end = [tokenizer.end_of_text]
    dtype = dtype_for(tokenizer.vocab_size)
    texts = [replace_surrogates(document) for document in documents]
    parts = [np.array(tokens, dtype) for text in texts for tokens in (tokenizer.encode(text), end)]
    return Encoded(np.concatenate(parts), len(texts), sum(len(text.encode()) for text in texts))


def encode_all(documents: Iterable[str], tokenizer: Tokenizer, workers: int) -> Generator[Encoded, None, None]:
    """All documents but empty ones, in order. The tokens do not depend on `workers`; 1 starts no process.

    Raises UserError if a worker dies. When the iterator ends, is closed or raises, its processes have ended.
    """
    if workers == 1:
        yield from (encode(tokenizer, chunk) for chunk in _chunks(documents))
        return
    # spawn, because fork would copy the threads' locks of pyarrow and tiktoken in whatever state they are.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer.name,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in _chunks(documents):
            with _interrupts_held():
                waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of the {workers} tokenizing processes died (killed, or out of memory); try again with fewer --num-workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for document in documents:
        if not document:
            continue
        chunk.append(document)
        characters += len(document)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back. Processes started meanwhile never see it: the parent alone decides when they end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_tokenizer: Tokenizer  # of a worker process, set when it starts


def _start_worker(tokenizer: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(tokenizer)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, the workers of a killed parent would wait for tasks for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(documents: list[str]) -> Encoded:
    return encode(_worker_tokenizer, documents)
