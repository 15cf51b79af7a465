"""Where --attention flash, the kernel of xla_splash.py, can run. Imports no torch_xla: it is asked before replicas start."""

import importlib.util
import os
import re

from gpt2_xla.config import ModelConfig, XlaConfig, XlaPretrainConfig

BLOCK_MULTIPLE = 128  # of queries and of keys: a row of the TPU's vector registers


def flash_obstacles(model: ModelConfig, runtime: XlaConfig, device_kind: str) -> list[str]:
    """Why the kernel cannot be used on devices of that kind, PJRT's name such as `TPU v4`: what it needs, what there is."""
    obstacles = []
    if not device_kind.startswith("TPU"):
        obstacles.append(f"needs a TPU, but the device is {device_kind}")
    elif importlib.util.find_spec("jax") is None:
        obstacles.append(
            "needs jax, which is not installed (pip install -r requirements-xla_tpu.txt -c constraints.txt)"
        )
    if runtime.scan_layers:  # its tracer cannot look into the kernel
        obstacles.append("does not work with --scan-layers")
    if model.dropout:
        obstacles.append(f"has no dropout, but --dropout is {model.dropout:g}")
    length, head = model.seq_length, model.d_model // max(model.num_heads, 1)
    if length % BLOCK_MULTIPLE:
        obstacles.append(f"takes a --seq-length that is a multiple of {BLOCK_MULTIPLE}, not {length}")
    if head > 128 and head % 128:
        obstacles.append(f"takes heads of at most 128 or a multiple of 128, but --d-model / --num-heads is {head}")
    return obstacles


def tpu_generation(device_kind: str) -> int:
    """4 for `TPU v4`, 5 for `TPU v5 lite`; 0 for what is no TPU."""
    generation = re.match(r"TPU v(\d+)", device_kind)
    return int(generation[1]) if generation else 0


def attention_mistakes(config: XlaPretrainConfig) -> list[str]:
    """What --attention flash asks of this model and machine that the kernel cannot do, before its devices are started."""
    device = os.environ.get("PJRT_DEVICE")
    if config.runtime.attention != "flash" or device is None:
        return []
    return [flash_sentence(obstacle) for obstacle in flash_obstacles(config.model, config.runtime, device)]


def flash_sentence(obstacle: str) -> str:
    return f"--attention flash {obstacle}; use --attention auto"
