"""Faults of the steps themselves: too many skipped in a row, and spikes of the loss. Judged a log window at a time.

What is judged was reduced over the replicas on the device, so that each of them decides alone, and all decide alike.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2_xla import checkpoint, checkpoint_files
from gpt2_xla.bad_batches import write_bad_batch
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.runtime.compile_watch import CompileWatch
from gpt2_xla.saving import restore
from gpt2_xla.spikes import is_spike, remember
from gpt2_xla.training_log import TrainingLog, Window

if TYPE_CHECKING:
    from gpt2_xla.train import Run

MOST_ROLLBACKS = 3  # to one and the same checkpoint


class StepGuard:
    """Asked after every step. `verdict` says why the run has to end, once it has to."""

    def __init__(self, run: "Run", log: TrainingLog, watch: CompileWatch) -> None:
        self._run, self._log, self._watch = run, log, watch
        self._rollbacks: Counter[int] = Counter()  # by the step gone back to
        self._began = run.step  # of this course; steps before it may have had other batches than this configuration's
        self._bad_steps = range(0)
        self._bad_samples = 0  # where the first of the bad steps began
        self.verdict: str | None = None

    def rolled_back(self, last_step: int) -> bool:
        """Judge the windows that ended by `last_step`; whether the run now stands elsewhere, and needs other batches.

        All replicas must have read them: see `TrainingLog.windows`.
        """
        config, run = self._run.config.run, self._run
        for window in self._log.windows(last_step):
            if 0 < config.max_skipped_steps <= window.skipped_in_a_row:
                self._note_bad_steps(window)
            elif is_spike(window.loss, run.recent_losses, config.spike_factor):
                if self._roll_back(window):
                    return True
                continue
            run.recent_losses = remember(window.loss, run.recent_losses)
        return False

    def finish(self) -> None:
        """Call after the run has saved what there was to save: writes the bad batches and raises the verdict, on rank 0."""
        run = self._run
        if self.verdict is None or run.runtime.rank != 0:
            return
        if not self._bad_steps:
            raise UserError(self.verdict)
        folder, sizes = Path(run.config.run.checkpoints_dir), run.config.batch_sizes
        before = sizes.before(self._bad_steps[0] - 1)
        try:
            paths = [
                write_bad_batch(folder, run.data, step, self._bad_samples + sizes.before(step - 1) - before)
                for step in self._bad_steps
            ]
        except OSError as error:
            raise UserError(f"{self.verdict}; their batches could not be written: {error.strerror or error}") from error
        raise UserError(
            f"{self.verdict}; step {run.step} is saved, without them; look at their {len(paths)} batches with python "
            f"scripts/inspect_data.py {paths[0]}; the same command goes on behind them, perhaps with a lower --learning-rate"
        )

    def _note_bad_steps(self, window: Window) -> None:
        run, limit = self._run, self._run.config.run.max_skipped_steps
        before = max(window.step - limit, self._began)
        self._bad_steps = range(before + 1, window.step + 1)
        sizes = run.config.batch_sizes
        self._bad_samples = window.samples - (sizes.before(window.step) - sizes.before(before))
        run.open_window = run.open_window.forgiven()
        first = window.step - window.skipped_in_a_row + 1
        self.verdict = (
            f"the loss or the gradients of steps {first} to {window.step} were not finite, and --max-skipped-steps "
            f"allows fewer than {limit} in a row"
        )

    def _roll_back(self, window: Window) -> bool:
        """Go back before a window that spiked, with the data behind it."""
        run, first = self._run, window.step - window.steps
        folder, factor = Path(run.config.run.checkpoints_dir), run.config.run.spike_factor
        what = f"the mean loss of steps {first + 1} to {window.step} is {window.loss:.4f}, more than {factor:g} times the median before it"
        run.phases.mark("rollback", window.step)
        run.saver.wait()  # it may be the one to go back to
        step = from_rank_zero(run.runtime, lambda: _last_good_step(folder, first))
        self._watch.worked("looking back", window.step)
        if step < 0:
            run.metrics.say(
                f"warning: {what}, but there is no checkpoint up to step {first} to go back to; training goes on"
            )
            return False
        if self._rollbacks[step] == MOST_ROLLBACKS:
            self.verdict = (
                f"{what}, after {MOST_ROLLBACKS} rollbacks to step {step}; lower --learning-rate, raise --spike-factor, "
                f"or look at the data; step {step} is saved"
            )
        self._rollbacks[step] += 1
        run.saver.withdraw_after(run, step)  # first: a copy in flight still reads a folder
        run.phases.mark("rollback", window.step)
        if run.runtime.rank == 0:
            _delete_after(folder, step)
        # Last: killed before this line, the run resumes from `step`, or from a checkpoint that the ledger still counts.
        run.ledger.rollback(step, window.samples, {"spike_step": window.step, "loss": window.loss})
        restore(run, folder / f"step-{step:08d}")
        skipped, run.samples = window.samples - run.samples, window.samples
        self._began = run.step
        self._log.restart(run.open_window)
        self._watch.worked("going back", step)
        run.metrics.write(
            {"kind": "rollback", "step": window.step, "loss": window.loss, "to_step": step, "skipped_samples": skipped}
        )
        run.metrics.say(f"{what}: back to step {step}, {skipped:,} sequences are skipped")
        return True


def _last_good_step(folder: Path, last: int) -> int:
    """The newest step, up to `last`, of a checkpoint without problems; -1 if there is none."""
    steps = ((int(path.name.removeprefix("step-")), path) for path in checkpoint.checkpoints(folder))
    return next((step for step, path in steps if step <= last and not checkpoint.problems(path)), -1)


def _delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of a course that the run has left: --resume would take the newest of them."""
    for path in checkpoint.checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            checkpoint_files.delete_folder(path)


def from_rank_zero(runtime: Runtime, find: Callable[[], int]) -> int:
    """What `find` returns on rank 0, on every replica; the others do not call it. Waits for the device."""
    mine = torch.zeros(16)  # no scalar: XLA would compile its value in, and each replica have a program of its own
    if runtime.rank == 0:
        mine[0] = find() * runtime.world_size
    agreed = runtime.mean(mine.to(runtime.device))
    runtime.end_step()
    return round(runtime.fetch_later(agreed)()[0])
