"""Muon against torch.optim.Muon, and its orthogonal matrices against the singular value decomposition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_xla import muon, optim
from gpt2_xla.config import ModelConfig, OptimConfig
from gpt2_xla.model import build_model

TINY = ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=2, num_heads=2)
OPTIONS = OptimConfig(optim_type="muon", learning_rate=1e-2, weight_decay=0.1)


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """What the Newton–Schulz steps compute, as they act on singular values alone: U p(p(p(p(p(S / |S|))))) Vᵀ."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


def separate(update: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a parameter (3C, C) or (R, C)."""
    return list(update.split(update.shape[1])) if update.shape[0] == 3 * update.shape[1] else [update]


def run(model, optimizer, steps, skip=lambda _: 0.0):
    """Steps with pseudo-random gradients, the same for every model of this shape."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (float("nan") if skip(step) else 1.0)
        optim.take_step(optimizer, torch.tensor(skip(step)), adam_step)


def adam_step(adam, skip):
    if not skip:
        adam.step()


def build(options=OPTIONS, **config):
    model = build_model(ModelConfig(**(vars(TINY) | config)), 0, seed=0)
    optimizer = optim.build_torch_optimizer(model, options, fused=False)
    optim.prime_state(model, optimizer)
    return model, optimizer


@given(st.integers(1, 20), st.integers(0, 30), st.integers(1, 4), st.floats(-6, 6), st.integers(0, 99))
@settings(max_examples=60)
def test_orthogonalized_is_a_function_of_the_singular_values(rows, wider, count, exponent, seed):
    matrices = torch.randn(count, rows, rows + wider, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    for found, matrix in zip(muon.orthogonalized(matrices), matrices, strict=True):
        torch.testing.assert_close(found.double(), by_singular_values(matrix), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 0.05)])
def test_singular_values_become_about_one(dtype, tolerance):
    u, _, vt = torch.linalg.svd(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    for spread in (1.0, 1e-1, 1e-2):  # smallest singular value for a largest of 1
        matrix = u @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(spread)).item(), 64)) @ vt
        found = torch.linalg.svdvals(muon.orthogonalized(matrix[None].to(dtype))[0].float())
        assert found.min() > 0.68 - tolerance
        assert found.max() < 1.21 + tolerance


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(muon.orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_muon_has_the_blocks_matrices_and_adamw_the_rest():
    for tied in (True, False):
        model, optimizer = build(tie_weights=tied)
        assert isinstance(optimizer, optim.MuonAndAdam)
        hidden = {id(p) for p in optimizer.muon.param_groups[0]["params"]}
        rest = [id(p) for group in optimizer.adam.param_groups for p in group["params"]]
        assert sorted([*hidden, *rest]) == sorted(id(p) for p in model.parameters())
        for name, parameter in model.named_parameters():
            matrix = name.startswith("blocks.") and name.endswith("weight") and "ln_" not in name
            assert (id(parameter) in hidden) == matrix, name
            kinds = {"momentum_buffer"} if matrix else {"step", "exp_avg", "exp_avg_sq"}
            assert optimizer.state[parameter].keys() == kinds
        named = optim.named_state(model, optimizer)
        assert named["momentum_buffer.blocks.1.attn.c_attn.weight"].shape == (48, 16)
        assert named["exp_avg.wte.weight"].shape == (31, 16)


def test_the_steps_are_torchs_muon_on_separate_matrices_and_torchs_adamw():
    options = OptimConfig(optim_type="muon", learning_rate=1e-2, weight_decay=0.1, muon_momentum=0.9)
    model = build_model(TINY, 0, seed=0)
    ours = optim.build_torch_optimizer(model, options, fused=False, matmul_dtype=torch.bfloat16)
    optim.prime_state(model, ours)
    assert isinstance(ours, optim.MuonAndAdam)
    twin = {p: [m.detach().clone().requires_grad_() for m in separate(p)] for p in ours.muon.param_groups[0]["params"]}
    theirs = torch.optim.Muon(
        [m for matrices in twin.values() for m in matrices],
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )
    before = {p: p.detach().clone() for p in twin}
    for step in range(4):
        run_one = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=run_one)
        for parameter, matrices in twin.items():
            assert parameter.grad is not None
            for matrix, gradient in zip(matrices, separate(parameter.grad), strict=True):
                matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    for parameter, matrices in twin.items():
        momentum = torch.cat([theirs.state[m]["momentum_buffer"] for m in matrices])
        assert torch.equal(ours.state[parameter]["momentum_buffer"], momentum)
        expected = torch.cat([m.detach() for m in matrices])
        # They round to bf16 in other places: a percent or two of a step's way.
        error = (parameter.detach() - expected).norm() / (expected - before[parameter]).norm()
        assert error < 0.03


def test_an_update_is_as_large_as_the_learning_rate_says():
    model, optimizer = build(OptimConfig(optim_type="muon", learning_rate=1e-2, weight_decay=0.0), d_model=64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            rms = (parameter.detach() - before[name]).square().mean().sqrt().item()
            assert 0.7 < rms / (0.2 * 1e-2) < 1.2, name


@pytest.mark.parametrize("elements", [1, 16 * 16, 40 * 16])
def test_how_many_matrices_are_taken_together_does_not_matter(elements, monkeypatch):
    together, optimizer = build()
    run(together, optimizer, 3)
    monkeypatch.setattr(muon, "STACKED_ELEMENTS", elements)
    apart, optimizer = build()
    run(apart, optimizer, 3)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_skipped_step_changes_nothing():
    model, optimizer = build()
    run(model, optimizer, 2)
    held = [*model.parameters(), *optim.named_state(model, optimizer).values()]
    before = [tensor.detach().clone() for tensor in held]
    run(model, optimizer, 1, skip=lambda _: 1.0)
    assert all(map(torch.equal, before, held))
    run(model, optimizer, 1)
    assert not any(torch.equal(old, new) for old, new in zip(before, held, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_independent_weight_decay_does_not_depend_on_the_peak(kind):
    shares = {}
    for peak in (1e-3, 1e-1):
        options = OptimConfig(optim_type=kind, learning_rate=peak, weight_decay=1e-3, independent_weight_decay=True)
        for rate, name in ((peak, "peak"), (peak / 4, "quarter")):
            model, optimizer = build(options)
            optim.set_learning_rate(optimizer, rate)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            for n, parameter in model.named_parameters():
                factor = 1 - 1e-3 * (1 if name == "peak" else 0.25) if parameter.dim() == 2 else 1.0
                torch.testing.assert_close(parameter.detach(), before[n] * factor, rtol=1e-6, atol=0)
            shares[peak, name] = model.blocks[0].mlp.c_fc.weight.detach()
    torch.testing.assert_close(shares[1e-3, "quarter"], shares[1e-1, "quarter"], rtol=1e-6, atol=0)


def test_the_product_of_learning_rate_and_decay_is_what_it_is_without():
    model, optimizer = build()
    before = model.blocks[0].mlp.c_fc.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.blocks[0].mlp.c_fc.weight.detach(), before * (1 - 1e-2 * 0.1))
