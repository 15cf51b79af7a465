"""Training metrics between two log steps: summed on the device, fetched late, timed without waiting."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2_xla.config import PretrainConfig
from gpt2_xla.metrics import Metrics
from gpt2_xla.open_window import OpenWindow
from gpt2_xla.optim import not_finite
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.schedule import learning_rate


@dataclass(frozen=True)
class Window:
    """What the device said of the steps between two log steps; the same on every replica."""

    step: int  # the last one
    steps: int
    samples: int  # sequences consumed by then
    loss: float  # mean over the steps that were not skipped; NaN where all were
    skipped: int  # steps whose loss or gradients were not finite
    skipped_in_a_row: int  # up to and including the last one, also of windows before


@dataclass(frozen=True)
class _Pending:
    """A window whose sums are on their way to the host."""

    step: int  # the window's last step
    steps: int
    timed: int  # of these, those that this process has made
    samples: int  # sequences consumed by then
    arrival: Future[tuple[list[float], float]]  # the sums, and when they were there, by time.perf_counter()
    input_wait: float  # seconds


class TrainingLog:
    """Writes a record every --log-interval steps, one step late: by then the device has long computed the window."""

    def __init__(
        self,
        config: PretrainConfig,
        runtime: Runtime,
        metrics: Metrics,
        flops_per_token: float,
        epochs: Callable[[int], dict[str, float]],  # of each source, after that many samples
        begun: OpenWindow,
    ) -> None:
        self._config, self._runtime, self._metrics = config, runtime, metrics
        self._flops_per_token = flops_per_token
        self._epochs = epochs
        # Copied, not computed, and never written to: a sum that starts from it is one and the same graph every time.
        self._zero = torch.zeros(3).to(runtime.device)
        self._reader = ThreadPoolExecutor(1, "log reader")
        self.restart(begun)

    def restart(self, begun: OpenWindow) -> None:
        """Forget all steps since the last window, and go on with the window `begun`: the run goes on elsewhere."""
        self._open = begun
        # Copied, like `_zero`: the first step's graph is that of the others.
        sums = [begun.loss, begun.grad_norm, begun.skipped]
        self._sums = torch.tensor(sums).to(self._runtime.device)
        self._skipped_in_a_row = torch.tensor([begun.skipped_in_a_row]).to(self._runtime.device)
        self._report = self._zero  # both, after the last step; what it is now nobody reads
        self._steps, self._timed = begun.steps, 0  # of the window; those of them that this process has made
        self._input_wait = 0.0  # seconds
        self._pending: _Pending | None = None
        self._read: list[Window] = []
        self._started = time.perf_counter()

    def next_batch(self, batches: Iterator[Tensor]) -> Tensor:
        """The next batch; the time the loop waited for it counts as input wait."""
        before = time.perf_counter()
        batch = next(batches)
        self._input_wait += time.perf_counter() - before
        return batch

    def add(self, values: Tensor) -> None:
        """Add a step's [loss, gradient norm], unless the step was skipped; queued with the step's work."""
        skipped = not_finite(values).unsqueeze(0)
        counted = torch.where(skipped > 0, torch.zeros_like(values), values)  # a product with 0 would still be NaN
        self._sums = self._sums + torch.cat([counted, skipped])
        self._skipped_in_a_row = (self._skipped_in_a_row + skipped) * skipped
        self._report = torch.cat([self._sums, self._skipped_in_a_row])

    def step_done(self, step: int, samples: int) -> None:
        """Call when optimizer step number `step` (counted from 1) has been launched, `samples` sequences into the run."""
        self._write_pending()
        self._steps, self._timed = self._steps + 1, self._timed + 1
        self._metrics.advance(step)
        if step % self._config.logging.log_interval == 0 or step == self._config.run.train_steps:
            read = self._runtime.fetch_later(self._report)
            # A thread waits for them, and so knows when the last step's work was done: this one is launching the next by then.
            arrival = self._reader.submit(lambda: (read(), time.perf_counter()))
            self._pending = _Pending(step, self._steps, self._timed, samples, arrival, self._input_wait)
            self._sums, self._steps, self._timed, self._input_wait = self._zero, 0, 0, 0.0

    def windows(self, last_step: int) -> list[Window]:
        """The windows that ended by `last_step` and were not asked for yet.

        All replicas have read a window when they have launched the step after it, or called pause(). Some read it earlier,
        so that decisions which all shall take at once must ask for no later step than that.
        """
        found = [window for window in self._read if window.step <= last_step]
        self._read = self._read[len(found) :]
        return found

    def pause(self) -> OpenWindow:
        """Write what is pending, before work that is no training (validation, saving); the steps since the last window."""
        self._write_pending()
        if self._timed:  # wait for steps since the last window: they are no part of the pause
            self._open = OpenWindow(self._steps, *self._runtime.fetch_later(self._report)())
        self._paused = time.perf_counter()
        return self._open

    def resume(self) -> None:
        """Take the time since pause() out of the speed."""
        self._started += time.perf_counter() - self._paused

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        window, self._pending = self._pending, None
        (loss, norm, skipped, in_a_row), ended = window.arrival.result()
        good = window.steps - int(skipped)
        loss, norm = (loss / good, norm / good) if good else (math.nan, math.nan)
        self._read.append(Window(window.step, window.steps, window.samples, loss, int(skipped), int(in_a_row)))
        self._open = OpenWindow(skipped_in_a_row=in_a_row)
        seconds, self._started = ended - self._started, ended
        config = self._config
        sizes = config.batch_sizes
        sequences = sizes.before(window.step) - sizes.before(window.step - window.timed)
        tokens_per_second = sequences * config.model.seq_length / seconds
        peak = self._runtime.peak_flops()
        compiles = self._runtime.compile_stats()
        self._metrics.write(
            {
                "kind": "train",
                "step": window.step,
                "loss": loss,
                "grad_norm": norm,
                "skipped_steps": int(skipped),
                "learning_rate": learning_rate(window.step - 1, config.optim, config.run.train_steps),
                "tokens": window.samples * config.model.seq_length,
                "tokens_per_second": tokens_per_second,
                "step_seconds": seconds / window.timed,
                "input_wait": window.input_wait / seconds,
                "mfu": tokens_per_second * self._flops_per_token / peak if peak else None,
                "compiles": compiles.count,
                "compile_seconds": compiles.seconds,
                "executions": compiles.executions,
                "host_copies": compiles.fetches,
                "peak_memory_bytes": self._runtime.peak_memory(),
                **{f"epochs/{name}": epochs for name, epochs in self._epochs(window.samples).items()},
            }
        )
