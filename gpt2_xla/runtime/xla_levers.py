"""The memory and bandwidth levers of the XLA runtime, put into the model (docs/xla.md lists them)."""

from typing import Literal

import torch_xla.runtime as xr
from torch_xla.utils.checkpoint import checkpoint

from gpt2_xla.config import XlaConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.runtime.recomputation import recompute_activations
from gpt2_xla.runtime.xla_flash import flash_obstacles, flash_sentence
from gpt2_xla.runtime.xla_scan import ScannedBlocks
from gpt2_xla.runtime.xla_splash import splash_attention


def pull_levers(model: GPT, config: XlaConfig, device_kind: str) -> Literal["flash", "math"]:
    """Make the model compute as the options say; return what --attention came to.

    `device_kind` is PJRT's name for the device. Raises `UserError` if this device lacks what an option needs.
    """
    model.use(fuses=True)
    attention = attention_kind(model, config, device_kind)
    if attention == "flash":
        model.use(attend=splash_attention)
    if config.scan_layers:
        model.use(run_blocks=ScannedBlocks(keep_activations=config.activation_checkpointing == "none"))
    else:
        # Its own, because torch.utils.checkpoint knows no XLA device. Dropout masks come again, by the seed.
        recompute_activations(model, config.activation_checkpointing, checkpoint)
    return attention


def attention_kind(model: GPT, config: XlaConfig, device_kind: str) -> Literal["flash", "math"]:
    """What --attention means on this device."""
    if config.attention == "math":
        return "math"
    obstacles = flash_obstacles(model.config, device_kind)
    if xr.is_spmd():  # torch_xla's kernel would have to be told how q, k and v are cut
        obstacles.append("does not work on a sharded model yet")
    if obstacles and config.attention == "flash":
        raise UserError([flash_sentence(obstacle) for obstacle in obstacles])
    return "math" if obstacles else "flash"
