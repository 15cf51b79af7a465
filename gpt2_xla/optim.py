"""Parameter groups, the optimizer on torch devices, and optimizer state by parameter name."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_xla.config import OptimConfig
from gpt2_xla.muon import Muon, hidden_matrices

BuildAdam = Callable[
    [list[dict[str, Any]]], torch.optim.Optimizer
]  # from parameter groups, which have a weight decay each

# In place of 0, which XLA would compile in, and so recompile when a schedule reaches it; 1 - rate * weight decay is not 1 yet.
SMALLEST_RATE = 1e-12


class MuonAndAdam(torch.optim.Optimizer):
    """Muon for the hidden matrices and AdamW for all else, as one: common groups and state."""

    def __init__(self, muon: Muon, adam: torch.optim.Optimizer) -> None:
        super().__init__([*adam.param_groups, *muon.param_groups], adam.defaults)
        # The same objects: a learning rate or a state that is set here is theirs.
        adam.param_groups, muon.param_groups = self.param_groups[:-1], self.param_groups[-1:]
        adam.state = muon.state = self.state
        self.muon, self.adam = muon, adam

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        self.muon.step(closure)
        self.adam.step(closure)


def build_optimizer(
    model: nn.Module, optim: OptimConfig, build_adam: BuildAdam, matmul_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """What --optim-type asks for, with the runtime's own Adam(W); `matmul_dtype` is that of Muon's products."""
    decay = decay_factor(optim)
    if optim.optim_type != "muon":
        return build_adam(parameter_groups(list(model.parameters()), decay))
    hidden = hidden_matrices(model)
    others = [parameter for parameter in model.parameters() if parameter not in hidden]
    muon = Muon(
        hidden,
        lr=optim.learning_rate,
        weight_decay=decay,
        momentum=optim.muon_momentum,
        matmul_dtype=matmul_dtype,
    )
    return MuonAndAdam(muon, build_adam(parameter_groups(others, decay)))


def decay_factor(optim: OptimConfig) -> float:
    """What all the optimizers multiply by the learning rate to get the share of a weight that a step takes away.

    --independent-weight-decay gives that share at the peak itself; below the peak it shrinks with the schedule alone.
    """
    return optim.weight_decay / optim.learning_rate if optim.independent_weight_decay else optim.weight_decay


def parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (embeddings included) with weight decay, vectors (biases, normalizations) without."""
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def optimizer_arguments(optim: OptimConfig) -> dict[str, Any]:
    """Keyword arguments that every implementation of Adam(W) understands."""
    return {"lr": optim.learning_rate, "betas": optim.betas, "eps": 1e-8}


def build_torch_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    fused: bool,
    capturable: bool = False,
    matmul_dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """The optimizer with torch's own AdamW or Adam; `capturable` counts steps on the device."""
    kind = torch.optim.Adam if optim.optim_type == "adam" else torch.optim.AdamW

    def build_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return kind(groups, **optimizer_arguments(optim), fused=fused, capturable=capturable)

    return build_optimizer(model, optim, build_adam, matmul_dtype)


def not_finite(values: Tensor) -> Tensor:
    """1.0 if a step's [loss, gradient norm] has a NaN or an infinity, so that the step must change nothing; else 0.0.

    A norm that is not finite means a gradient that is not. On the device: nobody waits for it.
    """
    return (~torch.isfinite(values).all()).float()


def take_step(
    optimizer: torch.optim.Optimizer, skip: Tensor, adam_step: Callable[[torch.optim.Optimizer, Tensor], None]
) -> None:
    """A step that changes nothing where `skip` is 1; `adam_step` is how the runtime does that with its Adam(W)."""
    if isinstance(optimizer, MuonAndAdam):
        optimizer.muon.step(found_inf=skip)
        optimizer = optimizer.adam
    adam_step(optimizer, skip)


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
    """Set the learning rate of every group, as a Python float; no less than SMALLEST_RATE."""
    for group in optimizer.param_groups:
        group["lr"] = max(value, SMALLEST_RATE)


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
    """Create the moments before the first step, so that the first step's graph is that of every other step.

    `step_device` is where Adam's step count lives; default: with its parameter.
    """
    hidden = optimizer.muon.param_groups[0]["params"] if isinstance(optimizer, MuonAndAdam) else []
    for parameter in hidden:
        optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    for parameter in model.parameters():
        if parameter in optimizer.state:
            continue
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=step_device or parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
