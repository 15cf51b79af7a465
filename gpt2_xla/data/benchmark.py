"""How fast data is prepared: our command, the pipeline most people write, and the bare tokenizers, on one input.

Every row runs in processes of its own, from a parquet file to shards on disk (the bare tokenizers: texts in memory to ids).
"""

import hashlib
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_xla.bench_config import DataBenchConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.documents import read_unit
from gpt2_xla.data.encoder import ReferenceEncoder, fast_encoder
from gpt2_xla.data.inputs import inputs_of
from gpt2_xla.data.shards import open_shard
from gpt2_xla.data.units import Columns, plan_units
from gpt2_xla.errors import UserError
from gpt2_xla.tokenizer import load_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_fineweb.py"
CHANGED = 0.01  # share of the letters that are replaced: every twentieth word is one that no cache has seen
CODE_EVERY = 5  # every fifth document is Python source or documentation


@dataclass(frozen=True)
class Row:
    """One measurement."""

    what: str
    text_bytes: int
    tokens: int
    cost: "Cost"


@dataclass(frozen=True)
class Cost:
    """What a command took, start included."""

    seconds: float
    core_seconds: float  # of all its processes together: what other work on the machine does not change
    memory: int  # bytes, the peak of all its processes together


def bench_data(config: DataBenchConfig, say: Callable[[str], None]) -> list[Row]:
    """Measure every row. UserError where the sample is missing or two pipelines disagree about a token."""
    if not Path(config.sample).is_dir():
        raise UserError(f"--sample {config.sample} is no folder; give one with parquet files of web pages")
    with tempfile.TemporaryDirectory(prefix="bench_data_") as name:
        folder = Path(name)
        say(f"writing {config.megabytes} MB of distinct text")
        text_bytes = write_input(folder / "in.parquet", Path(config.sample), config.megabytes * 10**6)
        rows: list[Row] = []
        expected: np.ndarray | None = None
        for workers in config.workers:
            for what, run in (("baseline", _run_baseline), ("ours", _run_ours)):
                say(f"{what}, {workers} workers")
                out = folder / f"{what}{workers}"
                cost = run(folder / "in.parquet", out, config.tokenizer, workers)
                tokens = _tokens_under(out)
                expected = tokens if expected is None else expected
                if not np.array_equal(tokens, expected):
                    raise UserError(f"{what} with {workers} workers made other tokens than the first row")
                rows.append(Row(f"{what}, {_count(workers)}", text_bytes, len(tokens), cost))
        for what in ("tiktoken", "gigatoken"):
            say(f"bare {what}")
            cost = _measured(_bare, folder / "in.parquet", config.tokenizer, what, folder / what)
            seconds, core_seconds = map(float, (folder / what).read_text().split())  # without reading the texts
            assert expected is not None
            cost = Cost(seconds, core_seconds, cost.memory)
            rows.append(Row(f"bare {what}, texts in memory", text_bytes, len(expected), cost))
    return rows


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def table(rows: list[Row], cores: int) -> str:
    """The rows as a Markdown table; each pipeline's ratios are to the baseline with as many workers."""
    lines = [
        f"| {cores} cores | MB/s | tokens/s | MB per core-second | peak memory | time against the baseline | core-seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = {row.what.split(", ")[1]: row.cost for row in rows if row.what.startswith("baseline")}
    for row in rows:
        cost, than = row.cost, base.get(row.what.split(", ")[1])
        wall, core = (
            (f"{than.seconds / cost.seconds:.1f} ×", f"{than.core_seconds / cost.core_seconds:.1f} ×")
            if than
            else ("", "")
        )
        lines.append(
            f"| {row.what} | {row.text_bytes / cost.seconds / 1e6:,.1f} | {row.tokens / cost.seconds / 1e6:,.2f} M "
            f"| {row.text_bytes / cost.core_seconds / 1e6:,.1f} | {cost.memory / 1e6:,.0f} MB | {wall} | {core} |"
        )
    return "\n".join(lines)


def write_input(path: Path, sample: Path, text_bytes: int) -> int:
    """A parquet file of FineWeb's shape: `text_bytes` of pages and code, each document different; returns its exact size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    total, rows = 0, 0
    schema = pa.schema([("text", pa.string()), ("id", pa.string())])
    seen: set[bytes] = set()
    texts = distinct_texts(sample)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while total < text_bytes:
            group = list(islice(texts, 1000))
            for text in group:
                digest = hashlib.blake2b(text, digest_size=16).digest()
                assert digest not in seen
                seen.add(digest)
            ids = [f"<urn:bench:{rows + i}>" for i in range(len(group))]
            writer.write_table(pa.table({"text": [text.decode() for text in group], "id": ids}, schema))
            total, rows = total + sum(map(len, group)), rows + len(group)
    return total


def distinct_texts(sample: Path) -> Iterator[bytes]:
    """Web pages and, between them, pieces of Python's sources and documentation, round after round, each time misspelt anew."""
    pages = _documents(str(sample))
    code = [
        text[start : start + 3000]
        for text in [*_documents("pydoc"), *_documents("stdlib")]
        for start in range(0, len(text), 3000)
    ]
    other = cycle(code)
    number = 0
    while True:
        for i, page in enumerate(pages):
            for text in [page, next(other)] if i % (CODE_EVERY - 1) == 0 else [page]:
                yield misspell(text, number)
                number += 1


def misspell(text: bytes, number: int) -> bytes:
    """The text with its number in front and 1 % of its ASCII letters replaced, at random, always the same way."""
    random = np.random.default_rng(number)
    letters = np.frombuffer(text, np.uint8).copy()
    places = np.flatnonzero((letters >= ord("a")) & (letters <= ord("z")))
    places = places[random.random(len(places)) < CHANGED]
    letters[places] = random.integers(ord("a"), ord("z") + 1, len(places), np.uint8)
    cut = letters.tobytes().decode(errors="ignore").encode()  # code was cut anywhere
    return b"%d\n" % number + cut


def _documents(source: str) -> list[bytes]:
    columns = Columns("text")
    plan = plan_units(inputs_of(source, "--sample"), columns, skip_bad=False)
    return [text for unit in plan.units for batch in read_unit(unit, columns) for text in batch.texts]


def _run_ours(source: Path, out: Path, tokenizer: str, workers: int) -> Cost:
    command = [sys.executable, str(SCRIPT), "--dataset", str(source), "--output-dir", str(out)]
    command += ["--tokenizer", tokenizer, "--num-workers", str(workers), "--valid-tokens", "0"]
    return _measured(_run_command, command)


def _run_command(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _run_baseline(source: Path, out: Path, tokenizer: str, workers: int) -> Cost:
    out.mkdir()
    return _measured(_baseline, source, out, tokenizer, workers)


def _baseline(source: Path, out: Path, tokenizer: str, workers: int) -> None:
    """One process reads rows, a pool tokenizes documents, lists of tokens come back and fill a shard-sized array."""
    import pyarrow.parquet as pq

    with (
        pq.ParquetFile(source) as parquet,
        multiprocessing.get_context("spawn").Pool(workers, _start_baseline, (tokenizer,)) as pool,
    ):
        rows = (text for batch in parquet.iter_batches(columns=["text"]) for text in batch.column(0).to_pylist())
        shard = np.empty(100_000_000, np.uint16)
        filled = number = 0
        for tokens in pool.imap(_tokenize_row, rows, chunksize=128):
            room = len(shard) - filled
            shard[filled : filled + len(tokens)] = tokens[:room]
            filled += min(room, len(tokens))
            if len(tokens) >= room:
                np.save(out / f"train_{number:05d}.npy", shard)
                shard[: len(tokens) - room] = tokens[room:]
                filled, number = len(tokens) - room, number + 1
        np.save(out / f"train_{number:05d}.npy", shard[:filled])


_encoding: Any  # tiktoken's, in the baseline's processes


def _start_baseline(tokenizer: str) -> None:
    global _encoding
    import tiktoken

    _encoding = tiktoken.get_encoding(tokenizer)


def _tokenize_row(text: str) -> list[int]:
    return [*_encoding.encode_ordinary(text), _encoding.eot_token]


def _bare(source: Path, tokenizer: str, what: str, answer: Path) -> None:
    """Texts in memory to ids, 1000 at a time; writes the seconds and core-seconds it took."""
    texts = _documents(str(source))
    loaded = load_tokenizer(tokenizer)
    encoder = ReferenceEncoder(loaded) if what == "tiktoken" else fast_encoder(loaded)
    assert encoder.name == what
    encoder.encode(texts[:1])  # imports
    start, core_start = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), 1000):
        encoder.encode(texts[first : first + 1000])
    answer.write_text(f"{time.perf_counter() - start} {time.process_time() - core_start}")


def _measured(function: Callable[..., None], *arguments: object) -> Cost:
    """What a call costs in a new process."""
    import psutil

    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    start, core_start = time.perf_counter(), _core_seconds()
    process.start()
    assert process.pid is not None
    peak = 0
    while process.is_alive():
        peak = max(peak, _resident(psutil.Process(process.pid)))
        process.join(0.1)
    seconds = time.perf_counter() - start
    if process.exitcode != 0:
        raise UserError(f"the measured process ended with status {process.exitcode}")
    return Cost(seconds, _core_seconds() - core_start, peak)


def _core_seconds() -> float:
    """Of all ended children, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(parent: "psutil.Process") -> int:  # type: ignore[name-defined] # noqa: F821
    """Resident memory; pages that processes share, such as the interpreter's, count for each of them."""
    import psutil

    total = 0
    try:
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:
        return 0  # one of them has just ended
    return total


def _tokens_under(out: Path) -> np.ndarray:
    folder = out / "train" if (out / "train").is_dir() else out
    return np.concatenate([open_shard(path) for path in manifests.read(folder).paths(folder)])
