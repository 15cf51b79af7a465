"""Run micro-steps as one XLA loop and print, as JSON, what came out: python xla_micro_steps.py"""

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch_xla
import torch_xla.utils.checkpoint
from torch import nn

from gpt2_xla.config import ModelConfig, TorchConfig, XlaConfig
from gpt2_xla.model import build_model
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.runtime.xla_runtime import XlaRuntime


class Masked(nn.Module):
    """The loss is the sum of a dropout mask, the gradient that of its weight is the mask itself."""

    def __init__(self, checkpointed):
        super().__init__()
        self.weight, self.checkpointed = nn.Parameter(torch.ones(64)), checkpointed

    def forward(self, tokens, targets):
        if self.checkpointed:
            return torch_xla.utils.checkpoint.checkpoint(self.masks, self.weight)
        return self.masks(self.weight)

    def masks(self, weight):
        first = nn.functional.dropout(weight, 0.5)
        return (nn.functional.dropout(first, 0.5)).sum()


def masked(runtime, checkpointed, micro_steps, seeds):
    model = Masked(checkpointed).to(runtime.device)
    torch_xla.sync()
    batch = torch.zeros(micro_steps, 1, 2, dtype=torch.long).to(runtime.device)
    found = []
    for seed in seeds:
        runtime.seed_dropout(seed * 4096)
        loss = runtime.compute_gradients(model, batch)
        runtime.end_step()
        found.append([loss.item(), model.weight.grad.tolist()])
        model.weight.grad = None
    return found


def program_size(runtime, micro_steps):
    model = Masked(False).to(runtime.device)
    batch = torch.zeros(micro_steps, 1, 2, dtype=torch.long).to(runtime.device)
    torch_xla.sync()
    runtime.compute_gradients(model, batch)
    return len(torch_xla._XLAC._get_xla_tensors_hlo([model.weight.grad]).splitlines())


def gradients(runtime, model, batch):
    forward = runtime.place(model)
    loss = runtime.compute_gradients(forward, batch.to(runtime.device))
    runtime.end_step()
    return {"loss": loss.cpu(), **{name: p.grad.cpu() for name, p in model.named_parameters()}}


def largest_difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main():
    board = ReplicaBoard.create()
    runtime, bf16 = (XlaRuntime(XlaConfig(mixed_precision=precision), board) for precision in ("no", "bf16"))
    eager = TorchRuntime(TorchConfig(device="cpu", mixed_precision="no"))
    model = build_model(ModelConfig(97, 16, 16, 1, 2), 24, 1)
    batch = torch.randint(0, 97, (3, 4, 17), generator=torch.Generator().manual_seed(0))
    expected = gradients(eager, copy.deepcopy(model), batch)
    loop = gradients(runtime, copy.deepcopy(model), batch)
    half = gradients(bf16, copy.deepcopy(model), batch)
    print(
        json.dumps(
            {
                "difference": largest_difference(expected, loop),
                "difference_one": largest_difference(
                    gradients(eager, copy.deepcopy(model), batch[:1]),
                    gradients(runtime, copy.deepcopy(model), batch[:1]),
                ),
                "bf16_difference": largest_difference(expected, half),
                "bf16_dtypes": sorted({str(value.dtype) for value in half.values()}),
                "tied": "lm_head.weight" not in loop and "wte.weight" in loop,
                "masks": masked(runtime, False, 4, [1, 2, 1]),
                "one_mask": masked(runtime, False, 1, [1, 2]),
                "checkpointed": masked(runtime, True, 4, [1, 2]),
                "program_sizes": [program_size(runtime, count) for count in (2, 16)],
            }
        )
    )
    board.remove()


if __name__ == "__main__":
    main()
