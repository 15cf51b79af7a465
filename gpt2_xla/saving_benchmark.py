"""How long the loop stands still for a checkpoint, against the time that writing it takes."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2_xla.bench_config import BenchConfig, BenchOptions, SavingBenchConfig
from gpt2_xla.benchmark import OurLoop, write_random_tokens
from gpt2_xla.config import DataConfig, RunConfig, TorchConfig, TorchPretrainConfig
from gpt2_xla.model_validation import check_model


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
        write_random_tokens(folder / "data", BenchConfig(config.model, BenchOptions(train_batch_size=batch)))
        training = TorchPretrainConfig(
            config.model,
            DataConfig(train_dir=(str(folder / "data"),), train_batch_size=batch, gradient_accum_step=1),
            run=RunConfig(checkpoints_dir=str(folder / "run"), saved_checkpoint_limit=1, train_steps=10**6),
            runtime=TorchConfig(device=options.device),
        )
        runtime = TorchRuntime(training.runtime)
        loop = OurLoop(training, runtime)
        try:
            return _measure(loop, options.saves, f"{runtime.describe()}, {os.cpu_count()} cores")
        finally:
            loop.batches.close()
            loop.run.saver.close()


def _measure(loop: OurLoop, saves: int, machine: str) -> Result:
    run = loop.run
    steps, stalls, waited, during = [], [], [], []
    loop.step()()
    for _ in range(saves + 1):
        steps.append(_seconds(lambda: loop.step()()))
        start = time.perf_counter()
        stalls.append(_seconds(lambda: run.saver.save(run, None)))
        run.saver.wait()
        waited.append(time.perf_counter() - start)
        loop.step()()
        run.saver.save(run, None)
        during.append(_seconds(lambda: loop.step()()))
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
