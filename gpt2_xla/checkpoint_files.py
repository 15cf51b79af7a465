"""The files of a checkpoint folder: flushed to the disk, recorded with size and sha256, verified, swapped in whole.

A folder appears under its final name only when it is complete. While a folder is being written, replaced or deleted it
has a hidden name: `.NAME.partial`, `.NAME.old`, `.NAME.deleted`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2_xla.durable_files import flush
from gpt2_xla.errors import UserError

RECORD = "trainer_state/COMPLETE"  # JSON: size and sha256 of every other file; written last


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a deep [[[[… is malformed too
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write CPU tensors as safetensors; raises OSError as any write does."""
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors 0.8 makes it private; the umask shows in the folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped; raises UserError for a file that is none."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from error


def complete(folder: Path) -> None:
    """Flush every file of the folder, write the record of them last, flush that and the folders."""
    (folder / RECORD).parent.mkdir(exist_ok=True)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    record = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
    }
    for file in files:
        flush(file)
    write_json(folder / RECORD, {"format": 1, "files": record})
    flush(folder / RECORD)
    for subfolder in {file.parent for file in files} | {folder, (folder / RECORD).parent}:
        flush(subfolder)


def damage(folder: Path, required: set[str], unhashed: set[str]) -> list[str]:
    """What differs between the folder and its record, a sentence each; of `unhashed` files only the size is compared."""
    try:
        files = read_json(folder / RECORD).get("files")
    except UserError as error:
        return list(error.mistakes)
    if not isinstance(files, dict):
        return [f"{folder / RECORD} lists no files"]
    found = [f"{folder / RECORD} does not list {name}" for name in sorted(required - files.keys())]
    for name, entry in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            found.append(f"{folder / RECORD} names {name!r}, which is outside of the checkpoint")
        elif (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            found.append(f"{folder / RECORD} is malformed at {name!r}")
        else:
            found += _compare(folder / name, entry["bytes"], None if name in unhashed else entry["sha256"])
    return found


def _compare(file: Path, size: int, digest: str | None) -> list[str]:
    """What is wrong with one file, if anything."""
    try:
        if not file.is_file():
            return [f"{file} is missing"]
        if file.stat().st_size != size:
            return [f"{file} has {file.stat().st_size:,} bytes instead of {size:,}"]
        if digest is not None and sha256(file) != digest:
            return [f"{file} was altered: its sha256 is not the recorded one"]
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL byte
        return [f"{file} can't be read: {getattr(error, 'strerror', None) or error}"]
    return []


def sha256(file: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Create the folder `final` with what `fill` writes into it, whole or not at all; raises OSError.

    A folder that has the name already is replaced; killed between the two renames, `recover` brings it back.
    """
    partial, old = _hidden(final, "partial"), _hidden(final, "old")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        complete(partial)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        flush(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        recover(final.parent)
        raise
    shutil.rmtree(old, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder so that no half of it is ever seen under its name; what can't be deleted stays."""
    doomed = _hidden(folder, "deleted")
    try:
        folder.rename(doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def recover(parent: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    for old in parent.glob(".*.old"):
        final = parent / old.name[1:].removesuffix(".old")
        if not final.exists():
            try:
                old.rename(final)
            except OSError:
                continue  # another process was first, or the folder is read-only: then nothing is lost either


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Remove what interrupted writes, replacements and deletions left of folders whose names match the glob pattern."""
    recover(parent)
    for suffix in ("partial", "old", "deleted"):
        for folder in parent.glob(f".{pattern}.{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)


def _hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")
