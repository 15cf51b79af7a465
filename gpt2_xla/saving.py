"""Saving while training goes on, and taking a run's state back from a checkpoint."""

import math
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from gpt2_xla import checkpoint, checkpoint_parts, loading, optim
from gpt2_xla.checkpoint import SaveError
from gpt2_xla.checkpoint_files import save_number
from gpt2_xla.config import PretrainConfig, to_dict
from gpt2_xla.data.pretraining import TOKENIZER_FOLDER
from gpt2_xla.errors import UserError
from gpt2_xla.open_window import OpenWindow
from gpt2_xla.remote_store import StoreError
from gpt2_xla.shares import Share
from gpt2_xla.uploads import Uploads

if TYPE_CHECKING:
    from gpt2_xla.train import Run


@dataclass(frozen=True)
class Snapshot:
    """What one process writes of one moment of a run."""

    state: checkpoint.TrainerState
    weights: list[Share]
    optimizer: list[Share]
    end_of_text: int | None


class Saver:
    """Writes a run's checkpoints in a thread of its own: the loop waits only for the copy to host memory.

    One save is in flight at most; the copy of a finished one to --remote-dir is a thread's own matter (`Uploads`). A save or
    a copy that fails is a warning; with --strict-saving the error is raised by the next call of check() or save(), in the
    loop's thread. Every replica has a saver and calls it at the same steps; those that hold nothing to write do nothing.
    """

    def __init__(self, config: PretrainConfig, rank: int, writers: int) -> None:
        self._folder, self._keep = Path(config.run.checkpoints_dir), config.run.saved_checkpoint_limit
        self._rank, self._writers, self._strict = rank, writers, config.run.strict_saving
        url = config.run.remote_dir if rank == 0 else None
        self._uploads = Uploads(url, self._folder, self._keep, self._copy_failed) if url else None
        self._failure: SaveError | None = None  # of the last save
        self._copy_error: UserError | None = None  # with --strict-saving, of a copy: to be raised
        self._buffers: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})  # of weights and optimizer; reused
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._in_flight: Future[None] | None = None
        self._attempts = 0  # the same number in every process

    def save(self, run: "Run", valid_loss: float | None) -> None:
        """Copy the run's state to the host and begin to write it; first waits for the save before this one."""
        run.phases.mark("save", run.step)
        self.wait()
        run.ledger.sync()  # no checkpoint may know of a step that the ledger does not
        snapshot = Snapshot(
            state=trainer_state(run, valid_loss),
            weights=run.runtime.to_host(dict(run.model.named_parameters()), self._buffers[0]),
            optimizer=run.runtime.to_host(optim.named_state(run.model, run.optimizer), self._buffers[1]),
            end_of_text=run.data.manifest.end_of_text,
        )
        run.saved_step = run.step
        self._attempts += 1
        if self._rank < self._writers:
            self._in_flight = self._thread.submit(self._save, snapshot, self._attempts)

    def check(self) -> None:
        """With --strict-saving, raise the error of a save or copy that has failed meanwhile; never waits."""
        if self._copy_error is not None:
            raise self._copy_error
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in flight is on this machine's disk; with --strict-saving raises its SaveError."""
        pending, self._in_flight = self._in_flight, None
        if pending is not None:
            pending.result()

    def finish(self, run: "Run") -> None:
        """At the end of a run: its last checkpoint and its records must be here and at --remote-dir.

        Raises SaveError or StoreError, strict or not: a result that is lost is no success.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure
        newest = max(checkpoint.checkpoints(self._folder), key=save_number, default=None)
        if self._uploads is not None and newest is not None:
            self._uploads.offer(newest)
            self._uploads.wait(lambda: run.phases.mark("upload", run.step))  # hours, perhaps: that is no hang
            if failure := self._uploads.failure:
                advice = f"all is in {self._folder}; the same command copies it"
                raise StoreError([f"{mistake}; {advice}" for mistake in _named(failure).mistakes])

    def withdraw_after(self, run: "Run", step: int) -> None:
        """Delete the copies of checkpoints after `step`, which the run goes back to; no save may be in flight."""
        if self._uploads is not None:
            try:
                self._uploads.withdraw_after(step, lambda: run.phases.mark("upload", run.step))
            except StoreError as error:
                self._copy_failed(error)

    def close(self) -> None:
        """Let the save and the copy in flight end, whatever becomes of them, and end the threads."""
        self._thread.shutdown()
        if self._uploads is not None:
            self._uploads.close()

    def _save(self, snapshot: Snapshot, attempt: int) -> None:
        """Write, in the thread."""
        self._failure = None
        try:
            folder = self._write(snapshot, attempt)
        except (UserError, OSError) as error:
            mistakes = list(error.mistakes) if isinstance(error, UserError) else [f"could not save: {error}"]
            self._failure = SaveError(mistakes)
            if self._strict:
                raise self._failure from error
            _warn(self._failure)
            return
        if folder is not None and self._uploads is not None:
            self._uploads.offer(folder)

    def _copy_failed(self, error: StoreError) -> None:
        if self._strict:
            self._copy_error = _named(error)
        else:
            _warn(_named(error))

    def _write(self, snapshot: Snapshot, attempt: int) -> Path | None:
        """Write the checkpoint and prune old ones; its folder. None where this process writes but a part of it."""
        step = snapshot.state.step
        if self._rank > 0:
            part = checkpoint_parts.part_folder(self._folder, step, attempt, self._rank)
            try:
                checkpoint_parts.write_part(part, self._rank, snapshot.weights, snapshot.optimizer)
            except OSError as error:
                raise SaveError(f"could not save {part}: {error.strerror or error}") from error
            return None
        tokenizer_files = self._folder / TOKENIZER_FOLDER
        folder = checkpoint.save(
            self._folder,
            snapshot.state,
            snapshot.weights,
            snapshot.optimizer,
            end_of_text=snapshot.end_of_text,
            tokenizer_files=tokenizer_files if tokenizer_files.is_dir() else None,
            parts=[checkpoint_parts.part_folder(self._folder, step, attempt, rank) for rank in range(1, self._writers)],
        )
        checkpoint.prune(self._folder, self._keep, spare=self._uploads.in_use() if self._uploads else set())
        return folder


def _named(error: StoreError) -> StoreError:
    """The error with the flag that it is about."""
    return StoreError([f"--remote-dir {mistake}" for mistake in error.mistakes])


def _warn(error: UserError) -> None:
    sentence = "; ".join(error.mistakes)
    tqdm.write(f"warning: {sentence}; training goes on, the next save tries again", file=sys.stderr)


def trainer_state(run: "Run", valid_loss: float | None) -> checkpoint.TrainerState:
    """What a checkpoint records of this moment beside the tensors."""
    manifest = run.data.manifest
    return checkpoint.TrainerState(
        step=run.step,
        samples=run.samples,
        config=to_dict(run.config),
        valid_loss=valid_loss if valid_loss is not None and math.isfinite(valid_loss) else None,
        best_valid_loss=run.best_valid_loss if math.isfinite(run.best_valid_loss) else None,
        data_fingerprint=run.data.fingerprint,
        tokenizer=manifest.tokenizer,
        tokenizer_hash=manifest.tokenizer_hash,
        scaler=run.runtime.scaler_state(),
        wandb_id=run.metrics.wandb_id,
        recent_losses=run.recent_losses,
        open_window=run.open_window.saved(),
    )


def restore(run: "Run", source: Path) -> str | None:
    """Take weights, optimizer, scaler and position from a checkpoint, at the start or in mid-run; return its W&B run.

    Raises UserError, before anything is changed, for weights of another model.
    """
    state = checkpoint.read_state(source)
    run.data.check_tokenizer(state.tokenizer, state.tokenizer_hash)
    loading.load(run.model, source)
    checkpoint.load_optimizer(source, optim.named_state(run.model, run.optimizer))
    run.runtime.end_step()
    run.runtime.load_scaler_state(state.scaler)
    run.step, run.samples, run.saved_step = state.step, state.samples, state.step
    run.validated = state.valid_loss is not None
    run.recent_losses = state.recent_losses
    run.open_window = OpenWindow(**state.open_window)
    run.best_valid_loss = state.best_valid_loss if state.best_valid_loss is not None else math.inf
    same_folder = source.parent.resolve() == Path(run.config.run.checkpoints_dir).resolve()
    return state.wandb_id if same_folder else None  # a branch is a run of its own


def changed_order(run: "Run", source: Path) -> list[str]:
    """What differs from the checkpoint's run in the things that decide the batches to come."""
    state = checkpoint.read_state(source)
    saved, config = state.config, run.config
    pairs = [
        ("the training data", state.data_fingerprint, run.data.fingerprint),
        ("--seed", saved.get("run", {}).get("seed"), config.run.seed),
        ("--shuffle", saved.get("data", {}).get("shuffle"), config.data.shuffle),
    ]
    return [f"{name} is not the checkpoint's" for name, before, now in pairs if before is not None and before != now]
