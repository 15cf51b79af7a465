"""A modern model (RoPE, RMSNorm, QK-norm, SwiGLU, grouped heads, no biases) has the same losses on every runtime."""

import pytest
from commands import QUICK_XLA, TINY, TRAIN_XLA, data_flags, losses, records, run, xla_replicas
from small_runs import run_here

import run_pretrain

STEPS = 20
FLAGS = [
    *TINY,
    *(
        "--position",
        "rope",
        "--norm",
        "rmsnorm",
        "--qk-norm",
        "--activation",
        "swiglu",
        "--no-bias",
        "--no-tie-weights",
    ),
    *("--num-heads", "4", "--num-kv-heads", "2", "--vocab-size", "260", "--train-steps", str(STEPS)),
]
TOLERANCE = 1e-5  # float32; measured 2e-6


def all_losses(folder):
    return [*losses(folder), *losses(folder, "valid")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, text_data):
    """Losses of each step and of the validation at the end: one torch process on the CPU."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = [*FLAGS, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", folder]
        assert run_here(patch, run_pretrain.main, *flags) == 0
    assert len(all_losses(folder)) == STEPS + 1
    return all_losses(folder)


@pytest.mark.parametrize("lever", ["block", "selective"])
def test_recomputing_activations_changes_no_loss(lever, tmp_path, text_data, reference, monkeypatch):
    flags = [*FLAGS, *data_flags(text_data), "--device", "cpu", "--activation-checkpointing", lever]
    assert run_here(monkeypatch, run_pretrain.main, *flags, "--checkpoints-dir", tmp_path) == 0
    assert all_losses(tmp_path) == pytest.approx(reference, abs=TOLERANCE)


@pytest.mark.xla
@pytest.mark.parametrize(
    ("command", "flags", "environment"),
    [
        (TRAIN_XLA, ["--train-batch-size", "4", "--gradient-accum-step", "2"], {}),
        (xla_replicas(2), ["--scan-layers", "--activation-checkpointing", "block"], {}),
        (
            TRAIN_XLA,
            [
                *("--sharding", "fsdp", "--mesh", "data=2,fsdp=2,tensor=2", "--activation-checkpointing", "selective"),
                *("--loss-chunk", "48", "--vocab-multiple", "128"),
            ],
            {"CPU_NUM_DEVICES": "8"},
        ),
    ],
    ids=["one device", "two replicas, scanned", "sharded over eight"],
)
def test_xla_has_the_losses_of_torch(command, flags, environment, tmp_path, text_data, reference):
    arguments = [*FLAGS, *data_flags(text_data), "--checkpoints-dir", tmp_path, *flags]
    output = run(*command, *arguments, **QUICK_XLA, **environment)
    assert all_losses(tmp_path) == pytest.approx(reference, abs=TOLERANCE)
    assert "exports to  Qwen3ForCausalLM" in output
    compiles = [record["compiles"] for record in records(tmp_path)]
    assert compiles[1] == compiles[-1]
