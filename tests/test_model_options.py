"""Each option of the architecture against a reference written out here, in float64, a head and a position at a time."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt2_xla import saving_benchmark
from gpt2_xla.bench.command import bench
from gpt2_xla.bench_config import BenchConfig, SavingBenchConfig
from gpt2_xla.cli import Parsed
from gpt2_xla.config import PRESETS, ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model import (
    GPT,
    RMSNorm,
    build_model,
    flops_per_token,
    parameter_count,
    repeat_heads,
    rotate,
    rotation_at,
)
from gpt2_xla.model_validation import model_mistakes
from gpt2_xla.tpu_plan.reference_step import make_reference

SIZES = {"vocab_size": 67, "seq_length": 12, "d_model": 32, "num_layers": 2, "num_heads": 4}
MODERN = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "bias": False}
OPTIONS = {
    "gpt2": {},
    "rope": {"position": "rope", "rope_theta": 50.0},
    "rmsnorm": {"norm": "rmsnorm", "norm_eps": 0.1},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "qk-norm": {"qk_norm": True},
    "no biases": {"bias": False},
    "grouped heads": {"num_kv_heads": 2},
    "one head of keys": {"num_kv_heads": 1, "qk_norm": True, "position": "rope"},
    "modern": MODERN,
    "all": MODERN | {"num_kv_heads": 2, "d_ff": 24, "tie_weights": False, "rope_theta": 500.0},
}


def random_model(**options) -> GPT:
    """A model whose every weight, biases and scales included, is random: a swapped pair must show."""
    model = GPT(ModelConfig(**(SIZES | options))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def random_tokens(*shape):
    return torch.randint(67, shape, generator=torch.Generator().manual_seed(2))


def reference_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one sequence (T,), in float64, from the weights by name alone."""
    config, w = model.config, {name: value.detach().double() for name, value in model.state_dict().items()}
    heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
    dim = config.d_model // heads

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if config.bias else y

    def rms(x, scale):
        return x / ((x**2).mean(-1, keepdim=True) + config.norm_eps) ** 0.5 * scale

    def normalize(x, name):
        if config.norm == "rmsnorm":
            return rms(x, w[f"{name}.weight"])
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + config.norm_eps) ** 0.5
        y = y * w[f"{name}.weight"]
        return y + w[f"{name}.bias"] if config.bias else y

    def turned(x):
        """Dimensions i and i + D / 2 of x (T, D) as a complex number, times e^(i position theta^(-2 i / D))."""
        pairs = torch.complex(x[:, : dim // 2], x[:, dim // 2 :])
        for position in range(len(x)):
            for i in range(dim // 2):
                angle = position * config.rope_theta ** (-2 * i / dim)
                pairs[position, i] *= complex(math.cos(angle), math.sin(angle))
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def attention(x, name):
        qkv = linear(x, f"{name}.c_attn")
        outputs = []
        for head in range(heads):
            shared = head // (heads // groups)
            q = qkv[:, head * dim : (head + 1) * dim]
            k = qkv[:, (heads + shared) * dim : (heads + shared + 1) * dim]
            v = qkv[:, (heads + groups + shared) * dim : (heads + groups + shared + 1) * dim]
            if config.qk_norm:
                q, k = rms(q, w[f"{name}.q_norm.weight"]), rms(k, w[f"{name}.k_norm.weight"])
            if config.position == "rope":
                q, k = turned(q), turned(k)
            rows = []
            for t in range(len(x)):
                scores = torch.stack([q[t] @ k[s] / dim**0.5 for s in range(t + 1)])
                rows.append(scores.softmax(0) @ v[: t + 1])
            outputs.append(torch.stack(rows))
        return linear(torch.cat(outputs, dim=-1), f"{name}.c_proj")

    def mlp(x, name):
        y = linear(x, f"{name}.c_fc")
        if config.activation == "swiglu":
            gate = linear(x, f"{name}.c_gate")
            y = gate / (1 + torch.exp(-gate)) * y
        elif config.activation == "gelu":
            y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
        else:
            y = y.clamp(min=0) ** (2 if config.activation == "relu2" else 1)
        return linear(y, f"{name}.c_proj")

    x = w["wte.weight"][tokens]
    if config.position == "learned":
        x = x + w["wpe.weight"][: len(tokens)]
    for layer in range(config.num_layers):
        x = x + attention(normalize(x, f"blocks.{layer}.ln_1"), f"blocks.{layer}.attn")
        x = x + mlp(normalize(x, f"blocks.{layer}.ln_2"), f"blocks.{layer}.mlp")
    return normalize(x, "ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_the_model_computes_what_its_options_say(options):
    model, tokens = random_model(**options), random_tokens(12)
    ours, reference = model(tokens[None])[0], reference_logits(model, tokens)
    assert reference.abs().max() > 1  # logits near zero would agree whatever the weights
    torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)
    make_reference(model)  # what plans of TPU steps are compared with
    torch.testing.assert_close(model(tokens[None])[0].double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_parameter_is_without_effect_and_gradients_flow_through_a_chunked_loss(options):
    model, tokens = random_model(**options), random_tokens(2, 13)
    gradients = []
    for chunk in (0, 7):
        model.loss_chunk = chunk
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-8, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_rotations_follow_the_positions_of_each_row():
    x = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(3))  # (B, H, T, D)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 1000, 2, 0], [5, 4, 3, 2, 1]])
    rotated = rotate(x, rotation_at(positions, 8, 100.0))
    for row, of_row in enumerate(positions):
        for t, position in enumerate(of_row.tolist()):
            pairs = torch.complex(x[row, :, t, :4].double(), x[row, :, t, 4:].double())
            turns = torch.tensor(
                [complex(math.cos(a), math.sin(a)) for a in (position * 100.0 ** (-i / 4) for i in range(4))]
            )
            expected = pairs * turns
            torch.testing.assert_close(rotated[row, :, t, :4].double(), expected.real, rtol=0, atol=3e-4)
            torch.testing.assert_close(rotated[row, :, t, 4:].double(), expected.imag, rtol=0, atol=3e-4)
    one = rotate(x, rotation_at(positions[2], 8, 100.0))
    torch.testing.assert_close(one[2], rotated[2])


@torch.no_grad()
def test_only_distances_count_under_rope_and_positions_are_taken_as_given():
    model, tokens = random_model(**MODERN), random_tokens(3, 12)
    plain = model(tokens)
    torch.testing.assert_close(model(tokens, positions=torch.arange(100, 112)), plain, rtol=0, atol=1e-4)
    rows = torch.stack([torch.arange(12), torch.arange(40, 52), 2 * torch.arange(12)])
    by_row = model(tokens, positions=rows)
    torch.testing.assert_close(by_row[:2], plain[:2], rtol=0, atol=1e-4)
    assert (by_row[2] - plain[2]).abs().max() > 0.01  # stretched


def test_under_autocast_rotation_and_norms_are_float32_and_attention_gets_bf16():
    model, tokens, seen = random_model(**MODERN, num_kv_heads=2), random_tokens(2, 12), []

    def attend(q, k, v, dropout):
        seen.append([(tensor.dtype, tuple(tensor.shape)) for tensor in (q, k, v)])
        return torch.zeros_like(q)

    model.use(attend=attend)
    norms = []
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(lambda _module, _inputs, y: norms.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    bf16 = torch.bfloat16
    assert seen == [[(bf16, (2, 4, 12, 8)), (bf16, (2, 2, 12, 8)), (bf16, (2, 2, 12, 8))]] * 2
    assert set(norms) == {torch.float32}
    assert rotate(torch.zeros(1, 1, 2, 4, dtype=bf16), rotation_at(torch.arange(2), 4, 10.0)).dtype == torch.float32
    # A bf16 stream is read in bf16 and normalized in float32.
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).to(bf16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNorm(64, 1e-5)(x).double(), exact, rtol=1e-6, atol=0)


def test_repeated_heads_are_the_shared_ones():
    x = torch.arange(2 * 2 * 3 * 1).view(2, 2, 3, 1)
    assert torch.equal(repeat_heads(x, 6), torch.stack([x[:, h // 3] for h in range(6)], dim=1))
    assert repeat_heads(x, 2) is x


def test_initial_weights_of_the_modern_model():
    model = build_model(ModelConfig(**(SIZES | MODERN | {"d_model": 128, "seq_length": 32})), 0, seed=3)
    names = dict(model.named_parameters())
    assert not [name for name in names if "bias" in name or "wpe" in name]
    for name, weight in names.items():
        if "ln_" in name or "norm" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 2) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.06), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flops_are_those_of_the_matmuls(options):
    model, tokens = random_model(**options), random_tokens(3, 12)
    make_reference(model)  # the counter does not know the CPU's own attention
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    assert (
        3 * counter.get_total_flops() == flops_per_token(model.config) * tokens.numel()
    )  # backward: twice the forward


def test_the_modern_preset_is_as_large_as_gpt2():
    with torch.device("meta"):
        modern, gpt2 = (GPT(ModelConfig(**PRESETS[name])) for name in ("modern-124m", "gpt2"))
    matrices = 12 * (768 * 3 * 768 + 768 * 768 + 3 * 768 * 2048)
    assert parameter_count(modern) == 50257 * 768 + matrices + 12 * (2 * 768 + 2 * 128) + 768 == 123_554_304
    assert parameter_count(modern) == pytest.approx(parameter_count(gpt2), rel=0.02)
    assert flops_per_token(modern.config) == flops_per_token(gpt2.config)


def test_a_swiglu_has_the_parameters_of_the_mlp_that_it_stands_for():
    for width in (64, 192, 768, 1024, 1280, 1600):
        hidden = ModelConfig(d_model=width, activation="swiglu").hidden_dim
        assert hidden % 64 == 0
        assert 0 <= 3 * hidden - 8 * width < 3 * 64


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"num_kv_heads": 5}, ["--num-heads 12 is not divisible by --num-kv-heads 5; use --num-kv-heads 4"]),
        ({"num_kv_heads": 0, "rope_theta": 5.0}, ["--num-kv-heads 0 must be", "--rope-theta 5 has no meaning"]),
        ({"position": "rope", "d_model": 36}, ["but --d-model 36 / --num-heads 12 is 3, an odd number"]),
        ({"position": "rope", "rope_theta": math.inf, "norm_eps": 0.0}, ["--rope-theta inf must", "--norm-eps 0.0 must"]),
        ({"d_model": 36}, []),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said_in_a_sentence(options, sentences):
    found = model_mistakes(ModelConfig(**options))
    assert len(found) == len(sentences)
    assert all(sentence in mistake for sentence, mistake in zip(sentences, found, strict=True))


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: bench(Parsed(BenchConfig(model), frozenset()), []),
        lambda model: saving_benchmark.bench(SavingBenchConfig(model)),
    ],
)
def test_benchmarks_refuse_it_too(measure):
    with pytest.raises(UserError, match="--d-model 64 is not divisible by --num-heads 5"):
        measure(ModelConfig(d_model=64, num_heads=5))
