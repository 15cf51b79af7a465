"""Units of work: stretches of the input that one worker reads alone. They follow from the input, never from the workers.

Row groups of parquet, stretches of local JSONL and text; a compressed or remote JSONL file is one unit, because its lines
can't be found without reading what is before them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gpt2_xla.data.inputs import InputFile, UnreadableInput, clear_remote_errors, file_system
from gpt2_xla.errors import UserError

UNIT_BYTES = 16 * 2**20  # of text: long against starting a task, short against the work that a kill loses
TOLD = 5  # bad files that an error names; a wrong --text-column makes hundreds of them
# Text per byte of a compressed file, for the estimate of the work only.
EXPANSION = 3.5


@dataclass(frozen=True)
class Unit:
    """Whole files, or a stretch of one."""

    index: int
    files: tuple[InputFile, ...]
    start: int = 0  # first row group of a parquet file; first byte of others
    stop: int | None = None  # one past the last; None for all of it
    first_row: int = 0  # rows of the parquet file before the first row group
    text_bytes: int = 0  # about how much text


@dataclass(frozen=True)
class Columns:
    """How to read rows, and where from."""

    text: str
    id: str | None = None  # the column of document ids, if there is one
    streaming: bool = False
    cache_dir: str | None = None
    whole_documents: bool = True  # a long text file stays one piece


@dataclass(frozen=True)
class Plan:
    """All units, and the files that can't be read (their names and what is wrong)."""

    units: tuple[Unit, ...]
    bad: dict[str, str]
    download: int = 0  # bytes that are to be downloaded and kept

    @property
    def text_bytes(self) -> int:
        """About how much text there is."""
        return sum(unit.text_bytes for unit in self.units)


def plan_units(files: list[InputFile], columns: Columns, skip_bad: bool) -> Plan:
    """Cut the input into units. UserError with all files that are no parquet or lack the column, unless `skip_bad`."""
    units: list[Unit] = []
    bad: dict[str, str] = {}
    batch: list[InputFile] = []  # small text files
    for file in files:
        whole = file.kind == "text" and (columns.whole_documents or file.size <= UNIT_BYTES or not file.is_local)
        if batch and (not whole or sum(held.size for held in batch) + file.size > UNIT_BYTES):
            units.append(_batch_unit(len(units), batch))
            batch = []
        if whole:
            batch.append(file)
            continue
        try:
            units += _stretches(len(units), file, columns)
        except UserError as error:
            bad[file.name] = "; ".join(error.mistakes)
    if batch:
        units.append(_batch_unit(len(units), batch))
    if bad and not skip_bad:
        told = list(bad.values())
        more = [f"and the same or other mistakes in {len(told) - TOLD:,} more files"] if len(told) > TOLD else []
        raise UserError([*told[:TOLD], *more])
    return Plan(tuple(units), bad)


def _batch_unit(index: int, files: list[InputFile]) -> Unit:
    return Unit(index, tuple(files), text_bytes=sum(file.size for file in files))


def _stretches(index: int, file: InputFile, columns: Columns) -> list[Unit]:
    if file.kind == "parquet":
        return _row_groups(index, file, columns)
    if file.kind == "pydoc":
        return [Unit(index, (file,), text_bytes=10**6)]
    if not file.is_local or file.name.endswith((".gz", ".zst")):
        expansion = EXPANSION if file.name.endswith((".gz", ".zst")) else 1
        return [Unit(index, (file,), text_bytes=int(file.size * expansion))]
    starts = range(0, max(1, file.size), UNIT_BYTES)
    stops = [*starts[1:], file.size]
    return [
        Unit(index + i, (file,), start, stop, text_bytes=stop - start)
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def _row_groups(index: int, file: InputFile, columns: Columns) -> list[Unit]:
    """One unit per row group; small ones together."""
    units: list[Unit] = []
    with open_parquet(file, columns, plan_only=True) as parquet:
        metadata = parquet.metadata
        _check_column(file, parquet.schema_arrow, columns.text)
        leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == columns.text)
        start = row = first_row = size = 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).column(leaf).total_uncompressed_size
            row += metadata.row_group(group).num_rows
            if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
                units.append(Unit(index + len(units), (file,), start, group + 1, first_row, size))
                start, first_row, size = group + 1, row, 0
    return units


def _check_column(file: InputFile, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise UserError(f"{file.url} has no --text-column {column}; its columns: {', '.join(schema.names)}")
    kind = schema.field(column).type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"--text-column {column} of {file.url} holds {kind}, expected text")


@contextmanager
def open_parquet(file: InputFile, columns: Columns, plan_only: bool = False) -> Iterator[Any]:
    """A pyarrow ParquetFile. A hub file is downloaded first unless it is streamed or only its footer is wanted."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_binary(file, columns, plan_only) as source, pyarrow.parquet.ParquetFile(source) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"{error}".splitlines()[0][:160]
        mistake = f"{file.url} can't be read as parquet ({what}); copy it again or leave it out"
        raise UnreadableInput(file.name, mistake) from error


@contextmanager
def open_binary(file: InputFile, columns: Columns, plan_only: bool = False) -> Iterator[Any]:
    """A file's bytes; local, downloaded or streamed."""
    from gpt2_xla.data import hub

    if file.is_local:
        with open(file.url, "rb") as local:  # noqa: PTH123 - a url that is a path
            yield local
    elif file.url.startswith("hf://") and not columns.streaming and not plan_only:
        with open(hub.downloaded(file.url, columns.cache_dir), "rb") as local:  # noqa: PTH123
            yield local
    else:
        with clear_remote_errors(file.url):
            fs, path = file_system(file.url)
            with fs.open(path, "rb") as remote:
                yield remote
