"""Time the training step of either runtime, each row in a process of its own."""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_xla.config import (
    BenchConfig,
    DataConfig,
    PretrainConfig,
    RunConfig,
    TorchConfig,
    TorchPretrainConfig,
    XlaConfig,
    XlaPretrainConfig,
    to_dict,
)
from gpt2_xla.runtime.base import Runtime

WARMUP_STEPS = 3
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds, memory in bytes."""

    machine: str
    precision: str
    parameters: int
    tokens_per_second: float  # steps launched freely, as in training
    step_median: float  # each step waited for
    step_p90: float
    input_wait: float  # share of the time spent waiting for data
    peak_memory: int
    compiles: int
    compile_seconds: float
    mfu: float | None
    loss: float


def row_configs(bench: BenchConfig, folder: Path) -> Iterator[PretrainConfig]:
    """The training configurations to measure, over random tokens in `folder`."""
    options, model = bench.bench, bench.model
    for runtime in options.runtimes:
        for precision in options.precisions:
            common: dict[str, Any] = {
                "model": model,
                "data": DataConfig(
                    train_dir=(str(folder),),
                    train_batch_size=options.train_batch_size,
                    gradient_accum_step=options.gradient_accum_step,
                ),
                "run": RunConfig(train_steps=2 * options.steps + WARMUP_STEPS),
            }
            if runtime == "torch":
                torch_options = TorchConfig(mixed_precision=precision, device=options.device, compile=options.compile)
                yield TorchPretrainConfig(runtime=torch_options, **common)
            else:
                yield XlaPretrainConfig(runtime=XlaConfig(mixed_precision=precision), **common)


def write_random_tokens(folder: Path, config: BenchConfig) -> None:
    """A shard of random tokens, enough for a few batches."""
    sequences = config.bench.train_batch_size * config.bench.gradient_accum_step
    count = (4 * sequences + 2) * config.model.seq_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocabulary, count)
    np.save(folder / "train_00000.npy", tokens.astype(np.uint16 if config.model.vocabulary <= 2**16 else np.uint32))


def measure(config: PretrainConfig, runtime: Runtime, steps: int, result: str) -> None:
    """Time the train step of `config` and write the row, as JSON, to the file `result` (rank 0)."""
    from gpt2_xla.data.pretraining import PretrainingData
    from gpt2_xla.model import build_model, flops_per_token, parameter_count
    from gpt2_xla.train import Run, train_step

    model = build_model(config.model, config.runtime.loss_chunk, config.run.seed)
    parameters = parameter_count(model)
    data = PretrainingData.open(config, runtime.rank, runtime.world_size)
    forward = runtime.place(model)
    run = Run(config, runtime, data, model, forward, runtime.build_optimizer(model, config.optim))
    batches = runtime.batches(data.training(0, config.run.train_steps), rows_dim=1)
    waited = 0.0

    def queue_step() -> Any:
        nonlocal waited
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        values = train_step(run, batch)
        runtime.end_step()
        run.step += 1
        return runtime.fetch_later(values)

    for _ in range(WARMUP_STEPS):
        read = queue_step()
    read()
    paced = []
    for _ in range(steps):
        before = time.perf_counter()
        queue_step()()
        paced.append(time.perf_counter() - before)
    waited, before = 0.0, time.perf_counter()
    for _ in range(steps):
        read = queue_step()
    loss = read()[0]
    seconds = time.perf_counter() - before
    batches.close()
    peak, compiles = runtime.peak_flops(), runtime.compile_stats()
    tokens_per_second = steps * config.tokens_per_step / seconds
    row = Row(
        machine=runtime.describe(),
        precision="float32" if config.runtime.mixed_precision == "no" else config.runtime.mixed_precision,
        parameters=parameters,
        tokens_per_second=tokens_per_second,
        step_median=statistics.median(paced),
        step_p90=statistics.quantiles(paced, n=10, method="inclusive")[-1] if len(paced) > 1 else paced[0],
        input_wait=waited / seconds,
        peak_memory=runtime.peak_memory(),
        compiles=compiles.count,
        compile_seconds=compiles.seconds,
        mfu=tokens_per_second * flops_per_token(config.model, parameters) / peak if peak else None,
        loss=loss,
    )
    if runtime.rank == 0:
        Path(result).write_text(json.dumps(asdict(row)))


def bench(config: BenchConfig, say: Any) -> list[Row]:
    """All rows that can be measured here; tells `say` why a row cannot."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_tokens(folder, config)
        for index, row_config in enumerate(row_configs(config, folder)):
            result = folder / f"row{index}.json"
            name = f"{type(row_config.runtime).__name__.removesuffix('Config').lower()} {row_config.runtime.mixed_precision}"
            say(f"measuring {name} …")
            # A process a row: peak memory, compile counts and thread pools are a process's own.
            code = f"from gpt2_xla import benchmark; benchmark.measure_row({index}, {str(folder)!r}, {str(result)!r})"
            (folder / "config.json").write_text(json.dumps(to_dict(config)))
            environment = {"PJRT_DEVICE": "CPU", **os.environ}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode or not result.exists():
                say(f"not run: {name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
                continue
            rows.append(Row(**json.loads(result.read_text())))
    return rows


def measure_row(index: int, folder: str, result: str) -> None:
    """Measure the row of that number in this process."""
    from gpt2_xla.cli import from_dict
    from gpt2_xla.errors import run_main

    bench_config = from_dict(BenchConfig, json.loads((Path(folder) / "config.json").read_text()))
    config = list(row_configs(bench_config, Path(folder)))[index]
    work = functools.partial(measure, steps=bench_config.bench.steps, result=result)

    def main() -> None:
        if isinstance(config, XlaPretrainConfig):
            from gpt2_xla.runtime.xla_launch import launch

            launch(config, work)
        else:
            from gpt2_xla.runtime.torch_runtime import TorchRuntime

            assert isinstance(config, TorchPretrainConfig)
            work(config, TorchRuntime(config.runtime))

    sys.exit(run_main(main))


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| machine | precision | tokens/s | step median | p90 | input wait | peak memory | compiles | compile time | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.machine,
            row.precision,
            f"{row.tokens_per_second:,.0f}",
            f"{row.step_median * 1e3:,.1f} ms",
            f"{row.step_p90 * 1e3:,.1f} ms",
            f"{row.input_wait:.2%}",
            f"{row.peak_memory / MIB:,.0f} MiB",
            str(row.compiles),
            f"{row.compile_seconds:.1f} s",
            f"{row.mfu:.1%}" if row.mfu is not None else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
