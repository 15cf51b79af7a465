"""Finished units to shards: each shard is written by one worker, from the part files that its tokens lie in."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_xla.data.manifest import ShardEntry
from gpt2_xla.data.parts import UnitRecord, open_tokens, read_documents, read_ids
from gpt2_xla.data.shards import write_shard_parts
from gpt2_xla.data.splits import Duplicates, keep_mask, kept_units, set_apart
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.tokenizer import HuggingFaceTokenizer, Tokenizer

COPIED_AT_ONCE = 2**22  # tokens
TOP = 2**64 - 1  # the largest id hash


@dataclass(frozen=True)
class SplitPlan:
    """One split: a stretch of the stream of those documents whose id hashes are on its side of a threshold."""

    name: str
    lowest: int  # id hashes lowest..highest belong to it
    highest: int
    first: int  # the stretch's first token
    tokens: int
    text_bytes: int

    @property
    def rule(self) -> str:
        """In words, for the manifest."""
        if (self.lowest, self.highest) == (0, TOP):
            return f"tokens {self.first} to {self.first + self.tokens - 1} of the stream of all documents"
        return f"documents with {self.lowest} <= blake2b-64(id), little-endian <= {self.highest}"

    def mask(self, documents: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """(documents,) bool: those in the stream."""
        hashes = documents["id"]
        return keep & (hashes >= np.uint64(self.lowest)) & (hashes <= np.uint64(self.highest))


@dataclass(frozen=True)
class Division:
    """All splits, valid/ first, and what is in none of them."""

    splits: tuple[SplitPlan, ...]
    unused_documents: int = 0  # set apart by --valid-share, beyond --valid-tokens
    unused_tokens: int = 0

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Division":
        """What asdict() was written from."""
        return cls(**{**content, "splits": tuple(SplitPlan(**split) for split in content["splits"])})


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    path: Path
    split: SplitPlan
    parts: Path  # folder of the units
    dtype: str
    units: tuple[tuple[UnitRecord, np.ndarray | None], ...]  # those its tokens lie in, and their dropped rows
    skip: int  # tokens of the split that its first unit gives to the shard before
    tokens: int

    @property
    def record(self) -> Path:
        """The file that says the shard is whole."""
        return self.path.parent.parent / "shards" / f"{self.path.stem}.json"


def by_hash(folder: Path, records: list[UnitRecord], dups: Duplicates, threshold: int, share: float) -> Division:
    """valid/ up to the threshold; train/ from the end of the share that is set apart; what is between goes nowhere."""
    limit = set_apart(share)
    valid = _hash_range("valid", folder, records, dups, 0, threshold)
    train = _hash_range("train", folder, records, dups, limit, TOP)
    documents = tokens = 0
    for unit in kept_units(folder, records, dups):
        hashes = unit.documents["id"]
        mine = unit.keep & (hashes > np.uint64(threshold)) & (hashes < np.uint64(limit))
        documents, tokens = documents + int(mine.sum()), tokens + int(unit.documents["tokens"][mine].sum())
    return Division((valid, train), documents, tokens)


def without_valid(folder: Path, records: list[UnitRecord], dups: Duplicates) -> Division:
    """train/ alone."""
    return Division((_hash_range("train", folder, records, dups, 0, TOP),))


def _hash_range(
    name: str, folder: Path, records: list[UnitRecord], dups: Duplicates, lowest: int, highest: int
) -> SplitPlan:
    tokens = text_bytes = 0
    empty = SplitPlan(name, lowest, highest, 0, 0, 0)
    for unit in kept_units(folder, records, dups):
        mine = unit.documents[empty.mask(unit.documents, unit.keep)]
        tokens, text_bytes = tokens + int(mine["tokens"].sum()), text_bytes + int(mine["bytes"].sum())
    return replace(empty, tokens=tokens, text_bytes=text_bytes)


def at_fraction(
    folder: Path, records: list[UnitRecord], dups: Duplicates, fraction: float, tokenizer: Tokenizer, dtype: str
) -> Division:
    """valid/ is the last `fraction` of the stream; the cut may lie inside a document, as in published splits."""
    tokens = documents = text_bytes = 0
    for unit in kept_units(folder, records, dups):
        tokens += int(unit.documents["tokens"][unit.keep].sum())
        text_bytes += int(unit.documents["bytes"][unit.keep].sum())
        documents += int(unit.documents["ends"][unit.keep].sum())
    cut = int((tokens - documents) * (1 - fraction))
    before = _text_bytes_before(folder, records, dups, cut, tokenizer, dtype)
    return Division(
        (
            SplitPlan("valid", 0, TOP, cut, tokens - cut, text_bytes - before),
            SplitPlan("train", 0, TOP, 0, cut, before),
        )
    )


def _text_bytes_before(
    folder: Path, records: list[UnitRecord], dups: Duplicates, cut: int, tokenizer: Tokenizer, dtype: str
) -> int:
    """UTF-8 bytes of the text behind the stream's tokens 0..cut-1."""
    total = 0
    for unit in kept_units(folder, records, dups):
        rows = unit.documents[unit.keep]
        ends = np.cumsum(rows["tokens"]).astype(np.int64)
        if len(ends) == 0 or cut >= ends[-1]:
            total += int(rows["bytes"].sum())
            cut -= int(ends[-1]) if len(ends) else 0
            continue
        row = int(np.searchsorted(ends, cut, side="right"))
        total += int(rows["bytes"][:row].sum())
        inside = cut - int(ends[row - 1] if row else 0)
        start = int(unit.documents["tokens"][: np.flatnonzero(unit.keep)[row]].sum())
        part = open_tokens(folder, unit.record, dtype)[start : start + inside]
        return total + _decoded_bytes(part, tokenizer)
    return total


def _decoded_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of some tokens' text, a part at a time where the parts' bytes add up: a Python int takes 14 times a uint16."""
    step = len(tokens) + 1 if isinstance(tokenizer, HuggingFaceTokenizer) else 2**18
    parts = (tokens[start : start + step].tolist() for start in range(0, len(tokens), step))
    return sum(len(tokenizer.decode_bytes(part)) for part in parts)


def shard_jobs(
    folder: Path, records: list[UnitRecord], dups: Duplicates, split: SplitPlan, out: Path, dtype: str, shard_size: int
) -> list[ShardJob]:
    """The shards of a split."""
    held = [
        int(u.documents["tokens"][split.mask(u.documents, u.keep)].sum()) for u in kept_units(folder, records, dups)
    ]
    ends = np.cumsum(np.array(held, np.int64))
    jobs = []
    for index in range(-(-split.tokens // shard_size)):
        start = split.first + index * shard_size
        count = min(shard_size, split.first + split.tokens - start)
        one = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, start + count - 1, side="right"))
        units = tuple((record, dups.rows.get(record.index)) for record in records[one : last + 1])
        skip = start - int(ends[one - 1] if one else 0)
        jobs.append(ShardJob(out / f"{split.name}_{index:05d}.npy", split, folder, dtype, units, skip, count))
    return jobs


def finished_shard(job: ShardJob) -> ShardEntry | None:
    """The entry of a shard that an earlier run has finished."""
    try:
        return ShardEntry(**json.loads(job.record.read_text(encoding="utf-8"))) if job.path.exists() else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def assemble_shard(job: ShardJob) -> ShardEntry:
    """Write one shard, and the record that it is whole."""
    documents = 0
    first = last = None
    left, skip = job.tokens, job.skip
    for record, dropped in job.units:
        rows = read_documents(job.parts, record)
        mask = job.split.mask(rows, keep_mask(len(rows), dropped))
        chosen = np.flatnonzero(mask)
        ends = np.cumsum(rows["tokens"][chosen]).astype(np.int64)
        stop = min(skip + left, int(ends[-1]) if len(ends) else 0)
        if stop > skip:
            one, other = (int(chosen[np.searchsorted(ends, at, side="right")]) for at in (skip, stop - 1))
            if first is None or left == stop - skip:  # the first unit or the last
                names = read_ids(job.parts, record, (one, other))
                first, last = first or names[0], names[1]
            inside = (ends > skip) & (ends <= stop)
            documents += int(rows["ends"][chosen][inside].sum())
            left -= stop - skip
        skip = 0
    sha256 = write_shard_parts(job.path, np.dtype(job.dtype), job.tokens, _tokens_of(job))
    entry = ShardEntry(job.path.name, job.tokens, documents, sha256, first, last)
    with atomic_write(job.record) as file:
        file.write(json.dumps(asdict(entry)).encode())
    return entry


def _tokens_of(job: ShardJob) -> Iterator[np.ndarray]:
    """A shard's tokens, a few million at a time."""
    left, skip = job.tokens, job.skip
    for record, dropped in job.units:
        rows = read_documents(job.parts, record)
        mask = job.split.mask(rows, keep_mask(len(rows), dropped))
        tokens = open_tokens(job.parts, record, job.dtype)
        ends = np.cumsum(rows["tokens"]).astype(np.int64)
        row = 0
        while row < len(rows) and left:
            start = int(ends[row - 1]) if row else 0
            stop_row = max(row + 1, int(np.searchsorted(ends, start + COPIED_AT_ONCE)))
            part = tokens[start : int(ends[stop_row - 1])]
            chosen = mask[row:stop_row]
            if not chosen.all():
                part = part[np.repeat(chosen, rows["tokens"][row:stop_row].astype(np.int64))]
            row = stop_row
            if skip >= len(part):
                skip -= len(part)
                continue
            part = part[skip : skip + left]
            skip, left = 0, left - len(part)
            yield part
