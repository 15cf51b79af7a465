"""What a person sees of a preparation: the plan and its disk, one progress bar, the table at the end."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest
from gpt2_xla.data.output import SPLITS
from gpt2_xla.data.parts import DOCUMENT, UnitRecord
from gpt2_xla.data.training_command import training_command
from gpt2_xla.data.units import Plan
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import ByteTokenizer, Tokenizer

# UTF-8 bytes per token, on the low side of what GPT-2's vocabulary makes of English (4.5) and source code (2.5 to 3.5).
BYTES_PER_TOKEN = 3.0
BYTES_PER_DOCUMENT = 2000  # of web text, 3000 on average; the documents' table and ids are small beside the tokens


def disk_needed(plan: Plan, tokenizer: Tokenizer, dtype: str, shard_size: int, workers: int) -> int:
    """Bytes, about: the tokens once, the documents' tables, and the shards that are being written."""
    tokens = plan.text_bytes / (1 if isinstance(tokenizer, ByteTokenizer) else BYTES_PER_TOKEN)
    itemsize = np.dtype(dtype).itemsize
    tables = plan.text_bytes / BYTES_PER_DOCUMENT * (DOCUMENT.itemsize + 60)
    return int((tokens + min(tokens, shard_size * (workers + 1))) * itemsize + tables)


def disk_free(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def check_disk(output_dir: Path, needed: int, cache: Path | None = None, download: int = 0) -> None:
    """UserError if bytes to write or to download find no room; where both go to one disk, they need it together."""
    hint = f" ({size(download)} of it downloads, which --streaming does not keep)"
    if cache is None:
        places = [("--output-dir", output_dir, needed, "")]
    elif _disk(cache) == _disk(output_dir):
        places = [("--output-dir", output_dir, needed + download, hint)]
    else:
        places = [("--output-dir", output_dir, needed, ""), ("--cache-dir", cache, download, hint)]
    mistakes = [
        f"{flag} {folder}: about {size(wanted)} needed{what}, {size(disk_free(folder))} free; "
        f"make room or choose another {flag}"
        for flag, folder, wanted, what in places
        if wanted > disk_free(folder)
    ]
    if mistakes:
        raise UserError(mistakes)


def _disk(folder: Path) -> int:
    """The number of the device that a folder is, or will be, on."""
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def plan_table(rows: list[tuple[str, Any]]) -> str:
    """Names and values, one a line."""
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


class Progress:
    """One bar: text done, MB/s, time left; documents, tokens and the disk left."""

    def __init__(self, plan: Plan, output_dir: Path, records: list[UnitRecord]) -> None:
        """`records`: the units that an earlier run has finished."""
        from tqdm import tqdm

        self._units = {unit.index: unit for unit in plan.units}
        self._folder = output_dir
        self._documents = sum(record.documents for record in records)
        self._tokens = sum(record.tokens for record in records)
        done = sum(self._units[record.index].text_bytes for record in records)
        total = max(plan.text_bytes, 1)
        self._bar = tqdm(desc="tokenize", total=total, initial=done, unit="B", unit_scale=True)

    def unit(self, record: UnitRecord) -> None:
        """A unit is finished."""
        self._documents += record.documents
        self._tokens += record.tokens
        free = disk_free(self._folder) / 1e9
        text = f"{self._documents:,} documents, {self._tokens:,} tokens, {free:,.0f} GB of disk left"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(self._units[record.index].text_bytes)

    def shards(self, done: int, total: int) -> None:
        """Shards are being written."""
        self._bar.set_description(f"shards {done}/{total}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.close()


def report(output_dir: Path) -> None:
    """Print what the folder holds, and the command that trains on it."""
    print(f"\n{'split':<6} {'shards':>7} {'documents':>12} {'tokens':>16} {'text':>14}")
    found: dict[str, Manifest] = {}
    held = None
    for split in SPLITS:
        folder = output_dir / split
        if folder.exists():
            held = found[split] = manifests.read(folder)
            megabytes = f"{(held.text_bytes or 0) / 1e6:,.2f} MB"
            print(f"{split:<6} {len(held.shards):>7,} {held.documents or 0:>12,} {held.tokens:>16,} {megabytes:>14}")
    if held is not None and held.unused_documents:
        print(f"{'unused':<6} {'':>7} {held.unused_documents:>12,} {held.unused_tokens or 0:>16,}")
        print("\nunused: set apart by --valid-share and so never trained on, more than --valid-tokens asks for")
    if held is not None and held.duplicates is not None:
        print(f"\n{held.duplicates:,} exact duplicates dropped")
    for skipped in held.skipped_files if held is not None else ():
        print(f"left out: {skipped}")
    if command := training_command(output_dir, found):
        print(f"\ntrain on it with:\n  {command}")
    else:
        print("\ntoo few tokens to train on: prepare more text")
