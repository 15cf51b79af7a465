"""Parameter groups, the optimizer on torch devices, and optimizer state by parameter name."""

from typing import Any

import torch
from torch import Tensor, nn

from gpt2_xla.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (embeddings included) with weight decay, vectors (biases, normalizations) without."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def optimizer_arguments(optim: OptimConfig) -> dict[str, Any]:
    """Keyword arguments that every implementation of Adam(W) understands."""
    return {"lr": optim.learning_rate, "betas": optim.betas, "eps": 1e-8}


def build_torch_optimizer(
    model: nn.Module, optim: OptimConfig, fused: bool, capturable: bool = False
) -> torch.optim.Optimizer:
    """torch's own AdamW or Adam over the model's parameter groups; `capturable` counts steps on the device."""
    kind = torch.optim.AdamW if optim.optim_type == "adamw" else torch.optim.Adam
    groups = parameter_groups(model, optim.weight_decay)
    return kind(groups, **optimizer_arguments(optim), fused=fused, capturable=capturable)


def not_finite(values: Tensor) -> Tensor:
    """1.0 if a step's [loss, gradient norm] has a NaN or an infinity, so that the step must change nothing; else 0.0.

    A norm that is not finite means a gradient that is not. On the device: nobody waits for it.
    """
    return (~torch.isfinite(values).all()).float()


@torch.no_grad()
def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """A step of an optimizer that knows no `found_inf`, undone on the device where `skip` is 1.

    For compilers: what is copied here is then only read once, and never stored.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = [*parameters, *(value for p in parameters for value in optimizer.state[p].values())]
    before = [tensor.clone() for tensor in held]
    optimizer.step()
    for tensor, old in zip(held, before, strict=True):
        tensor.copy_(torch.where(skip > 0, old, tensor))


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
