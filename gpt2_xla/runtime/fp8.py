"""The blocks' matrix products in float8 (--mixed-precision fp8), by torchao.

A linear layer's output, and the gradients of its input and of its weight, are each one product of two float8 matrices,
accumulated in float32 and rounded to bf16. Weights and inputs are e4m3, gradients e5m2, each matrix with one scale that
comes from its largest element at that moment. All else is as under bf16 autocast: embeddings, attention, the output layer.
So are validation and samples, which tell what the weights are worth to whoever uses the checkpoint; and torchao's layers fail
in the inference mode that samples are made in.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_xla.model import GPT

# The first with float8 units that torch._scaled_mm uses: Ada. Hopper is 9.0, Blackwell 10.0.
CAPABILITY = (8, 9)


def multiply_in_float8(model: GPT) -> None:
    """Replace the linear layers of the blocks by torchao's, which hold the same parameters under the same names."""
    # Imported here, for it is optional and takes seconds. Checked with torchao 0.14.1 on torch 2.9.
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model.blocks)  # its default: one scale per matrix, computed anew for each product
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.forward = _in_training(module, module.forward)  # type: ignore[method-assign, assignment]


def _in_training(linear: nn.Linear, in_float8: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass that takes float8 for training alone."""

    def forward(x: Tensor) -> Tensor:
        return in_float8(x) if linear.training else F.linear(x, linear.weight, linear.bias)

    return forward


def float8_mistakes(kind: str) -> list[str]:
    """What float8 needs that this machine, whose device is a `kind`, lacks."""
    needed = "compute capability 8.9 (Ada), 9.0 (Hopper) or later"
    if kind != "cuda":
        return [
            f"--mixed-precision fp8 needs a CUDA GPU of {needed}, but the device is {kind}; use --mixed-precision bf16 or no"
        ]
    index = min(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() - 1)
    found = torch.cuda.get_device_capability(index)
    if found < CAPABILITY:
        return [
            f"--mixed-precision fp8 needs a GPU of {needed}, but {torch.cuda.get_device_name(index)} has "
            f"{found[0]}.{found[1]}; use --mixed-precision bf16"
        ]
    if importlib.util.find_spec("torchao") is None:
        return [
            "--mixed-precision fp8 needs the package torchao, which is not installed; "
            "install it with pip install torchao -c constraints.txt"
        ]
    return []
