"""The disk, the prepared data and the newest checkpoint: run as a child, since a network disk may hang.

python -m gpt2_xla.doctor.folders CONFIG, a DoctorConfig as JSON; reports findings.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt2_xla.cli import from_dict
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.prepare_hint import prepare_arguments
from gpt2_xla.data.train_dirs import parse_train_dirs
from gpt2_xla.doctor.children import report
from gpt2_xla.doctor.finding import Finding, python_command
from gpt2_xla.doctor.host import disk
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import DoctorConfig

FULL_CHECK_BELOW = 2**30  # bytes; as in training


def folder_findings(config: DoctorConfig) -> Iterator[Finding]:
    """Findings on the run folder's disk, each data folder and the newest checkpoint."""
    yield disk(Path(config.checkpoints_dir))
    for one in parse_train_dirs(config.train_dir):
        yield _data("train data", one.folder, config.verify_data)
    if config.valid_dir is not None:
        yield _data("valid data", Path(config.valid_dir), config.verify_data)
    yield _checkpoint(Path(config.checkpoints_dir))


def _data(name: str, folder: Path, verify: str) -> Finding:
    """Whether a folder's manifest can be read and its shards are whole."""
    try:
        manifest = manifests.read(folder)
    except UserError as error:
        mend = f"{python_command()} {prepare_arguments(folder)}"
        return Finding(name, "problem", str(error).partition("; prepare data with")[0], mend)
    size = manifest.tokens * (2 if manifest.dtype == "uint16" else 4)
    full = verify == "full" or (verify == "auto" and size <= FULL_CHECK_BELOW)
    try:
        manifests.verify(folder, manifest, full)
    except UserError as error:
        more = f" (and {len(error.mistakes) - 1} more)" if len(error.mistakes) > 1 else ""
        return Finding(name, "problem", f"{error.mistakes[0]}{more}", _prepare_again(folder, manifest))
    hashed = full and all(shard.sha256 for shard in manifest.shards)
    text = f"{folder}: {manifest.tokens:,} tokens of {manifest.tokenizer or 'an unknown tokenizer'}"
    checked = f"{len(manifest.shards)} shards, {'sha256' if hashed else 'lengths'} checked"
    return Finding(name, "ok", f"{text} in {checked}")


def _prepare_again(folder: Path, manifest: Manifest) -> str:
    """The command that made the folder, as its manifest tells; a folder without one has only a hint."""
    command = manifest.command or f"{python_command()} scripts/prepare_text.py"
    return f"rm -r {_quoted(folder)} && {command} --output-dir {_quoted(folder.parent)}"


def _checkpoint(run_folder: Path) -> Finding:
    """Whether the newest checkpoint is good, or which older one a resume would fall back to."""
    from gpt2_xla import checkpoint  # imports torch, which may be what is broken

    folders = checkpoint.checkpoints(run_folder)
    if not folders:
        return Finding("checkpoint", "ok", f"none yet in {run_folder}")
    why = checkpoint.problems(folders[0])
    if not why:
        return Finding("checkpoint", "ok", f"{folders[0]} is whole")
    good = next((folder for folder in folders[1:] if not checkpoint.problems(folder)), None)
    damaged = f"{folders[0].name} is damaged: {why[0]}"
    if good is not None:
        text = f"{damaged}; a resume continues from {good.name}"
        return Finding("checkpoint", "warning", text, f"rm -r {_quoted(folders[0])}")
    text = f"{damaged}; there is no good one in {run_folder}, so the run must start again"
    return Finding("checkpoint", "problem", text, f"mv {_quoted(run_folder)} {_quoted(run_folder)}.damaged")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def main() -> None:
    """Report the findings as they come."""
    for finding in folder_findings(from_dict(DoctorConfig, json.loads(sys.argv[1]))):
        report(**dataclasses.asdict(finding))


if __name__ == "__main__":
    main()
