"""Train on one XLA device and print, as JSON, what torch_xla counted in each step: python xla_step_counters.py DATA_DIR"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics

from gpt2_xla import optim
from gpt2_xla.config import DataConfig, LoggingConfig, ModelConfig, OptimConfig, RunConfig, XlaConfig, XlaPretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.metrics import open_metrics
from gpt2_xla.model import build_model
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.xla_runtime import XlaRuntime
from gpt2_xla.train import start_run, train

STEPS = 100


class CountingRuntime(XlaRuntime):
    """Reads the counters before every step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.counted = []

    def seed_dropout(self, seed):
        self.counted.append(counters())
        super().seed_dropout(seed)


def counters():
    xm.wait_device_ops()  # an execution is counted when it ends
    names = ("CompileTime", "ExecuteTime", "TransferFromDeviceTime")
    return [metric[0] if (metric := xla_metrics.metric_data(name)) else 0 for name in names]


def nan_step(run):
    """Whether a step with NaN gradients, or with only a NaN loss, changes nothing, and what the optimizer's state is then."""
    return {
        "nan_step_skipped": skipped(run.runtime, run.model, run.optimizer, gradient=float("nan"), loss=0.0),
        "nan_loss_skipped": skipped(run.runtime, run.model, run.optimizer, gradient=1.0, loss=float("nan")),
        "state_finite": all(value.isfinite().all() for value in state_of(run.runtime, run.model, run.optimizer)),
        "optimizer_steps": float(optim.named_state(run.model, run.optimizer)["step.wte.weight"].cpu()),
    }


def state_of(runtime, model, optimizer):
    held = {**dict(model.named_parameters()), **optim.named_state(model, optimizer)}
    return [share.data for share in runtime.to_host(held, {})]


def skipped(runtime, model, optimizer, gradient, loss):
    before = state_of(runtime, model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    runtime.update(model, optimizer, 1.0, torch.full((), loss, device=runtime.device))
    runtime.end_step()
    return all(map(torch.equal, before, state_of(runtime, model, optimizer)))


def torch_adam_steps(board):
    """Of steps with good, NaN and good gradients, and one with a NaN loss, which were skipped by --no-use-syncfree-optim."""
    runtime = XlaRuntime(XlaConfig(mixed_precision="no", use_syncfree_optim=False), board)
    model = build_model(ModelConfig(31, 8, 16, 1, 2), 0, 1)
    runtime.place(model)
    optimizer = runtime.build_optimizer(model, OptimConfig())
    cases = [(1.0, 0.0), (float("nan"), 0.0), (1.0, 0.0), (1.0, float("inf"))]
    found = [skipped(runtime, model, optimizer, *case) for case in cases]
    return [*found, float(optim.named_state(model, optimizer)["step.wte.weight"].cpu())]


def main(data_dir):
    config = XlaPretrainConfig(
        ModelConfig(257, 32, 32, 2, 2, dropout=0.1),
        DataConfig(
            (f"{data_dir}/train",), f"{data_dir}/valid", train_batch_size=4, eval_batch_size=8, gradient_accum_step=2
        ),
        OptimConfig(warmup_steps=5),
        RunConfig(train_steps=STEPS, valid_interval=50, save_interval=40, checkpoints_dir=tempfile.mkdtemp()),
        LoggingConfig(log_interval=10, sample_interval=30, sample_tokens=12),
        runtime=XlaConfig(mixed_precision="bf16", max_recompiles=0),
    )
    board = ReplicaBoard.create()
    runtime = CountingRuntime(config.runtime, board)
    run, _ = start_run(config, runtime, PretrainingData.open(config, 0, 1))
    placed = counters()
    run.metrics = open_metrics(config, 0, 0)
    train(run)
    run.metrics.close()
    runtime.counted.append(counters())
    steps = [
        [after - before for before, after in zip(one, other, strict=True)]
        for one, other in zip(runtime.counted, runtime.counted[1:], strict=False)
    ]
    start = [after - before for before, after in zip(placed, runtime.counted[0], strict=True)]
    print(
        json.dumps(
            {
                "placing": placed,
                "first_validation": start,
                "steps": steps,
                **nan_step(run),
                "torch_adam": torch_adam_steps(board),
            }
        )
    )
    board.remove()


if __name__ == "__main__":
    main(sys.argv[1])
