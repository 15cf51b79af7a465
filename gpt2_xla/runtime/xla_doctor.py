"""What the doctor measures of the XLA devices, in a process of its own: python -m gpt2_xla.runtime.xla_doctor

xmp.spawn starts the replicas as training does; each reports its device, a matmul and an all-reduce over all of them.
"""

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from gpt2_xla.doctor.children import report
from gpt2_xla.runtime.device_checks import check_all_reduce, check_matmul
from gpt2_xla.runtime.xla_spawn import spawn_replicas


def replica(_: int) -> None:
    """One replica's reports."""
    device = torch_xla.device()
    rank, world = xr.global_ordinal(), xr.world_size()
    name = xm.xla_device_kind(device)
    try:
        memory = xm.get_memory_info(device)
    except RuntimeError:  # the CPU client does not tell
        memory = {}
    report(
        stage="device",
        rank=rank,
        world=world,
        name=name,
        type=xr.device_type(),
        used=memory.get("bytes_used"),
        total=memory.get("bytes_limit"),
        coordinates=xr.runtime_device_attributes(str(device)).get("coords"),
    )
    check_matmul(device, "bfloat16", 512 if name == "cpu" else 4096, wait, rank=rank)
    check_all_reduce(sum_over_replicas, device, rank, world, wait)


def sum_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """The sum over all replicas, in a new tensor."""
    return xm.all_reduce(xm.REDUCE_SUM, value)


def wait() -> None:
    """Launch what is queued and wait until it is done."""
    torch_xla.sync()
    xm.wait_device_ops()


if __name__ == "__main__":
    spawn_replicas(replica)
