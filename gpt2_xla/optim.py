"""Parameter groups, the optimizer on torch devices, and optimizer state by parameter name."""

from typing import Any

import torch
from torch import Tensor, nn

from gpt2_xla.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (embeddings included) with weight decay, vectors (biases, LayerNorm) without."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def optimizer_arguments(optim: OptimConfig) -> dict[str, Any]:
    """Keyword arguments that every implementation of Adam(W) understands."""
    return {"lr": optim.learning_rate, "betas": optim.betas, "eps": 1e-8}


def build_torch_optimizer(model: nn.Module, optim: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """torch's own AdamW or Adam over the model's parameter groups."""
    kind = torch.optim.AdamW if optim.optim_type == "adamw" else torch.optim.Adam
    return kind(parameter_groups(model, optim.weight_decay), **optimizer_arguments(optim), fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every group, as a Python float."""
    for group in optimizer.param_groups:
        group["lr"] = value


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `exp_avg.blocks.0.attn.c_attn.weight` → tensor: the same names on every runtime."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if isinstance(value, Tensor) and value.numel()  # torch_xla keeps an empty max_exp_avg_sq
    }


def prime_state(model: nn.Module, optimizer: torch.optim.Optimizer, step_device: torch.device | None = None) -> None:
    """Create Adam's moments before the first step, so that the first step's graph is that of every other step.

    `step_device` is where the step count lives; default: with its parameter.
    """
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=step_device or parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Copy state saved by `named_state` into a primed optimizer; KeyError if a name is missing."""
    for name, value in named_state(model, optimizer).items():
        value.copy_(saved[name].to(value.dtype))
