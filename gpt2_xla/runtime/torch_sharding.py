"""The model cut up over torchrun's processes: FSDP2 (`fully_shard`), --sharding fsdp and hsdp.

Each process holds a part of every weight, in float32, and the optimizer's state of that part. A block's weights are put
together just before the block needs them, in half precision where its matmuls take that, and let go of after it.
Gradients are averaged in float32, and each process keeps those of its part.
"""

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2_xla import optim as optimizers
from gpt2_xla.config import OptimConfig, TorchConfig
from gpt2_xla.held_blocks import held, offsets
from gpt2_xla.model import GPT, RMSNorm
from gpt2_xla.muon import orthogonalized
from gpt2_xla.notes import note
from gpt2_xla.runtime.process_mesh import process_mesh, sharding_note, world_size
from gpt2_xla.runtime.rendezvous import wait_for_ever
from gpt2_xla.runtime.stop_signals import StopRequest
from gpt2_xla.runtime.torch_runtime import DTYPES, TorchRuntime, compiled
from gpt2_xla.shares import Share

# Nothing is cast on the way into a module: the residual stream stays what it is.
FLOAT32 = MixedPrecisionPolicy(cast_forward_inputs=False)


def open_torch_runtime(config: TorchConfig, stop: StopRequest | None = None) -> TorchRuntime:
    """The runtime that --sharding asks for. Raises `UserError` for what this machine cannot do."""
    if (sentence := sharding_note(config)) and os.environ.get("RANK", "0") == "0":
        note(sentence)
    sharded = config.sharding in ("fsdp", "hsdp") and world_size() > 1
    return ShardedRuntime(config, stop) if sharded else TorchRuntime(config, stop)


class ShardedRuntime(TorchRuntime):
    """See `Runtime`. A process is a replica as far as batches go; the first copy's processes write its state."""

    def __init__(self, config: TorchConfig, stop: StopRequest | None = None) -> None:
        super().__init__(config, stop)
        self.shape = process_mesh(config)
        self.writers = self.shape.fsdp
        copies = {"data": self.shape.data} if self.shape.data > 1 else {}
        axes = {**copies, "fsdp": self.shape.fsdp}
        self._mesh = init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        for group in self._mesh.get_all_groups():
            wait_for_ever(group)
        self._held: list[Tensor] = []

    def describe(self) -> str:
        megabytes = sum(block.numel() * block.element_size() for block in map(held, self._held)) / 1e6
        return (
            f"{super().describe()}, mesh {self.shape}, "
            f"parameters and optimizer state: {megabytes:,.2f} MB in the first process"
        )

    def place(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, GPT)  # it is cut up block by block
        self._pull_levers(model)
        last = model.blocks[-1]
        for block in model.blocks:
            self._take_from_rank_zero(block)
            self._cut(block, keep=block is last)  # whose weights the backward pass needs at once
        self._take_from_rank_zero(model)
        # What is left is used from the first operation to the last. In float32: the loss adds up the output matrix's
        # gradient in its precision, over many chunks.
        fully_shard(model, mesh=self._mesh, mp_policy=FLOAT32, reshard_after_forward=False)
        model.register_forward_hook(_let_go_after_evaluation)
        return model

    def _take_from_rank_zero(self, module: nn.Module) -> None:
        """Move what is not cut up yet to the device, with rank 0's values: a block at a time has room on any."""
        module.to(self.device)
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                dist.broadcast(parameter.detach(), 0)

    def _cut(self, block: nn.Module, keep: bool) -> None:
        policy = FLOAT32
        if dtype := DTYPES.get(self.config.mixed_precision):
            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if self.config.compile:
            # Not the whole model: it would be compiled in pieces anyway, between one block's weights and the next one's.
            block.forward = compiled(block.forward)
        elif policy is not FLOAT32:
            norms: list[nn.Module] = [
                module for module in block.modules() if isinstance(module, nn.LayerNorm | RMSNorm)
            ]
            fully_shard(norms, mesh=self._mesh, mp_policy=FLOAT32, reshard_after_forward=False)
        fully_shard(block, mesh=self._mesh, mp_policy=policy, reshard_after_forward=not keep)

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(model, optim)
        self._held = [*model.parameters(), *optimizers.named_state(model, optimizer).values()]
        if isinstance(optimizer, optimizers.MuonAndAdam):
            optimizer.muon.whole = _whole
            optimizer.muon.orthogonalize = self._orthogonalize
            optimizer.muon.cut = _cut_like
        return optimizer

    def _orthogonalize(self, matrices: Tensor) -> Tensor:
        """See `orthogonalized`: matrices (N, R, C) that every process has, of which each does its share of the work."""
        share = -(-len(matrices) // self.world_size)
        mine = matrices[self.rank * share : (self.rank + 1) * share]
        done = matrices.new_zeros(share, *matrices.shape[1:])
        if len(mine):
            done[: len(mine)] = orthogonalized(mine)
        gathered = matrices.new_empty(self.world_size * share, *matrices.shape[1:])
        dist.all_gather_into_tensor(gathered, done)
        return gathered[: len(matrices)]

    def _reduction(self, forward: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Average the gradients after the last micro-step only; until then each process adds up its own, uncut."""
        assert isinstance(forward, FSDPModule)
        forward.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        super()._unscale(optimizer)
        # DTensor agrees within a copy only. Private, checked on torch 2.9: how fused optimizers ask.
        for found in self._scaler._found_inf_per_device(optimizer).values():
            dist.all_reduce(found, dist.ReduceOp.MAX)

    def _clip(self, model: nn.Module, max_norm: float) -> Tensor:
        gradients = [held(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        squares = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squares)  # also over the copies, which have the same gradients: one value for all processes
        norm = (squares / self.shape.data).sqrt()
        if max_norm:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def to_host(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Share]:
        if self.rank >= self.writers:
            return []
        # Step counts are no DTensors: each process has them.
        mine = {name: value for name, value in tensors.items() if isinstance(value, DTensor) or self.rank == 0}
        self._copy_to_host({name: held(value) for name, value in mine.items()}, buffers)
        return [Share(name, buffers[name], offsets(value), tuple(value.shape)) for name, value in mine.items()]


def _let_go_after_evaluation(model: nn.Module, _inputs: object, _output: object) -> None:
    """Without a backward pass nothing else would: the weights put together would be stale once others are loaded."""
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _whole(direction: Tensor) -> Tensor:
    return direction.full_tensor() if isinstance(direction, DTensor) else direction


def _cut_like(update: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of an update that every process has computed."""
    assert isinstance(parameter, DTensor)
    return distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
