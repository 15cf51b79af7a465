"""--find-batch: what it finds fits, is the largest that does, and leaves the run what it was."""

import json
import signal

import pytest
from commands import (
    TINY,
    TRAIN,
    children,
    data_flags,
    finish,
    losses,
    run,
    start,
    still_alive,
    torchrun,
    wait_until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import run_here

import run_pretrain
from gpt2_xla import batch_search
from gpt2_xla.batch_search import largest, micro_batches, with_batch
from gpt2_xla.config import DataConfig, TorchConfig, TorchPretrainConfig
from gpt2_xla.runtime.memory import memory_mistakes
from gpt2_xla.validation import config_mistakes, replica_mistakes

# float32 logits of 16,384 tokens' scores at once, 2 MiB a sequence and copy: memory without much arithmetic.
HEAVY = [*TINY, "--vocab-size", "16384", "--loss-chunk", "0", "--warmup-steps", "1", "--valid-interval", "0"]
WHOLE = ("--train-batch-size", "113", "--gradient-accum-step", "2")  # 226 sequences a step, of 1, 2, 113 or 226
LIMIT = ("--find-batch", "--memory-limit", "1.15")  # GiB, of which a tenth stays free; torch alone takes 0.6


def flags(data, folder, steps=2):
    return [*HEAVY, *WHOLE, *data_flags(data), "--device", "cpu", "--train-steps", steps, "--checkpoints-dir", folder]


@pytest.fixture(scope="module")
def as_the_recipe_says(tmp_path_factory, text_data):
    """The losses of the run without --find-batch."""
    folder = tmp_path_factory.mktemp("whole")
    run(*TRAIN, *flags(text_data, folder))
    return losses(folder)


def saved(folder):
    config = json.loads((folder / "config.json").read_text())
    data = config["data"]
    return data["train_batch_size"], data["gradient_accum_step"], config["runtime"]["find_batch"]


def test_the_run_is_the_same_and_a_resume_does_not_search_again(
    tmp_path, text_data, as_the_recipe_says, monkeypatch, capsys
):
    assert run_here(monkeypatch, run_pretrain.main, *flags(text_data, tmp_path, 1), *LIMIT) == 0
    printed = capsys.readouterr().out
    assert "that fits into 1.03 GiB a process" in printed
    assert "  113: does not fit" in printed
    assert "found --train-batch-size 2 --gradient-accum-step 113" in printed
    assert saved(tmp_path) == (2, 113, False)
    assert run_here(monkeypatch, run_pretrain.main, *flags(text_data, tmp_path, 2), *LIMIT) == 0
    assert "finding" not in capsys.readouterr().out
    assert saved(tmp_path) == (2, 113, False)
    assert losses(tmp_path) == pytest.approx(as_the_recipe_says, abs=1e-5)


def test_two_processes_find_one_batch_for_both(tmp_path, text_data, as_the_recipe_says):
    output = run(*torchrun(2), *flags(text_data, tmp_path), "--eval-batch-size", "8", *LIMIT)
    assert "  226: does not fit" in output  # 113 in each process
    assert output.count("found --train-batch-size 2 --gradient-accum-step 113") == 1
    assert saved(tmp_path) == (2, 113, False)
    assert losses(tmp_path) == pytest.approx(as_the_recipe_says, abs=1e-5)


def test_a_model_that_does_not_fit_at_all_is_told_before_anything_is_written(tmp_path, text_data, monkeypatch, capsys):
    folder = tmp_path / "run"
    little = ("--find-batch", "--memory-limit", "0.3")
    assert run_here(monkeypatch, run_pretrain.main, *flags(text_data, folder), *little) == 2
    assert "error: --find-batch: not even --train-batch-size 1 fits into 0.27 GiB a process" in capsys.readouterr().err
    assert not folder.exists()


def test_what_a_trial_refuses_is_told(tmp_path, text_data, monkeypatch, capsys):
    small = [*flags(text_data, tmp_path / "run"), "--vocab-size", "50", *LIMIT]
    assert run_here(monkeypatch, run_pretrain.main, *small) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --find-batch: a step of --train-batch-size 1 fails: ")
    assert "--vocab-size 50" in printed


def test_a_trial_that_hangs_is_told(tmp_path, text_data, monkeypatch, capsys):
    monkeypatch.setattr(batch_search, "COMPILE_SECONDS", 0.1)  # no process imports torch in that time
    assert run_here(monkeypatch, run_pretrain.main, *flags(text_data, tmp_path), *LIMIT, "--hang-timeout", "0.1") == 2
    told = (
        "error: --find-batch: a step of --train-batch-size 1 fails: no end after 0.1 s, the longest that --hang-timeout"
    )
    assert told in capsys.readouterr().err


def searching(tmp_path, text_data):
    """A run that searches, and the pid of its trial."""
    process = start(*TRAIN, *flags(text_data, tmp_path), *LIMIT)
    wait_until(process, lambda: children(process.pid, running="batch_trial"))
    return process, children(process.pid, running="batch_trial")[0]


def test_a_signal_ends_the_search(tmp_path, text_data):
    process, trial = searching(tmp_path, text_data)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0, output
    assert "stopped before the first step: there is nothing to save; the same command begins anew" in output
    assert not still_alive([trial])


def test_a_trial_dies_with_its_run(tmp_path, text_data):
    process, trial = searching(tmp_path, text_data)
    process.kill()
    finish(process)
    assert not still_alive([trial])


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=3)


@given(st.integers(1, 12), SIZES, st.integers(1, 4), st.booleans())
@settings(max_examples=200)
def test_every_micro_batch_makes_the_batches_of_every_step_and_none_is_missing(
    micro_batch, stages, processes, scheduled
):
    firsts = [sum(length for length, _ in stages[:number]) for number in range(len(stages))]
    schedule = ",".join(f"{first}:{micro_batch * count}" for first, (_, count) in zip(firsts, stages, strict=True))
    data = DataConfig(
        train_batch_size=micro_batch,
        gradient_accum_step=stages[0][1],
        batch_size_schedule=schedule if scheduled else None,
    )
    config = TorchPretrainConfig(data=data, runtime=TorchConfig(find_batch=True))
    sequences = [config.batch_sizes.sequences(step) for step in range(100)]
    sizes = micro_batches(config.batch_sizes, processes)
    wanted = [size for size in range(1, 500) if size % processes == 0 and not any(n % size for n in sequences)]
    assert sizes == wanted
    for size in sizes:
        found = with_batch(config, size)
        assert [found.batch_sizes.sequences(step) for step in range(100)] == sequences
        assert found.data.train_batch_size == size
        assert not found.runtime.find_batch
    if not sizes:
        (told,) = [mistake for mistake in replica_mistakes(config, processes) if "--find-batch" in mistake]
        assert f"is not divisible by the {processes} replicas" in told
    else:
        assert not [mistake for mistake in replica_mistakes(config, processes) if "--find-batch" in mistake]


@given(st.integers(1, 60), st.integers(0, 61))
@settings(max_examples=200)
def test_the_search_finds_the_largest_and_asks_little(count, fitting):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= fitting

    found = largest(list(range(1, count + 1)), fits)
    assert found == (min(count, fitting) or None)
    assert len(asked) == len(set(asked)) <= 2 * count.bit_length() + 1
    assert asked[0] == 1
    assert all(
        size <= 4 * max([1, *(before for before in asked[:number] if before <= fitting)])
        for number, size in enumerate(asked)
    )


def test_what_the_options_can_not_mean_is_told():
    def told(explicit=(), **options):
        return config_mistakes(TorchPretrainConfig(runtime=TorchConfig(**options)), set(explicit))

    assert told(find_batch=True, memory_limit=2.5) == []
    assert told(memory_limit=2.5) == []  # a checkpoint's, which has found its batch
    assert told(["memory_limit"], memory_limit=2.5) == [
        "--memory-limit 2.5 has no meaning without --find-batch; add it, or leave --memory-limit out"
    ]
    for value in (0, -1, float("inf"), float("nan")):
        assert "must be a number of GiB above 0" in told(find_batch=True, memory_limit=value)[0]
    assert memory_mistakes("cpu") == memory_mistakes("cuda") == []
    assert "but the device is mps; leave it out" in memory_mistakes("mps")[0]
    recipe = TorchPretrainConfig(
        data=DataConfig(train_batch_size=25, eval_batch_size=8, gradient_accum_step=4),
        runtime=TorchConfig(find_batch=True),
    )
    assert replica_mistakes(recipe, 8) == [
        "--find-batch: --train-batch-size 25 × --gradient-accum-step 4 = 100 is not divisible by the 8 replicas; use 96 or 104"
    ]
    assert replica_mistakes(recipe, 4) == []
