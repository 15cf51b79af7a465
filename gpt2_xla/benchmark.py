"""Time the training step of either runtime, each row in a process of its own."""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_xla.bench_config import BenchConfig
from gpt2_xla.config import (
    DataConfig,
    PretrainConfig,
    RunConfig,
    TorchConfig,
    TorchPretrainConfig,
    XlaConfig,
    XlaPretrainConfig,
    to_dict,
)
from gpt2_xla.model_validation import check_model
from gpt2_xla.runtime.base import Runtime

WARMUP_STEPS = 3
TURNS = 10
BARE = "bare torch_xla loop"
MIB = 2**20
Reader = Callable[[], list[float]]


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds, memory in bytes."""

    machine: str
    precision: str
    parameters: int
    tokens_per_second: float  # steps launched freely, as in training
    step_median: float  # each step waited for
    step_p90: float
    input_wait: float | None  # share of the time spent waiting for data
    peak_memory: int | None
    compiles: int | None
    compile_seconds: float | None
    mfu: float | None
    loss: float  # of the last step
    of_bare: float | None  # the free steps' time over that of the bare loop's, in turns


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


@dataclass
class _Timing:
    """What was measured of one loop. Times in seconds a step."""

    free: list[float]  # of each turn of steps launched without waiting
    paced: list[float]  # of each step waited for
    loss: float = 0.0


class OurLoop:
    """The program's own training step, without logging, validation and checkpoints."""

    def __init__(self, config: PretrainConfig, runtime: Runtime) -> None:
        from gpt2_xla.data.pretraining import PretrainingData
        from gpt2_xla.model import build_model, flops_per_token, parameter_count
        from gpt2_xla.train import Run

        model = build_model(config.model, config.runtime.loss_chunk, config.run.seed, config.runtime.vocab_multiple)
        self.parameters = parameter_count(model)
        self.flops_per_token = flops_per_token(config.model)
        self.data = PretrainingData.open(config, runtime.rank, runtime.world_size)
        forward = runtime.place(model)
        self.run = Run(config, runtime, self.data, model, forward, runtime.build_optimizer(model, config.optim))
        self.batches = runtime.batches(self.data.training(0, config.run.train_steps), rows_dim=1)
        self.waited = 0.0  # seconds, for data

    def step(self) -> Reader:
        """Queue a step; the returned function waits for it and returns the loss first."""
        from gpt2_xla.train import train_step

        before = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - before
        values = train_step(self.run, batch)
        self.run.runtime.end_step()
        self.run.step += 1
        return self.run.runtime.fetch_later(values)


def measure(config: PretrainConfig, runtime: Runtime, steps: int, result: str, bare: bool) -> None:
    """Time the train step of `config`, in turns with a bare loop of it; write the rows, as JSON, to `result` (rank 0)."""
    ours = OurLoop(config, runtime)
    _warm_up(ours.step)
    compiles, memory = runtime.compile_stats(), runtime.peak_memory()
    loops: dict[str, Callable[[], Reader]] = {runtime.describe(): ours.step}
    if bare and runtime.world_size == 1:
        from gpt2_xla.runtime.bare_xla_loop import BareXlaLoop

        other = BareXlaLoop(config, ours.data.training(0, config.run.train_steps))
        _warm_up(other.step)
        loops[BARE] = other.step
    ours.waited = 0.0
    timings = _time_in_turns(loops, steps)
    ours.batches.close()
    peak, (first, *_) = runtime.peak_flops(), timings.values()
    rows = []
    for machine, timing in timings.items():
        mine = timing is first
        tokens_per_second = config.tokens_at(0) / statistics.median(timing.free)
        ratios = [a / b for a, b in zip(timing.free, timings[BARE].free, strict=True)] if BARE in timings else []
        rows.append(
            Row(
                machine=machine,
                precision="float32" if config.runtime.mixed_precision == "no" else config.runtime.mixed_precision,
                parameters=ours.parameters,
                tokens_per_second=tokens_per_second,
                step_median=statistics.median(timing.paced),
                step_p90=_p90(timing.paced),
                input_wait=ours.waited / (sum(timing.free) + sum(timing.paced)) if mine else None,
                peak_memory=memory if mine else None,
                compiles=compiles.count if mine else None,
                compile_seconds=compiles.seconds if mine else None,
                mfu=tokens_per_second * ours.flops_per_token / peak if peak else None,
                loss=timing.loss,
                of_bare=statistics.median(ratios) if ratios else None,
            )
        )
    if runtime.rank == 0:
        Path(result).write_text(json.dumps([asdict(row) for row in rows]))


def _warm_up(step: Callable[[], Reader]) -> None:
    for _ in range(WARMUP_STEPS):
        read = step()
    read()


def _time_in_turns(loops: dict[str, Callable[[], Reader]], steps: int) -> dict[str, _Timing]:
    """`steps` free and `steps` paced steps of each loop, a few at a time: what slows the machine slows all of them."""
    timings = {name: _Timing([], []) for name in loops}
    for turn in range(steps):
        for name in list(loops) if turn % 2 else list(reversed(loops)):
            before = time.perf_counter()
            loops[name]()()
            timings[name].paced.append(time.perf_counter() - before)
    block = max(1, steps // TURNS)
    for turn in range(steps // block):
        for name in list(loops) if turn % 2 else list(reversed(loops)):
            before = time.perf_counter()
            for _ in range(block):
                read = loops[name]()
            values = read()
            timings[name].free.append((time.perf_counter() - before) / block)
            timings[name].loss = values[0]
    return timings


def _p90(times: list[float]) -> float:
    return statistics.quantiles(times, n=10, method="inclusive")[-1] if len(times) > 1 else times[0]


def bench(config: BenchConfig, say: Any) -> list[Row]:
    """All rows that can be measured here; tells `say` why a row cannot. Raises `UserError` for a model that can't be."""
    check_model(config.model)
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
            rows += [Row(**row) for row in json.loads(result.read_text())]
    return rows


def measure_row(index: int, folder: str, result: str) -> None:
    """Measure the row of that number in this process."""
    from gpt2_xla.cli import from_dict
    from gpt2_xla.errors import run_main

    bench_config = from_dict(BenchConfig, json.loads((Path(folder) / "config.json").read_text()))
    config = list(row_configs(bench_config, Path(folder)))[index]
    bare = bench_config.bench.bare and isinstance(config, XlaPretrainConfig)
    work = functools.partial(measure, steps=bench_config.bench.steps, result=result, bare=bare)

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
        "| machine | precision | tokens/s | time, bare loop = 1 | step median | p90 | input wait | peak memory | compiles | compile time | MFU | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.machine,
            row.precision,
            f"{row.tokens_per_second:,.0f}",
            _cell(row.of_bare, "{:.2f}"),
            f"{row.step_median * 1e3:,.1f} ms",
            f"{row.step_p90 * 1e3:,.1f} ms",
            _cell(row.input_wait, "{:.2%}"),
            _cell(row.peak_memory, "{:,.0f} MiB", 1 / MIB),
            _cell(row.compiles, "{:.0f}"),
            _cell(row.compile_seconds, "{:.1f} s"),
            _cell(row.mfu, "{:.1%}"),
            f"{row.loss:.6f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, template: str, factor: float = 1.0) -> str:
    return template.format(value * factor) if value is not None else "–"
