"""The host: its cores, its memory, and the disk of the run folder."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpt2_xla.doctor.finding import Finding

GIB = 2**30
WRITTEN = 64 * 2**20  # bytes, to measure the disk


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def host_findings(root: Path = Path("/")) -> Iterator[Finding]:
    """Cores with their load, and memory with the limit of a container."""
    load = os.getloadavg()[0]
    text = f"{cores()} cores, load {load:.1f}"
    if load > cores() + 1:
        mend = f"stop the other processes (top shows them), or export OMP_NUM_THREADS={max(1, cores() // 2)}"
        yield Finding("cores", "warning", f"{text}: other processes hold them", mend)
    else:
        yield Finding("cores", "ok", text)
    available, total, limited = memory(root)
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available{' in this container' if limited else ''}"
    if available < 2 * GIB:
        yield Finding(
            "host memory", "warning", f"{text}: loading gpt2 and Adam's state takes 2", "ps aux --sort=-rss | head"
        )
    else:
        yield Finding("host memory", "ok", text)


def memory(root: Path = Path("/")) -> tuple[int, int, bool]:
    """Bytes available and in all, and whether a cgroup's limit is what counts."""
    lines = (line.split() for line in (root / "proc" / "meminfo").read_text().splitlines())
    values = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    available, total = values["MemAvailable"], values["MemTotal"]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = int((root / "sys" / "fs" / "cgroup" / limit).read_text())  # "max" where there is none
            left = most - int((root / "sys" / "fs" / "cgroup" / used).read_text())
        except (OSError, ValueError):
            continue
        if most < total:
            return min(available, left), most, True
    return available, total, False


def disk(run_folder: Path) -> Finding:
    """Whether the run folder can be written, how much is free there, and how fast 64 MiB reach the disk."""
    there = next(folder for folder in (run_folder.absolute(), *run_folder.absolute().parents) if folder.exists())
    elsewhere = "add --checkpoints-dir FOLDER to the command, a folder that can be written, such as ~/runs/gpt2"
    if not there.is_dir():
        return Finding(
            "disk", "problem", f"{there} is a file, so {run_folder} can't be a folder", f"mv {there} {there}.old"
        )
    try:
        speed = _write_speed(there)
    except OSError as error:
        return Finding("disk", "problem", f"{run_folder} can't be written: {error.strerror}", elsewhere)
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free for {run_folder}, written at {speed / 1e6:,.0f} MB/s"
    if free < 2 * GIB:
        mend = f"du -xh -d2 {there} | sort -h | tail   # then delete what is not needed"
        return Finding("disk", "problem", f"{text}: a checkpoint of gpt2 takes 1.5", mend)
    if free < 10 * GIB:
        mend = "add --saved-checkpoint-limit 1 to the command"
        return Finding("disk", "warning", f"{text}; each checkpoint of gpt2 takes 1.5, and 3 are kept", mend)
    if speed < 50e6:
        return Finding("disk", "warning", f"{text}: a checkpoint of gpt2 takes {1.5e9 / speed:,.0f} s", elsewhere)
    return Finding("disk", "ok", text)


def _write_speed(folder: Path) -> float:
    """Bytes per second, flushed; leaves nothing behind."""
    block = os.urandom(2**20)  # not compressible
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN / (time.perf_counter() - started)
