"""A loop's process: `python -m gpt2_xla.bench.child FOLDER RUNTIME SEAT`. It warms up, then trains a turn whenever it is asked to.

Our loop is the program's own, `train()`, with its log, ledger and guards: it stops for the others in a metrics sink, which
hears of every step.
"""

import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gpt2_xla.bench.breakdown import Breakdown
from gpt2_xla.bench.contenders import WARMUP_STEPS, Contender, Seat, seats
from gpt2_xla.bench.link import Link
from gpt2_xla.bench_config import BenchConfig, BenchOptions
from gpt2_xla.cli import from_dict
from gpt2_xla.config import PretrainConfig, TorchPretrainConfig, XlaPretrainConfig
from gpt2_xla.errors import run_main
from gpt2_xla.runtime.base import CompileStats, Runtime
from gpt2_xla.runtime.orphans import die_with

if TYPE_CHECKING:
    from gpt2_xla.train import Run

FINISH = "finish"


class BareLoop(Protocol):
    """What ours is held against."""

    loss: float  # the last one known

    def run(self, steps: int) -> None:
        """Train that many steps, and wait for the device."""
        ...


class Finished(Exception):
    """All turns are taken: training ends without what a run does at its end."""


class TurnSink:
    """Takes our loop's turns. Rank 0 is asked for them, over the link; the others go on when it does."""

    def __init__(
        self,
        run: "Run",
        seat: Seat,
        link: Link | None,
        options: BenchOptions,
        others: dict[str, BareLoop],
        compiled: CompileStats,  # in this process before ours began
    ) -> None:
        self._run, self._link, self._options, self._others, self._compiled = run, link, options, others, compiled
        self._name, self._all_turns = seat.contenders[0].name, options.turns + seat.profiled_turns(options)
        self._weight = min(run.model.parameters(), key=torch.Tensor.numel)
        self._started = 0.0
        self._breakdown = Breakdown(run)
        self._loss = math.nan  # of the last window of the log
        self.seen: dict[str, Any] = {}

    def write(self, record: dict[str, Any]) -> None:
        self._loss = record["loss"] if record["kind"] == "train" else self._loss

    def advance(self, step: int) -> None:
        turns, rest = divmod(step - WARMUP_STEPS, self._options.steps)
        if turns < 0 or rest:
            return
        self._run.runtime.fetch_later(self._weight.detach())()  # as the last step left it: its work is done then
        seconds = time.perf_counter() - self._started
        if turns > self._options.turns:
            self.seen["parts"] = self._breakdown.finish(self._options.steps)
        elif turns == self._options.turns:  # before the profiler takes memory, too
            now = self._run.runtime.compile_stats()
            own = CompileStats(now.count - self._compiled.count, now.seconds - self._compiled.seconds)
            self.seen = seen(self._run.runtime, self._loss, own)
        if self._link is not None and turns > 0:
            self._link.send(seconds=seconds)
        elif self._link is not None:
            self._link.send(warm=[self._name, *self._others])
        if turns == self._all_turns:
            serve(self._link, FINISH, self._others, self._options.steps)
            raise Finished
        serve(self._link, self._name, self._others, self._options.steps)
        self._run.runtime.agree_on(step)
        if turns == self._options.turns:
            self._breakdown.start()
        self._started = time.perf_counter()

    def close(self) -> None:
        pass


def serve(link: Link | None, awaited: str, loops: dict[str, BareLoop], steps: int) -> None:
    """Let the bare loops of this process train when they are asked to, until it is time for what is awaited."""
    while link is not None and (asked := link.receive()["ask"]) != awaited:
        started = time.perf_counter()
        loops[asked].run(steps)
        link.send(seconds=time.perf_counter() - started)


def train_ours(
    config: PretrainConfig, runtime: Runtime, seat: Seat, options: BenchOptions, link: Link | None
) -> dict[str, Any]:
    """Train our loop, and the bare one that shares its process, as asked; what was seen of each."""
    from gpt2_xla.data.pretraining import PretrainingData
    from gpt2_xla.metrics import open_metrics
    from gpt2_xla.train import start_run, train

    Path(config.run.checkpoints_dir).mkdir(exist_ok=True)
    data = PretrainingData.open(config, runtime.rank, runtime.world_size)
    others: dict[str, BareLoop] = {}
    for bare in seat.contenders[1:] if runtime.world_size == 1 else ():  # which know one device
        from gpt2_xla.runtime.bare_xla_loop import BareXlaLoop

        others[bare.name] = BareXlaLoop(config, data.training(0, config.run.train_steps))
        others[bare.name].run(WARMUP_STEPS)
    compiled = runtime.compile_stats()  # for the others
    run, _ = start_run(config, runtime, data)
    sink = TurnSink(run, seat, link, options, others, compiled)
    run.metrics = open_metrics(config, 0, runtime.rank)
    run.metrics.sinks.append(sink)
    try:
        train(run)
    except Finished:
        pass
    finally:
        run.saver.close()
        run.ledger.close()
        run.metrics.close()
    facts = {seat.contenders[0].name: sink.seen, **{name: seen(runtime, loop.loss) for name, loop in others.items()}}
    if others:  # nobody knows whose the memory was
        facts = {name: one | {"peak_memory": None} for name, one in facts.items()}
    return facts


def train_bare(contender: Contender, options: BenchOptions, link: Link) -> dict[str, Any]:
    """Train a bare torch loop as asked; what was seen of it."""
    from gpt2_xla.runtime.bare_torch_loop import BareTorchLoop
    from gpt2_xla.runtime.torch_runtime import TorchRuntime

    assert isinstance(contender.config, TorchPretrainConfig)
    runtime = TorchRuntime(contender.config.runtime)  # names the device and measures its memory; the loop is without it
    loop = BareTorchLoop(contender.config, runtime.device, contender.compiled)
    loop.run(WARMUP_STEPS)
    link.send(warm=[contender.name])
    serve(link, FINISH, {contender.name: loop}, options.steps)
    return {contender.name: seen(runtime, loop.loss)}


def seen(runtime: Runtime, loss: float, compiles: CompileStats | None = None) -> dict[str, Any]:
    """What this process tells of a loop at the end."""
    return {
        "machine": runtime.describe(),
        "peak_flops": runtime.peak_flops(),
        "peak_memory": runtime.peak_memory(),
        "compiles": compiles.count if compiles else None,
        "compile_seconds": compiles.seconds if compiles else None,
        "loss": loss,
    }


def work(config: PretrainConfig, runtime: Runtime, seat: Seat, options: BenchOptions, socket: Path) -> None:
    """What a replica does for our loop."""
    link = Link.connect(socket) if runtime.rank == 0 else None
    facts = train_ours(config, runtime, seat, options, link)
    if link is not None:
        link.send(seen=facts)
        link.close()


def main(folder: Path, name: str, number: int) -> None:
    """Train what that seat holds."""
    die_with(os.getppid())
    bench = from_dict(BenchConfig, json.loads((folder / "config.json").read_text()))
    seat = seats(bench, folder)[name][number]
    first, socket = seat.contenders[0], folder / f"{name}-{number}"
    if not first.is_ours:
        link = Link.connect(socket)
        link.send(seen=train_bare(first, bench.bench, link))
        link.close()
    elif isinstance(first.config, XlaPretrainConfig):
        from gpt2_xla.runtime.xla_launch import launch

        launch(first.config, functools.partial(work, seat=seat, options=bench.bench, socket=socket))
    else:
        from gpt2_xla.runtime.torch_runtime import TorchRuntime

        assert isinstance(first.config, TorchPretrainConfig)
        runtime = TorchRuntime(first.config.runtime)
        try:
            work(first.config, runtime, seat, bench.bench, socket)
        finally:
            runtime.close()


if __name__ == "__main__":
    from gpt2_xla.bench import child  # by its name, as replicas' processes know it

    sys.exit(run_main(lambda: child.main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
