"""The same recipe gives the same losses for any number of processes, any accumulation, and on both runtimes."""

import pytest
from commands import QUICK_XLA, TINY, TRAIN_XLA, data_flags, losses, records, run, torchrun, xla_replicas
from small_runs import said_here

import run_pretrain

STEPS = 100
# float32: sums in another order differ in the last bits. With 50 warm-up steps training does not amplify that (measured: 2e-6);
# with 10 it does, to 1e-3, between any two orders of summation.
TOLERANCE = 1e-5


def all_flags(folder, text_data, *flags):
    return [*TINY, *data_flags(text_data), "--train-steps", str(STEPS), "--checkpoints-dir", folder, *flags]


def curve(command, folder, text_data, *flags):
    run(*command, *all_flags(folder, text_data, *flags), **QUICK_XLA)
    return [*losses(folder), *losses(folder, "valid")]


def curve_here(folder, text_data, *flags):
    """That of one torch process on the CPU, float32: this one."""
    said_here(run_pretrain.main, *all_flags(folder, text_data, "--device", "cpu", *flags))
    return [*losses(folder), *losses(folder, "valid")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, text_data):
    """Losses of each step and of the validation at the end."""
    found = curve_here(tmp_path_factory.mktemp("reference") / "run", text_data)
    assert len(found) == STEPS + 1
    assert found[STEPS - 1] < 0.6 * found[0]
    return found


def largest_difference(one, other):
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("processes", [2, 4])
def test_gloo_processes_equal_one_process(processes, tmp_path, text_data, reference):
    found = curve(torchrun(processes), tmp_path / "run", text_data, "--device", "cpu")
    assert largest_difference(found, reference) < TOLERANCE


def test_accumulation_equals_the_large_batch(tmp_path, text_data, reference):
    flags = ("--train-batch-size", "2", "--gradient-accum-step", "4")
    found = curve(torchrun(2), tmp_path / "run", text_data, *flags)
    assert largest_difference(found, reference) < TOLERANCE


def test_a_chunked_loss_equals_the_whole_one(tmp_path, text_data, reference):
    found = curve_here(tmp_path / "run", text_data, "--loss-chunk", "48")
    assert largest_difference(found, reference) < TOLERANCE


@pytest.mark.xla
def test_the_xla_entry_point_equals_the_torch_one(tmp_path, text_data, reference):
    found = curve(TRAIN_XLA, tmp_path / "run", text_data)
    assert largest_difference(found, reference) < TOLERANCE


@pytest.mark.xla
@pytest.mark.parametrize("replicas", [2, 4])
def test_xla_replicas_equal_one_process(replicas, tmp_path, text_data, reference):
    found = curve(xla_replicas(replicas), tmp_path / "run", text_data)
    assert largest_difference(found, reference) < TOLERANCE


@pytest.mark.xla
def test_xla_accumulation_equals_the_large_batch_and_compiles_once(tmp_path, text_data, reference):
    flags = (
        "--train-batch-size",
        "2",
        "--gradient-accum-step",
        "4",
        "--no-use-syncfree-optim",
        "--valid-interval",
        "50",
    )
    run(*TRAIN_XLA, *all_flags(tmp_path / "r", text_data, *flags), **QUICK_XLA)
    assert largest_difference(losses(tmp_path / "r"), reference[:STEPS]) < TOLERANCE
    compiles = [record["compiles"] for record in records(tmp_path / "r")]
    assert compiles[0] == compiles[-1]
