"""Memory of a torch device: how much a process may take, how to hold it to that, and how running out of it looks."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

from gpt2_xla.doctor.host import memory

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def memory_mistakes(device: str) -> list[str]:
    """Why --find-batch can't measure on a device of that type; empty if it can."""
    if device == "cuda" or (device == "cpu" and sys.platform == "linux"):
        return []
    return [
        f"--find-batch measures memory on CUDA GPUs and, on Linux, on CPUs, but the device is {device}; leave it out"
    ]


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU; of a CPU's memory its share among this host's processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available, _, _ = memory()
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def hold_to(device: torch.device, limit: int) -> None:
    """Have this process run out of memory at `limit` bytes of a GPU. On a CPU only its parent can see to that."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(device)[1]), device)


def peak(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the GPU by torch; on a CPU all that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_resident()


def peak_resident() -> int:
    """The most bytes of RAM that this process has held so far."""
    if sys.platform == "linux":
        return _status(os.getpid(), "VmHWM")  # ru_maxrss would count the parent, which this process was forked from
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def resident(pid: int) -> int:
    """Bytes of RAM that a process holds; 0 if it is gone."""
    try:
        return _status(pid, "VmRSS")
    except OSError:
        return 0


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed for the next step, which asks for the same again.

    It would hand large blocks back to the kernel, which clears each of their pages when the next step touches it: a tenth of
    a step on a CPU. Where malloc is another one, or the environment has settings for it, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)  # no block is mapped by itself, to be unmapped when it is freed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no more memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(str(error)) is not None


def _status(pid: int, field: str) -> int:
    """A size from /proc/PID/status, in bytes; 0 for a process that has ended but was not waited for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
