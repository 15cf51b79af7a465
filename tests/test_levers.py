"""Each memory lever gives the plain path's loss and gradients, saves what it says, and refuses what it cannot do."""

import json

import pytest
import torch
from commands import PYTHON, QUICK_XLA, ROOT, TINY, data_flags, losses, records, run, xla_replicas
from small_runs import FOUR_STEPS, run_here

import run_pretrain
from gpt2_xla import checkpoint
from gpt2_xla.cli import parse
from gpt2_xla.config import PRESETS, ModelConfig, TorchConfig, XlaConfig, XlaPretrainConfig
from gpt2_xla.model import build_model
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.runtime.xla_flash import attention_mistakes, flash_obstacles
from gpt2_xla.validation import config_mistakes

MODEL = ModelConfig(vocab_size=101, seq_length=32, d_model=32, num_layers=3, num_heads=4, dropout=0.1)
LEVERS = ("block", "selective")


def torch_step(lever, precision="no"):
    """Gradients of one batch, with the activation bytes that autograd kept for them."""
    runtime = TorchRuntime(TorchConfig(device="cpu", mixed_precision=precision, activation_checkpointing=lever))
    model = build_model(MODEL, 0, seed=1)
    forward = runtime.place(model).train()
    tokens = torch.randint(101, (4, 33), generator=torch.Generator().manual_seed(2))
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address comes twice
        return tensor

    runtime.seed_dropout(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), runtime.autocast():
        loss = forward(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())], sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("lever", LEVERS)
def test_recomputing_draws_the_same_dropout_and_changes_no_gradient(lever, precision):
    plain, recomputed = torch_step("none", precision)[0], torch_step(lever, precision)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_recomputing_keeps_fewer_activation_bytes():
    plain, block, selective = (torch_step(lever)[1] for lever in ("none", *LEVERS))
    attention = 3 * 4 * 4 * 32 * 32 * 4  # L B H T T float32: what SDPA keeps in float32 with dropout, at least once
    assert block < plain / 4
    assert block < selective < plain - attention


def test_a_run_with_the_levers_has_the_plain_losses_and_pads_no_checkpoint(tmp_path, text_data, monkeypatch):
    curves = []
    for name, flags in (("plain", []), ("levers", ["--vocab-multiple", "128", "--activation-checkpointing", "block"])):
        folder = tmp_path / name
        arguments = [*FOUR_STEPS, *data_flags(text_data), "--checkpoints-dir", folder, "--dropout", "0.1", *flags]
        assert run_here(monkeypatch, run_pretrain.main, *arguments) == 0
        curves.append([*losses(folder), *losses(folder, "valid")])
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    weights = checkpoint.read_weights(checkpoint.newest_good(tmp_path / "levers", print))
    assert [len(weight) for name, weight in weights.items() if "wte" in name] == [257]


def xla_mistakes(*flags):
    config = parse(XlaPretrainConfig, list(flags), "").config
    return [*config_mistakes(config), *attention_mistakes(config)]


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        (
            ["--scan-layers", "--activation-checkpointing", "selective"],
            ["--activation-checkpointing selective is not supported with --scan-layers; use block or none"],
        ),
        (
            ["--scan-layers", "--sharding", "fsdp"],
            ["--scan-layers is not supported with --sharding fsdp; leave one of them out"],
        ),
        (
            ["--scan-layers", "--dropout", "0.1"],
            ["--scan-layers has no dropout, but --dropout is 0.1; use --dropout 0, or leave it out"],
        ),
        (["--vocab-multiple", "0"], ["--vocab-multiple 0 must be at least 1"]),
        (
            [
                "--attention",
                "flash",
                "--dropout",
                "0.1",
                "--seq-length",
                "1000",
                "--d-model",
                "320",
                "--num-heads",
                "2",
            ],
            [
                "--attention flash needs a TPU, but the device is CPU; use --attention auto",
                "--attention flash has no dropout, but --dropout is 0.1; use --attention auto",
                "--attention flash takes a --seq-length that is a multiple of 128, not 1000; use --attention auto",
                "--attention flash takes heads of at most 128 or a multiple of 128, but --d-model / --num-heads is 160; use --attention auto",
            ],
        ),
        (
            ["--attention", "flash", "--scan-layers"],
            [
                "--attention flash needs a TPU, but the device is CPU; use --attention auto",
                "--attention flash does not work with --scan-layers; use --attention auto",
            ],
        ),
        (["--attention", "auto", "--dropout", "0.1"], []),
    ],
)
def test_what_a_lever_cannot_do_is_said_in_a_sentence(flags, sentences, monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert xla_mistakes(*flags) == sentences


def test_flash_wants_a_tpu_and_jax(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax" else object())
    assert [text.split(",")[0] for text in flash_obstacles(ModelConfig(), XlaConfig(), "TPU")] == ["needs jax"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for preset, kind in (
        ("gpt2", "TPU v3"),
        ("gpt2", "TPU v4"),
        ("gpt2-6h", "TPU v5 lite"),
        ("gpt2-xl", "TPU v6 lite"),
    ):
        assert flash_obstacles(ModelConfig(**PRESETS[preset]), XlaConfig(), kind) == []


@pytest.fixture(scope="module")
def on_xla():
    """What tests/xla_levers.py measured: largest difference of loss and of each gradient to the plain path, and more."""
    output = run(*PYTHON, str(ROOT / "tests" / "xla_levers.py"), **QUICK_XLA)
    return json.loads(output.splitlines()[-1])


@pytest.mark.xla
@pytest.mark.parametrize("lever", ["block", "selective", "scan", "scan, block", "loss"])
def test_on_xla_a_lever_changes_neither_loss_nor_gradients(lever, on_xla):
    loss, gradients = on_xla["float32"][lever]
    assert loss < 1e-6
    assert gradients < 1e-5


@pytest.mark.xla
@pytest.mark.parametrize("lever", ["block", "scan, block"])
def test_on_xla_in_bf16_it_changes_what_rounding_may(lever, on_xla):
    loss, gradients = on_xla["bf16"][lever]
    assert loss < 1e-4
    assert gradients < 0.03  # bias gradients: the plain program sums float32 where others sum bf16


@pytest.mark.xla
@pytest.mark.parametrize("lever", ["residual", "residual, scan, block"])
def test_on_xla_a_bf16_residual_stream_changes_what_rounding_may(lever, on_xla):
    loss, gradients = on_xla["bf16"][lever]
    assert 0 < loss < 0.01
    assert gradients < 0.1


@pytest.mark.xla
@pytest.mark.parametrize("lever", LEVERS)
def test_on_xla_recomputing_draws_the_same_dropout(lever, on_xla):
    loss, gradients = on_xla["dropout"][lever]
    assert loss < 1e-6
    assert gradients < 1e-5


@pytest.mark.xla
def test_scanning_keeps_the_program_small(on_xla):
    (small, large), (small_scanned, large_scanned) = on_xla["instructions"]
    assert large_scanned - small_scanned < 0.5 * (large - small)  # what is left stacks the layers' parameters


@pytest.mark.xla
def test_xla_replicas_with_every_lever_train_as_one_plain_torch_process_does(tmp_path, text_data, monkeypatch):
    levers = ["--scan-layers", "--activation-checkpointing", "block", "--vocab-multiple", "128", "--loss-chunk", "48"]
    common = [*TINY, *data_flags(text_data), "--train-steps", "40", "--valid-interval", "20"]
    plain = ("--checkpoints-dir", tmp_path / "plain", "--loss-chunk", "0", "--device", "cpu")
    assert run_here(monkeypatch, run_pretrain.main, *common, *plain) == 0
    output = run(*xla_replicas(2), *common, "--checkpoints-dir", tmp_path / "levers", *levers, **QUICK_XLA)
    assert "math attention" in output
    for kind in ("train", "valid"):
        assert losses(tmp_path / "levers", kind) == pytest.approx(losses(tmp_path / "plain", kind), abs=1e-5)
    compiles = [record["compiles"] for record in records(tmp_path / "levers")]
    assert compiles[1] == compiles[-1]


@pytest.mark.xla
def test_the_attention_kernel_is_causal_attention_in_value_and_gradients():
    pytest.importorskip("jax", reason="the kernel is jax's")
    found = json.loads(run(*PYTHON, str(ROOT / "tests" / "xla_splash.py"), **QUICK_XLA).splitlines()[-1])
    rounding = found.pop("bf16")
    assert all(max(differences) < 1e-5 for differences in found.values())
    assert max(rounding) < 0.05


@pytest.mark.xla
def test_on_a_mesh_each_device_runs_the_kernel_on_its_own_sequences_and_heads():
    pytest.importorskip("jax", reason="the kernel is jax's")
    output = run(*PYTHON, str(ROOT / "tests" / "xla_splash.py"), "sharded", CPU_NUM_DEVICES="8")
    assert max(json.loads(output.splitlines()[-1])) < 1e-4
