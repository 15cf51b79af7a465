"""Mixtures against brute force: shares exact over every prefix, the same for every world size, seekable, resumed bit for bit."""

import json
import math
import shutil
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, losses, records, run, torchrun
from conftest import write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import FOUR_STEPS, run_here, said_here

import run_pretrain
from gpt2_xla.cli import from_dict
from gpt2_xla.config import PretrainConfig, to_dict
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.loader import TokenWindows, training_batches
from gpt2_xla.data.mixture import LONGEST_PERIOD, Mixture, whole_shares
from gpt2_xla.data.train_dirs import TrainDir, parse_train_dirs
from gpt2_xla.data.training_set import TrainingSet, TrainingSource
from gpt2_xla.errors import UserError

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 12), st.sampled_from([1, 10, 100, 1000]), st.fractions(Fraction(1, 20), 3, max_denominator=20)),
    min_size=1,
    max_size=7,
)  # fmt: skip


@given(WEIGHTS)
@settings(max_examples=60)
def test_every_source_stays_within_one_sample_of_its_share(weights: list[Fraction]) -> None:
    mixture = Mixture(weights)
    seen = 3 * mixture.period if mixture.period < 20_000 else 30_000
    sources, _ = mixture.locate(np.arange(seen))
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    if math.lcm(*(share.denominator for share in shares)) <= LONGEST_PERIOD:
        assert [Fraction(share, mixture.period) for share in mixture.shares] == shares
    for source in range(len(weights)):
        counts = np.cumsum(sources == source)  # among the first 1, 2, 3, ... samples
        # whole numbers, so that no rounding hides an error
        off = np.abs(counts * mixture.period - np.arange(1, seen + 1) * mixture.shares[source])
        assert off.max() < mixture.period


@given(WEIGHTS, st.integers(0, 10**12))
@settings(max_examples=100)
def test_counts_and_numbers_are_those_of_counting(weights: list[Fraction], start: int) -> None:
    mixture = Mixture(weights)
    before = mixture.counts(start)
    assert sum(before) == start
    sources, indices = mixture.locate(np.arange(start, start + 300))
    for source, index in zip(sources.tolist(), indices.tolist(), strict=True):
        assert index == before[source]
        before[source] += 1
    assert mixture.counts(start + 300) == before


def test_the_order_of_weights_never_changes() -> None:
    """A resumed run must find the order of the run before, whatever versions lie between."""
    sources, _ = Mixture([Fraction("0.5"), Fraction("0.3"), Fraction("0.2")]).locate(np.arange(12))
    assert sources.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]


def test_weights_are_ratios_and_long_periods_are_rounded() -> None:
    assert whole_shares([Fraction("0.7"), Fraction("0.3")]) == whole_shares([7, 3]) == (7, 3)
    assert whole_shares([5]) == (1,)
    shares = whole_shares([10**10 + 1, 3 * 10**9, 1])
    assert sum(shares) == LONGEST_PERIOD
    assert shares[2] == 1
    assert shares[1] / sum(shares) == pytest.approx(3 / 13, abs=1 / LONGEST_PERIOD)
    assert min(whole_shares([10**9, *range(1, 300)])) == 1
    assert sum(whole_shares([10**9, *range(1, 300)])) == LONGEST_PERIOD


def test_a_long_period_is_made_and_searched_quickly() -> None:
    before = time.process_time()  # not that of a clock: on shared cores a process may wait for its turn
    Mixture([9_876_543_210, 1_234_567_890, 3]).locate(np.array([10**15]))
    assert time.process_time() - before < 10


# What --train-dir says


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("data/web", TrainDir("web", Path("data/web"))),
        ("data/web/train", TrainDir("web", Path("data/web/train"))),
        ("train", TrainDir("train", Path("train"))),
        ("web=data/fineweb/train:0.7", TrainDir("web", Path("data/fineweb/train"), Fraction(7, 10))),
        ("data/web:3", TrainDir("web", Path("data/web"), Fraction(3))),
        ("data/a:b", TrainDir("a:b", Path("data/a:b"))),
        ("data/a:b:1e-1", TrainDir("a:b", Path("data/a:b"), Fraction(1, 10))),
        ("./year=2024/web", TrainDir("web", Path("year=2024/web"))),
    ],
)
def test_an_entry_is_name_folder_and_weight(entry: str, expected: TrainDir) -> None:
    assert parse_train_dirs([entry]) == [expected]


def test_all_mistakes_of_the_entries_come_together() -> None:
    entries = ["=a", "b:0", "c:-1", "d:nan", "e:inf", "f:1e999", "g=:2", ":2", "x/train:1", "x/valid", "./y", "z=y:1"]
    with pytest.raises(UserError) as caught:
        parse_train_dirs(entries)
    expected = (
        "--train-dir =a has no name before its =",
        "--train-dir b:0 has the weight 0; expected a finite number above 0",
        "--train-dir c:-1 has the weight -1",
        "--train-dir d:nan has the weight nan",
        "--train-dir e:inf has the weight inf",
        "--train-dir f:1e999 has the weight 1e999",
        "--train-dir g=:2 names no folder",
        "--train-dir :2 names no folder",
        "--train-dir gives a weight to x z but none to x y; give each folder one",
        "--train-dir names 2 folders x; call them apart: NAME=FOLDER, as in x1=x/train x2=x/valid",
        f"--train-dir lists the folder {Path('y').resolve()} 2 times",
    )
    for mistake, start in zip(caught.value.mistakes, expected, strict=True):
        assert mistake.startswith(start)


def test_checkpoints_of_one_folder_are_still_read() -> None:
    saved = to_dict(PretrainConfig())
    for value, expected in (("data/train", ("data/train",)), (None, ()), (["a:1", "b:2"], ("a:1", "b:2"))):
        saved["data"]["train_dir"] = value
        assert from_dict(PretrainConfig, saved).data.train_dir == expected


# Samples


def training_set(folder: Path, lengths: list[int], weights: list[Fraction | None], seq_length: int = 5) -> TrainingSet:
    """Sources a, b, c, ... whose tokens are 1000 * their number + position."""
    sources = []
    for number, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        own = folder / "abcdefgh"[number]
        own.mkdir(parents=True)
        np.save(own / "s.npy", (1000 * number + np.arange(length)).astype(np.uint32))
        manifest = manifests.read(own)
        sources.append(TrainingSource(own.name, weight, manifest, TokenWindows(own, manifest, seq_length)))
    return TrainingSet(sources)


OPTIONS = {"seed": 7, "shuffle": True, "vocab_size": 2**32}


def test_a_source_gives_its_samples_in_the_order_it_has_alone(tmp_path: Path) -> None:
    mixed = training_set(tmp_path, [203, 91, 64], [Fraction(5), Fraction(3), Fraction(2)])
    rows = mixed.rows(np.arange(400), **OPTIONS)
    for number, source in enumerate(mixed.sources):
        own = rows[rows[:, 0] // 1000 == number]
        assert len(own) == [200, 120, 80][number]
        assert np.array_equal(own, source.windows.rows(np.arange(len(own)), **OPTIONS))
    assert mixed.epochs(400) == {"a": 200 / 39, "b": 120 / 17, "c": 80 / 11}


def test_without_weights_sources_count_by_their_tokens(tmp_path: Path) -> None:
    mixed = training_set(tmp_path, [300, 100], [None, None])
    assert mixed.shares == {"a": 0.75, "b": 0.25}
    assert mixed.tokens == 400


def test_one_source_is_the_folder_itself(tmp_path: Path) -> None:
    mixed = training_set(tmp_path, [203], [Fraction(5)])
    (source,) = mixed.sources
    assert np.array_equal(mixed.rows(np.arange(99), **OPTIONS), source.windows.rows(np.arange(99), **OPTIONS))
    assert mixed.fingerprint == source.manifest.fingerprint


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_mixture_is_the_same_for_every_world_size_split_and_start(tmp_path: Path, world_size: int) -> None:
    mixed = training_set(tmp_path, [203, 91], [Fraction(7), Fraction(3)])

    def rows(micro_steps: int, batch_size: int, rank: int, ranks: int, first: int, steps: int) -> torch.Tensor:
        options = {"micro_steps": micro_steps, "batch_size": batch_size, "rank": rank, "world_size": ranks}
        return torch.stack(list(training_batches(mixed, first_sample=first, steps=steps, **options, **OPTIONS)))

    whole = rows(1, 8, 0, 1, 0, 20).flatten(0, 2)
    parts = [rows(2, 4, rank, world_size, 24, 17) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts, dim=2).flatten(0, 2), whole[24:])


def test_the_fingerprint_is_of_all_sources_and_weights_in_order(tmp_path: Path) -> None:
    prints = {
        training_set(tmp_path / str(i), lengths, list(map(Fraction, weights))).fingerprint
        for i, (lengths, weights) in enumerate(
            [([100, 90], [7, 3]), ([100, 90], [3, 7]), ([90, 100], [7, 3]), ([100, 91], [7, 3]), ([100], [1])]
        )
    }
    assert len(prints) == 5
    one, other = (
        training_set(tmp_path / name, [100, 90], w).fingerprint for name, w in (("x", [7, 3]), ("y", [14, 6]))
    )
    assert one == other


def test_a_source_too_small_for_its_part_of_a_batch_is_named(tmp_path: Path) -> None:
    mixed = training_set(tmp_path, [1000, 40, 4], [Fraction(1), Fraction(1), Fraction(1)])
    few, short = mixed.mistakes(30)
    assert "b holds 40 tokens, that is 7 sequences of --seq-length 5, fewer than one batch" in few
    assert "takes of it (10)" in few
    assert "c holds 4 tokens, but --seq-length 5 needs at least 6" in short
    assert mixed.mistakes(21) == [short]


# Whole runs

# 64 × 32 tokens a step: each source passes an epoch within the run.
FLAGS = [*TINY, "--device", "cpu", "--train-batch-size", "64", "--train-steps", "40", "--warmup-steps", "10"]


@pytest.fixture(scope="module")
def two_sources(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--train-dir of the text and of numbers."""
    tokens = np.frombuffer(" ".join(map(str, range(5000))).encode(), np.uint8)
    numbers = write_split(tmp_path_factory.mktemp("numbers"), "train", tokens)
    return ["--train-dir", f"text={text_data / 'train'}:0.7", f"numbers={numbers}:0.3"]


@pytest.fixture(scope="module")
def uninterrupted(two_sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps in one process that also saved at step 15."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    flags = (*two_sources, "--save-interval", "15", "--checkpoints-dir", folder)
    output = said_here(run_pretrain.main, *FLAGS, *flags)
    assert "70.00% text (40,000 tokens), 30.00% numbers (23,889 tokens)" in output
    assert output.count("1.43 epochs of text, 1.03 epochs of numbers") == 2  # planned, and done at the end
    return folder


def test_epochs_of_each_source_are_in_the_records(uninterrupted: Path) -> None:
    last = records(uninterrupted)[-1]
    assert last["epochs/text"] == pytest.approx(40 * 64 * 0.7 / 1249, abs=1e-3)
    assert last["epochs/numbers"] == pytest.approx(40 * 64 * 0.3 / 745, abs=2e-3)


def test_a_mixed_run_resumes_bit_for_bit_and_tells_of_other_weights(
    uninterrupted: Path, two_sources: list[str], tmp_path: Path
) -> None:
    for name in ("same", "other"):
        shutil.copytree(uninterrupted / "step-00000015", tmp_path / name / "step-00000015")
    output = said_here(run_pretrain.main, "--checkpoints-dir", tmp_path / "same")
    assert "note:" not in output
    for file in ("model.safetensors", "trainer_state/optimizer.safetensors"):
        ours, theirs = (folder / "step-00000040" / file for folder in (tmp_path / "same", uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes()
    assert losses(tmp_path / "same") == losses(uninterrupted)[15:]
    changed = [entry.replace(":0.7", ":0.8") for entry in two_sources]
    output = said_here(run_pretrain.main, "--checkpoints-dir", tmp_path / "other", *changed, "--train-steps", "16")
    assert "note: the training data is not the checkpoint's; from step 15 on" in output


def test_two_processes_train_on_the_mixture_that_one_does(
    uninterrupted: Path, two_sources: list[str], tmp_path: Path
) -> None:
    run(*torchrun(2), *FLAGS, *two_sources, "--checkpoints-dir", tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), abs=1e-5)  # sums in another order
    states = [
        json.loads((folder / "step-00000040/trainer_state/state.json").read_text())
        for folder in (uninterrupted, tmp_path)
    ]
    assert states[0]["data_fingerprint"] == states[1]["data_fingerprint"]
    assert states[0]["samples"] == states[1]["samples"] == 40 * 64


def test_mistakes_of_several_folders_come_together(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    other = write_split(tmp_path / "other", "train", np.zeros(5000, np.uint16))
    text = (other / "manifest.json").read_text()
    other.joinpath("manifest.json").write_text(
        text.replace('"bytes"', '"gpt2"').replace('"tokenizer_hash": "', '"tokenizer_hash": "0')
    )
    entries = (f"{text_data / 'train'}:1", f"{other}:2", f"{tmp_path / 'absent'}:3")
    status = run_here(monkeypatch, run_pretrain.main, *FOUR_STEPS, "--train-dir", *entries, "--d-model", "7")
    printed = capsys.readouterr().err
    assert status == 2
    assert "different tokenizers: bytes and gpt2; prepare them with one" in printed
    assert f"data folder {tmp_path / 'absent'} does not exist" in printed
    assert "--d-model 7 is not divisible" in printed
    assert printed.startswith("3 errors:")
