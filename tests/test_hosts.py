"""torchrun over two hosts: a lost one comes back, a signal to one stops both, and who can't find the others says so."""

import contextlib
import itertools
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
from commands import (
    PATIENCE,
    ROOT,
    TINY,
    TRAIN,
    data_flags,
    finish,
    losses,
    records,
    replica_processes,
    run,
    start,
    torchrun,
    wait_for_step,
    wait_until,
)
from small_runs import run_here
from two_hosts import first_process, power_off, two_hosts, why_not

import run_pretrain
from gpt2_xla import evaluation
from gpt2_xla.errors import Stopped, UserError
from gpt2_xla.runtime.rendezvous import backend_mistakes, environment_mistakes, meet, restart_note
from gpt2_xla.runtime.stop_signals import StopRequest
from gpt2_xla.script_config import EvaluateConfig

STATE = ("model.safetensors", "trainer_state/optimizer.safetensors")
PAUSING = ROOT / "tests" / "pausing_run.py"


@pytest.fixture(scope="module")
def skipped_for():
    """Why this machine can't make two hosts, found once."""
    return why_not()


@pytest.fixture
def hosts(skipped_for, tmp_path):
    if skipped_for:
        pytest.skip(skipped_for)
    with two_hosts(tmp_path) as made:
        yield made


def flags(data, folder, steps=60):
    return [*TINY, *data_flags(data), "--train-steps", steps, "--save-interval", 20, "--checkpoints-dir", folder]


def final_bytes(run_dir, step=60):
    return [(run_dir / f"step-{step:08d}" / name).read_bytes() for name in STATE]


def test_a_host_that_died_comes_back_and_the_run_ends_as_if_nothing_had_been(hosts, tmp_path, text_data):
    run(*torchrun(2), *flags(text_data, tmp_path / "whole"))
    # So that the run does not end before its host does.
    pause = {"PAUSE_AT": "30", "PAUSE_UNTIL": str(tmp_path / "gone")}
    folder = tmp_path / "run"
    one, other = (host.torchrun(PAUSING, *flags(text_data, folder), **pause) for host in hosts)
    wait_for_step(one, folder, 29)
    wait_until(one, (folder / "step-00000020").is_dir)
    power_off(other)
    (tmp_path / "gone").touch()
    again = hosts[1].torchrun(ROOT / "run_pretrain.py", *flags(text_data, folder))
    outputs = [finish(process) for process in (one, again)]
    assert [process.returncode for process in (one, again)] == [0, 0], outputs
    assert "resuming after step 20 of 60" in outputs[0]
    assert "note: --max-restarts" not in outputs[0]
    assert final_bytes(folder) == final_bytes(tmp_path / "whole")
    last = {record["step"]: record["loss"] for record in records(folder)}  # steps 21 to 30 stand there twice
    assert [last[step] for step in range(1, 61)] == losses(tmp_path / "whole")


def test_a_signal_to_one_host_stops_both_at_the_same_step_and_the_same_command_continues(hosts, tmp_path, text_data):
    folder = tmp_path / "run"
    processes = [host.torchrun(ROOT / "run_pretrain.py", *flags(text_data, folder, 100_000)) for host in hosts]
    wait_for_step(processes[0], folder, 5)
    torchruns = [first_process(process) for process in processes]
    os.kill(torchruns[1], signal.SIGTERM)  # on host-b; rank 0 is on host-a
    assert "gpt2_xla/" not in finish(processes[1]).split("Traceback")[-1]  # torchrun's own error, as after any signal
    wait_until(processes[0], lambda: not replica_processes(torchruns[0]))
    output = power_off(processes[0])  # torchrun there waits up to 5 minutes for the other one, which is gone
    stopped = max(record["step"] for record in records(folder))
    assert f"stopped at step {stopped} of 100000; the same command continues" in output
    assert "Traceback" not in output
    on_one = run(*TRAIN, "--checkpoints-dir", folder, "--train-steps", stopped + 2)
    assert f"resuming after step {stopped} of {stopped + 2}" in on_one


def test_a_host_whose_own_name_is_loopback_says_which_variable_mends_it(hosts, tmp_path, text_data):
    for host in hosts:  # as Debian's installer writes /etc/hosts
        own = tmp_path / f"hosts-of-{host.name}"
        own.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
        host.names = own
    command = [*TRAIN, *flags(text_data, tmp_path / "run", 2)]
    world = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29501", "WORLD_SIZE": "2"}
    processes = [host.start(*command, **world, RANK=str(rank)) for rank, host in enumerate(hosts)]
    deadline = time.monotonic() + PATIENCE
    while not (ended := [process for process in processes if process.poll() is not None]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = finish(ended[0])  # the other one may wait; torchrun would end it
    assert ended[0].returncode == 2
    assert f"error: the 2 processes met at {hosts[0].address}:29501, but rank" in told
    assert "set GLOO_SOCKET_IFNAME to the network interface that joins them" in told
    assert "Traceback" not in told
    assert "/third_party/" not in told.split("error: ")[-1]
    for host in hosts:
        host.close()
    world |= {"GLOO_SOCKET_IFNAME": "cable"}
    processes = [host.start(*command, **world, RANK=str(rank)) for rank, host in enumerate(hosts)]
    outputs = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


@pytest.fixture
def port():
    """A free one that the system gives to nobody who does not ask for it, as it does from 32768 on."""
    first = 20_000 + os.getpid() % 10_000
    for number in itertools.count(first):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", number)):
            return str(number)


def test_hosts_that_count_otherwise_are_told(port, tmp_path, text_data):
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [*TRAIN, *TINY, "--train-batch-size", 6, "--eval-batch-size", 6, *data_flags(text_data)]
    command += ["--checkpoints-dir", tmp_path, "--device", "cpu"]
    processes = [start(*command, **world, RANK=str(rank), WORLD_SIZE=str(2 + rank)) for rank in range(2)]
    outputs = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert not any("Traceback" in output for output in outputs)
    assert (
        "error: rank 1 was started as one of 3 processes, rank 0 as one of 2; start the command on every" in outputs[0]
    )
    assert outputs[1].count("error: rank ") == 1  # the same, or that rank 0 is gone


def answers(port):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", int(port))) == 0


def environment(rank, port, **more):
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}


def test_who_waits_in_vain_says_for_whom(port):
    with pytest.raises(
        UserError, match=f"^rank 0 of 2 waited at 127.0.0.1:{port} for rank 1, which did not come within 1 s"
    ):
        meet(environment(0, port), timedelta(seconds=1), StopRequest())


def test_who_finds_nobody_says_where(port):
    with pytest.raises(UserError, match=f"^rank 1 of 2 finds no rank 0 at 127.0.0.1:{port} within 1 s"):
        meet(environment(1, port), timedelta(seconds=1), StopRequest())


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use"):
        meet(environment(0, str(taken.getsockname()[1])), timedelta(seconds=1), StopRequest())


def test_who_waits_for_the_others_hears_a_signal(port, tmp_path, text_data):
    process = start(*TRAIN, *flags(text_data, tmp_path), "--device", "cpu", **environment(0, port))
    wait_until(process, lambda: answers(port))
    process.send_signal(signal.SIGTERM)
    output = finish(process)  # the other one has ten minutes to come
    assert process.returncode == 0, output
    assert "stopped before the first step: there is nothing to save; the same command begins anew" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("rank", [0, 1])
def test_who_shall_stop_waits_for_nobody(rank, port):
    stop = StopRequest()
    stop.request_stop()
    with pytest.raises(Stopped):
        meet(environment(rank, port), timedelta(minutes=10), stop)


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, []),
        ({"RANK": "0"}, []),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, []),
        ({"WORLD_SIZE": "abc"}, ["WORLD_SIZE=abc in the environment is no whole number of at least 1; start"]),
        (
            {"WORLD_SIZE": "0", "LOCAL_RANK": "-1"},
            ["LOCAL_RANK=-1 in the environment is no whole number of at least 0", "WORLD_SIZE=0 in the environment"],
        ),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 in the environment, but no RANK and no MASTER_ADDR and no MASTER_PORT; "]),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
            ["WORLD_SIZE=2 in the environment, but no MASTER_ADDR; start the command with torchrun"],
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
            ["RANK=2 in the environment is not below WORLD_SIZE, which is 2"],
        ),
        ({"RANK": "1"}, ["RANK=1 in the environment is not below WORLD_SIZE, which is 1"]),
    ],
)
def test_variables_that_do_not_fit_are_told(given, said):
    found = environment_mistakes(given)
    assert len(found) == len(said)
    assert all(mistake.startswith(start) for mistake, start in zip(found, said, strict=True))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_told_with_all_other_mistakes(variable, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(variable, "abc")
    assert run_here(monkeypatch, run_pretrain.main, *TINY, *data_flags(tmp_path), "--train-steps", 0) == 2
    told = capsys.readouterr().err
    assert f"{variable}=abc in the environment is no whole number" in told
    assert "--train-steps 0" in told
    with pytest.raises(UserError, match=f"^{variable}=abc"):
        evaluation.run(EvaluateConfig())


@pytest.mark.parametrize("local, restarts, shared", itertools.product((1, 2), (0, 3), (False, True)))
def test_several_hosts_that_could_not_restart_are_told_why(local, restarts, shared):
    given = {"LOCAL_WORLD_SIZE": str(local), "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": str(restarts)}
    note = restart_note({**given, "TORCHELASTIC_USE_AGENT_STORE": str(shared)})
    assert (note is not None) == (local == 1 and restarts == 3 and shared)
    assert note is None or "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is not set on all hosts" in note


@pytest.mark.parametrize(
    "wanted, device, built, said",
    [
        (
            "nccl",
            "cpu",
            ("gloo", "nccl"),
            "--ddp-backend nccl needs CUDA devices, but the device is cpu; use --ddp-backend gloo",
        ),
        ("nccl", "cuda", ("gloo",), f"this build of torch, {torch.__version__}, has no nccl; use --ddp-backend gloo"),
        ("auto", "cuda", ("gloo",), "--ddp-backend auto: this build of torch"),
        ("gloo", "cpu", ("nccl",), "has no gloo; install another build of torch, or start one process"),
        ("gloo", "cuda", ("nccl",), "has no gloo; use --ddp-backend nccl"),
    ],
)
def test_a_backend_that_can_not_be_is_told(monkeypatch, wanted, device, built, said):
    monkeypatch.setattr(torch.distributed, "is_backend_available", built.__contains__)
    (mistake,) = backend_mistakes(wanted, device)
    assert said in mistake


@pytest.mark.parametrize("wanted, device", [("auto", "cpu"), ("gloo", "cpu"), ("gloo", "cuda"), ("auto", "mps")])
def test_a_backend_of_every_build_is_fine(wanted, device):
    assert backend_mistakes(wanted, device) == []


def test_a_backend_that_nobody_has_is_refused(text_data, monkeypatch, capsys):
    assert run_here(monkeypatch, run_pretrain.main, *TINY, *data_flags(text_data), "--ddp-backend", "mpi") == 2
    assert "error: --ddp-backend mpi is not one of auto, gloo, nccl" in capsys.readouterr().err
