"""What a run tells: one Metrics object, and the sinks that it writes to (screen, JSONL, W&B)."""

import contextlib
import html
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from gpt2_xla.config import LoggingConfig, PretrainConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.progress import open_progress, tell

Record = dict[str, Any]


class Sink(Protocol):
    """Takes records {"kind": "train" | "valid" | "rollback" | "sample", "step": …, name: number or text}."""

    def write(self, record: Record) -> None:
        """Take one record; must not raise for want of disk or network."""
        ...

    def advance(self, step: int) -> None:
        """Step `step` was queued; called each step, so it must be cheap and must not touch the device."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class Metrics:
    """Spreads records over its sinks. With none (other ranks, tests) it is the null object."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def write(self, record: Record) -> None:
        """Give one record to every sink."""
        for sink in self.sinks:
            sink.write(record)

    def advance(self, step: int) -> None:
        """Tell every sink that a step was queued."""
        for sink in self.sinks:
            sink.advance(step)

    def say(self, text: str) -> None:
        """Print a line of text beside the progress."""
        if self.sinks:
            tell(text)

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()

    @property
    def wandb_id(self) -> str | None:
        """The W&B run's id, for the checkpoint; None without W&B."""
        return next((sink.run_id for sink in self.sinks if isinstance(sink, WandbSink)), None)


def open_metrics(config: PretrainConfig, step: int, rank: int, wandb_id: str | None = None) -> Metrics:
    """The sinks that the configuration asks for, on rank 0; none elsewhere.

    Raises `UserError` if the run folder cannot be written or W&B does not start.
    """
    if rank != 0:
        return Metrics([])
    folder = Path(config.run.checkpoints_dir)
    sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl")]
    if config.logging.wandb_logging:
        sinks.append(WandbSink(config, folder, config.logging.wandb_resume_id or wandb_id))
    return Metrics([*sinks, open_progress(config, step)])  # last: nothing else may write on its line


class JsonlSink:
    """One JSON object a line, appended: a resumed run continues the file."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("ab+")
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":  # a crash cut the last line short; the next record must not join it
                    self._file.write(b"\n")
        except OSError as error:
            raise UserError(f"--checkpoints-dir: {path} cannot be written: {error.strerror}") from error

    def write(self, record: Record) -> None:
        # NaN is not JSON; a diverged loss becomes null rather than a line that no reader takes.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write((json.dumps(finite | {"time": round(time.time(), 3)}) + "\n").encode())
            self._file.flush()
        except OSError as error:
            tqdm.write(f"warning: {self._file.name}: {error.strerror}; training goes on", file=sys.stderr)

    def advance(self, step: int) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was told by write()
            self._file.close()


class WandbSink:
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run folder."""

    def __init__(self, config: PretrainConfig, folder: Path, run_id: str | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb-logging needs W&B: pip install wandb -c constraints.txt") from error
        log: LoggingConfig = config.logging
        self._interval = log.wandb_logging_interval or log.log_interval
        try:
            self._run = wandb.init(
                project=log.wandb_project,
                name=log.wandb_name or folder.name,
                tags=list(log.wandb_tags),
                notes=log.wandb_notes,
                id=run_id,
                resume="allow" if run_id else None,
                dir=folder,
                config=to_dict(config),
            )
        except wandb.Error as error:  # no API key, no network
            reason = str(error).splitlines()[0]
            raise UserError(f"--wandb-logging: {reason} (WANDB_MODE=offline logs without an account)") from error
        # W&B's own count of steps never goes back, as a run does that rolls back or resumes from an older checkpoint.
        self._run.define_metric("*", step_metric="step")
        self._last = config.run.train_steps
        self.run_id: str = self._run.id
        self._as_text = lambda text: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)

    def write(self, record: Record) -> None:
        step = record["step"]
        if record["kind"] == "sample":
            self._run.log({"sample/text": self._as_text(record["prompt"] + record["text"]), "step": step})
        elif record["kind"] != "train" or step % self._interval == 0 or step == self._last:
            numbers = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
            self._run.log(numbers | {"step": step})

    def advance(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
