"""A checkpoint that several processes write: each leaves its part in a hidden folder, rank 0 takes them in and completes it.

They meet in the file system alone, so that a background thread needs no collective: a part appears under its name when it is
whole, with a record of its own. Its name holds the number of the save within the run's process, the same in every process,
so that a part that an earlier attempt left is never taken for one of this save.
"""

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2_xla import checkpoint_files as files
from gpt2_xla.shares import Share, read_shares, share_files

PATIENCE = 600.0  # seconds that rank 0 waits for the parts: a process that died ends the run long before
WEIGHTS, OPTIMIZER = "weights-{:05d}-{:03d}.safetensors", "trainer_state/optimizer-{:05d}-{:03d}.safetensors"


def part_folder(run_dir: Path, step: int, attempt: int, rank: int) -> Path:
    """Where process `rank` leaves its part of the run's save number `attempt`."""
    return run_dir / f".step-{step:08d}.save-{attempt}.part-{rank}"


def write_part(folder: Path, rank: int, weights: Sequence[Share], optimizer: Sequence[Share]) -> None:
    """Write what a process other than rank 0 holds; raises OSError."""

    def fill(new: files.NewFolder) -> None:
        write_shares(new, WEIGHTS, rank, weights)
        write_shares(new, OPTIMIZER, rank, optimizer)

    try:
        files.write_folder(folder, 0, fill)
    except OSError as error:
        with contextlib.suppress(OSError):
            _failure(folder).write_text(error.strerror or f"{error}")  # so that rank 0 need not wait
        raise


def _failure(part: Path) -> Path:
    return part.with_name(f"{part.name}.failed")


def write_shares(new: files.NewFolder, name: str, rank: int, shares: Sequence[Share]) -> None:
    """Write one process's shares, in as many files as it takes."""
    for index, (entries, metadata) in enumerate(share_files(shares)):
        new.write_tensors(name.format(rank, index), entries, metadata)


def take_in(new: files.NewFolder, parts: Sequence[Path]) -> list[Share]:
    """Wait for the parts, move the optimizer's files into the new checkpoint, return the weights, memory-mapped."""
    deadline = time.monotonic() + PATIENCE
    weights: list[Share] = []
    for part in parts:
        while not part.is_dir():
            if _failure(part).exists():
                raise OSError(None, f"the process that writes {part.name} failed: {_failure(part).read_text()}")
            if time.monotonic() > deadline:
                raise TimeoutError(None, f"the process that writes {part.name} did not within {PATIENCE:.0f} s")
            time.sleep(0.02)
        for name, entry in files.recorded(part).items():
            if name.startswith("trainer_state/"):
                new.adopt(name, part / name, entry)
            else:
                weights += read_shares(part / name)
    return weights


def remove(parts: Sequence[Path]) -> None:
    """Remove parts that were taken in."""
    for part in parts:
        with contextlib.suppress(OSError):
            _failure(part).unlink(missing_ok=True)
        shutil.rmtree(part, ignore_errors=True)


def remove_all(run_dir: Path) -> None:
    """Remove what interrupted saves left of parts. Call while no process can be writing one."""
    for pattern in (".step-*.part-*", "..step-*.part-*"):
        remove([path.with_name(path.name.removesuffix(".failed")) for path in run_dir.glob(pattern)])
