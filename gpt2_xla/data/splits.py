"""Which documents are kept, and which of them go to valid/: decided from the finished units' tables alone.

By hash (FineWeb): valid/ is the documents whose id hashes are the smallest, as many as it takes. So a document's place
depends on its id and one threshold. When the source grows, the threshold falls: a document may leave valid/ for train/, but
none that was trained on is ever validated on.
"""

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


def hash_threshold(folder: Path, records: list[UnitRecord], duplicates: Duplicates, valid_tokens: int) -> int:
    """The largest id hash in valid/, which so holds `valid_tokens`, or a tenth of a source that has under ten times that.

    Raises UserError if there are not two documents to split. Memory: the documents of valid/, and one unit's.
    """
    total = seen = 0
    smallest = np.empty((2, 0), np.uint64)  # hashes, tokens; sorted by hash
    for unit in kept_units(folder, records, duplicates):
        hashes, tokens = unit.documents["id"][unit.keep], unit.documents["tokens"][unit.keep]
        total += int(tokens.sum())
        seen += len(hashes)
        both = np.concatenate([smallest, np.stack([hashes, tokens])], axis=1)
        both = both[:, np.argsort(both[0], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(both[1]), valid_tokens)) + 1
        smallest = both[:, :enough]
    want = max(1, min(valid_tokens, total // 10))
    last = int(np.searchsorted(np.cumsum(smallest[1]), want))
    if seen < 2:
        raise UserError(
            "the source holds one document, which can't be split; use --valid-tokens 0 or add documents"
            if seen
            else "there is no text in the source"
        )
    return _below_all(folder, records, duplicates, int(smallest[0, min(last, smallest.shape[1] - 1)]))


def _below_all(folder: Path, records: list[UnitRecord], duplicates: Duplicates, threshold: int) -> int:
    """The threshold, or one lower if it would leave nothing to train on."""
    lower = 0
    for unit in kept_units(folder, records, duplicates):
        hashes = unit.documents["id"][unit.keep]
        if np.any(hashes > threshold):
            return threshold
        lower = max(lower, int(max(hashes[hashes < threshold], default=0)))
    if lower == 0:
        raise UserError("all documents of the source have one id, which can't be split; name another --id-column")
    return lower
