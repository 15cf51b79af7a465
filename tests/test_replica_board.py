"""The board that replicas share: whoever asks, whenever, all replicas stop before the same step."""

import json
import multiprocessing
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import PATIENCE

from gpt2_xla.errors import UserError
from gpt2_xla.runtime.replica_board import ReplicaBoard

LAST_STEP = 300  # far beyond any request: a replica that gets there missed the stop
COLLECTIVE = 3  # steps between two meetings of the replicas: so far one may be ahead of another


@pytest.fixture
def board():
    board = ReplicaBoard.create()
    yield board
    if board.path.parent.exists():
        board.remove()


def steps_until_stop(path: Path, request_at: int | None, meeting) -> int:
    """Poll before each step as a training replica does; the number of the step that it stopped before.

    Like the collectives of training, the barrier `meeting` breaks if one replica goes on without another.
    """
    board = ReplicaBoard(path)
    try:
        for step in range(LAST_STEP):
            if board.poll():
                return step
            if step == request_at:
                board.request_stop()
            if step % COLLECTIVE == 0:
                meeting.wait(PATIENCE)
        return LAST_STEP
    finally:
        board.close()


def replica_process(paths: list[Path], requests: list[int | None], meeting, results) -> None:
    results.put([steps_until_stop(path, request, meeting) for path, request in zip(paths, requests, strict=True)])


def test_nobody_stops_unasked(board):
    assert [board.poll() for _ in range(100)] == [False] * 100


def test_a_stop_comes_at_the_first_poll_that_no_replica_has_made(board):
    fast, slow = ReplicaBoard(board.path), ReplicaBoard(board.path)
    assert not any(fast.poll() for _ in range(8))
    assert not any(slow.poll() for _ in range(5))
    board.request_stop()
    assert fast.poll()
    assert [slow.poll() for _ in range(5, 9)] == [False, False, False, True]
    board.request_stop()  # asking again changes nothing
    assert fast.poll()
    assert slow.poll()
    fast.close()
    slow.close()


def test_a_stop_before_the_first_poll_is_heard(board):
    board.request_stop()
    assert board.poll()


def test_threads_all_stop_before_the_same_step_in_many_random_trials():
    chance = random.Random(0)
    for _ in range(60):
        board = ReplicaBoard.create()
        requests = [chance.choice([None, chance.randrange(60)]) for _ in range(4)]
        requests[chance.randrange(4)] = chance.randrange(60)
        meeting = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            stops = list(pool.map(steps_until_stop, [board.path] * 4, requests, [meeting] * 4, timeout=PATIENCE))
        asked = [request for request in requests if request is not None]
        assert len(set(stops)) == 1, (requests, stops)
        assert min(asked) < stops[0] < LAST_STEP
        board.remove()


def test_processes_all_stop_before_the_same_step_in_many_random_trials():
    context = multiprocessing.get_context("spawn")
    chance = random.Random(1)
    trials = 80
    boards = [ReplicaBoard.create() for _ in range(trials)]
    requests = [[chance.choice([None, chance.randrange(50)]) for _ in range(trials)] for _ in range(3)]
    requests[0] = [chance.randrange(50) for _ in range(trials)]
    meeting, results = context.Barrier(3), context.Queue()
    arguments = [([board.path for board in boards], requests[i], meeting, results) for i in range(3)]
    processes = [context.Process(target=replica_process, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    stops = [results.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    for trial, of_replicas in enumerate(zip(*stops, strict=True)):
        assert len(set(of_replicas)) == 1, (trial, of_replicas)
        assert of_replicas[0] < LAST_STEP
        boards[trial].remove()


def test_the_first_failure_counts(board):
    assert board.failure() is None
    board.report_failure(UserError(["one mistake", "another"]))
    board.report_failure(RuntimeError("a consequence of the first"))
    failure = board.failure()
    assert failure is not None
    assert failure["mistakes"] == ["one mistake", "another"]
    assert "a consequence" not in json.dumps(failure)


def test_a_failure_that_is_no_users_mistake_keeps_its_traceback(board):
    def deep_in_the_loop() -> None:
        raise ZeroDivisionError("the cause")

    with pytest.raises(ZeroDivisionError) as caught:
        deep_in_the_loop()
    board.report_failure(caught.value)
    failure = board.failure()
    assert failure is not None
    assert failure["mistakes"] is None
    assert "deep_in_the_loop" in str(failure["traceback"])
    assert "ZeroDivisionError: the cause" in str(failure["traceback"])


def test_of_failures_at_the_same_time_one_is_kept_whole():
    for _ in range(20):
        board = ReplicaBoard.create()

        def fail(number: int, path: Path = board.path) -> None:
            own = ReplicaBoard(path)
            own.report_failure(UserError([f"replica {number}"] * 200))
            own.close()

        threads = [threading.Thread(target=fail, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        failure = board.failure()
        assert failure is not None
        mistakes = failure["mistakes"]
        assert isinstance(mistakes, list)
        assert len(mistakes) == 200
        assert len(set(mistakes)) == 1
        board.remove()


def test_removing_a_board_leaves_nothing():
    board = ReplicaBoard.create()
    board.report_failure(RuntimeError("x"))
    board.remove()
    assert not board.path.parent.exists()


def test_the_next_board_sweeps_those_of_killed_runs_and_no_other(board, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alive, left, young = ReplicaBoard.create(), tmp_path / "gpt2_xla-left", tmp_path / "gpt2_xla-young"
    for folder in (left, young):
        folder.mkdir()
        (folder / "board").write_bytes(b"\0" * 16)
    for folder in (left, alive.path.parent):
        os.utime(folder, (1e9, 1e9))
    ReplicaBoard.create().remove()
    assert sorted(tmp_path.iterdir()) == sorted([alive.path.parent, young])
    alive.remove()
