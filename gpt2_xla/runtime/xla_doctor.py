"""What the doctor measures of the XLA devices, in a process of its own: python -m gpt2_xla.runtime.xla_doctor

xmp.spawn starts the replicas as training does; each reports its device, a matmul and an all-reduce over all of them.
"""

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr

from gpt2_xla.doctor.children import report
from gpt2_xla.runtime.device_checks import check_all_reduce, check_matmul


def replica(_: int) -> None:
    """One replica's reports."""
    device = torch_xla.device()
    rank, world = xr.global_ordinal(), xr.world_size()
    kind = xr.device_type()
    memory = xm.get_memory_info(device) if kind == "TPU" else {}  # the CPU client does not implement it
    report(
        stage="device",
        rank=rank,
        world=world,
        name=xm.xla_device_kind(device),
        type=kind,
        used=memory.get("bytes_used"),
        total=memory.get("bytes_limit"),
        coordinates=xr.runtime_device_attributes(str(device)).get("coords"),
    )
    check_matmul(device, "bfloat16", 4096 if kind == "TPU" else 512, wait, rank=rank)
    check_all_reduce(sum_over_replicas, device, rank, world, wait)


def sum_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """The sum over all replicas, in a new tensor."""
    return xm.all_reduce(xm.REDUCE_SUM, value)


def wait() -> None:
    """Launch what is queued and wait until it is done."""
    torch_xla.sync()
    xm.wait_device_ops()


if __name__ == "__main__":
    xmp.spawn(replica)
