"""Next-token loss that never holds the float32 logits of all tokens.

At B·T = 16,384 tokens and V = 50,257 the float32 logits, their softmax and its gradient would be 3.3 GB each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target with this value is not counted; torch's own convention


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """Mean cross-entropy, in nats, of softmax(hidden @ weight.T) at the targets: a float32 scalar.

    hidden (B, T, C), weight (V, C), targets (B, T). The output layer runs in autocast's dtype, the softmax and the
    sum in float32. With `chunk` tokens at a time, the gradients are formed in the forward pass, while a chunk's logits
    are at hand: three matmuls per chunk as in the plain way, without recomputation and without the whole logits.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        if not chunk or chunk >= targets.numel():
            logits = F.linear(hidden.to(dtype), weight.to(dtype)).float()  # (B, T, C) -> (B, T, V)
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            # Inside of forward() gradients are off and needs_input_grad is true under no_grad too: say it here.
            wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
            total = _ChunkedLoss.apply(hidden, weight, targets, chunk, dtype, wants_gradient)
        return total / (targets != IGNORED).sum().clamp(min=1)


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden (B, T, C) @ weight.T (C, V) at targets (B, T), about `chunk` tokens at a time.

    A chunk is a stretch of every sequence: where devices hold some of the sequences each, all have a part of each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype, wants_gradient: bool
    ) -> Tensor:
        matrix = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = []
        # float32 also when the matmuls are bf16: a sum over many chunks would lose bits.
        grad_weight = torch.zeros_like(weight) if wants_gradient else None
        stretch = max(1, chunk // targets.shape[0])
        for part, part_targets in zip(
            hidden.to(dtype).split(stretch, dim=1), targets.split(stretch, dim=1), strict=True
        ):
            rows, row_targets = part.flatten(0, 1), part_targets.flatten()  # (B, stretch, C) -> (chunk, C)
            counted = row_targets != IGNORED
            index = row_targets.where(counted, 0).unsqueeze(1)
            logits = F.linear(rows, matrix).float()  # (chunk, C) -> (chunk, V)
            log_normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (log_normalizer - logits.gather(1, index)).squeeze(1).where(counted, 0.0).sum()
            if grad_weight is not None:
                # d loss / d logits = softmax - one-hot, and 0 in rows that are not counted.
                grad_logits = (logits - log_normalizer).exp_()
                grad_logits.scatter_add_(1, index, torch.full_like(log_normalizer, -1.0))
                grad_logits = (grad_logits * counted.unsqueeze(1)).to(dtype)
                grad_hidden.append((grad_logits @ matrix).view_as(part))  # (chunk, V) -> (B, stretch, C)
                grad_weight += grad_logits.T @ rows
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grad_hidden, dim=1).to(hidden.dtype), grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (grad,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None, None
