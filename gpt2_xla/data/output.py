"""The folder that receives prepared splits. They are made in OUTPUT_DIR/.preparing and get their names by one rename each."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.shards import sync_folder
from gpt2_xla.errors import UserError

SPLITS = ("train", "valid")


@contextmanager
def work_folder(output_dir: Path) -> Iterator[Path]:
    """An empty folder OUTPUT_DIR/.preparing that no other process uses; gone afterwards. What a killed run left is deleted."""
    folder = output_dir / ".preparing"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
        except BlockingIOError as error:
            raise UserError(f"another command is preparing data in {output_dir}; wait for it or stop it") from error
        try:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def publish(output_dir: Path, work: Path) -> None:
    """Give the finished splits their names. A split that is there already must be the same, and stays."""
    for split in reversed(SPLITS):
        made, target = work / split, output_dir / split
        if not made.exists():
            continue
        if (target / manifests.FILE_NAME).exists():
            if manifests.read(target).fingerprint != manifests.read(made).fingerprint:
                raise UserError(
                    f"{target} holds other tokens than this command makes now; delete it to prepare it again"
                )
            continue
        made.rename(target)
    sync_folder(output_dir)


@contextmanager
def clear_os_errors(output_dir: Path) -> Iterator[None]:
    """OSErrors here come from writing: no permission, no space, a file in the way."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output-dir {output_dir}: can't write {error.filename or 'there'}: {error.strerror or error}; "
            "make room or choose another --output-dir"
        ) from error
