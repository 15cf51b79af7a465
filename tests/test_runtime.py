"""The torch runtime's options do what they say; the peaks that MFU divides by."""

import threading

import pytest
import torch
from commands import TINY, TRAIN, data_flags, losses, records, run
from small_runs import said_here

import run_pretrain
from gpt2_xla.config import ModelConfig, OptimConfig, TorchConfig
from gpt2_xla.data.prefetch import prefetch
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT, build_model
from gpt2_xla.optim import build_torch_optimizer
from gpt2_xla.runtime.cpu_attention import cpu_attention
from gpt2_xla.runtime.peaks import gpu_peak, tpu_peak
from gpt2_xla.runtime.torch_runtime import TorchRuntime, clip_gradients, device_mistakes


@pytest.fixture
def make_runtime():
    """Builds runtimes on the CPU; afterwards the matmul precision is as it was."""
    precision = torch.get_float32_matmul_precision()
    yield lambda **options: TorchRuntime(TorchConfig(**{"device": "cpu", "mixed_precision": "no", **options}))
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_reaches_torch(make_runtime, precision):
    make_runtime(matmul_precision=precision)
    assert torch.get_float32_matmul_precision() == precision


def test_bf16_autocast_keeps_weights_loss_and_gradients_in_float32(make_runtime):
    runtime = make_runtime(mixed_precision="bf16")
    layer = torch.nn.Linear(4, 4)
    products = []

    class Loss(torch.nn.Module):
        def forward(self, tokens, targets):
            products.append(layer(tokens.float()))
            return products[-1].float().sum()

    loss = runtime.compute_gradients(Loss(), torch.ones(2, 3, 5, dtype=torch.long))  # (A, B, T+1)
    assert [product.dtype for product in products] == [torch.bfloat16] * 2
    assert loss.dtype == layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_bf16_losses_stay_near_float32(tmp_path, text_data):
    curves = []
    for precision in ("no", "bf16"):
        folder = tmp_path / precision
        flags = [*TINY, *data_flags(text_data), "--device", "cpu", "--train-steps", "60", "--checkpoints-dir", folder]
        said_here(run_pretrain.main, *flags, "--mixed-precision", precision)
        curves.append(losses(folder))
    assert curves[1] == pytest.approx(curves[0], abs=3e-2)
    assert curves[1] != curves[0]


def test_compile_changes_speed_not_losses_and_is_counted(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--device", "cpu", "--train-steps", "30", "--checkpoints-dir"]
    said_here(run_pretrain.main, *flags, tmp_path / "eager")
    run(*TRAIN, *flags, tmp_path / "compiled", "--compile")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5)
    compiles = [record["compiles"] for record in records(tmp_path / "compiled")]
    assert compiles[0] == compiles[-1] > 0


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_clipping_bounds_the_global_norm_and_returns_the_one_before(limit):
    model = torch.nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), 1.0)
    norm = clip_gradients(model, limit)
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(26**0.5)
    assert after.item() == pytest.approx(limit or 26**0.5, rel=1e-5)


def test_batches_close_ends_the_background_thread(make_runtime):
    def loading():  # by name: a thread that another test left may end meanwhile
        return [thread for thread in threading.enumerate() if thread.name == "prefetch"]

    before = loading()
    batches = make_runtime().batches(iter(torch.zeros(100, 2)), rows_dim=0)
    next(batches)
    (thread,) = (thread for thread in loading() if thread not in before)
    batches.close()
    assert not thread.is_alive()


def test_prefetch_passes_errors_on():
    def broken():
        yield 1
        raise UserError("the shard is cut short")

    items = prefetch(broken(), depth=2)
    assert next(items) == 1
    with pytest.raises(UserError, match="cut short"):
        next(items)


def test_the_optimizer_steps_tied_weights_once(make_runtime):
    from gpt2_xla.config import ModelConfig

    runtime = make_runtime()
    model = GPT(ModelConfig(vocab_size=11, seq_length=4, d_model=8, num_layers=1, num_heads=1))
    optimizer = runtime.build_optimizer(model, OptimConfig())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))


def test_known_peaks():
    assert gpu_peak("NVIDIA H200") == 989e12
    assert gpu_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_peak("Some GPU") is None
    assert tpu_peak("TPU v3") == 61.5e12  # a core: half a chip
    assert tpu_peak("TPU v5 lite") == 197e12
    assert tpu_peak("cpu") is None


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_with_a_gradient_or_a_loss_that_is_not_finite_changes_nothing(make_runtime, fused):
    runtime = make_runtime()
    model = torch.nn.Linear(3, 2)
    optimizer = runtime.build_optimizer(model, OptimConfig())
    if not fused:  # as on a device without the fused kernel
        optimizer = build_torch_optimizer(model, OptimConfig(), fused=False)
    good, bad = 1.0, (float("nan"), float("inf"))
    for gradient, loss in [
        (good, good),
        (bad[0], good),
        (good, bad[0]),
        (good, bad[1]),
        (bad[1], bad[1]),
        (good, good),
    ]:
        before = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        values = runtime.update(model, optimizer, 1.0, torch.tensor(loss))
        assert values.isfinite().all() == (gradient == loss == good)
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert changed == [gradient == loss == good] * 2
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_a_compiler_that_is_not_there_is_told_before_anything_is_built(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (mistake,) = device_mistakes(TorchConfig(device="cpu", compile=True))
    assert "no-such-compiler is not found" in mistake
    assert "set CXX" in mistake
    assert device_mistakes(TorchConfig(device="cpu")) == []


def test_a_model_on_the_cpu_uses_its_attention(make_runtime):
    runtime = make_runtime(mixed_precision="bf16")
    model = build_model(ModelConfig(vocab_size=8, seq_length=8, d_model=16, num_layers=1, num_heads=2), 0, 1)
    runtime.place(model)
    assert model.blocks[0].attn.attend is cpu_attention
