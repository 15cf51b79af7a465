"""What the doctor measures of torch's devices, in a process of its own.

python -m gpt2_xla.runtime.torch_doctor devices     each device: name, memory, a matmul
python -m gpt2_xla.runtime.torch_doctor all-reduce  all GPUs through NCCL, or two CPU processes through gloo
"""

import os
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from gpt2_xla.doctor.children import report
from gpt2_xla.runtime.device_checks import check_all_reduce, check_matmul


def accelerator() -> tuple[str, int]:
    """Kind and number of the accelerators that torch finds; cpu, 0 without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (found.type, torch.accelerator.device_count()) if found else ("cpu", 0)


def devices() -> None:
    """Report every device, and a matmul on each."""
    kind, count = accelerator()
    report(stage="torch", version=str(torch.__version__), cuda=torch.version.cuda, hip=torch.version.hip)
    report(stage="device", device="cpu", name=f"threads that torch uses: {torch.get_num_threads()}")
    for dtype in ("float32", "bfloat16"):
        check_matmul(torch.device("cpu"), dtype, 1024, lambda: None)
    for index in range(count):
        device = torch.device(kind, index)
        if kind == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            peers = sum(torch.cuda.can_device_access_peer(index, other) for other in range(count) if other != index)
            name = torch.cuda.get_device_name(device)
            report(stage="device", device=str(device), name=name, free=free, total=total, peers=peers, others=count - 1)
        else:
            report(stage="device", device=str(device), name=kind)
        check_matmul(device, "bfloat16", 4096, lambda device=device: torch.accelerator.synchronize(device))  # type: ignore[misc]


def all_reduce() -> None:
    """Start one process per GPU, or two on CPU, as torchrun would; each reports."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, world = ("nccl", count) if count else ("gloo", 2)
    report(stage="begin", world=world, backend=backend)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_process, (world, backend, f"{folder}/store"), nprocs=world, start_method="spawn")


def _process(rank: int, world: int, backend: str, store: str) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )

    def reduce(value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    check_all_reduce(
        reduce, device, rank, world, lambda: torch.cuda.synchronize() if backend == "nccl" else None, backend=backend
    )
    dist.destroy_process_group()


def main() -> None:
    """Run the part that the argument names."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # those of a torchrun that is none
        os.environ.pop(name, None)
    {"devices": devices, "all-reduce": all_reduce}[sys.argv[1]]()


if __name__ == "__main__":
    main()
