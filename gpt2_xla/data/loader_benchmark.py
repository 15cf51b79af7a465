"""How fast the loader is at scale: start-up, seek, throughput and memory over sparse shards, each row in its own process."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpt2_xla.bench_config import BenchLoaderConfig
from gpt2_xla.config import DataConfig, ModelConfig, PretrainConfig
from gpt2_xla.errors import UserError

VOCABULARY = 50257
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds, memory in bytes."""

    seq_length: int
    folders: int
    start_up: float  # manifests and headers read, shards checked by their lengths
    seek: float  # from there to the first batch at --seek-step
    tokens_per_second: float
    memory: int  # resident, that the loader added


def write_sparse_folder(folder: Path, shards: int, shard_size: int) -> None:
    """Shards that are holes after their headers: they read as zeros, and take no room on the disk."""
    folder.mkdir()
    for number in range(shards):
        with (folder / f"train_{number:05d}.npy").open("wb") as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (shard_size,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2 * shard_size)


def bench(config: BenchLoaderConfig) -> list[Row]:
    """Measure every sequence length, on one folder and on a mixture of two; raises `UserError` if one fails."""
    mistakes = [
        f"--{name.replace('_', '-')} {value} must be at least 1"
        for name, value in vars(config).items()
        if isinstance(value, int) and value < 1
    ]
    if not 0 < config.seconds < math.inf:
        mistakes.append(f"--seconds {config.seconds} must be a number above 0")
    mistakes += [f"--seq-lengths {length} must be at least 1" for length in config.seq_lengths if length < 1]
    if mistakes:
        raise UserError(mistakes)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, name) for name in ("one", "two")]
        for folder in folders:
            write_sparse_folder(folder, config.shards, config.shard_size)
        for mixture in ([str(folders[0])], [f"{folders[0]}:0.7", f"{folders[1]}:0.3"]):
            for length in config.seq_lengths:
                arguments = {"train_dirs": mixture, "seq_length": length} | {
                    name: getattr(config, name) for name in ("tokens_per_step", "seek_step", "seconds")
                }
                # A process a row: resident memory is a process's own.
                code = f"from gpt2_xla.data import loader_benchmark as b; b.print_row(**{arguments!r})"
                done = subprocess.run(
                    [sys.executable, "-c", code],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    cwd=Path(__file__).resolve().parents[2],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise UserError(f"T = {length} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
                rows.append(Row(**json.loads(done.stdout)))
    return rows


def print_row(**arguments: object) -> None:
    """Measure one row in this process and print it as JSON."""
    print(json.dumps(asdict(measure(**arguments))))  # type: ignore[arg-type]


def measure(train_dirs: list[str], seq_length: int, tokens_per_step: int, seek_step: int, seconds: float) -> Row:
    """Open the folders as a training run does, seek, read for `seconds`, and time the same steps read again."""
    from gpt2_xla.data.pretraining import PretrainingData

    config = PretrainConfig(
        model=ModelConfig(vocab_size=VOCABULARY, seq_length=seq_length),
        data=DataConfig(
            train_dir=tuple(train_dirs),
            train_batch_size=max(1, tokens_per_step // seq_length),
            eval_batch_size=1,
            gradient_accum_step=1,
            verify_data="size",
        ),
    )
    memory = _resident()
    before = time.perf_counter()
    data = PretrainingData.open(config, rank=0, world_size=1)
    start_up, before = time.perf_counter() - before, time.perf_counter()
    first = config.batch_sizes.before(seek_step)
    next(data.training(first, 10**9))
    seek = time.perf_counter() - before
    steps, before = 0, time.perf_counter()
    for _batch in data.training(first, 10**9):  # brings the windows into the page cache
        steps += 1
        if time.perf_counter() - before > seconds:
            break
    passes = []
    for _ in range(3):  # the best of three: other programs can only make it slower
        before = time.perf_counter()
        for _batch in data.training(first, steps):
            pass
        passes.append(time.perf_counter() - before)
    rate = steps * config.tokens_at(0) / min(passes)
    return Row(seq_length, len(train_dirs), start_up, seek, rate, _resident() - memory)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| T | folders | start-up | first batch after a seek | M tokens/s | added memory |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.seq_length} | {row.folders} | {row.start_up * 1e3:,.0f} ms | {row.seek * 1e3:,.1f} ms "
        f"| {row.tokens_per_second / 1e6:,.0f} | {row.memory / MIB:,.0f} MiB |"
        for row in rows
    ]
    return "\n".join(lines)
