"""How long the loop stands still for a checkpoint, against the time that writing it takes."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2_xla.bench.contenders import write_random_tokens
from gpt2_xla.bench_config import SavingBenchConfig
from gpt2_xla.config import DataConfig, PretrainConfig, RunConfig, TorchConfig, TorchPretrainConfig
from gpt2_xla.model_validation import check_model
from gpt2_xla.runtime.base import Runtime


@dataclass(frozen=True)
class Result:
    """Seconds, medians over the saves; bytes."""

    machine: str
    state: int  # bytes of weights and optimizer state
    first_stall: float  # the first save also allocates the memory
    stall: float  # the loop stands still
    synchronous: float  # the same save, waited for, with nothing beside it
    step: float  # a training step, with nothing beside it
    step_during: float  # one while a save is written


def bench(config: SavingBenchConfig) -> Result:
    """Measure in this process, on --device, with checkpoints below --folder that are removed afterwards."""
    from gpt2_xla.runtime.torch_runtime import TorchRuntime

    check_model(config.model)
    options = config.bench
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "data").mkdir()
        batch = options.train_batch_size
        write_random_tokens(folder / "data", config.model, (4 * batch + 2) * config.model.seq_length)
        training = TorchPretrainConfig(
            config.model,
            DataConfig(train_dir=(str(folder / "data"),), train_batch_size=batch, gradient_accum_step=1),
            run=RunConfig(checkpoints_dir=str(folder / "run"), saved_checkpoint_limit=1, train_steps=10**6),
            runtime=TorchConfig(device=options.device),
        )
        runtime = TorchRuntime(training.runtime)
        loop = Loop(training, runtime)
        try:
            return _measure(loop, options.saves, f"{runtime.describe()}, {os.cpu_count()} cores")
        finally:
            loop.batches.close()
            loop.run.saver.close()


class Loop:
    """The program's own training step, one at a time."""

    def __init__(self, config: PretrainConfig, runtime: Runtime) -> None:
        from gpt2_xla.data.pretraining import PretrainingData
        from gpt2_xla.model import build_model, parameter_count
        from gpt2_xla.train import Run

        model = build_model(config.model, config.runtime.loss_chunk, config.run.seed, config.runtime.vocab_multiple)
        self.parameters = parameter_count(model)
        data = PretrainingData.open(config, runtime.rank, runtime.world_size)
        forward = runtime.place(model)
        self.run = Run(config, runtime, data, model, forward, runtime.build_optimizer(model, config.optim))
        self.batches = runtime.batches(data.training(0, config.run.train_steps), rows_dim=1)

    def step(self) -> None:
        """Train a step, and wait for it."""
        from gpt2_xla.train import train_step

        values = train_step(self.run, next(self.batches))
        self.run.runtime.end_step()
        self.run.step += 1
        self.run.runtime.fetch_later(values)()


def _measure(loop: Loop, saves: int, machine: str) -> Result:
    run = loop.run
    steps, stalls, waited, during = [], [], [], []
    loop.step()
    for _ in range(saves + 1):
        steps.append(_seconds(loop.step))
        start = time.perf_counter()
        stalls.append(_seconds(lambda: run.saver.save(run, None)))
        run.saver.wait()
        waited.append(time.perf_counter() - start)
        loop.step()
        run.saver.save(run, None)
        during.append(_seconds(loop.step))
        run.saver.wait()
    return Result(
        machine,
        state=3 * 4 * loop.parameters,
        first_stall=stalls[0],
        stall=statistics.median(stalls[1:]),
        synchronous=statistics.median(waited[1:]),
        step=statistics.median(steps),
        step_during=statistics.median(during),
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table(result: Result) -> str:
    """The result as a row of a Markdown table."""
    cells = [
        result.machine,
        f"{result.state / 1e9:.2f} GB",
        f"{result.stall:.3f} s",
        f"{result.first_stall:.3f} s",
        f"{result.synchronous:.2f} s",
        f"{result.stall / result.synchronous:.1%}",
        f"{result.step:.2f} s",
        f"{result.step_during:.2f} s",
    ]
    titles = ["machine", "state", "stall", "first stall", "synchronous save", "share", "step", "step during a save"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), cells))
