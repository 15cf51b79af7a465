"""The files of a checkpoint folder: flushed to the disk, recorded with size and sha256, verified, swapped in whole.

A folder appears under its final name only when it is complete. While a folder is being written, replaced or deleted it
has a hidden name: `.NAME.partial`, `.NAME.old`, `.NAME.deleted`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gpt2_xla import tensor_files
from gpt2_xla.durable_files import flush
from gpt2_xla.errors import UserError
from gpt2_xla.tensor_files import Entry

RECORD = "trainer_state/COMPLETE"  # JSON: size and sha256 of every other file; written last


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError for anything else."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a deep [[[[… is malformed too
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


class NewFolder:
    """A checkpoint folder while it is written: each file is flushed, and its size and sha256 kept for the record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, dict[str, Any]] = {}
        path.mkdir(parents=True)
        (path / RECORD).parent.mkdir()

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file, flush it, and record it; raises OSError."""
        digest, size = hashlib.sha256(), 0
        with (self.path / name).open("wb", buffering=0) as file:
            for part in parts:
                digest.update(part)
                size += len(part)
                rest = memoryview(part)
                while rest:  # the system may take less than it is given
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        self.record[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of indented JSON; ValueError for NaN and infinities, which JSON has not."""
        self.write(name, [(json.dumps(value, indent=2, allow_nan=False) + "\n").encode()])

    def write_tensors(self, name: str, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, a tensor at a time."""
        self.write(name, tensor_files.parts(entries, metadata or {}))

    def adopt(self, name: str, source: Path, entry: dict[str, Any]) -> None:
        """Move in a file that is flushed already, with its entry in the record of the folder it comes from."""
        source.rename(self.path / name)
        self.record[name] = entry

    def complete(self, save_number: int) -> None:
        """Write the record of all files, flush it and the folders."""
        record = {"format": 1, "save": save_number, "files": dict(sorted(self.record.items()))}
        with (self.path / RECORD).open("w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for folder in {(self.path / name).parent for name in self.record} | {(self.path / RECORD).parent, self.path}:
            flush(folder)


def save_number(folder: Path) -> int:
    """The checkpoint's number in the order in which those of its run were written; 0 if that is not recorded."""
    try:
        number = read_json(folder / RECORD).get("save")
    except UserError:
        return 0
    return number if type(number) is int and 0 <= number < 2**62 else 0


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Size ("bytes") and sha256 of each file by the folder's record; raises UserError for a malformed one.

    No name leads out of the folder, be it by `..` or by a link.
    """
    files = read_json(folder / RECORD).get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder / RECORD} lists no files")
    mistakes = []
    for name, entry in files.items():
        if not _is_inside(folder, name):
            mistakes.append(f"{folder / RECORD} names {name[:200]!r}, which is outside of the checkpoint")
        elif (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            mistakes.append(f"{folder / RECORD} is malformed at {name[:200]!r}")
    if mistakes:
        raise UserError(mistakes[:8])
    return files


def _is_inside(folder: Path, name: str) -> bool:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or len(name) > 1000:
        return False
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long or that no file can have
        return False


def damage(folder: Path, required: set[str], skip_hash: Callable[[str], bool]) -> list[str]:
    """What differs between the folder and its record, a sentence each; of some files only the size is compared."""
    try:
        files = recorded(folder)
    except UserError as error:
        return list(error.mistakes)
    found = [f"{folder / RECORD} does not list {name}" for name in sorted(required - files.keys())]
    found += [
        f"{folder / RECORD} does not list {name}"
        for path in sorted(folder.rglob("*.safetensors"))
        if (name := path.relative_to(folder).as_posix()) not in files
    ]
    for name, entry in files.items():
        found += _compare(folder / name, entry["bytes"], None if skip_hash(name) else entry["sha256"])
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


def write_folder(final: Path, save_number: int, fill: Callable[[NewFolder], None]) -> None:
    """Create the folder `final` with what `fill` writes into it, whole or not at all; raises OSError.

    A folder that has the name already is replaced; killed between the two renames, `recover` brings it back.
    """
    partial = _hidden(final, "partial")
    try:
        folder = NewFolder(partial)
        fill(folder)
        folder.complete(save_number)
        swap_in(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def swap_in(new: Path, final: Path) -> None:
    """Give a complete and flushed folder its name; one that has the name already is replaced. Raises OSError."""
    old = _hidden(final, "old")
    try:
        if final.exists():
            final.rename(old)
        new.rename(final)
        flush(final.parent)
    except BaseException:
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
