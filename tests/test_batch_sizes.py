"""--batch-size-schedule against brute force, and in real runs: the same data, resumed anywhere, on any number of processes."""

import itertools
import shutil

import pytest
import torch
from commands import (
    QUICK_XLA,
    TINY,
    TRAIN_XLA,
    data_flags,
    losses,
    records,
    run,
    torchrun,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import run_here

import run_pretrain
from gpt2_xla.batch_sizes import BatchSizes, parse_batch_sizes
from gpt2_xla.config import DataConfig, ModelConfig, PretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.errors import UserError
from gpt2_xla.run_verification import verify_run
from gpt2_xla.script_config import VerifyRunConfig

# 8, 16, 32 and again 16 sequences a step.
SCHEDULE = ("--batch-size-schedule", "0:8,6:16,13:32,17:16")
FLAGS = [*TINY, *SCHEDULE, "--train-steps", "20", "--warmup-steps", "10", "--dropout", "0.1"]
SEQUENCES = [8] * 6 + [16] * 7 + [32] * 4 + [16] * 3
STATE = ("model.safetensors", "trainer_state/optimizer.safetensors")

STAGES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=5)


def sizes_of(stages, micro_batch):
    """Stages of (steps until the next one, micro-steps), and the micro-steps of each of 80 steps."""
    first, found, by_step = 0, [], []
    for length, micro_steps in stages:
        found.append((first, micro_steps))
        by_step += [micro_steps] * length
        first += length
    return BatchSizes(micro_batch, tuple(found)), (by_step + [stages[-1][1]] * 80)[:80]


@given(STAGES, st.integers(1, 7))
@settings(max_examples=100)
def test_every_step_is_what_counting_by_hand_says(stages, micro_batch):
    sizes, by_step = sizes_of(stages, micro_batch)
    sums = [0, *itertools.accumulate(micro_batch * count for count in by_step)]
    firsts = {first for first, _ in sizes.stages}
    for step, micro_steps in enumerate(by_step):
        assert sizes.micro_steps(step) == micro_steps
        assert sizes.sequences(step) == sums[step + 1] - sums[step]
        assert sizes.before(step) == sums[step]
        assert sizes.begins(step) == (step > 0 and step in firsts)
    assert parse_batch_sizes(str(sizes), micro_batch) == sizes


@given(STAGES, st.integers(0, 79), st.integers(0, 79))
@settings(max_examples=100)
def test_spans_are_the_steps_asked_for(stages, first, end):
    sizes, by_step = sizes_of(stages, 1)
    spans = list(sizes.spans(first, end))
    assert [micro_steps for count, micro_steps in spans for _ in range(count)] == by_step[first:end]
    assert all(count > 0 for count, _ in spans)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not STEP:SEQUENCES"),
        ("0:64,128", "'128' is not STEP:SEQUENCES, as in 0:64,2000:128"),
        ("0:64,-5:128", "'-5:128' is not"),
        ("0:64,1e3:128", "'1e3:128' is not"),
        ("0:" + "9" * 5000, "is not STEP:SEQUENCES"),
        ("5:64", "begins with step 5; it must say what step 0 takes"),
        ("0:64,9:32,9:64", "the steps must rise"),
        ("0:64,9:32,8:64", "the steps must rise"),
        ("0:64,9:100", "100 sequences are no whole micro-steps of --train-batch-size 32; use 96 or 128"),
        ("0:8", "8 sequences are no whole micro-steps of --train-batch-size 32; use 32"),
        ("0:0", "0 sequences are no whole"),
    ],
)
def test_a_schedule_that_says_nothing_sensible_is_told(text, said):
    with pytest.raises(UserError, match="--batch-size-schedule") as error:
        parse_batch_sizes(text, 32)
    assert any(said in mistake for mistake in error.value.mistakes)


def test_all_mistakes_come_together(monkeypatch, capsys, text_data):
    flags = ["--batch-size-schedule", "3:12", "--train-steps", "0", "--train-dir", text_data / "train"]
    assert run_here(monkeypatch, run_pretrain.main, *TINY, *flags) == 2
    printed = capsys.readouterr().err
    assert "begins with step 3" in printed
    assert "12 sequences are no whole micro-steps of --train-batch-size 8; use 8 or 16" in printed
    assert "--train-steps 0" in printed


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 8), (4, 8), (2, 4), (1, 2)])
def test_the_data_does_not_depend_on_processes_or_micro_steps_and_any_step_can_be_the_first(
    world_size, micro_batch, text_data
):
    def opened(rank, ranks, rows):
        data = DataConfig((f"{text_data}/train",), train_batch_size=rows, batch_size_schedule=SCHEDULE[1])
        return PretrainingData.open(PretrainConfig(ModelConfig(257, 32, 32, 1, 1), data), rank, ranks)

    def whole(first_step, ranks, rows):
        """Each step's sequences, in order."""
        sizes = opened(0, 1, rows).config.batch_sizes
        parts = [
            opened(rank, ranks, rows).training(sizes.before(first_step), 20 - first_step, first_step)
            for rank in range(ranks)
        ]
        return [torch.cat(batches, dim=1).flatten(0, 1) for batches in zip(*parts, strict=True)]

    reference = whole(0, 1, 8)
    assert [len(rows) for rows in reference] == SEQUENCES
    for first_step in (0, 5, 6, 12, 13, 16, 17, 19):
        found = whole(first_step, world_size, micro_batch)
        assert all(map(torch.equal, found, reference[first_step:]))
        assert len(found) == 20 - first_step


def final_bytes(run_dir):
    return [(run_dir / "step-00000020" / name).read_bytes() for name in STATE]


def test_a_run_interrupted_anywhere_is_bit_for_bit_and_counts_its_tokens(tmp_path, monkeypatch, capsys, text_data):
    def train(*arguments):
        assert run_here(monkeypatch, run_pretrain.main, *arguments, "--device", "cpu") == 0

    flags = [*FLAGS, "--train-dir", text_data / "train", "--save-interval", "1", "--saved-checkpoint-limit", "99"]
    train(*flags, "--checkpoints-dir", tmp_path / "whole")
    assert (
        "256 from step 0 on, 512 from step 6 on, 1,024 from step 13 on, 512 from step 17 on" in capsys.readouterr().out
    )
    tokens = [32 * count for count in itertools.accumulate(SEQUENCES)]
    assert [record["tokens"] for record in records(tmp_path / "whole")] == tokens
    speeds = [record["tokens_per_second"] * record["step_seconds"] for record in records(tmp_path / "whole")]
    assert speeds == pytest.approx([32 * count for count in SEQUENCES])
    for last in (5, 6, 14):  # before a change, at it, in a stage
        again = tmp_path / f"after{last}"
        shutil.copytree(tmp_path / "whole" / f"step-{last:08d}", again / f"step-{last:08d}")
        train("--checkpoints-dir", again)
        assert final_bytes(again) == final_bytes(tmp_path / "whole")
        assert [record["tokens"] for record in records(again)] == tokens[last:]
    summary, problems = verify_run(VerifyRunConfig(), tmp_path / "whole")
    assert problems == []
    assert f"20 steps, {sum(SEQUENCES):,} sequences, {tokens[-1]:,} tokens" in summary
    lines = (tmp_path / "whole" / "batches.jsonl").read_text().replace('"0:8,6:16,', '"0:8,7:16,')
    (tmp_path / "whole" / "batches.jsonl").write_text(lines)
    assert (
        "step 7 took 16 samples, but its global batch has 8" in verify_run(VerifyRunConfig(), tmp_path / "whole")[1][0]
    )


OTHER = ("--dropout", "0", "--warmup-steps", "50")


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory, text_data):
    """The losses of a run in one process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        flags = [*FLAGS, *OTHER, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", folder]
        assert run_here(patch, run_pretrain.main, *flags) == 0
    return losses(folder)


@pytest.mark.parametrize("command", [torchrun(2), pytest.param(TRAIN_XLA, marks=pytest.mark.xla)], ids=["gloo", "xla"])
def test_other_runtimes_and_micro_batches_give_the_losses_of_one_process(command, tmp_path, text_data, of_one_process):
    flags = [*FLAGS, *OTHER, *data_flags(text_data)]
    smaller = ("--train-batch-size", "4", "--max-recompiles", "0")
    output = run(*command, *flags, *smaller, "--checkpoints-dir", tmp_path / "other", **QUICK_XLA)
    assert losses(tmp_path / "other") == pytest.approx(of_one_process, abs=1e-5)
    assert "from step 7 on a step takes 16 sequences" in output
    if command == TRAIN_XLA:  # each number of micro-steps once: the fourth stage's is known by then
        compiles = [record["compiles"] for record in records(tmp_path / "other")]
        rises = [step for step, (one, two) in enumerate(itertools.pairwise(compiles), start=2) if two > one]
        # A record is written when the step after it has been launched, and so knows of that one's compilation.
        assert rises == [6, 13]
        assert ", 0 of them after warm-up" in output
