"""--profile-steps: which steps are recorded, and when the recording starts and ends. How is the runtime's affair."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from gpt2_xla.config import PretrainConfig
from gpt2_xla.metrics import Metrics
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.training_log import TrainingLog

FOLDER = "profile"  # in the run folder


def profile_range(text: str) -> tuple[int, int] | None:
    """First and last step of FIRST:LAST, counted from 1; None if the text is no such thing."""
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    return (int(match[1]), int(match[2])) if match else None


def profile_mistakes(config: PretrainConfig, done: int = 0) -> list[str]:
    """What is wrong with --profile-steps in a run that begins after step `done`."""
    text, last_step = config.runtime.profile_steps, config.run.train_steps
    if text is None:
        return []
    if config.run.do_test:
        return ["--profile-steps records training steps, but --do-test trains none; leave it out"]
    steps = profile_range(text)
    if steps is None:
        return [f"--profile-steps {text} is not FIRST:LAST, two step numbers, as in 10:15"]
    first, last = steps
    if first > last:
        return [f"--profile-steps {text} ends before it begins; did you mean {last}:{first}?"]
    if done >= last_step:
        return [
            f"--profile-steps {text} records steps that are trained, but all {done} steps of this run are done; leave it out"
        ]
    if first <= done or last > last_step:
        return [f"--profile-steps {text} is not within the steps that this run trains, {done + 1} to {last_step}"]
    return []


class StepProfile:
    """Records the steps of --profile-steps on rank 0; where there are none, a few comparisons a step.

    The other ranks run the same program at the same time; their part shows in rank 0's collectives. A profile that can't
    be written is no reason to end a run: that is said, and training goes on.
    """

    def __init__(self, config: PretrainConfig, runtime: Runtime, log: TrainingLog, metrics: Metrics) -> None:
        steps = profile_range(config.runtime.profile_steps or "")
        self._first, self._last = steps if steps and runtime.rank == 0 else (0, 0)  # steps count from 1
        self._folder = Path(config.run.checkpoints_dir) / FOLDER
        self._runtime, self._log, self._metrics = runtime, log, metrics
        self._recording, self._step_mark = ExitStack(), ExitStack()
        self._how_to_open: str | None = None  # known while recording
        self._newest = 0

    def before_step(self, step: int) -> None:
        """Call before optimizer step number `step`, counted from 1."""
        if step == self._first:
            name = f"steps-{self._first}-{self._last}"
            with self._paused():
                self._how_to_open = self._recording.enter_context(self._runtime.profile(self._folder, name))
        if self._how_to_open is not None:
            self._step_mark.enter_context(torch.profiler.record_function(f"step {step}"))
            self._newest = step

    def after_step(self, step: int) -> None:
        """Call when optimizer step number `step` has been launched."""
        if self._how_to_open is not None:
            self._step_mark.close()
            if step == self._last:
                self.close()

    def close(self) -> None:
        """Write what was recorded so far, if anything is being recorded."""
        if self._how_to_open is None:
            return
        how_to_open, self._how_to_open = self._how_to_open, None
        self._step_mark.close()
        with self._paused():
            self._recording.close()
            self._metrics.say(f"profile of steps {self._first} to {self._newest} in {self._folder}: {how_to_open}")

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Starting and writing a profile takes seconds that are no training; failing at it is told, not raised."""
        try:
            self._log.pause()
            yield
        except (OSError, RuntimeError) as error:
            self._metrics.say(f"warning: no profile in {self._folder}: {error}")
        self._log.resume()
