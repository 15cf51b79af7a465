"""Where documents come from: an iterator of texts for every kind of source, always in the same order."""

import gzip
import json
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2_xla.config import FinewebConfig
from gpt2_xla.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HUB = "huggingface.co"


def describe(source: str) -> str:
    """A source as the manifest records it: the built-in ones are those of one Python version."""
    return f"{source} of CPython {platform.python_version()}" if source in ("pydoc", "stdlib") else source


def text_documents(sources: tuple[str, ...], text_column: str) -> Iterator[str]:
    """The documents of all sources: "pydoc", "stdlib", files or folders.

    Text files are one document each, rows of .jsonl(.gz) and .parquet files one each. Raises UserError at once for sources
    that don't exist or hold nothing to read, and on the way for files that can't be read, are not UTF-8 or lack the column.
    """
    parts: list[Iterator[str]] = []
    mistakes: list[str] = []
    for source in sources:
        try:
            if source == "pydoc":
                parts.append(_pydoc_documents())
            elif source == "stdlib":
                parts += [_file_documents(file, text_column) for file in _stdlib_files()]
            else:
                parts += [_file_documents(file, text_column) for file in _files(Path(source))]
        except UserError as error:
            mistakes += error.mistakes
    if mistakes:
        raise UserError(mistakes)
    return (document for part in parts for document in part)


def _pydoc_documents() -> Iterator[str]:
    """The language reference that every CPython carries for help(), one topic per document."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in root.rglob("*.py") if not SKIPPED_FOLDERS & set(file.relative_to(root).parts)]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _files(path: Path) -> list[Path]:
    """The file itself, or a folder's readable files, recursively, in the order of their names; hidden ones left out."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--source {path} does not exist; expected pydoc, stdlib, a file or a folder")
    files = [
        file
        for file in path.rglob("*")
        if file.name.endswith(TEXT_SUFFIXES + ROW_SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"--source {path} holds no {', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} files")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _file_documents(file: Path, text_column: str) -> Iterator[str]:
    if file.name.endswith(".parquet"):
        return _parquet_documents(file, text_column)
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_documents(file, text_column)
    return _text_document(file)


def _text_document(file: Path) -> Iterator[str]:
    try:
        # Bytes, because text mode would turn \r\n into \n.
        yield file.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start}); "
            "convert it to UTF-8 or leave it out"
        ) from error


def _jsonl_documents(file: Path, text_column: str) -> Iterator[str]:
    try:
        with _open_lines(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _jsonl_text(line, f"{file}:{number}", text_column)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is cut short or damaged ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror or error}") from error


def _open_lines(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _jsonl_text(line: bytes, place: str, text_column: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not a line of JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get(text_column, None), str):
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}, no object"
        raise UserError(f"{place} has no text in --text-column {text_column}; its fields: {fields}")
    return row[text_column]


def check_parquet(file: Path, text_column: str) -> None:
    """Read a parquet file's footer; UserError if it is no parquet file or has no such column of text."""
    import pyarrow.parquet

    with _clear_parquet_errors(file):
        schema = pyarrow.parquet.read_schema(file)
    if text_column not in schema.names:
        raise UserError(f"{file} has no --text-column {text_column}; its columns: {', '.join(schema.names)}")
    kind = schema.field(text_column).type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"--text-column {text_column} of {file} holds {kind}, expected text")


def _parquet_documents(file: Path, text_column: str) -> Iterator[str]:
    import pyarrow.parquet

    check_parquet(file, text_column)
    with _clear_parquet_errors(file), pyarrow.parquet.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=256, columns=[text_column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


@contextmanager
def _clear_parquet_errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"{error}".splitlines()[0][:160]
        raise UserError(f"{file} can't be read as parquet ({what}); copy it again or leave it out") from error


def fineweb_documents(config: FinewebConfig) -> Iterator[str]:
    """The documents of a Hugging Face dataset, or of a local parquet file or folder, through `datasets`.

    Raises UserError at once for a path or column that does not exist or no network, and on the way for damaged files.
    """
    if config.fineweb_edu and config.dataset != FinewebConfig.dataset:
        raise UserError(f"--fineweb-edu and --dataset {config.dataset} name two datasets; give one of them")
    path = Path(config.dataset)
    if path.exists():
        files = [file for file in _files(path) if file.suffix == ".parquet"]
        if not files:
            raise UserError(f"--dataset {path} holds no .parquet files")
        for file in files:
            check_parquet(file, config.text_column)
        return (document for file in files for document in _builder_documents(file, config.text_column))
    if path.is_absolute() or config.dataset.startswith(("./", "../", "~")) or config.dataset.count("/") > 1:
        raise UserError(f"--dataset {config.dataset}: no such file or folder")
    return _hub_documents(config)


def _builder_documents(file: Path, text_column: str) -> Iterator[str]:
    """One local file, by datasets' parquet builder; streamed, because storing it a second time helps nobody."""
    import datasets

    with _clear_parquet_errors(file):
        rows = datasets.load_dataset("parquet", data_files=[str(file)], split="train", streaming=True)
        for row in rows.select_columns([text_column]):
            if row[text_column] is not None:
                yield row[text_column]


def _hub_documents(config: FinewebConfig) -> Iterator[str]:
    import datasets

    dataset = "HuggingFaceFW/fineweb-edu" if config.fineweb_edu else config.dataset
    try:
        rows = datasets.load_dataset(
            dataset, name=config.name, split=config.split, streaming=config.streaming, cache_dir=config.cache_dir
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"--dataset {dataset} is not on {HUB}, or private; give its name there or a local path"
        ) from error
    except ValueError as error:  # unknown configuration or split: the message lists those there are
        raise UserError(f"--dataset {dataset} --name {config.name} --split {config.split}: {error}") from error
    except _network_errors() as error:
        raise _unreachable(dataset, error) from error
    columns = rows.column_names or []
    if columns and config.text_column not in columns:
        raise UserError(f"{dataset} has no --text-column {config.text_column}; its columns: {', '.join(columns)}")
    return _hub_rows(rows, dataset, config.text_column)


def _hub_rows(rows: Any, dataset: str, text_column: str) -> Iterator[str]:
    try:
        for row in rows.select_columns([text_column]):
            if row[text_column] is not None:
                yield row[text_column]
    except _network_errors() as error:
        raise _unreachable(dataset, error) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises without a network: requests' errors are OSErrors, those of httpx, its successor, are not."""
    try:
        from httpx import HTTPError
    except ImportError:  # an older huggingface_hub
        return (OSError,)
    return (OSError, HTTPError)


def _unreachable(dataset: str, error: Exception) -> UserError:
    what = f"{error}".splitlines()[0][:160]
    return UserError(
        f"--dataset {dataset} can't be read from {HUB} ({what}); check the network and the disk, "
        "or give local parquet files with --dataset PATH"
    )
