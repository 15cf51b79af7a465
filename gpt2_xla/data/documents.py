"""The documents of a unit, in batches of a few MB, as UTF-8 bytes with an id each. Empty ones are left out."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpt2_xla.data.cuts import SAFE_CUT
from gpt2_xla.data.inputs import InputFile, UnreadableInput
from gpt2_xla.data.units import Columns, Unit, open_binary, open_parquet
from gpt2_xla.tokenizer import encode_utf8, replace_surrogates

BATCH_BYTES = 4 * 2**20


@dataclass
class Batch:
    """Some documents in a row."""

    ids: list[str] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    ends: bool = True  # False for a piece of a text file that is not its last


def read_unit(unit: Unit, columns: Columns) -> Iterator[Batch]:
    """A unit's documents. UnreadableInput that names the file, and the place in it, for what can't be read."""
    if unit.files[0].kind == "text" and unit.stop is not None:
        yield from _text_stretch(unit, columns)
        return
    batch, size = Batch(), 0
    for name, text in _documents(unit, columns):
        if not text:
            continue
        batch.ids.append(name)
        batch.texts.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = Batch(), 0
    if batch.ids:
        yield batch


def _documents(unit: Unit, columns: Columns) -> Iterator[tuple[str, bytes]]:
    for file in unit.files:
        if file.kind == "pydoc":
            from pydoc_data.topics import topics

            yield from ((f"pydoc/{name}", replace_surrogates(topics[name]).encode()) for name in sorted(topics))
        elif file.kind == "parquet":
            yield from _parquet_rows(unit, columns)
        elif file.kind == "jsonl":
            yield from _jsonl_rows(unit, columns)
        else:
            with _clear_errors(file), open_binary(file, columns) as source:
                text = source.read()
            _check_utf8(file, text, 0)
            yield file.name, text


def _parquet_rows(unit: Unit, columns: Columns) -> Iterator[tuple[str, bytes]]:
    (file,) = unit.files
    row = unit.first_row
    with open_parquet(file, columns) as parquet:
        has_ids = columns.id in parquet.schema_arrow.names
        wanted = [columns.text, columns.id] if has_ids else [columns.text]
        groups = list(range(unit.start, unit.stop or 0))
        rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
        size = max(1, min(4096, rows * BATCH_BYTES // max(1, unit.text_bytes)))
        for batch in parquet.iter_batches(batch_size=size, columns=wanted, row_groups=groups):
            texts = batch.column(columns.text)
            names = batch.column(columns.id).to_pylist() if has_ids else [None] * len(texts)
            for i, text in enumerate(_utf8_of(texts)):
                if text is not None:
                    yield f"{file.name}#{row + i}" if names[i] is None else str(names[i]), text
            row += len(texts)


def _utf8_of(texts: Any) -> list[bytes | None]:
    """The UTF-8 of an arrow array of strings, lone surrogates replaced; UnicodeDecodeError where it is something else."""
    import pyarrow

    found: list[bytes | None] = _as_binary(texts).to_pylist()
    try:
        texts.validate(full=True)  # parquet does not promise that its strings are UTF-8
    except pyarrow.ArrowInvalid:
        return [text and encode_utf8(text.decode("utf-8", "surrogatepass")) for text in found]
    return found


def _as_binary(texts: Any) -> Any:
    """An arrow array of strings as bytes, without a copy where arrow knows how (a cast would cost a tenth of the reading)."""
    import pyarrow

    if pyarrow.types.is_string(texts.type):
        return texts.view(pyarrow.binary())
    return texts.view(pyarrow.large_binary()) if pyarrow.types.is_large_string(texts.type) else texts.cast("binary")


def _jsonl_rows(unit: Unit, columns: Columns) -> Iterator[tuple[str, bytes]]:
    (file,) = unit.files
    with _clear_errors(file), open_binary(file, columns) as source:
        lines = _decompressed(file.name, source)
        position = unit.start
        if position > 0:  # the line that is cut here is the unit's before
            lines.seek(position - 1)
            position += len(lines.readline()) - 1
        while unit.stop is None or position < unit.stop:
            line = lines.readline()
            if not line:
                return
            document = None if line.isspace() else _jsonl_document(file, line, position, columns)
            position += len(line)
            del line  # it may be as long as all the rest
            if document is not None:
                yield document


def _decompressed(name: str, source: Any) -> Any:
    if name.endswith(".gz"):
        return gzip.open(source, "rb")
    if name.endswith(".zst"):
        import zstandard

        # Several frames end to end are one file, as for zstd itself.
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True))
    return source


def _jsonl_document(file: InputFile, line: bytes, position: int, columns: Columns) -> tuple[str, bytes] | None:
    """A line's id and text; None where the text is null, as a row of parquet may be."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreadableInput(
            file.name, f"{_place(file, position, columns)} is not a line of JSON ({error})"
        ) from error
    if isinstance(row, dict) and row.get(columns.text, "") is None:
        return None
    if not isinstance(row, dict) or not isinstance(row.get(columns.text), str):
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}, no object"
        place = _place(file, position, columns)
        raise UnreadableInput(file.name, f"{place} has no text in --text-column {columns.text}; its fields: {fields}")
    name = row.get(columns.id) if columns.id else None
    name = name if isinstance(name, str | int) else f"{file.name}#{position}"
    return replace_surrogates(str(name)), encode_utf8(row[columns.text])


def _place(file: InputFile, position: int, columns: Columns) -> str:
    """FILE:LINE of a byte. Reads the file up to there, which only an error does."""
    with open_binary(file, columns) as source:
        lines = _decompressed(file.name, source)
        count = 1
        while position > 0:
            block = lines.read(min(position, 2**20))
            count += block.count(b"\n")
            position -= len(block)
    return f"{file.url}:{count}"


def _text_stretch(unit: Unit, columns: Columns) -> Iterator[Batch]:
    """A part of one long text file, cut where it changes no token; the last part ends the document."""
    (file,) = unit.files
    with _clear_errors(file), open_binary(file, columns) as source:
        start = _cut_after(source, unit.start, file.size)
        stop = _cut_after(source, unit.stop or 0, file.size)
        source.seek(start)
        text = source.read(stop - start)
    if text:
        _check_utf8(file, text, start)
        yield Batch([file.name], [text], ends=stop == file.size)


def _cut_after(source: Any, position: int, size: int) -> int:
    """The first safe cut at or after a position; the file's ends are safe."""
    if position == 0:
        return 0
    position -= 1
    while position < size:
        source.seek(position)
        found = SAFE_CUT.search(source.read(2**20 + 1))
        if found:
            return position + found.end()
        position += 2**20
    return size


def _check_utf8(file: InputFile, text: bytes, start: int) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UnreadableInput(
            file.name,
            f"{file.url} is not UTF-8 text (byte {error.object[error.start]:#04x} at position {start + error.start}); "
            "convert it to UTF-8 or leave it out",
        ) from error


@contextmanager
def _clear_errors(file: InputFile) -> Iterator[None]:
    from zstandard import ZstdError

    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, ZstdError) as error:
        raise UnreadableInput(file.name, f"{file.url} is cut short or damaged ({error}); copy it again") from error
    except OSError as error:
        raise UnreadableInput(file.name, f"{file.url} can't be read: {error.strerror or error}") from error
