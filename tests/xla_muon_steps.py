"""Muon's steps on an XLA device, some not finite; prints, as JSON, what they changed and compiled: python xla_muon_steps.py"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpt2_xla import optim
from gpt2_xla.config import ModelConfig, OptimConfig, XlaConfig
from gpt2_xla.model import build_model
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.xla_runtime import XlaRuntime


def main():
    board = ReplicaBoard.create()
    runtime = XlaRuntime(XlaConfig(mixed_precision="bf16"), board)
    model = build_model(ModelConfig(31, 8, 16, 1, 2), 0, 1)
    runtime.place(model)
    optimizer = runtime.build_optimizer(model, OptimConfig(optim_type="muon"))
    held = {**dict(model.named_parameters()), **optim.named_state(model, optimizer)}

    def state():
        return [share.data for share in runtime.to_host(held, {})]

    def step(gradient, loss, rate):
        """Whether such a step changes nothing."""
        before = state()
        optim.set_learning_rate(optimizer, rate)
        for parameter in model.parameters():
            parameter.grad = torch.full(parameter.shape, gradient).to(runtime.device)
        values = runtime.update(model, optimizer, 1.0, torch.full((1,), loss).to(runtime.device)[0])
        runtime.end_step()
        runtime.fetch_later(values)()
        return all(map(torch.equal, before, state()))

    nan, inf = float("nan"), float("inf")
    cases = [(1.0, 0.5, 1e-2), (nan, 0.5, 2e-2), (1.0, 0.5, 3e-2), (1.0, inf, 0.0)]
    found = [step(*cases[0])]
    warm = runtime.compile_stats().count
    found += [step(*case) for case in cases[1:]]
    finite = all(bool(value.isfinite().all()) for value in state())
    compiles = runtime.compile_stats().count - warm
    print(json.dumps({"changed_nothing": found, "finite": finite, "compiles": compiles}))
    board.remove()


if __name__ == "__main__":
    main()
