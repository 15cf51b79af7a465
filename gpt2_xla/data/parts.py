"""Part files: what is left of a unit once it is tokenized, and all that the shards are assembled from.

Three files a unit in OUTPUT_DIR/.preparing/units: its tokens, raw; one row per document and the documents' ids; and, last,
the record that says the others are whole. A killed run leaves finished units and at most some hidden temporary files.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from gpt2_xla.data.documents import read_unit
from gpt2_xla.data.encoder import DocumentEncoder, with_end_of_text
from gpt2_xla.data.prefetch import prefetch
from gpt2_xla.data.shards import dtype_for
from gpt2_xla.data.units import Columns, Unit
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import Tokenizer

# A document: its tokens (end-of-text included), its text's UTF-8 bytes, whether it ends here, and hashes of id and text.
DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("ends", "?"), ("id", "<u8"), ("text", "<u8", (2,))])


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit holds."""

    index: int
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    checked: int = 0  # documents that were tokenized a second time
    bad: dict[str, str] = field(default_factory=dict)  # files that were left out, and what is wrong with them


def part_path(folder: Path, index: int, suffix: str) -> Path:
    """The file of a unit: suffix tokens, docs or json."""
    return folder / f"{index:06d}.{suffix}"


def write_part(
    folder: Path, unit: Unit, columns: Columns, encoder: DocumentEncoder, tokenizer: Tokenizer, seed: int, dedup: bool
) -> UnitRecord:
    """Tokenize a unit into its part files, all but the record. The texts are hashed if `dedup`."""
    random = np.random.default_rng([seed, unit.index])
    checked = encoder.checked
    rows: list[np.ndarray] = []
    names: list[str] = []
    with (
        # A thread reads on, over a network or from a compressed file, while this one tokenizes.
        contextlib.closing(prefetch(read_unit(unit, columns), depth=1)) as batches,
        atomic_write(part_path(folder, unit.index, "tokens")) as file,
    ):
        for batch in batches:
            encoded = encoder.encode(batch.texts, batch.ids, random)
            dtype = dtype_for(tokenizer.vocab_size)
            tokens = with_end_of_text(encoded, tokenizer.end_of_text, dtype, batch.ends)
            file.write(tokens.astype(np.dtype(dtype).newbyteorder("<"), copy=False).data)
            rows.append(_describe(batch.ids, batch.texts, encoded.counts, batch.ends, dedup))
            names += batch.ids
    documents = np.concatenate([np.empty(0, DOCUMENT), *rows])
    with atomic_write(part_path(folder, unit.index, "docs")) as file:
        file.write(documents.tobytes() + json.dumps(names).encode())
    return UnitRecord(
        unit.index,
        tokens=int(documents["tokens"].sum()),
        documents=len(documents),
        text_bytes=int(documents["bytes"].sum()),
        checked=encoder.checked - checked,
    )


def _describe(ids: list[str], texts: list[bytes], counts: np.ndarray, ends: bool, dedup: bool) -> np.ndarray:
    rows = np.zeros(len(ids), DOCUMENT)
    rows["tokens"] = counts + ends
    rows["bytes"] = [len(text) for text in texts]
    rows["ends"] = ends
    rows["id"] = [hash_of(name.encode()) for name in ids]
    if dedup:
        hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
        rows["text"] = np.frombuffer(hashes, "<u8").reshape(-1, 2)
    return rows


def hash_of(name: bytes) -> int:
    """64 bits of a document's id; the same on every machine, for ever: they decide its split."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def write_record(folder: Path, record: UnitRecord) -> None:
    """Declare a unit finished."""
    with atomic_write(part_path(folder, record.index, "json")) as file:
        file.write(json.dumps(asdict(record)).encode())


def read_record(folder: Path, index: int) -> UnitRecord | None:
    """The record of a unit; None if it is not finished."""
    try:
        return UnitRecord(**json.loads(part_path(folder, index, "json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{part_path(folder, index, 'json')} is damaged; delete {folder.parent}") from error


def read_documents(folder: Path, record: UnitRecord) -> np.ndarray:
    """One DOCUMENT per document of a finished unit."""
    if record.documents == 0:
        return np.empty(0, DOCUMENT)
    return np.fromfile(part_path(folder, record.index, "docs"), DOCUMENT, record.documents)


def read_ids(folder: Path, record: UnitRecord, rows: tuple[int, int]) -> list[str]:
    """The ids of two documents of a finished unit."""
    with part_path(folder, record.index, "docs").open("rb") as file:
        file.seek(record.documents * DOCUMENT.itemsize)
        names = json.loads(file.read())
    return [names[row] for row in rows]


def open_tokens(folder: Path, record: UnitRecord, dtype: str) -> np.ndarray:
    """The tokens of a finished unit, memory-mapped."""
    if record.tokens == 0:
        return np.empty(0, dtype)
    return np.memmap(part_path(folder, record.index, "tokens"), dtype, mode="r", shape=(record.tokens,))
