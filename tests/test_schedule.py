"""Learning rates against the schedulers of torch and transformers, at the boundaries, and as pure functions."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_xla.config import OptimConfig
from gpt2_xla.schedule import learning_rate

PEAK = 6e-4


def optim(method: str, warmup: int = 0, min_lr: float = 0.0, decay_steps: int | None = None) -> OptimConfig:
    return OptimConfig(
        decay_method=method, learning_rate=PEAK, warmup_steps=warmup, min_lr=min_lr, decay_steps=decay_steps
    )


def rates(config: OptimConfig, train_steps: int, steps: int) -> list[float]:
    return [learning_rate(step, config, train_steps) for step in range(steps)]


def reference(build, steps: int) -> list[float]:
    """The learning rates that a torch scheduler gives to steps 0 … steps-1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = build(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def same(ours: list[float], theirs: list[float]) -> None:
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_cosine_to_a_minimum_is_torchs_cosine_annealing():
    theirs = reference(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=200, eta_min=6e-5), 200)
    same(rates(optim("cosine", min_lr=6e-5), 200, 200), theirs)


def test_linear_to_a_minimum_is_torchs_linear_decay():
    theirs = reference(
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=150), 200
    )
    same(rates(optim("linear", min_lr=0.1 * PEAK, decay_steps=150), 200, 200), theirs)


@pytest.mark.parametrize("method", ["cosine", "linear", "noam", "wsd", "wsd-sqrt"])
def test_schedules_with_warmup_are_those_of_transformers(method):
    from transformers import optimization

    build = {
        "cosine": lambda o: optimization.get_cosine_schedule_with_warmup(o, 30, 200),
        "linear": lambda o: optimization.get_linear_schedule_with_warmup(o, 30, 200),
        "noam": lambda o: optimization.get_inverse_sqrt_schedule(o, 30),
        "wsd": lambda o: optimization.get_wsd_schedule(
            o, num_warmup_steps=30, num_decay_steps=40, num_training_steps=200, decay_type="linear"
        ),
        "wsd-sqrt": lambda o: optimization.get_wsd_schedule(
            o, num_warmup_steps=30, num_decay_steps=40, num_training_steps=200, decay_type="1-sqrt"
        ),
    }[method]
    ours = rates(optim(method, warmup=30, decay_steps=40 if method.startswith("wsd") else None), 200, 200)
    theirs = reference(build, 202)
    # Their warm-up gives step 0 a rate of 0, which trains nothing; ours is one step ahead of it.
    same(ours[:30], theirs[1:31])
    later = 31 if method == "noam" else 30  # the inverse square root goes on in the count that warm-up ended with
    same(ours[30:], theirs[later : later + 170])


@pytest.mark.parametrize("method", ["cosine", "linear", "wsd", "wsd-sqrt"])
def test_boundaries(method):
    config = optim(method, warmup=10, min_lr=6e-5)
    at = lambda step: learning_rate(step, config, 100)  # noqa: E731
    assert at(0) == pytest.approx(PEAK / 10)
    assert at(9) == PEAK
    assert at(10) == pytest.approx(PEAK)
    assert at(99) > 6e-5
    assert at(100) == at(101) == at(10**9) == pytest.approx(6e-5)


def test_cosine_is_halfway_down_halfway():
    assert learning_rate(60, optim("cosine", warmup=20, min_lr=2e-4), 100) == pytest.approx((PEAK + 2e-4) / 2)


def test_decay_steps_of_cosine_is_where_the_minimum_begins():
    config = optim("cosine", warmup=10, min_lr=6e-5, decay_steps=50)
    assert learning_rate(49, config, 100) > 6e-5
    assert {learning_rate(step, config, 100) for step in range(50, 120)} == {6e-5}


def test_wsd_falls_over_the_last_fifth_unless_told_otherwise():
    config = optim("wsd", warmup=10)
    assert {learning_rate(step, config, 100) for step in range(9, 81)} == {PEAK}
    assert learning_rate(81, config, 100) == pytest.approx(PEAK * 19 / 20)
    assert learning_rate(51, optim("wsd", decay_steps=50), 100) == pytest.approx(PEAK * 49 / 50)


def test_noam_is_the_paper_scaled_to_the_peak_and_not_below_the_minimum():
    # Vaswani et al. 2017, equation 3: d_model^-0.5 · min(step^-0.5, step · warmup^-1.5), steps counted from 1
    width, warmup = 512, 400
    config = OptimConfig(
        decay_method="noam", learning_rate=1 / math.sqrt(width * warmup), warmup_steps=warmup, min_lr=0.0
    )
    for step in (0, 1, 200, 398, 399, 400, 1000, 10**6):
        paper = width**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5)
        assert learning_rate(step, config, 2000) == pytest.approx(paper)
    floored = optim("noam", warmup=4, min_lr=1e-4)
    assert learning_rate(0, floored, 100) == pytest.approx(PEAK / 4)
    assert learning_rate(10**6, floored, 100) == 1e-4


METHODS = st.sampled_from(["cosine", "linear", "noam", "wsd", "wsd-sqrt"])


@given(METHODS, st.integers(0, 60), st.integers(100, 400), st.floats(0, 1), st.none() | st.integers(1, 40))
@settings(max_examples=150)
def test_rates_rise_to_the_peak_then_only_fall_and_never_jump(method, warmup, steps, share, decay_steps):
    if method in ("cosine", "linear") and decay_steps is not None:
        decay_steps += warmup
    config = optim(method, warmup, share * PEAK, None if method == "noam" else decay_steps)
    found = rates(config, steps, steps + 20)
    before, after = found[:warmup], found[max(warmup - 1, 0) :]
    rounding = 1e-12 * PEAK
    assert all(a <= b + rounding for a, b in itertools.pairwise(before))
    assert all(b <= a + rounding for a, b in itertools.pairwise(after))
    assert max(found) == pytest.approx(PEAK)
    assert min(after) >= share * PEAK * (1 - 1e-12)
    # The steepest part: warm-up's line, or the decay's (a half cosine is π/2 steeper than a line at its middle).
    if method.startswith("wsd"):
        fall = decay_steps or max(steps // 5, 1)
    else:
        fall = 2 if method == "noam" else (decay_steps or steps) - warmup
    falls = math.sqrt(1 / fall) if method == "wsd-sqrt" else math.pi / 2 / fall
    steepest = max(1 / max(warmup, 1) if warmup else 0, falls)
    assert all(abs(b - a) <= PEAK * steepest + 1e-12 for a, b in itertools.pairwise(found))


@given(METHODS, st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_a_step_has_one_rate_whatever_was_asked_before(method, order: random.Random):
    config = optim(method, warmup=20, min_lr=6e-5)
    expected = rates(config, 100, 120)
    steps = list(range(120))
    order.shuffle(steps)
    assert [learning_rate(step, config, 100) for step in steps] == [expected[step] for step in steps]
    assert all(type(rate) is float for rate in expected)  # a tensor would cost XLA a fetch
