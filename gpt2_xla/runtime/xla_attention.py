"""Causal attention in plain operations, as XLA computes it best."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_xla.model import repeat_heads


def math_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """See `Attend`; softmax in float32.

    Not torch's scaled_dot_product_attention, which torch_xla takes apart into more passes over the (B, H, T, T) scores (half
    as much traffic again on v5e, by the compiler), and for which it merges B and H, so that GSPMD would gather all heads.
    """
    if torch.is_autocast_enabled("xla"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("xla")) for tensor in (q, k, v))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = torch.einsum("bhtd,bhsd->bhts", q, k).float() / math.sqrt(q.shape[-1])
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(diagonal=1)
    weights = F.dropout(scores.masked_fill(later, -torch.inf).softmax(dim=-1), dropout)
    return torch.einsum("bhts,bhsd->bhtd", weights.to(v.dtype), v)
