"""The optimizer against plain torch, bit for bit where the arithmetic is the same."""

import pytest
import torch

from gpt2_xla import optim
from gpt2_xla.config import ModelConfig, OptimConfig
from gpt2_xla.model import GPT, build_model

TINY = ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=2, num_heads=2)
OPTIONS = OptimConfig(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def give_gradients(model: GPT, step: int) -> None:
    """The same pseudo-random gradients for every model of this shape."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def copies(model: GPT) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_weights(one: GPT, other: GPT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_weights": False}, {"norm": "rmsnorm", "qk_norm": True, "activation": "swiglu"}]
)
def test_every_parameter_is_in_exactly_one_group_and_matrices_alone_decay(changes):
    model = build_model(ModelConfig(**(vars(TINY) | changes)), 0, seed=0)
    groups = optim.parameter_groups(list(model.parameters()), 0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})  # once each, the tied weight too
    assert len(grouped) == len({id(t) for t in model.state_dict(keep_vars=True).values()})
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "ln_" in name or "_norm" in name
        assert decay[id(parameter)] == (0.0 if vector else 0.1), name


@pytest.mark.parametrize("fused", [True, False])
def test_without_a_gradient_matrices_shrink_by_lr_times_decay_and_vectors_stay(fused):
    model = build_model(TINY, 0, seed=0)
    optimizer = optim.build_torch_optimizer(model, OPTIONS, fused=fused)
    before = copies(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        if old.dim() >= 2:
            torch.testing.assert_close(new.detach(), old * (1 - 1e-2 * 0.1), rtol=1e-6, atol=0)
            assert not torch.equal(new, old)
        else:
            assert torch.equal(new, old)


@pytest.mark.parametrize(("kind", "reference"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_optimizer_is_torchs_own(kind, reference):
    model, twin = build_model(TINY, 0, seed=0), build_model(TINY, 0, seed=0)
    options = OptimConfig(**(vars(OPTIONS) | {"optim_type": kind}))
    matrices = [p for p in twin.parameters() if p.dim() >= 2]
    vectors = [p for p in twin.parameters() if p.dim() < 2]
    theirs = reference(matrices, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    theirs.add_param_group({"params": vectors, "weight_decay": 0.0})
    train(model, optim.build_torch_optimizer(model, options, fused=False), range(3))
    train(twin, theirs, range(3))
    assert same_weights(model, twin)


def test_adam_and_adamw_differ_by_how_they_decay():
    models = {}
    for kind in ("adam", "adamw"):
        for decay in (0.0, 0.1):
            model = models[kind, decay] = build_model(TINY, 0, seed=0)
            options = OptimConfig(**(vars(OPTIONS) | {"optim_type": kind, "weight_decay": decay}))
            train(model, optim.build_torch_optimizer(model, options, fused=False), range(3))
    assert same_weights(models["adam", 0.0], models["adamw", 0.0])
    assert not same_weights(models["adam", 0.1], models["adamw", 0.1])
    assert not same_weights(models["adamw", 0.0], models["adamw", 0.1])


@pytest.mark.parametrize("fused", [True, False])
def test_priming_the_state_changes_no_bit_of_the_trajectory(fused):
    primed, plain = build_model(TINY, 0, seed=0), build_model(TINY, 0, seed=0)
    ours = optim.build_torch_optimizer(primed, OPTIONS, fused=fused)
    optim.prime_state(primed, ours)
    theirs = optim.build_torch_optimizer(plain, OPTIONS, fused=fused)
    train(primed, ours, range(5))
    train(plain, theirs, range(5))
    assert same_weights(primed, plain)
    for name, value in optim.named_state(plain, theirs).items():
        assert torch.equal(optim.named_state(primed, ours)[name], value), name


@pytest.mark.parametrize(("from_fused", "to_fused"), [(True, False), (False, True), (True, True), (False, False)])
def test_state_moves_between_implementations_by_name(from_fused, to_fused):
    first = build_model(TINY, 0, seed=0)
    first_optimizer = optim.build_torch_optimizer(first, OPTIONS, fused=from_fused)
    optim.prime_state(first, first_optimizer)
    train(first, first_optimizer, range(3))
    saved = {name: value.clone() for name, value in optim.named_state(first, first_optimizer).items()}

    second = build_model(TINY, 0, seed=1)
    second.load_state_dict(first.state_dict())
    second_optimizer = optim.build_torch_optimizer(second, OPTIONS, fused=to_fused)
    optim.prime_state(second, second_optimizer)
    loaded = optim.named_state(second, second_optimizer)
    for name, value in loaded.items():  # what checkpoint.load_optimizer does
        value.copy_(saved[name])
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not any(loaded[name].data_ptr() == saved[name].data_ptr() for name in saved)

    train(first, first_optimizer, range(3, 5))
    train(second, second_optimizer, range(3, 5))
    if from_fused == to_fused:
        assert same_weights(first, second)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_state_names_are_those_of_the_weights():
    model = build_model(TINY, 0, seed=0)
    optimizer = optim.build_torch_optimizer(model, OPTIONS, fused=False)
    optim.prime_state(model, optimizer)
    expected = {f"{kind}.{name}" for name, _ in model.named_parameters() for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert optim.named_state(model, optimizer).keys() == expected


def test_the_learning_rate_is_set_in_every_group():
    model = build_model(TINY, 0, seed=0)
    optimizer = optim.build_torch_optimizer(model, OPTIONS, fused=True)
    optim.set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
