"""The rows of a padded vocabulary: cut off where weights leave a run, put back, as zeros, where they enter one.

The loss and the logits count them as impossible (`loss.without_padding`), so no gradient ever reaches them. In a file they
would do harm: other programs know nothing of padding, and a row of zeros wins over logits that are all negative.
"""

import dataclasses

from torch import Tensor
from torch.nn import functional as F

from gpt2_xla.config import ModelConfig

PADDED = ("wte.weight", "lm_head.weight")  # (V, C)


def unpadded(config: ModelConfig) -> ModelConfig:
    """The configuration of the model that a file holds."""
    if not config.vocab_padding:
        return config
    return dataclasses.replace(config, vocab_size=config.tokens_known, vocab_padding=0)


def cut(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """The weight without the rows of padding, if it has some: (V, C) -> (V - padding, C), a view."""
    return weight[: config.tokens_known] if name in PADDED else weight


def pad(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """The weight with the rows of padding, if it has some: (V - padding, C) -> (V, C)."""
    return F.pad(weight, (0, 0, 0, config.vocab_padding)) if name in PADDED and config.vocab_padding else weight
