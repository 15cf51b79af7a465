"""All XLA devices as one (SPMD): weights, gradients, optimizer state and batches cut up over a mesh.

One process per host traces the program of one device that holds everything; XLA's partitioner (GSPMD) cuts it into the
program of each device, from the marks set here, and adds the collectives: --sharding fsdp.
"""

import contextlib
import math
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn

from gpt2_xla import optim as optimizers
from gpt2_xla.config import XlaConfig
from gpt2_xla.model import GPT
from gpt2_xla.muon import orthogonalized
from gpt2_xla.runtime.cuda_host import gpu_kind
from gpt2_xla.runtime.mesh import AXES, ROWS, Layout, mesh_shape
from gpt2_xla.runtime.pjrt_cuda import register_devices, start_client
from gpt2_xla.runtime.stop_signals import StopRequest
from gpt2_xla.runtime.tpu_host import tpu_chips
from gpt2_xla.runtime.votes import Votes, join_hosts, leave_hosts
from gpt2_xla.runtime.xla_partition import WHOLE, ByHeads, Partition, partition_spec
from gpt2_xla.runtime.xla_runtime import XlaRuntime
from gpt2_xla.runtime.xla_shards import copied, own_blocks, put_together, shard_bytes, tiles
from gpt2_xla.shares import Share

HOSTS_PORT = 12355  # host 0 listens here for the others


def start_devices() -> tuple[int, int]:
    """Start PJRT for SPMD, unless this process has: the devices of all hosts, and the hosts."""
    if not xr.is_spmd():
        register_devices()
        xr.use_spmd()
    start_client()
    return xr.global_runtime_device_count(), xr.process_count()


class XlaSpmdRuntime(XlaRuntime):
    """See `Runtime`. A "replica" is a host's process here: `rank` of `world_size` hosts, each of which loads its own rows."""

    def __init__(self, config: XlaConfig, stop: StopRequest | None = None) -> None:
        devices, hosts = start_devices()
        asked = stop or StopRequest()
        self._votes: Votes | None = None
        if hosts > 1:
            join_hosts(xr.get_master_ip(), HOSTS_PORT, xr.process_index(), hosts)
            self._votes = Votes(asked, None)
        super().__init__(config, self._votes or asked)
        self.rank, self.world_size, self.device_count = xr.process_index(), hosts, devices
        self.writers = hosts
        self.shape = mesh_shape(config.mesh, devices)
        # The order of the runtime's own global ordinals, the same on every host.
        self.partition = Partition(xs.Mesh(np.arange(devices), self.shape.sizes, AXES), self.shape)
        self._held: list[Tensor] = []

    def describe(self) -> str:
        hosts = f" of {self.world_size} hosts" if self.world_size > 1 else ""
        megabytes = sum(map(shard_bytes, self._held)) / 1e6
        return (
            f"{super().describe()}{hosts}, mesh {self.shape}, "
            f"parameters and optimizer state: {megabytes:,.2f} MB per device"
        )

    def _lay_out(self, model: nn.Module) -> None:
        assert isinstance(model, GPT)  # the marks are for its modules
        self.partition.cut_model(model)
        self._held += model.parameters()

    def _mapped(self) -> ByHeads:
        return ByHeads(self.partition)

    def _lay_out_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in model.named_parameters():
            for value in optimizer.state[parameter].values():
                if value.shape == parameter.shape:  # not the step count
                    self.partition.mark(value, self.partition.stored(name, parameter))
        self._held += optimizers.named_state(model, optimizer).values()
        if isinstance(optimizer, optimizers.MuonAndAdam):
            names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
            # Each device orthogonalizes whole matrices of its own: cut ones would be added up in every product.
            optimizer.muon.orthogonalize = lambda stacked: orthogonalized(
                self.partition.cut(stacked, (AXES, WHOLE, WHOLE))
            )
            optimizer.muon.cut = lambda update, parameter: self.partition.cut(
                update, self.partition.stored(names[parameter], parameter)
            )

    def batches(self, host_batches: Iterator[Tensor], rows_dim: int) -> Generator[Tensor, None, None]:
        if self.world_size == 1:
            yield from super().batches(host_batches, rows_dim)
            return
        # torch_xla joins the hosts' parts of a batch only along the first dimension, and only if that is cut over all devices.
        rows_first = (batch.movedim(rows_dim, 0).contiguous() for batch in host_batches)
        with contextlib.closing(super().batches(rows_first, 0)) as ready:
            for batch in ready:
                yield self.partition.cut(batch.movedim(0, rows_dim), self._rows_layout(rows_dim, batch.dim()))

    def _input_sharding(self, rows_dim: int) -> Any:
        if self.world_size > 1:
            return xs.ShardingSpec(self.partition.mesh, (AXES, None, None), minibatch=True)
        return xs.ShardingSpec(self.partition.mesh, partition_spec(self._rows_layout(rows_dim, 3)))

    def _rows_layout(self, rows_dim: int, dims: int) -> Layout:
        return tuple(ROWS if dim == rows_dim else WHOLE for dim in range(dims))

    def seed_dropout(self, seed: int) -> None:
        # Every host runs the same program: the masks of a step are those of the whole batch.
        xm.set_rng_state(seed, str(self.device))

    def _average(self, tensors: list[Tensor]) -> None:
        """Nothing: the program is that of all devices, and so are its gradients and its loss."""

    def mean(self, value: Tensor) -> Tensor:
        return value  # computed from the batch of all devices already

    def to_host(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Share]:
        buffers.clear()  # see XlaRuntime
        found: list[Share] = []
        for name, tensor in tensors.items():
            value = tensor.detach()
            if value.device.type == "cpu" or math.prod(tiles(value)) == 1:
                if self.rank == 0:
                    found.append(Share.whole(name, copied(value)))
            elif self.writers == 1:
                # Not .cpu(), which would compile a program for each tensor, each time.
                found.append(Share.whole(name, put_together(value)))
            else:
                found += (Share(name, block, at, tuple(value.shape)) for block, at in own_blocks(value))
        return found

    def agree_on(self, value: int) -> bool:
        return self._votes is None or self._votes.equal(value)

    def close(self) -> None:
        super().close()
        if self._votes is not None:
            leave_hosts()

    def peak_memory(self) -> int | None:
        return super().peak_memory() if xr.device_type() == "CPU" else None  # torch_xla 2.9 refuses to tell under SPMD

    def _device_kind(self) -> str:
        # From the PCI bus or NVIDIA's driver: torch_xla 2.9 knows only the one virtual device.
        device, chips = xr.device_type(), tpu_chips()
        found = gpu_kind() if device == "CUDA" else chips[0] if chips else None
        return found or str(device)
