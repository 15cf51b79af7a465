"""A run that was interrupted is the run that was not: bit for bit, by signal or by crash, over a change of processes."""

import json
import shutil
import signal

import pytest
from commands import (
    PYTHON,
    QUICK_XLA,
    TINY,
    TRAIN,
    TRAIN_XLA,
    data_flags,
    finish,
    losses,
    records,
    replica_processes,
    run,
    start,
    still_alive,
    torchrun,
    wait_for_step,
    xla_replicas,
)
from small_runs import run_here, said_here
from stopping import PAUSING, stop_paused

import run_pretrain

# 64 × 32 tokens a step: an epoch of the 40,000 tokens ends every 19 steps, so each run crosses several.
FLAGS = [*TINY, "--train-batch-size", "64", "--dropout", "0.1", "--train-steps", "60", "--warmup-steps", "10"]
STATE = ("model.safetensors", "trainer_state/optimizer.safetensors")


def final_bytes(run_dir):
    return [(run_dir / "step-00000060" / name).read_bytes() for name in STATE]


def told(run_dir):
    """What the records of training say of the steps, but for their times."""
    return [(r["step"], r["loss"], r["grad_norm"], r["skipped_steps"], r["tokens"]) for r in records(run_dir)]


def checkpoints(run_dir):
    return sorted(path.name for path in run_dir.glob("step-*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text_data):
    """A run of 60 steps in one process that also saved at step 25."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = [*FLAGS, *data_flags(text_data), "--valid-interval", "25", "--save-interval", "25", "--device", "cpu"]
    said_here(run_pretrain.main, *flags, "--checkpoints-dir", folder)
    assert checkpoints(folder) == ["step-00000025", "step-00000050", "step-00000060"]
    return folder


def test_resume_from_a_crash_is_bit_for_bit(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted / "step-00000025", tmp_path / "step-00000025")
    output = run(*TRAIN, "--checkpoints-dir", tmp_path)  # every other option is the checkpoint's
    assert "continuing at 25" in output
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)
    assert losses(tmp_path) == losses(uninterrupted)[25:]


def test_interrupted_in_warm_up_and_in_the_fall_of_wsd_is_bit_for_bit(tmp_path, monkeypatch, text_data):
    # Epochs end within steps 19 and 38, warm-up with step 10, the fall begins with step 40. Steps 5 to 7 and 41 to 42 are in
    # no record yet when the run is interrupted.
    flags = [*FLAGS, "--decay-method", "wsd", "--decay-steps", "20", "--save-interval", "7", "--log-interval", "4"]
    flags += ["--saved-checkpoint-limit", "99", "--device", "cpu"]
    whole, twice = tmp_path / "whole", tmp_path / "twice"

    def train(*arguments):
        assert run_here(monkeypatch, run_pretrain.main, *arguments) == 0

    train(*flags, "--train-dir", text_data / "train", "--checkpoints-dir", whole)
    shutil.copytree(whole, twice)
    for last in (7, 42):
        for folder in twice.glob("step-*"):
            if int(folder.name[5:]) > last:
                shutil.rmtree(folder)
        train("--checkpoints-dir", twice)
    assert final_bytes(twice) == final_bytes(whole)
    assert told(twice) == [*told(whole), *told(whole)[1:], *told(whole)[10:]]


def test_resume_tells_when_the_batches_to_come_are_others(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted / "step-00000050", tmp_path / "step-00000050")
    output = said_here(run_pretrain.main, "--checkpoints-dir", tmp_path, "--seed", "7", "--no-shuffle")
    assert "note: --seed is not the checkpoint's; from step 50 on" in output
    assert "note: --shuffle is not the checkpoint's; from step 50 on" in output
    assert "training data is not" not in output


def test_from_checkpoint_continues_the_given_one_elsewhere(tmp_path, uninterrupted):
    source = uninterrupted / "step-00000025"
    said_here(run_pretrain.main, "--from-checkpoint", source, "--checkpoints-dir", tmp_path / "copy")
    assert final_bytes(tmp_path / "copy") == final_bytes(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly_and_resume_is_bit_for_bit(number, tmp_path, text_data, uninterrupted):
    folder, go_on = tmp_path / "run", tmp_path / "go_on"
    flags = [*FLAGS, *data_flags(text_data), "--checkpoints-dir", folder]
    process = start(*PYTHON, PAUSING, *flags, PAUSE_AT="4", PAUSE_UNTIL=str(go_on))
    wait_for_step(process, folder, 3)
    output = stop_paused(process, number, go_on)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    (saved,) = checkpoints(folder)
    assert f"stopped at step {int(saved[5:])} of 60" in output
    said_here(run_pretrain.main, *flags)
    assert final_bytes(folder) == final_bytes(uninterrupted)


def test_torchrun_stops_at_one_step_and_continues_with_another_number_of_processes(tmp_path, text_data):
    flags, go_on = [*TINY, *data_flags(text_data), "--train-steps", "100"], tmp_path / "go_on"
    flags += ["--device", "cpu"]
    said_here(run_pretrain.main, *flags, "--checkpoints-dir", tmp_path / "one")
    pause = {"PAUSE_AT": "21", "PAUSE_UNTIL": str(go_on)}
    process = start(*torchrun(2, PAUSING), *flags, "--checkpoints-dir", tmp_path / "two", **pause)
    wait_for_step(process, tmp_path / "two", 20)
    output = stop_paused(process, signal.SIGTERM, go_on)  # torchrun passes it on to its processes
    assert "stopped at step" in output
    assert len(checkpoints(tmp_path / "two")) == 1
    said_here(run_pretrain.main, *flags, "--checkpoints-dir", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(
    "kind", ["gloo", pytest.param("xla", marks=pytest.mark.xla)], ids=["1 to 4 to 2", "1 to XLA replicas"]
)
def test_a_checkpoint_goes_from_any_number_of_processes_to_any(kind, tmp_path, text_data):
    """Losses differ from those of one process by the order of float32 sums alone: measured below 1e-6."""
    flags = [*TINY, *data_flags(text_data), "--train-steps", "15", "--save-interval", "5", "--device", "cpu"]
    said_here(run_pretrain.main, *flags, "--checkpoints-dir", tmp_path / "one")
    expected, source = losses(tmp_path / "one"), "one"
    hops = [(torchrun(4), 5), (torchrun(2), 10)] if kind == "gloo" else [(xla_replicas(2), 5)]
    for hop, (command, step) in enumerate(hops):
        saved, target = f"step-{step:08d}", f"hop{hop}"
        shutil.copytree(tmp_path / source / saved, tmp_path / target / saved)
        run(*command, "--checkpoints-dir", tmp_path / target, **QUICK_XLA)
        assert losses(tmp_path / target) == pytest.approx(expected[step:], abs=1e-5)
        source = target


def test_a_finished_run_resumed_trains_nothing_more(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    output = said_here(run_pretrain.main, "--checkpoints-dir", folder)
    assert "all 60 steps are done" in output
    assert losses(folder) == losses(uninterrupted)
    assert final_bytes(folder) == final_bytes(uninterrupted)


def test_do_test_prints_the_validation_loss_of_the_checkpoint(uninterrupted):
    output = said_here(run_pretrain.main, "--do-test", "--checkpoints-dir", uninterrupted)
    loss = losses(uninterrupted, "valid")[-1]
    assert f"60 steps trained: validation loss {loss:.4f}, perplexity" in output


@pytest.mark.xla
def test_xla_replicas_stop_at_one_step_and_leave_no_child(tmp_path, text_data):
    command = [*xla_replicas(2), *TINY, *data_flags(text_data), "--train-steps", "9000", "--checkpoints-dir", tmp_path]
    process = start(*command, **QUICK_XLA)
    wait_for_step(process, tmp_path, 5)
    children = replica_processes(process.pid)
    process.terminate()
    output = finish(process)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    (saved,) = checkpoints(tmp_path)
    assert f"stopped at step {int(saved[5:])} of 9000" in output
    assert children
    assert not still_alive(children)


@pytest.mark.xla
def test_xla_resumes_bit_for_bit_and_torch_continues_its_checkpoint(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--train-steps", "60", "--save-interval", "20", "--max-recompiles", "0"]
    flags += ["--log-interval", "8"]  # steps 17 to 20 are in no record yet when step 20 is saved
    run(*TRAIN_XLA, *flags, "--checkpoints-dir", tmp_path / "whole", **QUICK_XLA)
    for name in ("xla", "torch"):
        shutil.copytree(tmp_path / "whole" / "step-00000020", tmp_path / name / "step-00000020")
    said_here(run_pretrain.main, "--device", "cpu", "--checkpoints-dir", tmp_path / "torch")
    assert losses(tmp_path / "torch") == pytest.approx(losses(tmp_path / "whole")[2:], abs=1e-5)
    for _ in range(2):  # interrupted twice: after step 20, and after step 40
        output = run(*TRAIN_XLA, "--checkpoints-dir", tmp_path / "xla", **QUICK_XLA)
        assert ", 0 of them after warm-up" in output
        assert final_bytes(tmp_path / "xla") == final_bytes(tmp_path / "whole")
        shutil.rmtree(tmp_path / "xla" / "step-00000060")
    assert told(tmp_path / "xla") == told(tmp_path / "whole")[2:] + told(tmp_path / "whole")[5:]
    state = json.loads((tmp_path / "torch" / "step-00000060" / "trainer_state" / "state.json").read_text())
    assert state["samples"] == 60 * 8
