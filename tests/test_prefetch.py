"""Reading ahead: the same items, errors in their place, no thread left behind."""

import threading
from collections.abc import Iterator

import pytest
from commands import PATIENCE

from gpt2_xla.data.prefetch import prefetch
from gpt2_xla.errors import UserError


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_prefetch_yields_the_same_items(depth: int) -> None:
    assert list(prefetch(iter(range(50)), depth)) == list(range(50))
    assert not prefetch_threads()


def test_prefetch_works_ahead_by_its_depth_only() -> None:
    made: list[int] = []
    ahead = threading.Event()

    def numbers() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if i == 4:
                ahead.set()
            yield i

    items = prefetch(numbers(), 3)
    assert next(items) == 0
    assert ahead.wait(PATIENCE)  # 1 taken, 3 ready, 1 in hand
    assert made == [0, 1, 2, 3, 4]
    items.close()
    assert not prefetch_threads()


@pytest.mark.parametrize("error", [UserError("a shard"), ValueError("x"), KeyboardInterrupt()])
def test_prefetch_raises_where_the_item_would_have_come(error: BaseException) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise error

    items = prefetch(failing(), 2)
    assert next(items) == 1
    with pytest.raises(type(error)):
        next(items)
    assert not prefetch_threads()


def test_prefetch_ends_its_thread_when_closed_at_any_moment() -> None:
    for taken in range(20):
        items = prefetch(iter(range(10**9)), 1 + taken % 3)
        for _ in range(taken):
            next(items)
        items.close()
    assert not prefetch_threads()
