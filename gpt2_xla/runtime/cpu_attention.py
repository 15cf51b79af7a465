"""Causal attention for bf16 on the CPU, in matrix products of blocks.

torch's own kernel computes its products in float32 there: forward and backward together take 2 to 4 times as long
(docs/results.md). In float32 it is as fast as this, so it stays.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gpt2_xla.model import causal_attention, repeat_heads


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """See `Attend`; softmax in float32. Anything but bf16 without dropout goes to torch's kernel."""
    if dropout or q.dtype != torch.bfloat16:
        return causal_attention(q, k, v, dropout)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return _BlockedAttention.apply(q, k, v)


class _BlockedAttention(torch.autograd.Function):
    """Attention of q, k, v (B, H, T, D) -> (B, H, T, D), some rows of scores at a time, each as long as its last row needs.

    The probabilities are kept for the backward pass where they are no larger than q, k and v; else they are computed again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        # (B, T, H, D) in memory: the output layer's input (B, T, C) then is this very tensor.
        y = torch.empty(B, T, H, D, dtype=q.dtype).transpose(1, 2)
        queries, keys, values = (x.reshape(B * H, T, D) for x in (q * D**-0.5, k, v))
        kept = []
        for first, end in _blocks(T):
            weights = _probabilities(queries, keys, first, end)
            y[:, :, first:end] = torch.bmm(weights, values[:, :end]).view(B, H, end - first, D)
            if T <= 6 * D:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, *kept = ctx.saved_tensors
        B, H, T, D = q.shape
        queries, keys, values, grad = (x.reshape(B * H, T, D) for x in (q * D**-0.5, k, v, grad_outputs[0]))
        # The sum of a row's probabilities times their gradients, by the product rule of softmax (Dao et al. 2022, appendix B).
        row_sums = (grad_outputs[0].float() * y.float()).sum(dim=-1, keepdim=True).reshape(B * H, T, 1)
        grad_q = torch.empty_like(queries)
        wide = torch.promote_types(q.dtype, torch.float32)  # for sums over blocks
        grad_k, grad_v = (torch.zeros(B * H, T, D, dtype=wide) for _ in range(2))
        for index, (first, end) in enumerate(_blocks(T)):
            weights = kept[index] if kept else _probabilities(queries, keys, first, end)
            part = grad[:, first:end]
            grad_v[:, :end] += torch.bmm(weights.transpose(1, 2), part)
            grad_scores = torch.bmm(part, values[:, :end].transpose(1, 2)).sub_(row_sums[:, first:end]).mul_(weights)
            grad_q[:, first:end] = torch.bmm(grad_scores, keys[:, :end]) * D**-0.5
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), queries[:, first:end])
        return grad_q.view_as(q), grad_k.to(q.dtype).view_as(q), grad_v.to(q.dtype).view_as(q)


def _blocks(length: int) -> list[tuple[int, int]]:
    """First row and end of each block; small blocks compute less of the future, large ones make larger products."""
    rows = 64 if length <= 256 else 128
    return [(first, min(length, first + rows)) for first in range(0, length, rows)]


def _probabilities(queries: Tensor, keys: Tensor, first: int, end: int) -> Tensor:
    """What scaled queries (N, T, D) from `first` to `end` give to keys (N, T, D) before `end`: (N, end - first, end)."""
    scores = torch.bmm(queries[:, first:end], keys[:, :end].transpose(1, 2))
    later = torch.ones(end - first, end - first, dtype=torch.bool).triu(diagonal=1)
    scores[:, :, first:].masked_fill_(later, -math.inf)
    return torch.softmax(scores, dim=-1)  # float32 inside
