"""The times that a record tells, on a clock that only the simulated host and device move on."""

from types import SimpleNamespace

import pytest
import torch

from gpt2_xla import training_log
from gpt2_xla.config import DataConfig, LoggingConfig, PretrainConfig, RunConfig
from gpt2_xla.metrics import Metrics
from gpt2_xla.open_window import OpenWindow
from gpt2_xla.runtime.base import CompileStats

STEP, HOST = 0.100, 0.004  # seconds of a step's work, and of launching it


class Machine:
    """A host and a device; also what the log asks of a `Runtime`, and the thread in which the log waits for the device."""

    def __init__(self, kind: str) -> None:
        self.kind, self.device = kind, torch.device("cpu")
        self.now, self.done = 0.0, 0.0  # the host's clock; when the device has done what was launched
        self.arrived: float | None = None  # the clock of the thread that waits, while it runs

    def launch(self) -> None:
        self.now += HOST
        if self.kind == "launch waits for the step before":
            self.now = max(self.now, self.done)
        self.done = max(self.now, self.done) + STEP
        if self.kind == "launch works":
            self.now = self.done

    def clock(self) -> float:
        return self.now if self.arrived is None else self.arrived

    def fetch_later(self, value):
        done = self.done

        def read():
            if self.arrived is None:
                self.now = max(self.now, done)
            else:
                self.arrived = max(self.arrived, done)
            return value.tolist()

        return read

    def submit(self, work):
        self.arrived = self.now
        result, arrived, self.arrived = work(), self.arrived, None

        def wait():
            self.now = max(self.now, arrived or 0.0)
            return result

        return SimpleNamespace(result=wait)

    def peak_flops(self) -> None:
        return None

    def peak_memory(self) -> int:
        return 0

    def compile_stats(self) -> CompileStats:
        return CompileStats()


@pytest.mark.parametrize("kind", ["launch works", "launch waits for the step before", "device works behind"])
@pytest.mark.parametrize("pause_every", [100, 5, 3])
def test_every_window_is_told_the_speed_of_its_own_steps(kind, pause_every, monkeypatch):
    machine, written = Machine(kind), []
    monkeypatch.setattr(training_log, "time", SimpleNamespace(perf_counter=machine.clock))
    monkeypatch.setattr(training_log, "ThreadPoolExecutor", lambda *_: machine)
    config = PretrainConfig(
        data=DataConfig(train_batch_size=4, gradient_accum_step=1),
        run=RunConfig(train_steps=23),
        logging=LoggingConfig(log_interval=5),
    )
    sink = SimpleNamespace(write=written.append, advance=lambda step: None)
    log = training_log.TrainingLog(config, machine, Metrics([sink]), 1.0, lambda samples: {}, OpenWindow())
    for step in range(1, 24):
        machine.launch()
        log.add(torch.ones(2))
        log.step_done(step, step)
        if step % pause_every == 0:
            log.pause()
            machine.now += 7.0  # a validation
            log.resume()
    log.pause()
    assert [record["step"] for record in written] == [5, 10, 15, 20, 23]
    seconds = [record["step_seconds"] for record in written]
    if kind == "launch works":
        assert seconds == pytest.approx([STEP + HOST] * 5, rel=1e-6)
    else:  # a device that has nothing queued, after a pause, waits for a launch
        assert all(STEP * 0.999 < each <= STEP + 2 * HOST / 3 + 1e-6 for each in seconds)
