"""Train a few steps on a mesh of XLA devices and print, as JSON, what torch_xla counted and how the tensors lie.

python tests/spmd_step_counters.py DATA_DIR MESH, with CPU_NUM_DEVICES devices.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics

from gpt2_xla import optim
from gpt2_xla.config import DataConfig, ModelConfig, OptimConfig, RunConfig, XlaConfig, XlaPretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.model import build_model
from gpt2_xla.open_window import OpenWindow
from gpt2_xla.runtime.xla_shards import put_together, shard_bytes, tiles
from gpt2_xla.runtime.xla_spmd_runtime import XlaSpmdRuntime
from gpt2_xla.shares import by_name
from gpt2_xla.shares import put_together as together
from gpt2_xla.train import Run, train_step, validate
from gpt2_xla.training_log import TrainingLog


def counters():
    xm.wait_device_ops()  # an execution is counted when it ends
    found = {}
    for name in ("CompileTime", "ExecuteReplicatedTime", "TransferFromDeviceTime"):
        metric = xla_metrics.metric_data(name)
        found[name] = metric[0] if metric else 0
    return found


def main(data_dir, mesh):
    config = XlaPretrainConfig(
        ModelConfig(257, 20, 32, 1, 2, dropout=0.1),
        DataConfig((f"{data_dir}/train",), f"{data_dir}/valid", 8, 8, gradient_accum_step=2),
        OptimConfig(warmup_steps=5),
        RunConfig(train_steps=100, valid_steps=4, checkpoints_dir=tempfile.mkdtemp()),
        runtime=XlaConfig(sharding="fsdp", mesh=mesh, loss_chunk=20, mixed_precision="bf16"),
    )
    runtime = XlaSpmdRuntime(config.runtime)
    model = build_model(config.model, config.runtime.loss_chunk, 1)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    data = PretrainingData.open(config, runtime.rank, runtime.world_size)
    run = Run(config, runtime, data, model, runtime.place(model), runtime.build_optimizer(model, config.optim))
    log = TrainingLog(config, runtime, run.metrics, 1.0, data.train.epochs, OpenWindow())
    batches = runtime.batches(data.training(0, 100), rows_dim=1)

    def steps(count):
        before = counters()
        for _ in range(count):
            log.add(train_step(run, log.next_batch(batches)))
            runtime.end_step()
            run.step += 1
        return {name: now - before[name] for name, now in counters().items()}

    report = {"describe": runtime.describe(), "bytes": total, "first_step": steps(1)}
    validate(run)
    before = counters()
    report["steps"] = steps(10)
    validate(run)
    run.saver.save(run, None)
    run.saver.wait()
    steps(1)
    report["compiles_after_warm_up"] = counters()["CompileTime"] - before["CompileTime"]

    state = optim.named_state(model, run.optimizer)
    held = {**dict(model.named_parameters()), **{n: t for n, t in state.items() if t.dim()}}
    report["tiles"] = {name: tiles(tensor) for name, tensor in held.items()}
    report["bytes_per_device"] = sum(map(shard_bytes, held.values()))
    batches.close()
    print(json.dumps({**report, **as_several_hosts(runtime, model.blocks[0].mlp.c_fc.weight)}))


def as_several_hosts(runtime, weight):
    """Whether the ways that only several hosts go, each of which holds a part, come to the same on one."""
    here = put_together(weight.detach())
    runtime.world_size = runtime.writers = 2
    batch = torch.arange(3 * 8 * 5).view(3, 8, 5)
    (sent,) = runtime.batches(iter([batch]), rows_dim=1)
    runtime.end_step()
    found = by_name(runtime.to_host({"weight": weight, "batch": sent}, {}))
    cut = len(found["weight"]) == 4 and sum(share.data.numel() for share in found["weight"]) == weight.numel()
    return {
        "cut_alike": cut and torch.equal(together(found["weight"]), here),
        "sent_alike": torch.equal(together(found["batch"]), batch),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
