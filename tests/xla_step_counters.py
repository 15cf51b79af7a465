"""Run training steps on one XLA device and print, as JSON, what torch_xla counted: python xla_step_counters.py DATA_DIR"""

import dataclasses
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
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.xla_runtime import XlaRuntime
from gpt2_xla.train import Run, save, train_step, validate
from gpt2_xla.training_log import TrainingLog


def counters():
    xm.wait_device_ops()  # an execution is counted when it ends
    transfers = xla_metrics.metric_data("TransferFromDeviceTime")
    executions = xla_metrics.metric_data("ExecuteTime")
    compiles = xla_metrics.metric_data("CompileTime")
    return [metric[0] if metric else 0 for metric in (compiles, executions, transfers)]


def main(data_dir):
    folder = tempfile.mkdtemp()
    config = XlaPretrainConfig(
        ModelConfig(257, 32, 32, 2, 2, dropout=0.1),
        DataConfig(
            (f"{data_dir}/train",), f"{data_dir}/valid", train_batch_size=4, eval_batch_size=8, gradient_accum_step=2
        ),
        OptimConfig(warmup_steps=5),
        RunConfig(train_steps=100, checkpoints_dir=folder),
        runtime=XlaConfig(mixed_precision="bf16"),
    )
    board = ReplicaBoard.create()
    runtime = XlaRuntime(config.runtime, board)
    model = build_model(config.model, 64, 1)
    data = PretrainingData.open(config, 0, 1)
    run = Run(config, runtime, data, model, runtime.place(model), runtime.build_optimizer(model, config.optim))
    log = TrainingLog(config, runtime, run.metrics, 1.0, data.train.epochs)
    batches = runtime.batches(data.training(0, 100), rows_dim=1)

    def steps(count):
        for _ in range(count):
            log.add(train_step(run, log.next_batch(batches)))
            runtime.end_step()
            run.step += 1

    steps(3)
    validate(run)
    after_warmup = counters()
    steps(40)
    after_steps = counters()
    validate(run)
    save(run, None)
    steps(10)
    after_all = counters()

    # A step with a NaN gradient must change nothing.
    before = runtime.to_host(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    runtime.update(model, run.optimizer, 1.0)
    runtime.end_step()
    after = runtime.to_host(dict(model.named_parameters()))
    state = runtime.to_host(optim.named_state(model, run.optimizer))
    print(
        json.dumps(
            {
                "steps": [b - a for a, b in zip(after_warmup, after_steps, strict=True)],
                "recompiles_in_all": after_all[0] - after_warmup[0],
                "nan_step_skipped": all(torch.equal(before[name], after[name]) for name in before),
                "state_finite": all(bool(value.isfinite().all()) for value in state.values()),
                "optimizer_steps": float(state["step.wte.weight"]),
                "config": dataclasses.asdict(config)["runtime"]["mixed_precision"],
            }
        )
    )
    batches.close()
    board.remove()


if __name__ == "__main__":
    main(sys.argv[1])
