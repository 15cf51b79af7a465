"""The watchdog bites a run that makes no progress, and no other."""

import json
import threading
import time

import pytest
from commands import PATIENCE

from gpt2_xla.errors import HangError
from gpt2_xla.watchdog import Watchdog


@pytest.fixture
def watchdogs(tmp_path):
    """Builds watchdogs that note an end instead of making it."""
    built = []

    def build(rank, timeout=0.5, **options):
        ended = threading.Event()
        errors = []
        dog = Watchdog(
            timeout, rank, 2, tmp_path / "progress", abandon=errors.append, end=lambda _: ended.set(), **options
        )
        built.append(dog)
        return dog, ended, errors

    yield build
    for dog in built:
        dog.close()


def wait_for_word(folder, rank, phase):
    """Return when the rank has left word that it is in this phase."""
    file, deadline = folder / "progress" / f"rank-{rank:05d}.json", time.monotonic() + PATIENCE
    while not file.exists() or json.loads(file.read_text())["phase"] != phase:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_progress_keeps_it_quiet(watchdogs):
    dog, ended, _ = watchdogs(0, timeout=2)  # seconds, as long as a busy machine may keep this thread from a mark
    for step in range(50):
        dog.mark("step", step)
        assert not ended.wait(0.05)


def test_it_ends_the_run_with_the_place_of_every_rank(watchdogs, tmp_path, capfd):
    (one, ended, errors), (other, _, _) = watchdogs(0), watchdogs(1)
    other.mark("save", 13)
    wait_for_word(tmp_path, 1, "save")
    one.mark("step", 12)
    assert ended.wait(PATIENCE)
    assert isinstance(errors[0], HangError)
    assert "rank 0 of 2 is in phase step after step 12\n  rank 0: step after step 12, for " in str(errors[0])
    assert "\n  rank 1: save after step 13, for " in str(errors[0])
    printed = capfd.readouterr().err
    assert "is MainThread" in printed
    assert "test_it_ends_the_run_with_the_place_of_every_rank" in printed


def test_a_rank_that_is_gone_is_told_by_its_silence(watchdogs, tmp_path):
    (one, ended, errors), (other, _, _) = watchdogs(0), watchdogs(1)
    other.mark("data", 3)
    wait_for_word(tmp_path, 1, "data")
    other._done.set()  # as a stopped process: it writes no more
    one.mark("step", 3)
    assert ended.wait(PATIENCE)
    assert "rank 1: data after step 3" in str(errors[0])
    assert "so its process is stopped or gone" in str(errors[0])


def test_a_compilation_may_take_longer(watchdogs):
    dog, ended, _ = watchdogs(0, compiles=True)
    dog.mark("step", 0)  # the first of its kind: it compiles
    assert not ended.wait(1.2)
    dog.mark("step", 1)
    assert ended.wait(PATIENCE)


def test_nothing_is_left_behind(watchdogs, tmp_path):
    dogs = [watchdogs(rank)[0] for rank in range(2)]
    dogs[0].mark("step", 1)
    wait_for_word(tmp_path, 0, "step")
    for dog in dogs:
        dog.close()
    assert list(tmp_path.iterdir()) == []
