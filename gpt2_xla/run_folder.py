"""The folder of a run: its configuration and tokenizer, and that no two runs write into it at the same time."""

import errno
import fcntl
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gpt2_xla import checkpoint, checkpoint_files, checkpoint_parts
from gpt2_xla.config import PretrainConfig, to_dict
from gpt2_xla.data.pretraining import TOKENIZER_FOLDER, PretrainingData
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError

PATIENCE = 30.0  # seconds that the processes of a run that was killed may take to be gone


def await_others(folder: Path, say: Callable[[str], None]) -> None:
    """Return when no run holds the folder, or there is no such folder. Raises `UserError` if one still does after PATIENCE.

    All processes of a command call it before they choose where to begin: what a run is about to save counts.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # one that cannot be read is told of by who writes there
        return
    try:
        _lock(handle, folder, fcntl.LOCK_SH, say)  # shared: commands that only look don't wait for each other
    finally:
        os.close(handle)


def contents(folder: Path) -> dict[str, int]:
    """The checkpoints of a run folder, good and bad, each with its number in the order in which they were written."""
    checkpoint_files.recover(folder)
    return {path.name: checkpoint_files.save_number(path) for path in checkpoint.checkpoints(folder)}


@contextmanager
def own_run_folder(
    config: PretrainConfig, data: PretrainingData, seen: Mapping[str, int] | None = None
) -> Iterator[None]:
    """Prepare the run's folder and keep other runs out of it.

    `seen` is what `contents` told when the command chose where to begin. Raises `UserError` if the folder is in use, cannot
    be written, or holds other checkpoints by now: a run that was faster has written them, and they would be overwritten.
    """
    folder = Path(config.run.checkpoints_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, folder, fcntl.LOCK_EX, lambda text: print(text, file=sys.stderr))
            if seen is not None and contents(folder) != seen:
                raise UserError(
                    f"another run has written to --checkpoints-dir {folder} since this command chose where to begin; "
                    "give the command again to continue from what is there now"
                )
            with atomic_write(folder / "config.json") as file:  # a full disk must not empty the one that is there
                file.write((json.dumps(to_dict(config), indent=2) + "\n").encode())
            data.save_tokenizer(folder / TOKENIZER_FOLDER)
            checkpoint_parts.remove_all(folder)
            checkpoint_files.remove_leftovers(folder, "step-*")  # here too: a finished run saves no more
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        raise UserError(f"--checkpoints-dir {folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, kind: int, say: Callable[[str], None]) -> None:
    """Lock the folder until its handle is closed, or the process gone; a file system without locks has none."""
    until = time.monotonic() + PATIENCE
    for attempt in itertools.count():
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return
        else:
            return
        if time.monotonic() > until:
            raise UserError(
                f"--checkpoints-dir {folder} is in use by another run on this machine; wait for its end, stop it, or "
                "choose another folder"
            )
        if attempt == 1:  # the first may have met a command that only looks
            say(f"waiting for the run that holds {folder}, {PATIENCE:g} s at most")
        time.sleep(0.2)
