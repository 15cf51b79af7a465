"""What the XLA runtime promises: a constant graph, no host sync, syncfree steps, errors that arrive, no orphan."""

import os
import signal

import numpy as np
import pytest
from commands import (
    PYTHON,
    QUICK_XLA,
    ROOT,
    TINY,
    TRAIN_XLA,
    data_flags,
    finish,
    printed_json,
    replica_processes,
    run,
    start,
    still_alive,
    wait_for_step,
)

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def counted(text_data):
    output = run(*PYTHON, str(ROOT / "tests" / "xla_step_counters.py"), str(text_data), **QUICK_XLA)
    return printed_json(output)


def test_a_step_is_one_execution_without_compiling_or_fetching(counted):
    # Of 100 steps; the loss is fetched in the step after each tenth, validation and saving follow steps of their own.
    plain = [step for number, step in enumerate(counted["steps"], start=1) if number % 10 not in (0, 1)]
    assert len(plain) == 80
    assert all(step == [0, 1, 0] for step in plain)
    logged = [step for number, step in enumerate(counted["steps"], start=1) if number % 10 == 1 and number > 1]
    assert [step[:2] for step in logged] == [[0, 1]] * 9
    assert sum(step[2] for step in logged) <= 9


def test_only_the_first_step_validation_and_sample_compile(counted):
    assert counted["placing"][0] == 1  # Adam's zeros
    assert counted["first_validation"][0] == 1
    # Samples follow each thirtieth step: two programs, one that reads the prompt and one that adds a token.
    assert [step[0] for step in counted["steps"]] == [1] + [0] * 28 + [2] + [0] * 70


def test_a_token_of_a_sample_is_one_execution_and_one_fetch(counted):
    sampled = [step[1:] for number, step in enumerate(counted["steps"], start=1) if number in (30, 60, 90)]
    assert sampled == [[1 + 12, 1 + 12]] * 3  # the step's own and the log's; 12 tokens


def test_a_step_with_nan_gradients_or_a_nan_loss_is_skipped_on_the_device(counted):
    assert counted["nan_step_skipped"]
    assert counted["nan_loss_skipped"]
    assert counted["state_finite"]
    assert counted["optimizer_steps"] == 100


def test_torchs_own_adam_skips_the_same_steps_on_the_device(counted):
    assert counted["torch_adam"] == [False, True, False, True, 2.0]


def test_an_error_of_the_loader_ends_the_run_with_its_sentence(tmp_path):
    tokens = np.arange(20_000) % 250
    tokens[10_000] = 300  # no manifest says that this shard has it: only the loader can see
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "train_00000.npy", tokens.astype(np.uint16))
    flags = [*TINY, "--vocab-size", "257", "--train-dir", tmp_path / "data", "--checkpoints-dir", tmp_path / "run"]
    process = start(*TRAIN_XLA, *flags, "--train-steps", "100")
    output = finish(process)
    assert process.returncode == 2, output
    assert "is 300, but --vocab-size 257 allows only" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_a_killed_process_takes_the_others_with_it(victim, tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--train-steps", "100000", "--checkpoints-dir", tmp_path]
    process = start(*TRAIN_XLA, *flags, "--mp-start-method", "fork" if victim == "child" else "spawn")
    wait_for_step(process, tmp_path, 2)
    (child,) = replica_processes(process.pid)
    os.kill(child if victim == "child" else process.pid, signal.SIGKILL)
    output = finish(process)  # the pipe closes only when the child is gone too
    assert not still_alive([child])
    if victim == "child":
        assert process.returncode == 1
        assert "a replica's process was killed" in output
