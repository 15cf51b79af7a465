"""A run's course on the screen: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from gpt2_xla.config import PretrainConfig

INTERVAL = 10.0  # seconds between two lines of training, at least: a run of days leaves a log that can be read


def tell(text: str) -> None:
    """Print a line, above the bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()  # into a file Python would print it kilobytes later


def open_progress(config: PretrainConfig, step: int) -> "ProgressBar | ProgressLines":
    """The display of a run that begins after `step` steps, by what standard error is."""
    return ProgressBar(config, step) if sys.stderr.isatty() else ProgressLines(config)


class ProgressBar:
    """tqdm's bar with the last logged loss, tokens/s and MFU; validation results are lines above it."""

    def __init__(self, config: PretrainConfig, step: int) -> None:
        self._sizes, self._steps = config.batch_sizes, config.run.train_steps
        # Steps of different sizes take different times: then the bar and its estimate count sequences.
        self._counts_steps = len(self._sizes.stages) == 1
        self._bar = tqdm(
            total=self._position(self._steps),
            initial=self._position(step),
            unit="step" if self._counts_steps else "seq",
            dynamic_ncols=True,
            mininterval=0.5,
            smoothing=0.05,
        )

    def write(self, record: dict[str, Any]) -> None:
        _tell_event(record)
        if record["kind"] != "train":
            return
        shown = {"loss": f"{record['loss']:.4f}", "tokens/s": f"{record['tokens_per_second']:,.0f}"}
        if record.get("mfu") is not None:
            shown["MFU"] = f"{record['mfu']:.1%}"
        if record.get("compiles"):
            shown["compiles"] = f"{record['compiles']} in {record['compile_seconds']:.0f} s"
        self._bar.set_postfix(shown, refresh=False)

    def _position(self, step: int) -> int:
        """Of the bar, after `step` steps."""
        return step if self._counts_steps else self._sizes.before(step)

    def advance(self, step: int) -> None:
        if not self._counts_steps:
            self._bar.set_description_str(f"step {step} of {self._steps}", refresh=False)
        self._bar.update(self._position(step) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class ProgressLines:
    """A line for a training record, at most one every INTERVAL seconds; the first and the last record always have theirs."""

    def __init__(self, config: PretrainConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._sizes, self._steps, self._clock = config.batch_sizes, config.run.train_steps, clock
        self._start: tuple[int, float] | None = None  # step and time from which on the time left is estimated
        self._told: float | None = None  # when the last line was printed
        self._compiles = 0  # that were told
        self._held: str | None = None  # the newest record's line, not printed yet

    def write(self, record: dict[str, Any]) -> None:
        _tell_event(record)
        if record["kind"] == "rollback":
            self._start = None  # steps that are made twice are no measure
        if record["kind"] != "train":
            return
        now = self._clock()
        due = self._told is None or now >= self._told + INTERVAL or record["step"] == self._steps
        self._held = self._line(record, now)
        if due:
            self._compiles, self._told = record.get("compiles", 0), now
            self._print_held()

    def _line(self, record: dict[str, Any], now: float) -> str:
        step = record["step"]
        parts = [f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
        if record.get("mfu") is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if (programs := record.get("compiles", 0)) > self._compiles:
            parts.append(
                f"{programs} program{'s' if programs > 1 else ''} compiled in {record['compile_seconds']:.0f} s"
            )
        if self._start is None:  # the steps before took the time of compiling and starting up, too
            self._start = step, now
        elif step < self._steps:
            first, began = self._start
            done = self._sizes.before(step) - self._sizes.before(first)
            to_come = self._sizes.before(self._steps) - self._sizes.before(step)
            parts.append(f"{timedelta(seconds=round((now - began) * to_come / done))} left")
        return f"step {step} of {self._steps}: {', '.join(parts)}"

    def _print_held(self) -> None:
        if self._held is not None:
            tell(self._held)
        self._held = None

    def advance(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._print_held()


def _tell_event(record: dict[str, Any]) -> None:
    """Print what a validation found, or a sample."""
    if record["kind"] == "valid":
        best = ", the best so far" if record["best"] else ""
        loss = f"validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
        tell(f"step {record['step']}: {loss}{best}")
    elif record["kind"] == "sample":
        tell(f"step {record['step']} writes: {record['prompt']}{record['text']}")
