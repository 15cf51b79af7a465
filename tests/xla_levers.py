"""Loss and gradients on one XLA device with each memory lever, against the plain path; prints JSON: python xla_levers.py

`python tests/xla_levers.py sizes` prints the size of the step's program and its compile time instead, for docs/xla.md.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch_xla
import torch_xla.core.xla_model as xm

from gpt2_xla.config import ModelConfig, XlaConfig
from gpt2_xla.model import GPT, build_model
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.xla_runtime import XlaRuntime

LEVERS = {
    "plain": {},
    "block": {"activation_checkpointing": "block"},
    "selective": {"activation_checkpointing": "selective"},
    "scan": {"scan_layers": True},
    "scan, block": {"scan_layers": True, "activation_checkpointing": "block"},
    "loss": {"loss_chunk": 10, "vocab_multiple": 128},
    "residual": {"residual_precision": "bf16"},
    "residual, scan, block": {"residual_precision": "bf16", "scan_layers": True, "activation_checkpointing": "block"},
}
BOARD = ReplicaBoard.create()
TOKENS = torch.randint(101, (2, 3, 17), generator=torch.Generator().manual_seed(1))


class Model:
    """A placed model with the runtime that placed it."""

    def __init__(self, lever, dropout=0.0, precision="no", layers=2):
        options = {"mixed_precision": precision, "loss_chunk": 0, **LEVERS[lever]}
        self.runtime = XlaRuntime(XlaConfig(**options), BOARD)
        config = ModelConfig(vocab_size=101, seq_length=16, d_model=32, num_layers=layers, num_heads=2, dropout=dropout)
        model = build_model(config, options["loss_chunk"], 1, options.get("vocab_multiple", 1))
        self.model: GPT = self.runtime.place(model).train()
        self.tokens = TOKENS.to(self.runtime.device)
        torch_xla.sync()

    def queue(self, seed=7):
        """The loss and all gradients of two micro-steps."""
        self.runtime.seed_dropout(seed)
        loss = self.runtime.compute_gradients(self.model, self.tokens)
        return [loss, *(p.grad for p in self.model.parameters())]

    def step(self, seed=7):
        """The same, on the host."""
        values = self.queue(seed)
        torch_xla.sync()
        return [value.cpu() for value in values]

    def instructions(self):
        """How many instructions the program of a step holds."""
        return torch_xla._XLAC._get_xla_tensors_hlo(self.queue()).count(" = ")


def difference(values, reference):
    """Largest difference of the losses, and of any gradient relative to its largest element."""
    pairs = list(zip(values, reference, strict=True))
    return [
        float((pairs[0][0] - pairs[0][1]).abs()),
        max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs[1:]),
    ]


def compare(levers, **options):
    plain = Model("plain", **options).step()
    return {lever: difference(Model(lever, **options).step(), plain) for lever in levers}


def sizes():
    """Instructions, bytes and CPU seconds to compile, of forward and backward of two micro-steps."""
    print("| layers | levers | instructions | program | compile time on CPU |", "|---|---|---|---|---|", sep="\n")
    for layers in (12, 48):
        for lever in ("plain", "scan", "block", "scan, block"):
            model = Model(lever, layers=layers)
            values = model.queue()
            size = len(torch_xla._XLAC._get_xla_tensors_hlo_proto(values))
            count = torch_xla._XLAC._get_xla_tensors_hlo(values).count(" = ")
            before = time.process_time()
            torch_xla.sync(wait=True)
            seconds = time.process_time() - before
            print(f"| {layers} | {lever} | {count:,} | {size / 2**20:.2f} MiB | {seconds:.1f} s |", flush=True)


def main():
    results = {
        "float32": compare(["block", "selective", "scan", "scan, block", "loss"]),
        "bf16": compare(["block", "scan, block", "residual", "residual, scan, block"], precision="bf16"),
        "dropout": compare(["block", "selective"], dropout=0.1),
        "instructions": [[Model(lever, layers=n).instructions() for n in (2, 6)] for lever in ("plain", "scan")],
    }
    xm.wait_device_ops()
    print(json.dumps(results))
    BOARD.remove()


if __name__ == "__main__":
    sizes() if sys.argv[1:] == ["sizes"] else main()
