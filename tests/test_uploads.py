"""A slow store holds up neither training nor saving; what is copied is not deleted meanwhile."""

import threading
from pathlib import Path

import pytest
from commands import PATIENCE

from gpt2_xla import uploads
from gpt2_xla.remote_store import StoreError
from gpt2_xla.uploads import Uploads


class Store:
    """Takes checkpoints one at a time, when the test lets it."""

    def __init__(self):
        self.copied, self.let, self.began, self.error = [], threading.Semaphore(0), threading.Event(), None

    def copy_records(self, run_dir):
        self.copied.append("records")

    def publish(self, folder, keep):
        self.began.set()
        assert self.let.acquire(timeout=PATIENCE)
        if self.error:
            raise self.error
        self.copied.append(folder.name)

    def withdraw_after(self, step):
        self.copied.append(f"withdrawn after {step}")


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(uploads, "RemoteRun", lambda url: found)
    return found


@pytest.fixture
def failures():
    return []


@pytest.fixture
def copies(store, failures, tmp_path):
    made = Uploads("memory://run", tmp_path, 3, failures.append)
    yield made
    store.let.release(9)
    made.close()


def test_of_those_offered_during_a_copy_only_the_last_is_copied_and_none_is_waited_for(copies, store):
    for name in "abc":
        copies.offer(Path(name))  # returns at once: nothing is let through yet
        assert store.began.wait(PATIENCE)
    assert copies.in_use() == {Path("a"), Path("c")}
    store.let.release(2)
    copies.wait()
    assert store.copied == ["records", "a", "records", "c"]
    assert copies.in_use() == set()


def test_who_waits_gives_signs_of_life(copies, store, monkeypatch):
    monkeypatch.setattr(uploads, "POLL", 0.01)
    signs = []

    def alive():
        signs.append(1)
        if len(signs) == 3:
            store.let.release()

    copies.offer(Path("a"))
    copies.wait(alive)
    assert len(signs) >= 3


@pytest.mark.parametrize("error", [StoreError("s3://b/a: no permission"), ValueError("odd")])
def test_a_failure_is_told_and_the_next_copy_is_tried(copies, store, failures, error):
    store.error = error
    store.let.release()
    copies.offer(Path("a"))
    copies.wait()
    (told,) = failures
    assert isinstance(told, StoreError)
    assert copies.failure is told
    store.error = None
    store.let.release()
    copies.offer(Path("b"))
    copies.wait()
    assert copies.failure is None
    assert store.copied[-1] == "b"


def test_copies_of_a_course_that_is_left_are_withdrawn_after_the_copy_in_flight(copies, store):
    copies.offer(Path("a"))
    assert store.began.wait(PATIENCE)
    copies.offer(Path("b"))
    copies.withdraw_after(5, alive=store.let.release)  # while it waits: by then b is forgotten
    assert store.copied == ["records", "a", "withdrawn after 5"]
