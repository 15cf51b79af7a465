"""The folder of a run: its configuration and tokenizer, and that no two runs write into it at the same time."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_xla import checkpoint_files, checkpoint_parts
from gpt2_xla.config import PretrainConfig, to_dict
from gpt2_xla.data.pretraining import TOKENIZER_FOLDER, PretrainingData
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError

PATIENCE = 30.0  # seconds that the processes of a run that was killed may take to be gone


@contextmanager
def own_run_folder(config: PretrainConfig, data: PretrainingData) -> Iterator[None]:
    """Prepare the run's folder and keep other runs out of it. Raises `UserError` if it is in use, or cannot be written."""
    folder = Path(config.run.checkpoints_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, folder)
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


def _lock(handle: int, folder: Path) -> None:
    """Lock the folder until its handle is closed, or the process gone; a file system without locks has none."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        time.sleep(0.2)
