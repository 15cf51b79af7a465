"""Killed at any moment and started again, a preparation makes what an uninterrupted one makes, byte for byte."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
KILLS = 20


def write_source(folder: Path) -> Path:
    """80 MB of text, so 6 units, in parquet and JSONL, with duplicates."""
    folder.mkdir()
    words = [f"word{i}" for i in range(5000)]
    chance = random.Random(0)
    bodies = [" ".join(chance.choices(words, k=chance.randrange(5, 800))) for _ in range(500)]
    texts = [f"document {i} {bodies[i % 500]}" for i in range(20_000)]
    table = pa.table({"text": texts + texts[:500], "id": [f"<urn:{i}>" for i in range(len(texts) + 500)]})
    pq.write_table(table, folder / "a.parquet", row_group_size=1000)
    pq.write_table(table.slice(0, 6000), folder / "b.parquet", row_group_size=500)
    return folder


def start(source: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_fineweb.py"), "--dataset", str(source)]
    command += ["--tokenizer", "bytes", "--shard-size", "9000000", "--dedup", "exact", "--valid-tokens", "2000000"]
    command += ["--valid-share", "0.04"]
    command += ["--output-dir", str(out), "--num-workers", str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def hashes(folder: Path) -> dict[str, str]:
    files = [file for split in ("train", "valid") for file in sorted((folder / split).iterdir())]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    started = time.monotonic()
    whole = start(source, tmp_path / "whole", workers=1)
    output, _ = whole.communicate(timeout=PATIENCE)
    assert whole.returncode == 0, output
    length = time.monotonic() - started
    expected = hashes(tmp_path / "whole")
    assert len(expected) > 10

    chance = random.Random(1)
    kills = finished = 0
    out = tmp_path / "killed"
    while kills < KILLS:
        process = start(source, out, workers=1 + kills % 2)
        # A run that is nearly through ends early, so moments of a whole run's length would often come too late.
        try:
            process.wait(chance.uniform(0.3, 0.3 + 0.7 * length))
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=PATIENCE)
            assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
            kills += 1
        else:
            assert process.returncode == 0, process.communicate()[0]
            finished += 1
            assert hashes(out) == expected
            assert sorted(path.name for path in out.iterdir()) == ["train", "valid"]
            out = tmp_path / f"killed{finished}"
    process = start(source, out, workers=2)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert hashes(out) == expected
    assert sorted(path.name for path in out.iterdir()) == ["train", "valid"]
