"""The times that a record tells, on a clock that only the simulated host and device move on."""

from types import SimpleNamespace

import pytest
import torch

from gpt2_xla import training_log
from gpt2_xla.config import DataConfig, LoggingConfig, PretrainConfig, RunConfig
from gpt2_xla.metrics import Metrics
from gpt2_xla.runtime.base import CompileStats

STEP, HOST = 0.100, 0.004  # seconds of a step's work, and of launching it


class Machine:
    """A host with a device that works behind it, or at once; also what the log asks of a `Runtime`."""

    def __init__(self, works_behind: bool) -> None:
        self.works_behind, self.now, self.done, self.device = works_behind, 0.0, 0.0, torch.device("cpu")

    def launch(self) -> None:
        self.now += HOST
        self.done = max(self.now, self.done) + STEP
        self.now = self.now if self.works_behind else self.done

    def fetch_later(self, value):
        done = self.done

        def read():
            self.now = max(self.now, done)
            return value.tolist()

        return read

    def peak_flops(self) -> None:
        return None

    def peak_memory(self) -> int:
        return 0

    def compile_stats(self) -> CompileStats:
        return CompileStats()


@pytest.mark.parametrize("works_behind", [False, True], ids=["at once", "behind the host"])
@pytest.mark.parametrize("pause_every", [100, 5, 3])
def test_every_window_is_told_the_speed_of_its_own_steps(works_behind, pause_every, monkeypatch):
    machine, written = Machine(works_behind), []
    monkeypatch.setattr(training_log, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    config = PretrainConfig(
        data=DataConfig(train_batch_size=4, gradient_accum_step=1),
        run=RunConfig(train_steps=23),
        logging=LoggingConfig(log_interval=5),
    )
    sink = SimpleNamespace(write=written.append, advance=lambda step: None)
    log = training_log.TrainingLog(config, machine, Metrics([sink]), 1.0, lambda samples: {})
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
    step_seconds = STEP if works_behind else STEP + HOST
    # Behind the host, the device waits for the launch of the first step after a pause.
    tolerance = 0.03 if works_behind else 1e-6
    assert [record["step_seconds"] for record in written] == pytest.approx([step_seconds] * 5, rel=tolerance)
