"""Samplers against brute-force references and transformers' own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2_xla.sampling import (
    Sampling,
    choose,
    filtered,
    gumbel_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

# Quarters give many ties; the range reaches probabilities that vanish in float32.
LOGITS = st.lists(st.integers(-160, 160).map(lambda n: n / 4), min_size=1, max_size=20)


def kept(logits: torch.Tensor) -> set[int]:
    return set(logits.isfinite().nonzero().flatten().tolist())


@given(LOGITS, st.integers(0, 30))
def test_top_k_keeps_the_k_largest_and_their_equals(values, k):
    threshold = sorted(values, reverse=True)[min(k, len(values)) - 1] if k else -math.inf
    filtered = keep_top_k(torch.tensor(values), k)
    assert kept(filtered) == {i for i, v in enumerate(values) if v >= threshold}
    assert all(filtered[i] == values[i] for i in kept(filtered))


@given(LOGITS, st.floats(0, 1.0))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(values, p):
    weights = [math.exp(v - max(values)) for v in values]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    nucleus, reached = [], 0.0
    for i in order:
        nucleus.append(i)
        reached += weights[i] / sum(weights)
        if abs(reached - p) < 1e-5:
            return  # float32 may fall on either side
        if reached >= p:
            break
    if p < 1:
        assert kept(keep_top_p(torch.tensor(values), p)) == set(nucleus)


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert kept(keep_top_p(logits, 0.6)) == {0, 1}
    assert kept(keep_top_p(logits, 1e-9)) == {0}
    assert kept(keep_top_p(logits, 0.0)) == {0}
    assert kept(keep_top_p(logits, 1.0)) == {0, 1, 2, 3}
    assert kept(keep_top_p(torch.zeros(4), 0.5)) == {0, 1}  # equals: the lower ids
    assert kept(keep_top_p(torch.zeros(4), 0.0)) == {0}


@given(LOGITS, st.floats(0, 1))
def test_min_p_keeps_what_is_at_least_p_times_as_likely_as_the_most_likely(values, p):
    ratios = [math.exp(v - max(values)) for v in values]
    if any(abs(ratio - p) < 1e-6 * p for ratio in ratios if ratio < 1):
        return  # float32 may fall on either side
    assert kept(keep_min_p(torch.tensor(values), p)) == {i for i, ratio in enumerate(ratios) if ratio >= p or p == 0}


def test_min_p_of_0_keeps_all_and_of_1_the_most_likely():
    logits = torch.tensor([3.0, -80.0, 3.0, 2.9])
    assert kept(keep_min_p(logits, 0.0)) == {0, 1, 2, 3}
    assert kept(keep_min_p(logits, 1.0)) == {0, 2}


@given(LOGITS, st.sets(st.integers(0, 19)), st.floats(0.1, 5))
def test_a_repetition_penalty_is_that_of_ctrl(values, tokens, penalty):
    seen = torch.tensor([i in tokens for i in range(len(values))])
    expected = [(v / penalty if v > 0 else v * penalty) if i in tokens else v for i, v in enumerate(values)]
    torch.testing.assert_close(penalize_repetition(torch.tensor(values), seen, penalty), torch.tensor(expected))


def test_all_filters_together_are_those_of_transformers():
    from transformers import generation

    generator = torch.Generator().manual_seed(0)
    logits, text = 1.5 * torch.randn(6, 50, generator=generator), torch.randint(50, (6, 9), generator=generator)
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, text, True)
    processors = [
        generation.RepetitionPenaltyLogitsProcessor(1.7),
        generation.TemperatureLogitsWarper(0.8),
        generation.TopKLogitsWarper(20),
        generation.TopPLogitsWarper(0.9),
        generation.MinPLogitsWarper(0.02),
    ]
    expected = logits
    for processor in processors:
        expected = processor(text, expected)
    ours = filtered(logits, Sampling(1.7, 0.8, 20, 0.9, 0.02), seen)
    assert int(ours.isfinite().sum(dim=1).min()) > 2
    torch.testing.assert_close(ours.softmax(dim=-1), expected.softmax(dim=-1))


def test_filters_work_on_each_row_by_itself():
    rows = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    assert keep_top_k(rows, 1).isfinite().tolist() == [[False, False, True], [True, False, False]]
    assert keep_top_p(rows, 0.1).isfinite().tolist() == [[False, False, True], [True, False, False]]
    assert keep_min_p(rows, 0.5).isfinite().tolist() == [[False, False, True], [True, False, False]]


def noise(seed: int, rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([gumbel_noise(size, generator) for _ in range(rows)])


@given(LOGITS, st.floats(0.01, 5), st.integers(0, 25), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_a_choice_is_the_largest_noisy_logit_that_every_filter_allows(values, temperature, k, top_p, min_p, seed):
    sampling = Sampling(temperature=temperature, top_k=k, top_p=top_p, min_p=min_p)
    shifted = (torch.tensor(values) - max(values)) / temperature
    allowed = kept(keep_min_p(keep_top_p(keep_top_k(shifted, k), top_p), min_p))
    added = noise(seed, 1, len(values))
    expected = max(sorted(allowed), key=lambda token: float(shifted[token].double() + added[0, token]))
    assert int(choose(torch.tensor([values]), sampling, added)) == expected


def test_what_cannot_be_is_not_chosen_whatever_the_noise():
    logits = torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]])
    extreme = torch.tensor([[700.0, -700.0, -690.0, 700.0]], dtype=torch.float64)
    assert choose(logits, Sampling(), extreme).tolist() == [2]
    assert noise(0, 20, 50_000).isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_probabilities(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf])
    draws = choose(logits.expand(20_000, 5), Sampling(temperature=temperature), noise(0, 20_000, 5))
    # Four standard deviations of a binomial are 0.014 at most.
    torch.testing.assert_close(
        draws.bincount(minlength=5) / 20_000, (logits / temperature).softmax(0), rtol=0, atol=0.014
    )


def test_rounding_of_all_logits_moves_hardly_a_choice():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 50_000, generator=generator)  # every token is unlikely: each place in a sum would move
    rounded = logits + 3e-6 * torch.randn(50, 50_000, generator=generator)
    added = noise(2, 50, 50_000)
    assert torch.equal(choose(logits, Sampling(), added), choose(rounded, Sampling(), added))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1e-30), Sampling(top_p=0.0)])
def test_no_temperature_and_no_nucleus_take_the_most_likely_token(sampling):
    logits = torch.tensor([[1.0, 5.0, 4.9], [3.0, -2.0, 0.0]])
    assert choose(logits, sampling, noise(0, 2, 3)).tolist() == [1, 0]
