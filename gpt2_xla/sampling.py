"""Logits → the next token. Pure functions: chance comes in as noise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Applied in the order of the fields, as transformers does; each default changes nothing."""

    repetition_penalty: float = 1.0
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (..., V) with those of the tokens seen, a mask (..., V), made less likely (CTRL, Keskar et al. 2019).

    A positive logit is divided by the penalty, a negative one multiplied with it; a penalty below 1 favours repetition.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k largest set to -inf; those equal to the k-th are kept too. k = 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) with all but the nucleus set to -inf (Holtzman et al. 2020).

    The nucleus is the fewest tokens, most likely first, whose probabilities sum to p or more: the token that crosses p
    is in it, and the most likely one always, so that p = 0 keeps that one alone. Among equals the lower id comes first.
    """
    if p >= 1:
        return logits  # rounding must not cut the tail off
    order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = order.values.softmax(dim=-1)
    outside = probabilities.cumsum(dim=-1) - probabilities >= p  # what came before reached p already
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, order.indices, outside), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) without the tokens that are less than p times as likely as the most likely one (Nguyen et al. 2024).

    p = 0 keeps all, p = 1 the most likely token and its equals.
    """
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -torch.inf)


def filtered(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V) as a draw takes them: penalized, tempered (if not 0), and -inf where a filter forbids the token.

    `seen` (B, V) marks the tokens of the text so far; needed for a repetition penalty alone.
    """
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits
    # Subtracting the maximum changes no probability and keeps tiny temperatures from overflowing.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    logits = keep_top_k(logits, sampling.top_k)
    return keep_min_p(keep_top_p(logits, sampling.top_p), sampling.min_p)


def gumbel_noise(size: int, generator: torch.Generator) -> Tensor:
    """Gumbel-distributed numbers (V,), float64: whose sum with logits is the largest is drawn from their softmax."""
    return -torch.empty(size, dtype=torch.float64).exponential_(generator=generator).clamp_min_(1e-300).log_()


def choose(logits: Tensor, sampling: Sampling, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """The next token of each row, (B,), from float32 logits (B, V) and Gumbel noise (B, V); without noise the most likely.

    A row's token depends on nothing of the other rows. Rounding of the logits moves a choice only where two sums are as
    close as that, whereas a place among cumulated probabilities would move with every logit before it.
    """
    logits = filtered(logits, sampling, seen)
    if sampling.temperature == 0 or noise is None:
        return logits.argmax(dim=-1)
    return (logits.double() + noise).argmax(dim=-1)
