"""Take steps on 2 XLA replicas; each writes what it saw to FOLDER/RANK.json: python xla_replica_step.py FOLDER"""

import json
import math
import os
import re
import sys
from pathlib import Path

import torch
from xla_cpu_replicas import ENVIRONMENT, replica

from gpt2_xla.config import ModelConfig, OptimConfig, RunConfig, XlaConfig, XlaPretrainConfig
from gpt2_xla.errors import run_main
from gpt2_xla.model import build_model
from gpt2_xla.runtime.xla_launch import launch


def work(config, runtime):
    import torch_xla

    model = build_model(config.model, 0, 1)
    forward = runtime.place(model)
    optimizer = runtime.build_optimizer(model, config.optim)
    tokens = torch.randint(0, 97, (2, 1, 9), generator=torch.Generator().manual_seed(runtime.rank))
    batch = tokens.to(runtime.device)

    def step(poison, loss_poison=0.0):
        runtime.seed_dropout(0)
        loss = runtime.compute_gradients(forward, batch)
        # Data, not a constant, and no scalar (equal ones share a buffer): the graph must be one for all replicas.
        poisons = torch.tensor([poison] * 16 + [loss_poison]).to(runtime.device)
        model.wpe.weight.grad += poisons[:16]
        loss = loss + poisons[16]
        values = runtime.update(model, optimizer, 1.0, loss)
        hlo = torch_xla._XLAC._get_xla_tensors_hlo([values, *model.parameters()])
        runtime.end_step()
        return hlo, values.tolist(), [parameter.detach().cpu() for parameter in model.parameters()]

    hlo, (loss, _), first = step(0.0)
    _, (_, norm), second = step(float("inf") if runtime.rank == 1 else 0.0)
    _, (loss_alone, norm_alone), unchanged = step(0.0, float("inf") if runtime.rank == 1 else 0.0)
    _, _, third = step(0.0)
    found = {
        "all_reduces": len(re.findall(r" all-reduce\(", hlo)),
        "reduced": len(re.findall(r"f32\[", re.search(r"= (.*) all-reduce\(", hlo)[1])),
        "parameters": len(first),
        "loss": loss,
        "norm_is_finite": bool(torch.tensor(norm).isfinite()),
        "skipped": all(map(torch.equal, first, second)),
        "loss_alone": [math.isfinite(loss_alone), math.isfinite(norm_alone), *map(torch.equal, second, unchanged)],
        "goes_on": not any(map(torch.equal, second, third)),
        "weights": [float(value.double().sum()) for value in third],
    }
    Path(config.run.checkpoints_dir, f"{runtime.rank}.json").write_text(json.dumps(found))


def main():
    os.environ.update(ENVIRONMENT, CPU_NUM_DEVICES="2")
    config = XlaPretrainConfig(
        model=ModelConfig(97, 8, 16, 1, 2),
        optim=OptimConfig(learning_rate=1e-2),
        run=RunConfig(checkpoints_dir=sys.argv[1]),
        runtime=XlaConfig(mixed_precision="no"),
    )
    launch(config, work, replica)


if __name__ == "__main__":
    sys.exit(run_main(main))
