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
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int = 0,
    vocab_multiple: int = 1,
    fuses: bool = False,
    tokens_known: int | None = None,
) -> Tensor:
    """Mean cross-entropy, in nats, of softmax(hidden @ weight.T) at the targets: a float32 scalar.

    hidden (B, T, C), weight (V, C), targets (B, T). The output layer runs in autocast's dtype, the softmax and the
    sum in float32. With `chunk` tokens at a time, the gradients are formed in the forward pass, while a chunk's logits
    are at hand: three matmuls per chunk as in the plain way, without recomputation and without the whole logits.
    With `vocab_multiple` the matmuls see the weight padded to a multiple of that many rows, whose logits count as -inf.
    `fuses` says that the device's compiler fuses elementwise operations: then the target's logit is found by comparing,
    in passes that are made anyway, because XLA turns an indexed one into copies of all logits. The logits of the
    weight's rows from `tokens_known` on count as -inf too.
    """
    device, known = hidden.device.type, tokens_known if tokens_known is not None else weight.shape[0]
    dtype = _matmul_dtype(hidden, weight)
    with torch.autocast(device, enabled=False):
        if not chunk or chunk >= targets.numel():
            logits = _logits(hidden.to(dtype), _padded(weight.to(dtype), vocab_multiple), known)  # (B, T, V')
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            # Inside of forward() gradients are off and needs_input_grad is true under no_grad too: say it here.
            wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
            total = _ChunkedLoss.apply(
                hidden, weight, targets, chunk, dtype, vocab_multiple, known, fuses, wants_gradient
            )
        return total / (targets != IGNORED).sum().clamp(min=1)


def sequence_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int = 0,
    vocab_multiple: int = 1,
    fuses: bool = False,
    tokens_known: int | None = None,
) -> Tensor:
    """Summed cross-entropy, in nats, of each sequence: float32 (B,), without gradients. See `next_token_loss`."""
    known = tokens_known if tokens_known is not None else weight.shape[0]
    dtype = _matmul_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        matrix = _padded(weight.to(dtype), vocab_multiple)  # (V, C) -> (V', C)
        totals = torch.zeros(targets.shape[0], dtype=torch.float32, device=hidden.device)
        stretch = _stretch(targets, chunk)
        for part, part_targets in zip(
            hidden.to(dtype).split(stretch, dim=1), targets.split(stretch, dim=1), strict=True
        ):
            logits = _logits(part.flatten(0, 1), matrix, known)  # (B, stretch, C) -> (B · stretch, V')
            losses, _ = _rows_loss(logits, part_targets.flatten(), fuses, wants_gradient=False)
            totals = totals + losses.view_as(part_targets).sum(dim=1)
        return totals


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The output layer's precision: autocast's, else that of the weights."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _stretch(targets: Tensor, chunk: int) -> int:
    """Tokens of each sequence of (B, T) that make up a chunk; 0 asks for one chunk."""
    return max(1, chunk // targets.shape[0]) if chunk else max(1, targets.shape[1])


def _padded(weight: Tensor, multiple: int) -> Tensor:
    """The weight (V, C) with rows of zeros up to a multiple of that many: (V', C)."""
    padding = -weight.shape[0] % multiple
    return F.pad(weight, (0, 0, 0, padding)) if padding else weight


def _logits(hidden: Tensor, matrix: Tensor, tokens_known: int) -> Tensor:
    """Float32 logits (..., V') of hidden (..., C); those from `tokens_known` on are padding and impossible."""
    return without_padding(F.linear(hidden, matrix).float(), tokens_known)


def without_padding(logits: Tensor, tokens_known: int) -> Tensor:
    """Logits (..., V) with those from `tokens_known` on, which are of no token, at -inf."""
    if logits.shape[-1] == tokens_known:
        return logits
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= tokens_known, -math.inf)


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
        tokens_known: int,
        fuses: bool,
        wants_gradient: bool,
    ) -> Tensor:
        matrix = _padded(weight.to(dtype), vocab_multiple)  # (V, C) -> (V', C)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = []
        # float32 also when the matmuls are bf16: a sum over many chunks would lose bits.
        grad_weight = torch.zeros_like(matrix, dtype=weight.dtype) if wants_gradient else None
        stretch = _stretch(targets, chunk)
        for part, part_targets in zip(
            hidden.to(dtype).split(stretch, dim=1), targets.split(stretch, dim=1), strict=True
        ):
            rows, row_targets = part.flatten(0, 1), part_targets.flatten()  # (B, stretch, C) -> (chunk, C)
            losses, grad_logits = _rows_loss(_logits(rows, matrix, tokens_known), row_targets, fuses, wants_gradient)
            total += losses.sum()
            if grad_weight is not None and grad_logits is not None:
                grad_logits = grad_logits.to(dtype)
                grad_hidden.append((grad_logits @ matrix).view_as(part))  # (chunk, V') -> (B, stretch, C)
                grad_weight += grad_logits.T @ rows
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grad_hidden, dim=1).to(hidden.dtype), grad_weight[: weight.shape[0]])
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: the second is as large as the embedding.
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), *[None] * 7


def _rows_loss(logits: Tensor, targets: Tensor, fuses: bool, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy (N,) of float32 logits (N, V) at targets (N,), and the gradient of its sum with respect to the logits (N, V)."""
    counted = targets != IGNORED
    index = targets.where(counted, 0).unsqueeze(1)
    log_normalizer = logits.logsumexp(dim=1, keepdim=True)
    if fuses:
        hot = torch.arange(logits.shape[1], device=logits.device) == index
        at_target = logits.where(hot, 0.0).sum(dim=1, keepdim=True)
    else:
        at_target = logits.gather(1, index)
    loss = (log_normalizer - at_target).squeeze(1).where(counted, 0.0)
    if not wants_gradient:
        return loss, None
    # d loss / d logits = softmax - one-hot, and 0 in rows that are not counted.
    gradient = (logits - log_normalizer).exp_()
    if fuses:
        gradient = gradient - hot.to(torch.float32)
    else:
        gradient.scatter_add_(1, index, torch.full_like(log_normalizer, -1.0))
    return loss, gradient * counted.unsqueeze(1)
