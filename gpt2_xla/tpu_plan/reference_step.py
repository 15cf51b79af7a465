"""The step to beat: the model as most trainers write it, in the same program otherwise, for `plan_tpu.py --reference`.

Attention by a masked softmax over all T x T scores, LayerNorm written out, the cross-entropy of all float32 logits at once.
"""

import math

import torch
from torch import Tensor, nn

from gpt2_xla.model import GPT, repeat_heads


def make_reference(model: GPT) -> None:
    """Have a placed model compute in that way; autocast decides the dtypes, as it does there."""
    model.use(attend=masked_attention, fuses=False)
    model.loss_chunk, model.residual_dtype = 0, None
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = written_out.__get__(module)  # type: ignore[method-assign]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """See `Attend`; without dropout."""
    assert dropout == 0.0
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, T, D) -> (B, H, T, T)
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


def written_out(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm by its mean and variance."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = x.var(dim=-1, keepdim=True, unbiased=False)
    scaled = norm.weight * (x - mean) / torch.sqrt(variance + norm.eps)
    return scaled if norm.bias is None else scaled + norm.bias
