"""The model is causal and starts as GPT-2 did; the chunked loss is cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt2_xla.config import ModelConfig
from gpt2_xla.loss import IGNORED, next_token_loss
from gpt2_xla.model import GPT, flops_per_token, gelu, parameter_count

CONFIG = ModelConfig(vocab_size=300, seq_length=32, d_model=64, num_layers=4, num_heads=4, dropout=0.0)


def model_of(config: ModelConfig = CONFIG) -> GPT:
    model = GPT(config)
    model.initialize(seed=3)
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_future_tokens_do_not_change_past_logits_and_past_ones_change_future_logits():
    model, tokens = model_of().eval(), random_tokens(1, 32)
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 300
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:20], after[:20])
    assert ((before[20:] - after[20:]).abs().amax(dim=-1) > 0).all()


@torch.no_grad()
def test_the_same_token_at_another_position_has_other_logits():
    logits = model_of().eval()(torch.full((1, 32), 7))[0]
    assert (logits[1:] - logits[:-1]).abs().max() > 1e-3


@torch.no_grad()
def test_initial_loss_is_that_of_a_uniform_guess():
    tokens = random_tokens(8, 33)
    loss = model_of()(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(math.log(300), abs=0.1)


def test_initial_weights_have_gpt2s_statistics_and_follow_the_seed():
    model = model_of()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(weight.mean().item()) < std * 0.1, name
    again, other = model_of(), GPT(CONFIG)
    other.initialize(seed=5)
    assert torch.equal(model.wte.weight, again.wte.weight)
    assert not torch.equal(model.wte.weight, other.wte.weight)


def test_dropout_acts_in_training_only():
    model, tokens = model_of(ModelConfig(**(vars(CONFIG) | {"dropout": 0.5}))), random_tokens(1, 32)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_tied_weights_are_one_parameter():
    tied, untied = model_of(), model_of(ModelConfig(**(vars(CONFIG) | {"tie_weights": False})))
    assert tied.lm_head.weight is tied.wte.weight
    assert parameter_count(untied) - parameter_count(tied) == 300 * 64
    assert flops_per_token(tied.config) == flops_per_token(untied.config)


def loss_and_gradients(loss, hidden, weight):
    """The loss and its gradients, times 3: backward must pass on what comes from above."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight)
    (3 * value).backward()
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [0, 1, 7, 16, 48, 100])
@pytest.mark.parametrize("ignored", [0, 9, 48])
@pytest.mark.parametrize("vocab_multiple", [1, 25, 64])
@pytest.mark.parametrize("fuses", [False, True])
def test_the_chunked_and_padded_loss_is_cross_entropy_in_value_and_gradients(chunk, ignored, vocab_multiple, fuses):
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(3, 16, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (48,), generator=generator)
    targets[torch.randperm(48, generator=generator)[:ignored]] = IGNORED

    def reference(hidden, weight):
        total = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets, reduction="sum", ignore_index=-100)
        return total / max(48 - ignored, 1)

    def mine(hidden, weight):
        return next_token_loss(hidden, weight, targets.view(3, 16), chunk, vocab_multiple, fuses)

    ours = loss_and_gradients(mine, hidden, weight)
    for found, exact in zip(ours, loss_and_gradients(reference, hidden, weight), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("vocab_multiple", [1, 64])
def test_under_bf16_autocast_the_loss_is_close_and_its_gradients_keep_their_dtypes(chunk, vocab_multiple):
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(4, 16, 32, generator=generator), 0.1 * torch.randn(50, 32, generator=generator)
    targets = torch.randint(50, (4, 16), generator=generator)
    exact = loss_and_gradients(lambda h, w: next_token_loss(h, w, targets), hidden, weight)

    def in_bf16(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return next_token_loss(hidden, weight, targets, chunk, vocab_multiple)

    for mine, reference in zip(loss_and_gradients(in_bf16, hidden, weight), exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, reference, rtol=0.02, atol=0.02 * reference.abs().max().item())


def test_without_gradients_the_chunked_loss_does_not_compute_them(monkeypatch):
    hidden, weight, targets = torch.randn(1, 8, 4), torch.randn(9, 4, requires_grad=True), torch.arange(8)[None]
    made = []
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: made.append(a))
    with torch.no_grad():
        next_token_loss(hidden, weight, targets, chunk=2)
    assert not made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_as_it_is_compiled_is_gelu(dtype):
    x = torch.linspace(-20, 20, 4001).to(dtype).requires_grad_()
    plain, traced = F.gelu(x, approximate="tanh"), torch.compile(gelu, backend="eager")(x)
    assert traced.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(traced, plain, **tolerance)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (traced, plain)]
    torch.testing.assert_close(*gradients, **tolerance)
