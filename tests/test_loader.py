"""Batches against brute-force references: the order is a permutation, the same for every world size, and seekable."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_xla.bench_config import BenchLoaderConfig
from gpt2_xla.data import loader, loader_benchmark, shards
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.data_mistakes import train_data_mistakes, valid_data_mistakes, vocabulary_mistakes
from gpt2_xla.data.loader import (
    TokenWindows,
    evaluation_batches,
    evaluation_steps,
    predicted_tokens,
    training_batches,
)
from gpt2_xla.data.loader_benchmark import write_sparse_folder
from gpt2_xla.data.permutation import permute
from gpt2_xla.errors import UserError

TEMPORARY = pytest.TempPathFactory


def make_windows(folder: Path, lengths: list[int], seq_length: int) -> TokenWindows:
    """Shards whose token at stream position p is p."""
    position = 0
    for i, length in enumerate(lengths):
        np.save(folder / f"s_{i:02d}.npy", np.arange(position, position + length).astype(np.uint32))
        position += length
    return TokenWindows(folder, manifests.read(folder), seq_length)


def batches(windows: TokenWindows, **options) -> list[torch.Tensor]:
    defaults = {"seed": 7, "shuffle": True, "first_sample": 0, "steps": 5, "micro_steps": 2, "batch_size": 4}
    return list(training_batches(windows, **{**defaults, "rank": 0, "world_size": 1, "vocab_size": 2**32, **options}))


def keys(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(8, np.uint64)


@given(st.one_of(st.integers(1, 70), st.integers(1, 5000)), st.integers(0, 2**64))
@settings(max_examples=150)
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    order = permute(np.arange(size), size, keys(seed))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_permutation_does_not_depend_on_who_else_is_asked() -> None:
    whole = permute(np.arange(1000), 1000, keys(1))
    assert [int(permute(np.array([i]), 1000, keys(1))[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_permutation_is_even_over_seeds() -> None:
    # Where element 0 of 10 goes over 5,000 seeds: each place 500 times, with a standard deviation of 21.
    counts = np.bincount([int(permute(np.array([0]), 10, keys(seed))[0]) for seed in range(5000)], minlength=10)
    assert counts.min() > 390
    assert counts.max() < 610


def test_permutation_looks_random_at_scale() -> None:
    size = 1_000_003
    order = permute(np.arange(20_000), size, keys(3))
    assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.05
    assert abs(order.mean() / size - 0.5) < 0.02
    assert len(np.unique(order)) == 20_000


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), seq_length=st.integers(1, 12), seed=st.integers(0, 99)
)
@settings(max_examples=80)
def test_an_epoch_reads_each_of_its_windows_once(
    tmp_path_factory: TEMPORARY, lengths: list[int], seq_length: int, seed: int
) -> None:
    windows = make_windows(tmp_path_factory.mktemp("w"), lengths, seq_length)
    tokens = sum(lengths)
    if tokens <= seq_length:
        assert len(windows) == 0
        with pytest.raises(UserError, match="fewer than --seq-length"):
            batches(windows)
        return
    assert len(windows) >= 1
    for epoch in range(3):
        rows = batches(
            windows, seed=seed, first_sample=epoch * len(windows), steps=1, micro_steps=1, batch_size=len(windows)
        )[0][0]
        starts = np.sort(rows[:, 0].numpy())
        offset = starts[0]
        assert np.array_equal(starts, offset + np.arange(len(windows)) * seq_length)
        assert 0 <= offset < seq_length
        assert all(np.array_equal(row, np.arange(row[0], row[0] + seq_length + 1)) for row in rows.numpy())
        assert tokens - len(windows) * seq_length < 2 * seq_length  # what the docstring promises


def test_the_smallest_data_is_one_window(tmp_path: Path) -> None:
    windows = make_windows(tmp_path, [4, 5], 8)
    assert len(windows) == 1
    for batch in batches(windows):
        assert (batch == torch.arange(9)).all()


def test_epochs_differ_in_order_and_borders(tmp_path: Path) -> None:
    windows = make_windows(tmp_path, [1000], 10)
    samples = np.arange(99)
    epochs = [windows.starts(samples + 99 * epoch, seed=1, shuffle=True) for epoch in range(8)]
    assert len({tuple(starts) for starts in epochs}) == 8
    assert len({min(starts) for starts in epochs}) > 3
    assert not np.array_equal(epochs[0], windows.starts(samples, seed=2, shuffle=True))


def test_order_of_a_seed_never_changes(tmp_path: Path) -> None:
    """A resumed run must find the order of the run before, whatever versions lie between."""
    windows = make_windows(tmp_path, [1000], 10)
    assert windows.starts(np.array([0, 1, 2, 99, 10**9]), seed=1337, shuffle=True).tolist() == [443, 673, 163, 703, 145]


def test_unshuffled_reads_in_order(tmp_path: Path) -> None:
    windows = make_windows(tmp_path, [30, 71], 10)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches(windows, shuffle=False, steps=3)])
    assert rows[:, 0].tolist() == [(n % 9) * 10 for n in range(24)]


@given(st.sampled_from([1, 2, 4]), st.sampled_from([(2, 4), (1, 8), (8, 1 * 4), (4, 4)]), st.booleans())
@settings(max_examples=24)
def test_global_order_is_the_same_for_every_world_size_and_split(
    tmp_path_factory: TEMPORARY, world_size: int, split: tuple[int, int], shuffle: bool
) -> None:
    windows = make_windows(tmp_path_factory.mktemp("w"), [50, 33, 100], 5)
    micro_steps, batch_size = split
    total = 64
    reference = [windows.starts(np.array([n]), 7, shuffle)[0] for n in range(total)]
    ranks = [
        batches(
            windows, shuffle=shuffle, steps=total // (micro_steps * batch_size), micro_steps=micro_steps,
            batch_size=batch_size, rank=rank, world_size=world_size,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    seen = [
        row[0].item()
        for step in zip(*ranks, strict=True)
        for m in range(micro_steps)
        for batch in step
        for row in batch[m]
    ]
    assert seen == reference
    assert ranks[0][0].shape == (micro_steps, batch_size // world_size, 6)
    assert ranks[0][0].dtype == torch.int64


@given(st.integers(0, 200))
@settings(max_examples=20)
def test_seek_is_skip(tmp_path_factory: TEMPORARY, skipped: int) -> None:
    windows = make_windows(tmp_path_factory.mktemp("w"), [200], 5)
    whole = batches(windows, steps=skipped + 2)
    rest = batches(windows, steps=2, first_sample=skipped * 8)
    assert torch.equal(torch.stack(whole[skipped:]), torch.stack(rest))


def test_seek_far_is_quick(tmp_path: Path) -> None:
    windows = make_windows(tmp_path, [200], 5)
    batches(windows, steps=1, first_sample=10**15)  # sample by sample, or epoch by epoch, this would take days


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    seq_length=st.integers(1, 9),
    batch_size=st.sampled_from([4, 8]),
    world_size=st.sampled_from([1, 2, 4]),
    steps=st.one_of(st.none(), st.integers(0, 9)),
)
@settings(max_examples=100)
def test_evaluation_predicts_every_token_once(
    tmp_path_factory: TEMPORARY,
    lengths: list[int],
    seq_length: int,
    batch_size: int,
    world_size: int,
    steps: int | None,
) -> None:
    windows = make_windows(tmp_path_factory.mktemp("w"), lengths, seq_length)
    ranks = [
        list(
            evaluation_batches(
                windows, steps=steps, batch_size=batch_size, rank=rank, world_size=world_size, vocab_size=2**32
            )
        )
        for rank in range(world_size)
    ]
    assert {len(of_rank) for of_rank in ranks} == {evaluation_steps(windows, batch_size, steps)}
    rows = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert all(batch.shape == (batch_size // world_size, 2, seq_length) for batch in rows)
    inputs = [token for batch in rows for token in batch[:, 0].flatten().tolist()]
    targets = [token for batch in rows for token in batch[:, 1].flatten().tolist()]
    real = [(i, t) for i, t in zip(inputs, targets, strict=True) if t != -100]
    whole = [(p - 1, p) for p in range(1, sum(lengths))]
    assert real == (whole if steps is None else whole[: steps * batch_size * seq_length])
    assert len(real) == predicted_tokens(windows, batch_size, steps)
    assert all(i == 0 for i, t in zip(inputs, targets, strict=True) if t == -100)


def test_tokens_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    windows = make_windows(tmp_path, [10, 10], 4)
    with pytest.raises(
        UserError, match=r"token 3 of s_01.npy is 13, but --vocab-size 13 .* use --vocab-size 14 or more"
    ):
        batches(windows, shuffle=False, vocab_size=13)
    batches(windows, shuffle=False, vocab_size=17)  # 0..16 are in windows
    # The last token is a target only.
    with pytest.raises(UserError, match=r"token 9 of s_01.npy is 19"):
        list(evaluation_batches(windows, steps=None, batch_size=2, rank=0, world_size=1, vocab_size=19))
    assert len(list(evaluation_batches(windows, steps=None, batch_size=2, rank=0, world_size=1, vocab_size=20))) == 3


def test_mistakes_of_the_data_state_the_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(100, np.uint16))
    manifest = manifests.read(tmp_path)

    def mistakes(**options) -> str:
        return "\n".join(train_data_mistakes(tmp_path, manifest, **{"seq_length": 8, "batch_size": 4, **options}))

    assert mistakes() == ""
    assert "holds 100 tokens, but --seq-length 100 needs at least 101" in mistakes(seq_length=100)
    assert mistakes(seq_length=99, batch_size=1) == ""
    assert "11 sequences of --seq-length 8, fewer than one batch of --train-batch-size 12" in mistakes(batch_size=12)
    assert mistakes(batch_size=11) == ""
    assert valid_data_mistakes(tmp_path, manifest) == []
    large = manifests.Manifest("valid", "uint16", 1, (), tokenizer="gpt2", vocab_size=50257)
    assert len(valid_data_mistakes(tmp_path, large)) == 1
    assert vocabulary_mistakes([("--train-dir a", manifest)], 50) == []
    assert vocabulary_mistakes([("--train-dir a", manifest), ("--valid-dir b", large)], 50257) == []
    (found,) = vocabulary_mistakes([("--train-dir a", large), ("--valid-dir b", large)], 50)
    assert "50257 ids of the tokenizer gpt2 that prepared --train-dir a and --valid-dir b; use" in found


def test_shards_cut_short_are_found_when_opened(tmp_path: Path) -> None:
    windows = make_windows(tmp_path, [100, 100], 8)
    (tmp_path / "s_01.npy").open("r+b").truncate(200)
    entries = tuple(manifests.ShardEntry(f"s_{i:02d}.npy", 100) for i in range(2))
    with pytest.raises(UserError, match=r"s_01.npy holds 200 bytes, its header promises"):
        TokenWindows(tmp_path, manifests.Manifest("train", "uint32", 200, entries), 8)
    with pytest.raises(UserError, match="has become shorter"):
        batches(windows)


def test_a_shard_that_shrinks_or_goes_while_training_is_named(tmp_path: Path) -> None:
    for name, damage in (
        ("cut", lambda path: path.open("r+b").truncate(200)),
        ("gone", lambda path: path.unlink()),
    ):
        (tmp_path / name).mkdir()
        windows = make_windows(tmp_path / name, [100, 100], 8)
        damage(tmp_path / name / "s_01.npy")
        with pytest.raises(UserError, match=r"s_01.npy (has become shorter|can't be read: No such file)"):
            batches(windows)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    length=st.integers(1, 12),
    open_files=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=80)
def test_gathering_equals_reading_one_by_one(
    tmp_path_factory: TEMPORARY, lengths: list[int], length: int, open_files: int, data: st.DataObject
) -> None:
    lengths.append(length)
    windows = make_windows(tmp_path_factory.mktemp("w"), lengths, 1)
    places = st.lists(st.integers(0, sum(lengths) - length), max_size=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MAX_OPEN_FILES", open_files)
        for _ in range(2):
            starts = np.array(data.draw(places), np.int64)
            assert np.array_equal(windows.stream.gather(starts, length), starts[:, None] + np.arange(length))
            assert len(windows.stream._files) <= open_files
    for beyond in (-1, sum(lengths) - length + 1):
        with pytest.raises(IndexError):
            windows.stream.gather(np.array([beyond]), length)


def test_shards_of_two_byte_orders_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(9, "<u2"))
    np.save(tmp_path / "b.npy", np.zeros(9, ">u2"))
    with pytest.raises(UserError, match="mix <u2 and >u2"):
        TokenWindows(tmp_path, manifests.read(tmp_path), 2)


@pytest.mark.parametrize("together", [1, 100, 2**18])
def test_reading_several_steps_together_changes_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    windows = make_windows(tmp_path, [200, 91], 5)
    expected = [windows.rows(np.arange(8) + 8 * s, seed=7, shuffle=True, vocab_size=2**32) for s in range(3, 20)]
    monkeypatch.setattr(loader, "TOKENS_READ_TOGETHER", together)
    found = batches(windows, first_sample=24, steps=17)
    assert np.array_equal(np.array(expected), torch.stack(found).flatten(1, 2).numpy())


def test_a_hundred_large_shards_open_and_seek_at_once(tmp_path: Path) -> None:
    write_sparse_folder(tmp_path / "data", 100, 100_000_000)  # takes no room on the disk
    before = time.process_time()  # what other processes do takes none of it
    windows = TokenWindows(tmp_path / "data", manifests.read(tmp_path / "data"), 1024)
    assert time.process_time() - before < 2
    assert windows.tokens == 10**10
    for first_sample in (0, 512 * 10**6):  # the second only is timed: the first calls load code
        before = time.process_time()
        (batch,) = batches(windows, first_sample=first_sample, steps=1)
    assert time.process_time() - before < 0.5  # 5 ms, where nothing else runs
    assert batch.shape == (2, 4, 1025)


def test_the_loader_benchmark_measures_every_row(tmp_path: Path) -> None:
    config = BenchLoaderConfig(
        seq_lengths=(16,), shards=2, shard_size=10_000, tokens_per_step=64, seek_step=9, seconds=0.05
    )
    rows = loader_benchmark.bench(config)
    assert [(row.seq_length, row.folders) for row in rows] == [(16, 1), (16, 2)]
    assert all(row.tokens_per_second > 0 for row in rows)
    assert loader_benchmark.table(rows).count("| 16 |") == 2
    with pytest.raises(UserError, match=r"--shards 0 must be at least 1\n--seq-lengths -1 must"):
        loader_benchmark.bench(BenchLoaderConfig(shards=0, seq_lengths=(-1,)))
