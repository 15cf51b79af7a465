"""Which documents are kept, and which of them go to valid/: decided from the finished units' tables alone.

By hash (FineWeb): documents whose id hashes lie in a fixed share of all hashes are set apart and never trained on; of
these, valid/ takes the smallest hashes until it holds enough tokens, and the rest goes nowhere. When the source grows, a
document may so join or leave valid/, but none is ever in train/ that was in valid/ before, nor the other way round.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_xla.data.parts import UnitRecord, read_documents
from gpt2_xla.errors import UserError

HASHES_AT_ONCE = 2**23  # text hashes compared in memory at a time (24 B each, and as much again to sort them)


@dataclass(frozen=True)
class Kept:
    """What is kept of one unit."""

    record: UnitRecord
    documents: np.ndarray  # DOCUMENT rows
    keep: np.ndarray  # (documents,) bool: not a duplicate


@dataclass(frozen=True)
class Duplicates:
    """The documents that --dedup exact drops: rows of each unit."""

    rows: dict[int, np.ndarray]

    @property
    def total(self) -> int:
        """How many."""
        return sum(map(len, self.rows.values()))


def find_duplicates(folder: Path, records: list[UnitRecord]) -> Duplicates:
    """Every document whose text came before in the source's order. Memory is bounded: hashes are compared in slices."""
    slices = 1 + sum(record.documents for record in records) // HASHES_AT_ONCE
    found: dict[int, list[np.ndarray]] = {}
    for part in range(slices):
        hashes, units, rows = [], [], []
        for record in records:
            documents = read_documents(folder, record)
            mine = np.flatnonzero(documents["text"][:, 0] % slices == part)
            hashes.append(documents["text"][mine])
            units.append(np.full(len(mine), record.index, np.int64))
            rows.append(mine)
        all_hashes = np.concatenate(hashes)
        order = np.lexsort((all_hashes[:, 0], all_hashes[:, 1]))  # stable, so the first in the source's order leads
        same = np.all(all_hashes[order[1:]] == all_hashes[order[:-1]], axis=1)
        repeated = order[1:][same]
        unit_of, row_of = np.concatenate(units)[repeated], np.concatenate(rows)[repeated]
        for unit in np.unique(unit_of):
            found.setdefault(int(unit), []).append(row_of[unit_of == unit])
    return Duplicates({unit: np.sort(np.concatenate(parts)) for unit, parts in found.items()})


def kept_units(folder: Path, records: list[UnitRecord], duplicates: Duplicates) -> Iterator[Kept]:
    """The units in order, with what is kept of them."""
    for record in records:
        documents = read_documents(folder, record)
        yield Kept(record, documents, keep_mask(len(documents), duplicates.rows.get(record.index)))


def keep_mask(documents: int, dropped: np.ndarray | None) -> np.ndarray:
    """(documents,) bool: False for the dropped rows."""
    keep = np.ones(documents, bool)
    if dropped is not None:
        keep[dropped] = False
    return keep


def set_apart(share: float) -> int:
    """How many of the 2^64 id hashes, from 0 on, --valid-share sets apart: their documents are never in train/."""
    return int(share * 2**64)  # exact: a power of two only moves the point


def hash_threshold(
    folder: Path, records: list[UnitRecord], duplicates: Duplicates, valid_tokens: int, share: float
) -> int:
    """The largest id hash in valid/: the smallest ones of those set apart, until their documents hold `valid_tokens`.

    Raises UserError that suggests a share if this one leaves valid/ or train/ empty. Memory: the documents of valid/, and
    one unit's.
    """
    limit = np.uint64(set_apart(share))
    total = 0
    smallest = np.empty((2, 0), np.uint64)  # hashes, tokens; sorted by hash
    for unit in kept_units(folder, records, duplicates):
        total += int(unit.keep.sum())
        mine = unit.documents[unit.keep & (unit.documents["id"] < limit)]
        both = np.concatenate([smallest, np.stack([mine["id"], mine["tokens"]])], axis=1)
        both = both[:, np.argsort(both[0], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(both[1]), valid_tokens)) + 1
        smallest = both[:, :enough]
    trained_on = any(np.any(u.documents["id"][u.keep] >= limit) for u in kept_units(folder, records, duplicates))
    if smallest.shape[1] and trained_on:
        return int(smallest[0, -1])
    where = "all" if smallest.shape[1] else "none"
    suggestion = _share_that_works(folder, records, duplicates, valid_tokens)
    raise UserError(
        f"--valid-share {share}: {where} of the source's {total:,} documents lie in that share, so "
        f"{'train' if smallest.shape[1] else 'valid'}/ would be empty; "
        + (f"use --valid-share {suggestion:g}, or " if suggestion else "use ")
        + "--valid-tokens 0 for no valid/"
    )


def _share_that_works(
    folder: Path, records: list[UnitRecord], duplicates: Duplicates, valid_tokens: int
) -> float | None:
    """A short share that holds `valid_tokens`, or a tenth of the tokens if that is less; None where none splits.

    Only for sources that no usual share splits, which are small: their hashes are in memory at once.
    """
    kept = [unit.documents[unit.keep] for unit in kept_units(folder, records, duplicates)]
    documents = np.sort(np.concatenate(kept)[["id", "tokens"]], order="id")
    hashes, tokens = documents["id"] / 2**64, np.cumsum(documents["tokens"])
    below = int(np.searchsorted(hashes, hashes[-1]))  # documents that may be set apart
    if below == 0:
        return None
    last = int(np.searchsorted(tokens, max(1, min(valid_tokens, int(tokens[-1]) // 10))))
    wanted = float(hashes[min(last, below - 1)])
    for digits in range(2, 16):
        step = 10.0 ** (math.floor(math.log10(max(wanted, 2**-64))) - digits + 1)
        share = float(f"{(math.floor(wanted / step) + 1) * step:.{digits}g}")
        if share < hashes[-1]:
            return share
    return None
