"""Which activations the backward pass computes again instead of keeping (--activation-checkpointing)."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from gpt2_xla.model import GPT, Attention

Recomputed = Literal["none", "block", "selective"]
# checkpoint(function, *arguments) is function(*arguments), called once more in the backward pass with the same dropout
# masks: what it computed in between is not kept.
Checkpoint = Callable[..., Tensor]


def recompute_activations(model: GPT, what: Recomputed, checkpoint: Checkpoint) -> None:
    """Run each block, or only its attention from q, k, v to y, through `checkpoint`.

    `selective` spares the (B, H, T, T) matrices, the largest activations and the cheapest to compute again (Korthikanti
    et al. 2022, "Reducing Activation Recomputation in Large Transformer Models").
    """

    def recomputed(function: Callable[..., Tensor], *arguments: Tensor | float | None) -> Tensor:
        return checkpoint(function, *arguments) if torch.is_grad_enabled() else function(*arguments)

    if what == "block":

        def run_blocks(blocks: Iterable[nn.Module], x: Tensor, rotation: Tensor | None) -> Tensor:
            for block in blocks:
                x = recomputed(block, x, rotation)
            return x

        model.use(run_blocks=run_blocks)
    elif what == "selective":
        plain = next(module.attend for module in model.modules() if isinstance(module, Attention))

        def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            return recomputed(plain, q, k, v, dropout)

        model.use(attend=attend)
