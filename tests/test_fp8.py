"""--mixed-precision fp8: torchao's float8 layers in the program's own loop, on the CPU, where torch._scaled_mm computes in
software what the GPU's float8 units do. Its refusal of the CPU is taken away for that."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from commands import TINY, data_flags, losses
from safetensors import safe_open
from small_runs import run_here
from test_host_waits import Waits, assert_only_the_log_is_fetched, configuration, train_with
from torch.nn import functional as F

import run_pretrain
from gpt2_xla.bench.contenders import option_mistakes
from gpt2_xla.bench_config import BenchConfig
from gpt2_xla.cli import parse
from gpt2_xla.config import ModelConfig, OptimConfig, TorchConfig, TorchPretrainConfig, XlaPretrainConfig
from gpt2_xla.model import build_model
from gpt2_xla.optim import named_state
from gpt2_xla.runtime import torch_runtime
from gpt2_xla.runtime.fp8 import float8_mistakes, multiply_in_float8
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.validation import config_mistakes

MODEL = ModelConfig(257, 32, 64, 2, 2)
GATED = replace(MODEL, activation="swiglu", norm="rmsnorm", position="rope", num_kv_heads=1, bias=False, d_ff=128)
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
FLOAT8_GPU = torch.cuda.is_available() and not float8_mistakes("cuda")
# Its accumulators have fewer bits than float32.
GPU = pytest.param(
    "cuda", 1e-2, marks=[pytest.mark.gpu, pytest.mark.skipif(not FLOAT8_GPU, reason="needs a GPU with float8 units")]
)


@pytest.fixture
def cpu_allowed(monkeypatch):
    monkeypatch.setattr(torch_runtime, "float8_mistakes", lambda kind: [])


def runtime(precision, **options):
    return TorchRuntime(TorchConfig(device="cpu", mixed_precision=precision, **options))


def batch():
    return torch.randint(257, (2, 4, 33), generator=torch.Generator().manual_seed(0))  # (A, B, T + 1)


def quantized(x, dtype):
    """x rounded to float8 with one scale, in float32 again: by hand."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x.double() * scale).float().to(dtype).float() / scale.float()


@needs_torchao
@pytest.mark.parametrize("device, tolerance", [("cpu", 1e-3), GPU])
def test_the_three_products_of_a_layer_are_those_of_float8_matrices(device, tolerance):
    model = build_model(MODEL, 0, 1).to(device)
    multiply_in_float8(model)
    layer, generator = model.blocks[0].mlp.c_fc, torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 64, generator=generator).to(device).requires_grad_()  # (B, T, C)
    gradient = torch.randn(4, 32, 256, generator=generator).to(device)
    y = layer(x)
    y.backward(gradient)
    x8, w8 = (quantized(t.detach(), torch.float8_e4m3fn) for t in (x, layer.weight))
    g8 = quantized(gradient, torch.float8_e5m2)
    expected = [F.linear(x8, w8, layer.bias), g8 @ w8, g8.flatten(0, 1).T @ x8.flatten(0, 1)]
    for found, right in zip([y, x.grad, layer.weight.grad], expected, strict=True):
        assert ((found - right).norm() / right.norm()).item() < tolerance
    torch.testing.assert_close(layer.bias.grad, gradient.sum((0, 1)))  # no product: not in float8


@needs_torchao
@pytest.mark.parametrize("config", [MODEL, GATED, replace(MODEL, tie_weights=False)], ids=["gpt2", "gated", "untied"])
def test_the_blocks_alone_change_and_no_parameter_does(config):
    plain, model = build_model(config, 0, 1), build_model(config, 0, 1)
    before = dict(model.named_parameters())
    multiply_in_float8(model)
    linear = {name for name, module in plain.named_modules() if type(module) is torch.nn.Linear}
    changed = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert changed == linear - {"lm_head"}
    assert {name.split(".")[-1] for name in changed} >= {"c_attn", "c_proj", "c_fc"}
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert (model.lm_head.weight is model.wte.weight) == config.tie_weights


@needs_torchao
@pytest.mark.usefixtures("cpu_allowed")
@pytest.mark.parametrize("config", [MODEL, GATED], ids=["gpt2", "gated"])
def test_gradients_are_near_those_of_bf16(config):
    gradients = {}
    for precision in ("no", "bf16", "fp8"):
        device, model = runtime(precision), build_model(config, 48, 1)
        device.compute_gradients(device.place(model), batch())
        gradients[precision] = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in gradients["fp8"].values())
    errors = {
        precision: [
            ((gradients[precision][name] - exact).norm() / exact.norm()).item()
            for name, exact in gradients["no"].items()
        ]
        for precision in ("bf16", "fp8")
    }
    assert max(errors["bf16"]) < 0.02  # measured: 0.007
    assert 0.05 < max(errors["fp8"]) < 0.2  # measured: 0.11


@needs_torchao
@pytest.mark.usefixtures("cpu_allowed")
@pytest.mark.parametrize("lever", ["block", "selective"])
def test_recomputing_changes_no_gradient(lever):
    gradients = []
    for levers in ({}, {"activation_checkpointing": lever}):
        device, model = runtime("fp8", **levers), build_model(MODEL, 48, 1)
        device.compute_gradients(device.place(model), batch())
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@needs_torchao
@pytest.mark.usefixtures("cpu_allowed")
def test_evaluation_is_that_of_bf16():
    values = []
    for precision in ("bf16", "fp8"):
        device, model = runtime(precision), build_model(MODEL, 48, 1)
        forward, tokens = device.place(model).eval(), batch()[0]
        with torch.inference_mode(), device.autocast():
            values.append(forward(tokens[:, :-1], tokens[:, 1:]).item())
    assert values[0] == values[1]


@needs_torchao
@pytest.mark.usefixtures("cpu_allowed")
def test_the_compiler_gets_one_whole_graph():
    device, model = runtime("fp8"), build_model(MODEL, 48, 1)
    forward = torch.compile(device.place(model), backend="aot_eager", dynamic=False, fullgraph=True)
    compiled = device.compute_gradients(forward, batch())
    plain = build_model(MODEL, 48, 1)
    assert compiled.item() == pytest.approx(device.compute_gradients(device.place(plain), batch()).item(), abs=1e-3)


@needs_torchao
@pytest.mark.usefixtures("cpu_allowed")
def test_master_weights_and_optimizer_state_stay_float32():
    device, model = runtime("fp8", residual_precision="bf16"), build_model(MODEL, 0, 1)
    forward, before = device.place(model), [p.detach().clone() for p in model.parameters()]
    optimizer = device.build_optimizer(model, OptimConfig("muon"))
    assert optimizer.muon._matmul_dtype == torch.bfloat16
    values = device.update(model, optimizer, 1.0, device.compute_gradients(forward, batch()))
    assert values.isfinite().all()
    assert not any(map(torch.equal, before, model.parameters()))
    tensors = [*model.parameters(), *named_state(model, optimizer).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@needs_torchao
@pytest.mark.usefixtures("cpu_allowed")
def test_the_host_waits_for_nothing(text_data, tmp_path):
    with Waits() as waits:
        train_with(configuration(text_data, tmp_path, "cpu", mixed_precision="fp8"), waits)
    assert_only_the_log_is_fetched(waits)


@needs_torchao
@pytest.mark.usefixtures("cpu_allowed")
def test_a_run_stays_near_bf16_and_float32_continues_it(monkeypatch, tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--warmup-steps", "5", "--device", "cpu", "--sample-interval", "15"]
    for precision in ("bf16", "fp8"):
        folder = ("--checkpoints-dir", tmp_path / precision)
        for steps, form in ((30, precision), (40, "no")):
            there = (*folder, "--train-steps", steps, "--mixed-precision", form)
            assert not run_here(monkeypatch, run_pretrain.main, *flags, *there)
    bf16, fp8 = (losses(tmp_path / precision) for precision in ("bf16", "fp8"))
    assert len(fp8) == 40
    assert fp8[0] - fp8[-1] > 1
    assert fp8 == pytest.approx(bf16, abs=2e-2)  # measured: 2e-3
    assert fp8[1:30] != bf16[1:30]
    last, other = (safetensors_names(tmp_path / precision / "step-00000030") for precision in ("fp8", "bf16"))
    assert last == other


def safetensors_names(checkpoint):
    """The tensors of a checkpoint: file, name, precision and shape of each."""
    found = set()
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
        found |= {(path.name, name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    assert found
    return found


def test_a_machine_without_float8_units_is_refused(tmp_path, text_data, monkeypatch, capsys):
    flags = [*TINY, *data_flags(text_data), "--device", "cpu", "--checkpoints-dir", tmp_path / "run"]
    assert run_here(monkeypatch, run_pretrain.main, *flags, "--mixed-precision", "fp8") == 2
    printed = capsys.readouterr().err
    assert "--mixed-precision fp8 needs a CUDA GPU of compute capability 8.9 (Ada), 9.0 (Hopper) or later" in printed
    assert "but the device is cpu; use --mixed-precision bf16 or no" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("capability, units", [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_a_gpu_needs_float8_units_and_the_program_torchao(monkeypatch, capability, units):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    (mistake,) = float8_mistakes("cuda")
    if units:
        assert mistake.endswith("is not installed; install it with pip install torchao -c constraints.txt")
    else:
        assert "9.0 (Hopper) or later, but Some GPU has 8.0; use --mixed-precision bf16" in mistake


@pytest.mark.parametrize(
    ("config", "flags", "sentences"),
    [
        (TorchPretrainConfig, "", []),
        (TorchPretrainConfig, "--residual-precision bf16 --preset gpt2-6h", []),
        (TorchPretrainConfig, "--d-model 120", ["--d-model is 120; use 112 or 128"]),
        (
            TorchPretrainConfig,
            "--d-ff 100 --seq-length 8",
            ["--d-ff is 100; use 96 or 112", "--seq-length is 8; use 16"],
        ),
        (
            TorchPretrainConfig,
            "--d-model 48 --num-kv-heads 1",
            ["queries, keys and values together are 56 wide; use another --num-kv-heads or --num-heads"],
        ),
        (TorchPretrainConfig, "--sharding fsdp", []),
        (XlaPretrainConfig, "", ["fp8 is not supported on XLA devices; use --mixed-precision bf16 or no"]),
    ],
)
def test_what_float8_does_not_go_with_is_told(config, flags, sentences):
    found = parse(config, [*flags.split(), "--mixed-precision", "fp8"], "")
    mistakes = config_mistakes(found.config, found.explicit)
    assert len(mistakes) == len(sentences)
    assert all(sentence in mistake for sentence, mistake in zip(sentences, mistakes, strict=True))


def test_the_bare_loop_has_no_float8():
    flags = ["--mixed-precision", "fp8", "--against", "bare"]
    (mistake,) = option_mistakes(parse(BenchConfig, flags, "").config)
    assert "the bare loop has no --mixed-precision fp8; add --bare-precisions bf16" in mistake
    assert not option_mistakes(parse(BenchConfig, [*flags, "--bare-precisions", "bf16"], "").config)
