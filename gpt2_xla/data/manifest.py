"""manifest.json: what a folder of token shards holds, and the checks that it still does."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gpt2_xla.data.prepare_hint import prepare_hint
from gpt2_xla.data.shards import DTYPES, read_header
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.errors import UserError

FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard. `documents` counts the end-of-text tokens in it; None where only the shard's header is known."""

    file: str
    tokens: int
    documents: int | None = None
    sha256: str | None = None
    first_document: str | None = None  # id of the document that its first token belongs to
    last_document: str | None = None


@dataclass(frozen=True)
class InputEntry:
    """One input file, and how to notice that it has changed."""

    file: str
    bytes: int
    version: str  # etag or content hash of a remote file, time of the last change (ns) of a local one


@dataclass(frozen=True)
class Manifest:
    """The tokens of one split. What a bare folder of .npy files can't tell is None."""

    split: str
    dtype: str
    tokens: int
    shards: tuple[ShardEntry, ...]
    tokenizer: str | None = None
    tokenizer_hash: str | None = None
    vocab_size: int | None = None  # ids are 0..vocab_size-1
    end_of_text: int | None = None
    documents: int | None = None  # end-of-text tokens
    text_bytes: int | None = None  # UTF-8 bytes of the text behind the tokens, for bits per byte
    source: tuple[str, ...] = ()
    command: str | None = None  # the options that decide the bytes; where they go and how fast is left out
    inputs: tuple[InputEntry, ...] = ()  # all that was read; built-in sources are told by their version in `source`
    split_rule: str | None = None  # which documents are in this split
    unused_documents: int | None = None  # in no split: set apart by --valid-share, beyond --valid-tokens
    unused_tokens: int | None = None
    duplicates: int | None = None  # documents that --dedup exact dropped, of both splits; None without it
    skipped_files: tuple[str, ...] = ()  # files that could not be read, and why (--skip-bad-files)
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over all that decides a batch: tokenizer hash, vocabulary, dtype, and the shards in order.

        The same tokens prepared from another path, or by another command, have the same fingerprint.
        """
        content = {
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "dtype": self.dtype,
            "shards": [[shard.file, shard.tokens, shard.sha256] for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def paths(self, folder: Path) -> list[Path]:
        """The shards' files, in order."""
        return [folder / shard.file for shard in self.shards]


def write(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; it appears whole or not at all."""
    with atomic_write(folder / FILE_NAME) as file:
        file.write((json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read(folder: Path) -> Manifest:
    """The manifest of a folder, or one inferred from the headers of its .npy files if it has none.

    Raises UserError for a missing or empty folder and for a manifest that is malformed or points out of its folder.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data folder {folder} {what}; {prepare_hint(folder)}")
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return _infer(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / FILE_NAME} can't be read: {error}") from error
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / FILE_NAME} is malformed ({error}); prepare the data again") from error


def _infer(folder: Path) -> Manifest:
    paths = sorted(path for path in folder.glob("*.npy") if not path.name.startswith("."))
    if not paths:
        inner = [name for name in ("train", "valid") if (folder / name / FILE_NAME).exists()]
        hint = f"did you mean {folder / inner[0]}?" if inner else prepare_hint(folder)
        raise UserError(f"data folder {folder} holds neither {FILE_NAME} nor .npy shards; {hint}")
    headers = [read_header(path) for path in paths]
    dtypes = {header.dtype.name for header in headers}
    if len(dtypes) > 1:
        raise UserError(f"data folder {folder} mixes shards of {' and '.join(sorted(dtypes))}; convert them to one")
    shards = tuple(ShardEntry(path.name, header.tokens) for path, header in zip(paths, headers, strict=True))
    return Manifest(split=folder.name, dtype=dtypes.pop(), tokens=sum(s.tokens for s in shards), shards=shards)


def _parse(content: Any) -> Manifest:
    """Raises ValueError or TypeError that says what is wrong."""
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    if content.get("version") != 1:
        raise ValueError(f"version {content.get('version')!r}, expected 1")
    known = {field.name for field in fields(Manifest)}
    values = {key: value for key, value in content.items() if key in known}  # later versions may add fields
    if missing := {"split", "dtype", "tokens", "shards"} - values.keys():
        raise ValueError(f"no {', '.join(sorted(missing))}")
    _check_types(values)
    shards = tuple(_parse_shard(entry) for entry in values["shards"])
    if not shards:
        raise ValueError("no shards")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    if sum(shard.tokens for shard in shards) != values["tokens"]:
        raise ValueError(f"its shards sum to {sum(s.tokens for s in shards)} tokens, it claims {values['tokens']}")
    values["inputs"] = tuple(_parse_input(entry) for entry in values.get("inputs", ()))
    lists = {name: tuple(values.get(name, ())) for name in ("source", "skipped_files")}
    return Manifest(**{**values, **lists, "shards": shards})


def _check_types(values: dict[str, Any]) -> None:
    optional_counts = (
        "vocab_size", "end_of_text", "documents", "text_bytes", "unused_documents", "unused_tokens", "duplicates",
    )  # fmt: skip
    for name in ("tokens", *optional_counts):
        value = values.get(name)
        if not _is_count(value) and not (value is None and name in optional_counts):
            raise ValueError(f"{name} is {value!r}, expected a count")
    for name in ("split", "tokenizer", "tokenizer_hash", "command", "split_rule"):
        if not isinstance(values.get(name), str | None):
            raise ValueError(f"{name} is {values[name]!r}, expected a string")
    if values["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {values['dtype']!r}, expected {' or '.join(DTYPES)}")
    for name in ("shards", "source", "inputs", "skipped_files"):
        if not isinstance(values.get(name, []), list):
            raise ValueError(f"{name} must be a list")


def _parse_shard(entry: Any) -> ShardEntry:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not _is_count(entry.get("tokens")):
        raise ValueError(f"shard {entry!r:.80} has no file and tokens")
    name = entry["file"]
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"shard {name!r} is not a plain file name")
    documents, sha256 = entry.get("documents"), entry.get("sha256")
    if not isinstance(sha256, str | None) or not (documents is None or _is_count(documents)):
        raise ValueError(f"shard {name!r} has a bad documents or sha256")
    first, last = entry.get("first_document"), entry.get("last_document")
    if not isinstance(first, str | None) or not isinstance(last, str | None):
        raise ValueError(f"shard {name!r} has a bad first_document or last_document")
    return ShardEntry(name, entry["tokens"], documents, sha256, first, last)


def _parse_input(entry: Any) -> InputEntry:
    try:
        return InputEntry(str(entry["file"]), int(entry["bytes"]), str(entry["version"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"input {entry!r:.80} has no file, bytes and version") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def verify(folder: Path, manifest: Manifest, full: bool) -> None:
    """Hold every shard against the manifest: size, length and dtype; its sha256 too if `full` (about 1 s per GB and core).

    Raises one UserError with all that is wrong.
    """
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(lambda shard: list(_problems(folder, manifest, shard, full)), manifest.shards))
    if any(problems):
        raise UserError([problem for one in problems for problem in one])


def _problems(folder: Path, manifest: Manifest, shard: ShardEntry, full: bool) -> Iterator[str]:
    path = folder / shard.file
    try:
        header = read_header(path)
    except UserError as error:
        yield from error.mistakes
        return
    if header.tokens != shard.tokens:
        yield f"shard {path} holds {header.tokens} tokens, its manifest says {shard.tokens}: prepare the data again"
    if header.dtype.name != manifest.dtype:
        yield f"shard {path} is {header.dtype.name}, its manifest says {manifest.dtype}: prepare the data again"
    if not full or shard.sha256 is None:
        return
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        yield f"shard {path} can't be read: {error.strerror}"
        return
    if found != shard.sha256:
        yield f"shard {path} has changed since it was prepared (its sha256 differs): copy it again or prepare the data again"
