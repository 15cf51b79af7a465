"""A stop that comes at any moment is heard and loses nothing; the same command continues. So it is with dead processes."""

import http.server
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import (
    PATIENCE,
    PYTHON,
    QUICK_XLA,
    ROOT,
    TINY,
    TRAIN,
    data_flags,
    finish,
    records,
    replica_processes,
    run,
    start,
    still_alive,
    torchrun,
    wait_for_step,
    wait_until,
    xla_replicas,
)
from conftest import write_split
from small_runs import said_here

import run_pretrain


def catches_sigterm(process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in status if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def checkpoints(run_dir):
    return sorted(path.name for path in run_dir.glob("step-*"))


def test_a_signal_during_start_up_is_not_lost(tmp_path, text_data):
    process = start(*TRAIN, *TINY, *data_flags(text_data), "--train-steps", "100000", "--checkpoints-dir", tmp_path)
    wait_until(process, lambda: catches_sigterm(process))  # now it imports torch, for seconds
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0, output
    assert "stopped before the first step: there is nothing to save; the same command begins anew" in output
    assert checkpoints(tmp_path) == []


@pytest.fixture(scope="module")
def long_validation(tmp_path_factory):
    """4 million tokens to validate on: at 256 a batch, for half a minute at least."""
    folder = tmp_path_factory.mktemp("long")
    write_split(folder, "train", np.arange(40_000) % 250)
    write_split(folder, "valid", np.arange(4_000_000) % 250)
    return folder


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (TRAIN, signal.SIGUSR1),
        (torchrun(2), signal.SIGTERM),
        pytest.param(xla_replicas(2), signal.SIGTERM, marks=pytest.mark.xla),
    ],
    ids=["torch", "torchrun", "xla"],
)
def test_a_signal_ends_a_validation_on_all_replicas_and_a_restart_makes_up_for_it(
    command, number, tmp_path, long_validation
):
    flags = [*TINY, *data_flags(long_validation), "--train-steps", "3", "--checkpoints-dir", tmp_path]
    process = start(*command, *flags, **QUICK_XLA)
    wait_for_step(process, tmp_path, 3)  # logged just before the last validation begins
    process.send_signal(number)
    output = finish(process)
    assert "stopped at step 3 of 3; the same command continues" in output
    if command != torchrun(2):  # which ends with an error of its own after any signal
        assert process.returncode == 0
        assert "Traceback" not in output
    assert "gpt2_xla/" not in output.split("Traceback")[-1]
    assert records(tmp_path, "valid") == []
    assert checkpoints(tmp_path) == ["step-00000003"]
    if command == TRAIN:
        output = said_here(run_pretrain.main, *flags, "--valid-steps", "2")
        assert "all 3 steps are done" in output
        assert [record["step"] for record in records(tmp_path, "valid")] == [3]
        assert "step 3: validation" not in said_here(run_pretrain.main, *flags)  # done once


def test_the_maintenance_notice_is_a_signal(tmp_path, text_data):
    notice = threading.Event()
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            if "wait_for_change=true" in self.path:
                notice.wait(PATIENCE)
            values = {True: "TERMINATE_ON_HOST_MAINTENANCE", False: "NONE"}
            text = values[notice.is_set()] if "maintenance-event" in self.path else "FALSE"
            self.send_response(200)
            self.send_header("ETag", "abc")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        flags = [*TINY, *data_flags(text_data), "--train-steps", "100000", "--checkpoints-dir", tmp_path]
        process = start(*TRAIN, *flags, GCE_METADATA_HOST=f"127.0.0.1:{server.server_port}")
        wait_for_step(process, tmp_path, 2)
        wait_until(process, lambda: len({path.split("?")[0] for path, _ in asked}) == 2)  # both are watched
        notice.set()
        output = finish(process)
    finally:
        notice.set()
        server.shutdown()
        server.server_close()
    assert process.returncode == 0, output
    assert "the metadata server says maintenance-event = TERMINATE_ON_HOST_MAINTENANCE" in output
    assert len(checkpoints(tmp_path)) == 1
    assert {flavor for _, flavor in asked} == {"Google"}
    base = "/computeMetadata/v1/instance/"
    assert {path.split("?")[0] for path, _ in asked} == {base + "maintenance-event", base + "preempted"}


def test_torchrun_restarts_a_killed_worker_and_the_run_ends_as_if_nothing_had_been(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--train-steps", "60", "--save-interval", "20", "--checkpoints-dir"]
    elastic = list(torchrun(2))
    elastic.insert(-1, "--max-restarts=2")
    run(*elastic, *flags, tmp_path / "whole")
    slow = [*elastic[:-1], str(ROOT / "tests" / "pausing_run.py")]
    process = start(*slow, *flags, tmp_path / "killed", PAUSE_AT="30", PAUSE_UNTIL=str(tmp_path / "go_on"))
    wait_for_step(process, tmp_path / "killed", 29)
    wait_until(process, (tmp_path / "killed" / "step-00000020").exists)  # it is written in the background
    workers = replica_processes(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    (tmp_path / "go_on").touch()
    output = finish(process)
    assert process.returncode == 0, output
    assert "resuming after step 20 of 60" in output
    for name in ("model.safetensors", "trainer_state/optimizer.safetensors"):
        one, other = ((tmp_path / run / "step-00000060" / name).read_bytes() for run in ("whole", "killed"))
        assert one == other
    assert not still_alive(workers)


def test_workers_die_with_their_torchrun(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--train-steps", "60", "--checkpoints-dir", tmp_path]
    slow = [*torchrun(2)[:-1], str(ROOT / "tests" / "pausing_run.py")]
    process = start(*slow, *flags, PAUSE_AT="10")
    wait_for_step(process, tmp_path, 9)
    workers = replica_processes(process.pid)
    process.kill()
    process.wait(PATIENCE)
    assert len(workers) == 2
    left = still_alive(workers)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []


def test_a_hang_ends_with_every_ranks_phase_and_stacks(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--train-steps", "60", "--checkpoints-dir", tmp_path]
    process = start(
        *torchrun(2)[:-1],
        str(ROOT / "tests" / "pausing_run.py"),
        *flags,
        "--hang-timeout",
        "10",  # seconds, which a step of milliseconds does not take even where the cores are shared
        PAUSE_AT="10",
        RANK_PAUSED="1",
    )
    output = finish(process)
    assert process.returncode != 0
    for rank, phase, step in ((0, "step", 10), (1, "data", 10)):
        assert f"(--hang-timeout 10): rank {rank} of 2 is in phase {phase} after step {step}" in output
        assert f"  rank {rank}: {phase} after step {step}, for " in output
    assert " is MainThread" in output
    assert "pausing_run.py" in output  # the stack
    assert "exitcode  : 70" in output


def test_hosts_agree_on_when_to_stop_and_where_to_begin(tmp_path):
    program = (
        "import sys; rank = int(sys.argv[1])\n"
        "from gpt2_xla.runtime.votes import Votes, join_hosts, leave_hosts\n"
        "from gpt2_xla.runtime.stop_signals import StopRequest\n"
        "join_hosts('127.0.0.1', int(sys.argv[2]), rank, 2)\n"
        "stop = StopRequest(); votes = Votes(stop, None)\n"
        "print(votes.equal(7), votes.equal(rank))\n"
        "for poll in range(9):\n"
        "    if votes.poll(): print('stopped at', poll); break\n"
        "    if rank == 1 and poll == 3: votes.request_stop()\n"
        "votes.close(); leave_hosts()\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), None) as free:
        port = str(free.server_port)
    processes = [start(*PYTHON, "-c", program, str(rank), port) for rank in range(2)]
    outputs = [finish(process) for process in processes]
    for output in outputs:  # without what gloo may say of the one that came first
        told = [line for line in output.splitlines() if line.startswith(("True", "False", "stopped"))]
        assert told == ["True False", "stopped at 5"], output
