"""Steps that are not finite are skipped, counted and in the end stop the run; a spike of the loss takes it back."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import QUICK_XLA, TINY, finish, records, run, start, torchrun, xla_replicas
from conftest import write_split
from flaky_store import FlakyStore
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from small_runs import run_here

import run_pretrain
from gpt2_xla import checkpoint, step_guard
from gpt2_xla.config import LoggingConfig, PretrainConfig, RunConfig, TorchConfig
from gpt2_xla.metrics import Metrics
from gpt2_xla.open_window import OpenWindow, is_open_window
from gpt2_xla.run_verification import verify_run
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.script_config import VerifyRunConfig
from gpt2_xla.step_guard import _delete_after
from gpt2_xla.training_log import TrainingLog
from gpt2_xla.uploads import Uploads

STEP = 8 * 32  # tokens
VALUES = st.floats(0, 1e6, width=32) | st.sampled_from([math.nan, math.inf])  # a loss, a gradient norm
# Read in order; a window is 2 steps; steps 17 and 18 read noise.
SPIKY = [*TINY, "--warmup-steps", "0", "--learning-rate", "1e-2", "--train-steps", "24", "--log-interval", "2"]
SPIKY += ["--save-interval", "4", "--no-shuffle", "--spike-factor", "1.2"]


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Run run_pretrain.py in this process; returns the exit status and what it printed."""

    def start_it(*arguments):
        capsys.readouterr()
        status = run_here(monkeypatch, run_pretrain.main, *arguments, "--checkpoints-dir", tmp_path / "run")
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return start_it


def write_spiky_data(folder: Path, noise_ends: int = 18) -> Path:
    """One sentence over and over, with noise from step 17 to the end of step `noise_ends`."""
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. ", np.uint8)
    tokens = np.resize(text, 60 * STEP).copy()
    noise = slice(16 * STEP, noise_ends * STEP)
    tokens[noise] = np.random.default_rng(0).integers(128, 256, noise_ends * STEP - noise.start)
    return write_split(folder, "train", tokens)


def lines_of(path, kind):
    return [one for one in map(json.loads, path.read_text().splitlines()) if one["kind"] == kind]


# counting


def test_a_window_is_the_mean_of_its_good_steps_and_counts_the_others():
    written = []
    metrics = Metrics([])
    metrics.write = written.append
    config = PretrainConfig(run=RunConfig(train_steps=9), logging=LoggingConfig(log_interval=3))
    runtime = TorchRuntime(TorchConfig(device="cpu", mixed_precision="no"))
    log = TrainingLog(config, runtime, metrics, 1.0, lambda _: {}, OpenWindow())
    nan, inf = math.nan, math.inf
    steps = [(1.0, 2.0), (nan, 2.0), (3.0, 4.0), (1.0, inf), (nan, nan), (inf, 1.0), (nan, 1.0), (5.0, 6.0), (nan, nan)]
    for step, values in enumerate(steps, start=1):
        log.add(torch.tensor(values))
        log.step_done(step, step * 10)
    assert [window.step for window in log.windows(5)] == [3]
    log.pause()
    windows = log.windows(9)
    assert [(w.step, w.samples, w.skipped, w.skipped_in_a_row) for w in windows] == [(6, 60, 3, 3), (9, 90, 2, 1)]
    assert math.isnan(windows[0].loss)
    assert windows[1].loss == 5.0
    assert [record["skipped_steps"] for record in written] == [1, 3, 2]
    assert (written[0]["loss"], written[0]["grad_norm"]) == (2.0, 3.0)
    assert log.windows(9) == []


@given(
    steps=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12),
    interval=st.integers(1, 5),
    stops=st.sets(st.integers(1, 12)),
)
def test_a_log_that_goes_on_from_a_checkpoint_tells_what_one_that_never_stopped_does(steps, interval, stops):
    config = PretrainConfig(run=RunConfig(train_steps=len(steps)), logging=LoggingConfig(log_interval=interval))
    runtime = TorchRuntime(TorchConfig(device="cpu", mixed_precision="no"))

    def train(stops: set[int]) -> tuple[list[str], list[str]]:
        written, windows, metrics = [], [], Metrics([])
        metrics.write = written.append
        log = TrainingLog(config, runtime, metrics, 1.0, lambda _: {}, OpenWindow())
        for step, values in enumerate(steps, start=1):
            log.add(torch.tensor(values))
            log.step_done(step, step * 10)
            if step in stops or step == len(steps):
                saved = json.loads(json.dumps(log.pause().saved()))
                assert is_open_window(saved)
                windows += log.windows(step)
                log = TrainingLog(config, runtime, metrics, 1.0, lambda _: {}, OpenWindow(**saved))
        told = ("step", "loss", "grad_norm", "skipped_steps", "tokens")
        return [repr([record[name] for name in told]) for record in written], [repr(window) for window in windows]

    assert train(stops) == train(set())


def test_after_so_many_skipped_steps_the_run_saves_shows_the_batches_and_stops(train, text_data, tmp_path):
    # The first step throws the weights out of all bounds; from the second on there is no finite loss.
    flags = [*TINY, "--train-dir", text_data / "train", "--train-steps", "50", "--warmup-steps", "0"]
    status, printed = train(*flags, "--learning-rate", "1e38", "--max-skipped-steps", "3", "--log-interval", "2")
    assert status == 2
    assert "the loss or the gradients of steps 2 to 4 were not finite" in printed
    assert "step 5 is saved" in printed
    folder = tmp_path / "run"
    assert [record["skipped_steps"] for record in records(folder)] == [1, 2]
    files = sorted(folder.glob("bad_batch-*"))
    assert [file.name for file in files] == [f"bad_batch-{step:08d}.safetensors" for step in (2, 3, 4)]
    with safe_open(files[0], "numpy") as file:
        tokens, positions = file.get_tensor("tokens"), file.get_tensor("position")
        assert file.get_tensor("sample").tolist() == list(range(8, 16))
    stream = np.load(next((text_data / "train").glob("*.npy")))
    for row, position in zip(tokens, positions.tolist(), strict=True):
        assert row.tolist() == stream[position : position + 33].tolist()
    state = {"step.wte.weight": torch.zeros(())}
    checkpoint.load_optimizer(folder / "step-00000005", state)
    assert state["step.wte.weight"] == 1.0  # a skipped step is none to Adam

    from gpt2_xla.bad_batches import describe_bad_batch

    shown = describe_bad_batch(files[0])
    assert "step 2: 8 sequences of 32 tokens, samples 8 to 15" in shown
    assert repr(bytes(tokens[0][:20].astype(np.uint8)).decode())[1:-1] in shown


def test_the_count_of_skipped_steps_goes_on_over_a_resume_and_begins_anew_when_it_ended_the_run(
    train, text_data, tmp_path
):
    flags = [*TINY, "--train-dir", text_data / "train", "--warmup-steps", "0", "--learning-rate", "1e38"]
    flags += ["--max-skipped-steps", "6", "--log-interval", "2"]
    assert train(*flags, "--train-steps", "5")[0] == 0
    status, printed = train(*flags, "--train-steps", "50", "--train-batch-size", "16")
    assert status == 2
    assert "the loss or the gradients of steps 2 to 8 were not finite" in printed
    folder = tmp_path / "run"
    # Those of the steps that this command made: steps 2 to 5 had batches of another size.
    files = sorted(folder.glob("bad_batch-*"))
    assert [file.name for file in files] == [f"bad_batch-{step:08d}.safetensors" for step in (6, 7, 8)]
    read = {line["step"]: (line["first"], line["count"]) for line in lines_of(folder / "batches.jsonl", "batch")}
    for step, file in zip((6, 7, 8), files, strict=True):
        first, count = read[step]
        with safe_open(file, "numpy") as batch:
            assert batch.get_tensor("sample").tolist() == list(range(first, first + count))
    for saved, in_a_row in ((5, 4), (9, 0)):
        state = checkpoint.read_state(folder / f"step-{saved:08d}")
        assert state.open_window["skipped_in_a_row"] == in_a_row


def test_without_a_limit_skipped_steps_never_stop_a_run(train, text_data, tmp_path):
    flags = [*TINY, "--train-dir", text_data / "train", "--train-steps", "30", "--warmup-steps", "0"]
    assert train(*flags, "--learning-rate", "1e38", "--max-skipped-steps", "0")[0] == 0
    assert [record["skipped_steps"] for record in records(tmp_path / "run")] == [0] + [1] * 29


# going back


def test_a_spike_takes_the_run_back_and_its_data_is_left_out(train, tmp_path):
    data = write_spiky_data(tmp_path)
    status, printed = train(*SPIKY, "--save-interval", "3", "--train-dir", data)
    assert status == 0, printed
    assert "the mean loss of steps 17 to 18 is" in printed
    assert "back to step 15, 24 sequences are skipped" in printed
    folder = tmp_path / "run"
    after = [(r["step"], r["tokens"] // STEP) for r in records(folder) if r["step"] > 14]
    assert after[:2] == [(16, 16), (18, 18)]
    assert after[2:] == [(16, 19), (18, 21), (20, 23), (22, 25), (24, 27)]  # 3 steps' data was left out
    losses = {r["step"]: r["loss"] for r in records(folder)}  # the last of each step
    assert losses[18] < 1.2 * losses[14]
    (rollback,) = lines_of(folder / "batches.jsonl", "rollback")
    assert (rollback["step"], rollback["samples"], rollback["spike_step"]) == (15, 18 * 8, 18)
    (record,) = records(folder, "rollback")
    assert (record["step"], record["to_step"], record["skipped_samples"]) == (18, 15, 24)
    summary, problems = verify_run(VerifyRunConfig(), folder)
    assert problems == []
    assert "samples 120 to 143 are left out after step 15" in summary
    assert "every token once an epoch, in order, but for what was left out" in summary


def test_a_spike_in_the_last_window_before_a_stop_is_not_saved(train, tmp_path, monkeypatch):
    flags = [*SPIKY, "--train-dir", write_spiky_data(tmp_path)]
    asked = iter([*[False] * 18, True])
    with monkeypatch.context() as patch:
        patch.setattr(TorchRuntime, "should_stop", lambda _: next(asked))
        status, printed = train(*flags)
    assert status == 0
    assert "back to step 16" in printed
    assert "stopped at step 16 of 24" in printed
    folder = tmp_path / "run"
    assert checkpoint.checkpoints(folder)[0].name == "step-00000016"
    status, printed = train(*flags)  # meets the noise again, and leaves it out
    assert status == 0
    assert "back to step 16, 16 sequences are skipped" in printed
    assert verify_run(VerifyRunConfig(), folder)[1] == []


def test_rollbacks_that_do_not_help_stop_the_run_at_the_checkpoint(train, tmp_path):
    data = write_spiky_data(tmp_path, noise_ends=60)
    status, printed = train(*SPIKY, "--train-dir", data)
    assert status == 2
    assert "after 3 rollbacks to step 16; lower --learning-rate" in printed
    assert len(lines_of(tmp_path / "run" / "batches.jsonl", "rollback")) == 4
    assert checkpoint.checkpoints(tmp_path / "run")[0].name == "step-00000016"
    assert train()[0] == 2  # all over again
    assert len(lines_of(tmp_path / "run" / "batches.jsonl", "rollback")) == 8
    assert verify_run(VerifyRunConfig(), tmp_path / "run")[1] == []


def test_a_spike_before_the_first_checkpoint_is_only_told(train, tmp_path):
    status, printed = train(*SPIKY, "--save-interval", "0", "--train-dir", write_spiky_data(tmp_path))
    assert status == 0, printed
    assert "no checkpoint up to step 16 to go back to; training goes on" in printed


def test_going_back_deletes_the_checkpoints_of_the_course_that_is_left(tmp_path):
    for step in (4, 16, 17, 18):
        (tmp_path / f"step-{step:08d}").mkdir()
    _delete_after(tmp_path, 16)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000016", "step-00000004"]


def test_a_run_killed_while_it_goes_back_still_has_a_ledger_that_counts(train, monkeypatch, tmp_path):
    def killed(*_):
        raise RuntimeError("killed")

    data = write_spiky_data(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(step_guard, "_delete_after", killed)
        with pytest.raises(RuntimeError, match="killed"):  # with a checkpoint of step 17, within the window that spikes
            train(*SPIKY, "--train-dir", data, "--save-interval", "1", "--saved-checkpoint-limit", "9")
    assert train("--spike-factor", "100")[0] == 0
    assert verify_run(VerifyRunConfig(), tmp_path / "run")[1] == []


def test_a_copy_in_flight_of_a_checkpoint_that_is_left_ends_first(train, monkeypatch, tmp_path):
    began, withdrawing = threading.Event(), threading.Event()
    put, withdraw, look = FlakyStore.put_file, Uploads.withdraw_after, step_guard._last_good_step

    def slow(self, lpath, rpath, **named):
        if "/step-00000017" in rpath or "/step-00000018" in rpath:  # of the window that spikes
            began.set()
            withdrawing.wait(60)
        put(self, lpath, rpath, **named)

    def withdrawn(self, *arguments):
        withdrawing.set()
        withdraw(self, *arguments)

    monkeypatch.setattr(FlakyStore, "put_file", slow)
    monkeypatch.setattr(Uploads, "withdraw_after", withdrawn)
    monkeypatch.setattr(step_guard, "_last_good_step", lambda *arguments: began.wait(60) and look(*arguments))
    FlakyStore.reset()
    flags = ("--save-interval", "1", "--saved-checkpoint-limit", "9", "--remote-dir", "flaky://bucket/run")
    status, printed = train(*SPIKY, "--train-dir", write_spiky_data(tmp_path), *flags, "--strict-saving")
    assert status == 0, printed
    assert "back to step 16" in printed
    assert "could not" not in printed
    assert "can't be read" not in printed


def test_several_processes_go_back_together(tmp_path):
    data = write_spiky_data(tmp_path)
    output = run(*torchrun(2), *SPIKY, "--train-dir", data, "--checkpoints-dir", tmp_path / "run")
    assert output.count("back to step 16, 16 sequences are skipped") == 1
    assert [r["step"] for r in records(tmp_path / "run")][-4:] == [18, 20, 22, 24]
    assert verify_run(VerifyRunConfig(), tmp_path / "run")[1] == []


@pytest.mark.xla
def test_xla_replicas_go_back_together_and_compile_no_second_step(tmp_path):
    data = write_spiky_data(tmp_path)
    flags = [*SPIKY, "--train-dir", data, "--checkpoints-dir", tmp_path / "run", "--max-recompiles", "0"]
    process = start(*xla_replicas(2), *flags, **QUICK_XLA)
    output = finish(process)
    assert process.returncode == 0, output
    assert output.count("back to step 16, 16 sequences are skipped") == 1
    assert ", 0 of them after warm-up" in output
    assert verify_run(VerifyRunConfig(), tmp_path / "run")[1] == []
