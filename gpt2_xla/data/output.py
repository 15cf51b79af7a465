"""The folder that receives prepared splits. Work lives in OUTPUT_DIR/.preparing, outlives a kill, and ends with one rename a split."""

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import InputEntry
from gpt2_xla.durable_files import atomic_write, flush
from gpt2_xla.errors import UserError

SPLITS = ("train", "valid")
PLAN = "plan.json"


@contextmanager
def work_folder(output_dir: Path) -> Iterator[Path]:
    """OUTPUT_DIR/.preparing, used by no other process. It stays if it holds finished work, for the next run to continue."""
    folder = output_dir / ".preparing"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
        except BlockingIOError as error:
            raise UserError(f"another command is preparing data in {output_dir}; wait for it or stop it") from error
        try:
            yield folder
        finally:
            if not any(folder.glob("units/*.json")):
                remove(folder)
    finally:
        os.close(lock)


def remove(work: Path) -> None:
    """Delete the work; the plan first, so that no half-deleted folder is ever continued."""
    (work / PLAN).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def claim(work: Path, identity: dict[str, Any]) -> None:
    """Make `work` the folder of this plan. UserError that names the differences if it holds another plan's work."""
    try:
        held = json.loads((work / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        held = None
    except ValueError as error:
        raise UserError(f"{work / PLAN} is damaged; delete {work} to start again") from error
    if held is None:
        for entry in work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name in ("units", "shards", *SPLITS):
            (work / name).mkdir()
        with atomic_write(work / PLAN) as file:
            file.write(json.dumps(identity).encode())
    elif differences := _differences(held, identity):
        raise UserError(
            f"{work} holds the unfinished work of another command: {'; '.join(differences)}; "
            "run that command again, choose another --output-dir, or delete that folder"
        )
    for stale in work.rglob(".*.tmp"):  # of killed processes
        stale.unlink(missing_ok=True)


def _differences(held: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    found = []
    if held.get("version") != ours["version"]:
        found.append(f"this program's work format was {held.get('version')}, is {ours['version']}")
    for name in sorted({*held["options"], *ours["options"]}):
        before, now = held["options"].get(name), ours["options"].get(name)
        if before != now:
            found.append(f"--{name.replace('_', '-')} was {before}, is {now}")
    return (
        found
        or _changed_facts(held, ours)
        or changed_inputs([InputEntry(*entry) for entry in held["inputs"]], [InputEntry(*e) for e in ours["inputs"]])
    )


def _changed_facts(held: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What the same options mean now: another tokenizer of that name, another Python's documentation."""
    return [
        f"its {name.replace('_', ' ')} was {held[name]}, is {ours[name]}"
        for name in ("tokenizer_hash", "source")
        if held[name] != ours[name]
    ]


def changed_options(before: str, now: str) -> list[str]:
    """The options that two recorded commands give different values."""
    held, ours = _options(before), _options(now)
    return [
        f"{flag} was {held.get(flag, 'not given')}, is {ours.get(flag, 'not given')}"
        for flag in dict.fromkeys([*held, *ours])
        if held.get(flag) != ours.get(flag)
    ]


def _options(command: str) -> dict[str, str]:
    """The flags of a recorded command with their values as text; "command" is what stands before them."""
    flag, words = "command", {"command": list[str]()}
    for word in shlex.split(command):
        if word.startswith("--no-"):
            words[word.replace("--no-", "--", 1)] = ["off"]
        elif word.startswith("--"):
            flag = word
            words[flag] = []
        else:
            words[flag].append(word)
    return {name: " ".join(values) or "on" for name, values in words.items()}


def changed_inputs(held: list[InputEntry], ours: list[InputEntry]) -> list[str]:
    """What is different about the input files, in at most four parts of a sentence."""
    before, now = ({entry.file: entry for entry in entries} for entries in (held, ours))
    found = []
    for name in dict.fromkeys([*before, *now]):
        if name not in now:
            found.append(f"input {name} is gone")
        elif name not in before:
            found.append(f"input {name} is new")
        elif before[name] != now[name]:
            found.append(f"input {name} has changed ({before[name].bytes:,} bytes, now {now[name].bytes:,})")
    return [*found[:3], f"and {len(found) - 3} more"] if len(found) > 4 else found


def check_published(output_dir: Path, expected: dict[str, Any], inputs: list[InputEntry]) -> set[str]:
    """The splits that are there already. UserError if they are not what this command makes, or damaged."""
    splits = {split: output_dir / split for split in SPLITS}
    found = {split: folder for split, folder in splits.items() if folder.exists() and any(folder.iterdir())}
    for folder in found.values():
        if not (folder / manifests.FILE_NAME).exists():
            raise UserError(f"{folder} holds files that no prepare command wrote; choose another --output-dir")
        manifest = manifests.read(folder)
        held = {"tokenizer_hash": manifest.tokenizer_hash, "source": list(manifest.source)}
        changes = changed_options(manifest.command or "", expected["command"])
        changes = changes or _changed_facts(held, expected) or changed_inputs(list(manifest.inputs), inputs)
        if changes:
            raise UserError(
                f"{folder} holds other data: {'; '.join(changes)}; choose another --output-dir or delete that folder"
            )
        try:
            manifests.verify(folder, manifest, full=False)
        except UserError as error:
            raise UserError([*error.mistakes, f"delete {folder} to prepare it again"]) from error
    return set(found)


def publish(output_dir: Path, work: Path) -> None:
    """Give the finished splits their names. A split that is there already must be the same, and stays."""
    for split in reversed(SPLITS):
        made, target = work / split, output_dir / split
        if not (made / manifests.FILE_NAME).exists():
            continue
        if (target / manifests.FILE_NAME).exists():
            if manifests.read(target).fingerprint != manifests.read(made).fingerprint:
                raise UserError(
                    f"{target} holds other tokens than this command makes now; delete it to prepare it again"
                )
            continue
        made.rename(target)
    flush(output_dir)


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
