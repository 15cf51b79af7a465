"""The pipeline: documents → one temporary token stream → train/ and valid/ shards with their manifests.

The number of worker processes decides how long this takes, never what it makes.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from gpt2_xla.config import FinewebConfig, PrepareConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.encode import default_workers, encode_all
from gpt2_xla.data.manifest import Manifest, ShardEntry
from gpt2_xla.data.output import SPLITS, clear_os_errors, publish, work_folder
from gpt2_xla.data.shards import write_shard
from gpt2_xla.data.sources import describe, fineweb_documents, text_documents
from gpt2_xla.data.stream import Stream, split_at_document
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import Tokenizer, load_tokenizer

# Options that say where the data goes and how fast it gets there; all others decide its bytes.
NOT_IN_COMMAND = {"output_dir", "num_workers", "cache_dir", "streaming"}
Value = TypeVar("Value")


@dataclass(frozen=True)
class Job:
    """One run of the pipeline."""

    output_dir: Path
    documents: Iterator[str]
    tokenizer: Tokenizer
    num_workers: int
    shard_size: int
    split_at: Callable[[Stream], int]  # the first token of valid/; the stream's length for no valid/
    has_valid: bool
    source: tuple[str, ...]
    seed: int
    command: str


def prepare_text(config: PrepareConfig) -> None:
    """Prepare pydoc, stdlib, files and folders. valid/ is the last --valid-fraction of the token stream.

    Raises UserError for mistakes in the options, the sources and the output folder, and if nothing can be written.
    """
    mistakes = _number_mistakes(config)
    if not 0 <= config.valid_fraction < 1:
        mistakes.append(f"--valid-fraction {config.valid_fraction} must be at least 0 and below 1")
    if not config.source:
        mistakes.append("--source needs at least one of pydoc, stdlib, a file or a folder")
    tokenizer = _attempt(mistakes, lambda: load_tokenizer(config.tokenizer))
    documents = _attempt(mistakes, lambda: text_documents(config.source, config.text_column))
    if mistakes or tokenizer is None or documents is None:
        raise UserError(mistakes)

    def split_at(stream: Stream) -> int:
        if config.valid_fraction == 0:
            return stream.tokens
        return int((stream.tokens - stream.documents) * (1 - config.valid_fraction))

    source = tuple(describe(source) for source in config.source)
    _prepare(_job(config, "prepare_text.py", documents, tokenizer, split_at, config.valid_fraction > 0, source))


def prepare_fineweb(config: FinewebConfig) -> None:
    """Prepare FineWeb or a dataset of its schema. valid/ is whole documents from the end.

    Raises UserError for mistakes in the options, the dataset and the output folder, without network, and if nothing can be
    written.
    """
    mistakes = _number_mistakes(config)
    if config.valid_tokens < 0:
        mistakes.append(f"--valid-tokens {config.valid_tokens} must be 0 or more")
    tokenizer = _attempt(mistakes, lambda: load_tokenizer(config.tokenizer))
    # Asking the hub may take long, so only for a command that is right otherwise.
    documents = _attempt(mistakes, lambda: fineweb_documents(config)) if not mistakes else None
    if mistakes or tokenizer is None or documents is None:
        raise UserError(mistakes)
    dataset = "HuggingFaceFW/fineweb-edu" if config.fineweb_edu else config.dataset
    source = (dataset,) if Path(dataset).exists() else (f"{dataset} {config.name} {config.split}",)

    def split_at(stream: Stream) -> int:
        return split_at_document(stream, config.valid_tokens)

    _prepare(_job(config, "prepare_fineweb.py", documents, tokenizer, split_at, config.valid_tokens > 0, source))


def _number_mistakes(config: PrepareConfig | FinewebConfig) -> list[str]:
    mistakes = []
    if config.shard_size < 1:
        mistakes.append(f"--shard-size {config.shard_size} must be 1 or more tokens")
    if config.num_workers is not None and config.num_workers < 1:
        mistakes.append(f"--num-workers {config.num_workers} must be 1 or more")
    return mistakes


def _attempt(mistakes: list[str], make: Callable[[], Value]) -> Value | None:
    """What `make` returns; None, and its mistakes on the list, if it raises UserError."""
    try:
        return make()
    except UserError as error:
        mistakes += error.mistakes
        return None


def _job(
    config: PrepareConfig | FinewebConfig,
    script: str,
    documents: Iterator[str],
    tokenizer: Tokenizer,
    split_at: Callable[[Stream], int],
    has_valid: bool,
    source: tuple[str, ...],
) -> Job:
    return Job(
        output_dir=Path(config.output_dir),
        documents=documents,
        tokenizer=tokenizer,
        num_workers=config.num_workers or default_workers(),
        shard_size=config.shard_size,
        split_at=split_at,
        has_valid=has_valid,
        source=source,
        seed=config.seed,
        command=command_of(config, script),
    )


def command_of(config: PrepareConfig | FinewebConfig, script: str) -> str:
    """The command with every option that decides the bytes, so that a later default can't change what it means."""
    words = ["python", f"scripts/{script}"]
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if name in NOT_IN_COMMAND or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _prepare(job: Job) -> None:
    with clear_os_errors(job.output_dir):
        if _is_prepared(job):
            print(f"{job.output_dir} already holds this data; delete the folder to prepare it again")
        else:
            with work_folder(job.output_dir) as work:
                stream = _tokenize(job, work / "stream.bin")
                _write_splits(job, stream, work)
                publish(job.output_dir, work)
    _report(job)


def _is_prepared(job: Job) -> bool:
    """Whether this very command has filled the output folder before. UserError if it holds anything else."""
    splits = {split: job.output_dir / split for split in SPLITS}
    found = {split: folder for split, folder in splits.items() if folder.exists() and any(folder.iterdir())}
    for folder in found.values():
        if not (folder / manifests.FILE_NAME).exists():
            raise UserError(f"{folder} holds files that no prepare command wrote; choose another --output-dir")
        manifest = manifests.read(folder)
        for what, theirs, ours in (
            ("tokenizer's hash", manifest.tokenizer_hash, job.tokenizer.hash),
            ("command", manifest.command, job.command),
            ("source", ", ".join(manifest.source), ", ".join(job.source)),
        ):
            if theirs != ours:
                raise UserError(
                    f"{folder} holds other data: its {what} is {theirs!r}, this one's {ours!r}; "
                    "choose another --output-dir or delete that folder"
                )
        try:
            manifests.verify(folder, manifest, full=False)
        except UserError as error:
            raise UserError([*error.mistakes, f"delete {folder} to prepare it again"]) from error
    return set(found) == (set(SPLITS) if job.has_valid else {"train"})


def _tokenize(job: Job, path: Path) -> Stream:
    """Write all documents' tokens to `path`, with a progress bar. UserError if there are none."""
    from tqdm import tqdm

    stream = Stream(path, job.tokenizer)
    tokens = 0
    with (
        closing(encode_all(job.documents, job.tokenizer, job.num_workers)) as chunks,
        path.open("wb") as file,
        tqdm(desc="tokenize", unit="B", unit_scale=True) as bar,
    ):
        for chunk in chunks:
            file.write(chunk.tokens.tobytes())
            stream.documents += chunk.documents
            stream.chunk_tokens.append(len(chunk.tokens))
            stream.chunk_bytes.append(chunk.text_bytes)
            tokens += len(chunk.tokens)
            bar.set_postfix_str(f"{stream.documents:,} documents, {tokens:,} tokens", refresh=False)
            bar.update(chunk.text_bytes)
    if tokens == 0:
        raise UserError(f"{', '.join(job.source)}: there is no text in it")
    return stream


def _write_splits(job: Job, stream: Stream, work: Path) -> None:
    """Cut the stream into shards, last first, giving its disk space back shard by shard; manifests last."""
    total, split = stream.tokens, job.split_at(stream)
    if split == 0:
        raise UserError(
            f"{', '.join(job.source)}: too little text to split ({total} tokens); use a smaller share for valid/"
        )
    train_bytes = stream.text_bytes_before(split)
    common = Manifest(
        split="train",
        dtype=stream.dtype,
        tokens=split,
        shards=(),
        tokenizer=job.tokenizer.name,
        tokenizer_hash=job.tokenizer.hash,
        vocab_size=job.tokenizer.vocab_size,
        end_of_text=job.tokenizer.end_of_text,
        text_bytes=train_bytes,
        source=job.source,
        seed=job.seed,
        command=job.command,
    )
    if split < total:
        valid = replace(common, split="valid", tokens=total - split, text_bytes=stream.text_bytes - train_bytes)
        _write_split(job, stream, work, valid, split)
    _write_split(job, stream, work, common, 0)


def _write_split(job: Job, stream: Stream, work: Path, manifest: Manifest, first: int) -> None:
    folder = work / manifest.split
    folder.mkdir()
    entries: list[ShardEntry] = []
    itemsize = np.dtype(stream.dtype).itemsize
    for index in reversed(range(-(-manifest.tokens // job.shard_size))):
        start = index * job.shard_size
        tokens = stream.read(first + start, first + min(start + job.shard_size, manifest.tokens))
        name = f"{manifest.split}_{index:05d}.npy"
        sha256 = write_shard(folder / name, tokens)
        entries.insert(0, ShardEntry(name, len(tokens), len(stream.ends(tokens)), sha256))
        del tokens
        os.truncate(stream.path, (first + start) * itemsize)
    documents = sum(entry.documents or 0 for entry in entries)
    manifests.write(folder, replace(manifest, shards=tuple(entries), documents=documents))


def _report(job: Job) -> None:
    """Print what the folder holds, and the command that trains on it."""
    print(f"\n{'split':<6} {'shards':>7} {'documents':>12} {'tokens':>16} {'text':>12}")
    words = ["python", "run_pretrain.py"]
    for split in SPLITS:
        folder = job.output_dir / split
        if folder.exists():
            held = manifests.read(folder)
            megabytes = f"{(held.text_bytes or 0) / 1e6:,.2f} MB"
            print(f"{split:<6} {len(held.shards):>7,} {held.documents or 0:>12,} {held.tokens:>16,} {megabytes:>12}")
            words += [f"--{split}-dir", str(folder)]
    print(f"\ntrain on it with:\n  {shlex.join(words)}")
