"""Next-token loss that never holds the float32 logits of all tokens.

At B·T = 16,384 tokens and V = 50,257 the float32 logits, their softmax and its gradient would be 3.3 GB each.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target with this value is not counted; torch's own convention


def next_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0, vocab_multiple: int = 1, fuses: bool = False
) -> Tensor:
    """Mean cross-entropy, in nats, of softmax(hidden @ weight.T) at the targets: a float32 scalar.

    hidden (B, T, C), weight (V, C), targets (B, T). The output layer runs in autocast's dtype, the softmax and the
    sum in float32. With `chunk` tokens at a time, the gradients are formed in the forward pass, while a chunk's logits
    are at hand: three matmuls per chunk as in the plain way, without recomputation and without the whole logits.
    With `vocab_multiple` the matmuls see the weight padded to a multiple of that many rows, whose logits count as -inf.
    `fuses` says that the device's compiler fuses elementwise operations: then the target's logit is found by comparing,
    in passes that are made anyway, because XLA turns an indexed one into copies of all logits.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        if not chunk or chunk >= targets.numel():
            logits = _logits(hidden.to(dtype), _padded(weight.to(dtype), vocab_multiple), weight.shape[0])  # (B, T, V')
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            # Inside of forward() gradients are off and needs_input_grad is true under no_grad too: say it here.
            wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
            total = _ChunkedLoss.apply(hidden, weight, targets, chunk, dtype, vocab_multiple, fuses, wants_gradient)
        return total / (targets != IGNORED).sum().clamp(min=1)


def _padded(weight: Tensor, multiple: int) -> Tensor:
    """The weight (V, C) with rows of zeros up to a multiple of that many: (V', C)."""
    padding = -weight.shape[0] % multiple
    return F.pad(weight, (0, 0, 0, padding)) if padding else weight


def _logits(hidden: Tensor, matrix: Tensor, vocabulary: int) -> Tensor:
    """Float32 logits (..., V') of hidden (..., C); those from `vocabulary` on are padding and impossible."""
    logits = F.linear(hidden, matrix).float()
    if matrix.shape[0] == vocabulary:
        return logits
    return logits.masked_fill(torch.arange(matrix.shape[0], device=logits.device) >= vocabulary, -math.inf)


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden (B, T, C) @ weight.T (C, V) at targets (B, T), about `chunk` tokens at a time.

    A chunk is a stretch of every sequence: where devices hold some of the sequences each, all have a part of each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        dtype: torch.dtype,
        vocab_multiple: int,
        fuses: bool,
        wants_gradient: bool,
    ) -> Tensor:
        vocabulary = weight.shape[0]
        matrix = _padded(weight.to(dtype), vocab_multiple)  # (V, C) -> (V', C)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = []
        # float32 also when the matmuls are bf16: a sum over many chunks would lose bits.
        grad_weight = torch.zeros_like(matrix, dtype=weight.dtype) if wants_gradient else None
        stretch = max(1, chunk // targets.shape[0])
        for part, part_targets in zip(
            hidden.to(dtype).split(stretch, dim=1), targets.split(stretch, dim=1), strict=True
        ):
            rows, row_targets = part.flatten(0, 1), part_targets.flatten()  # (B, stretch, C) -> (chunk, C)
            loss, grad_logits = _rows_loss(_logits(rows, matrix, vocabulary), row_targets, fuses, wants_gradient)
            total += loss
            if grad_weight is not None and grad_logits is not None:
                grad_logits = grad_logits.to(dtype)
                grad_hidden.append((grad_logits @ matrix).view_as(part))  # (chunk, V') -> (B, stretch, C)
                grad_weight += grad_logits.T @ rows
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grad_hidden, dim=1).to(hidden.dtype), grad_weight[:vocabulary])
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, *[None] * 6


def _rows_loss(logits: Tensor, targets: Tensor, fuses: bool, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of float32 logits (N, V) at targets (N,), and its gradient with respect to the logits (N, V)."""
    counted = targets != IGNORED
    index = targets.where(counted, 0).unsqueeze(1)
    log_normalizer = logits.logsumexp(dim=1, keepdim=True)
    if fuses:
        hot = torch.arange(logits.shape[1], device=logits.device) == index
        at_target = logits.where(hot, 0.0).sum(dim=1, keepdim=True)
    else:
        at_target = logits.gather(1, index)
    loss = (log_normalizer - at_target).squeeze(1).where(counted, 0.0).sum()
    if not wants_gradient:
        return loss, None
    # d loss / d logits = softmax - one-hot, and 0 in rows that are not counted.
    gradient = (logits - log_normalizer).exp_()
    if fuses:
        gradient = gradient - hot.to(torch.float32)
    else:
        gradient.scatter_add_(1, index, torch.full_like(log_normalizer, -1.0))
    return loss, gradient * counted.unsqueeze(1)
