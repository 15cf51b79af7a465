"""Training metrics between two log steps: summed on the device, fetched late, timed without waiting."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2_xla.config import PretrainConfig
from gpt2_xla.metrics import Metrics
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.schedule import learning_rate


@dataclass(frozen=True)
class _Pending:
    """A window whose sums are on their way to the host."""

    step: int  # the window's last step
    steps: int
    samples: int  # sequences consumed by then
    read: Callable[[], list[float]]
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
    ) -> None:
        self._config, self._runtime, self._metrics = config, runtime, metrics
        self._flops_per_token = flops_per_token
        self._epochs = epochs
        # Copied, not computed, and never written to: a sum that starts from it is one and the same graph every time.
        self._zero = torch.zeros(2).to(runtime.device)
        self._sum, self._steps, self._input_wait = self._zero, 0, 0.0
        self._pending: _Pending | None = None
        self._started = time.perf_counter()

    def next_batch(self, batches: Iterator[Tensor]) -> Tensor:
        """The next batch; the time the loop waited for it counts as input wait."""
        before = time.perf_counter()
        batch = next(batches)
        self._input_wait += time.perf_counter() - before
        return batch

    def add(self, values: Tensor) -> None:
        """Add a step's [loss, gradient norm]; queued with the step's work."""
        self._sum = self._sum + values

    def step_done(self, step: int, samples: int) -> None:
        """Call when optimizer step number `step` (counted from 1) has been launched, `samples` sequences into the run."""
        self._write_pending()
        self._steps += 1
        self._metrics.advance(step)
        if step % self._config.logging.log_interval == 0 or step == self._config.run.train_steps:
            read = self._runtime.fetch_later(self._sum)
            self._pending = _Pending(step, self._steps, samples, read, self._input_wait)
            self._sum, self._steps, self._input_wait = self._zero, 0, 0.0

    def pause(self) -> None:
        """Write what is pending, before work that is no training (validation, saving)."""
        self._write_pending()
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Take the time since pause() out of the speed."""
        self._started += time.perf_counter() - self._paused

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        window, self._pending = self._pending, None
        loss, norm = (total / window.steps for total in window.read())
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        config = self._config
        tokens_per_second = window.steps * config.tokens_per_step / seconds
        peak = self._runtime.peak_flops()
        compiles = self._runtime.compile_stats()
        self._metrics.write(
            {
                "kind": "train",
                "step": window.step,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": learning_rate(window.step - 1, config.optim, config.run.train_steps),
                "tokens": window.samples * config.model.seq_length,
                "tokens_per_second": tokens_per_second,
                "step_seconds": seconds / window.steps,
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
