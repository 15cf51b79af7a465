"""The memory and bandwidth levers of the XLA runtime, put into the model (docs/xla.md lists them)."""

from functools import partial
from typing import Literal

import torch
from torch_xla.utils.checkpoint import checkpoint

from gpt2_xla.config import XlaConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.runtime.recomputation import recompute_activations
from gpt2_xla.runtime.xla_attention import math_attention
from gpt2_xla.runtime.xla_flash import flash_obstacles, flash_sentence, tpu_generation
from gpt2_xla.runtime.xla_scan import ScannedBlocks
from gpt2_xla.runtime.xla_splash import Mapped, splash_attention

# Older TPUs take bf16 in their matrix units alone: there the kernel reads float32 (its compiler refuses bf16 products).
BF16_VECTORS = 4


def pull_levers(
    model: GPT, config: XlaConfig, device_kind: str, mapped: Mapped | None = None
) -> Literal["flash", "math"]:
    """Make the model compute as the options say on devices of that kind; return what --attention came to.

    `mapped` says who holds which heads of a sharded model. Raises `UserError` if the device lacks what an option needs.
    """
    recent = tpu_generation(device_kind) >= BF16_VECTORS
    model.use(fuses=True)
    if config.residual_precision == "bf16" or (
        config.residual_precision == "auto" and config.mixed_precision == "bf16" and recent
    ):
        model.use(residual_dtype=torch.bfloat16)
    attention = attention_kind(model, config, device_kind)
    kernel = partial(splash_attention, mapped=mapped, dtype=None if recent else torch.float32)
    model.use(attend=kernel if attention == "flash" else math_attention)
    if config.scan_layers:
        model.use(run_blocks=ScannedBlocks(keep_activations=config.activation_checkpointing == "none"))
    else:
        # Its own, because torch.utils.checkpoint knows no XLA device. Dropout masks come again, by the seed.
        recompute_activations(model, config.activation_checkpointing, checkpoint)
    return attention


def attention_kind(model: GPT, config: XlaConfig, device_kind: str) -> Literal["flash", "math"]:
    """What --attention means on such a device."""
    if config.attention == "math":
        return "math"
    obstacles = flash_obstacles(model.config, config, device_kind)
    if obstacles and config.attention == "flash":
        raise UserError([flash_sentence(obstacle) for obstacle in obstacles])
    return "math" if obstacles else "flash"
