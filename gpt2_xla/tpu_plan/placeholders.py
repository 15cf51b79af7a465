"""The XLA runtimes with placeholders instead of data: what they queue can be traced and compiled, but not run."""

import dataclasses

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch_xla.core.xla_builder import create_placeholder_tensor

from gpt2_xla.config import XlaConfig, XlaPretrainConfig
from gpt2_xla.runtime.mesh import Layout, MeshShape
from gpt2_xla.runtime.stop_signals import StopRequest
from gpt2_xla.runtime.xla_partition import Partition, partition_spec
from gpt2_xla.runtime.xla_runtime import XlaRuntime
from gpt2_xla.runtime.xla_spmd_runtime import XlaSpmdRuntime

REPLICATED = "{replicated}"


class Placeholders(XlaRuntime):
    """What both planning runtimes do otherwise than those they plan for."""

    held: dict[str, Tensor]  # the program's arguments by name
    kind: str  # of the devices planned for
    row_parts: int  # programs that share a micro-step's sequences

    def hold(self, name: str, like: Tensor) -> Tensor:
        """A new argument of the program, of that shape and dtype; a parameter for a parameter."""
        self.held[name] = create_placeholder_tensor(like.shape, like.dtype)
        tensor = self.held[name].clone()  # a mark on this one leaves that one the argument that it is
        return nn.Parameter(tensor) if isinstance(like, nn.Parameter) else tensor

    def hold_batch(self, config: XlaPretrainConfig) -> Tensor:
        """Tokens (A, B, T+1) of one step of one program."""
        rows = config.data.train_batch_size // self.row_parts
        shape = (config.data.gradient_accum_step, rows, config.model.seq_length + 1)
        return self.hold("batch", torch.empty(shape, dtype=torch.int64, device="meta"))

    def place(self, model: nn.Module) -> nn.Module:
        """Give a model that has no memory placeholders for parameters."""
        made: dict[Tensor, Tensor] = {}
        for prefix, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in made:  # a tied one stays one
                    made[parameter] = self.hold(f"{prefix}.{name}", parameter)
                setattr(module, name, made[parameter])
        self._lay_out(model)
        self._pull_levers(model)
        return model

    def _lay_out_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """The state is queued zeros by now: replace it, or it would be constants of the program."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            for kind, value in state.items():
                if value.numel() and value.device.type == "xla":
                    state[kind] = self.hold(f"{kind}.{names[parameter]}", value)
        super()._lay_out_state(model, optimizer)

    def end_step(self) -> None:
        """Nothing runs."""

    def _device_kind(self) -> str:
        return self.kind

    def argument_shardings(self) -> dict[str, str]:
        """GSPMD's text by the arguments' names; {} without partitions."""
        return {}

    def result_shardings(self, results: list[Tensor]) -> list[str]:  # noqa: ARG002
        """GSPMD's text for each result; [] without partitions."""
        return []


class PlanReplica(Placeholders):
    """One of `devices` replicas."""

    def __init__(self, config: XlaConfig, devices: int, kind: str) -> None:
        super().__init__(config, StopRequest())
        self.held, self.kind = {}, kind
        self.world_size = self.device_count = self.row_parts = devices

    def _lay_out(self, model: nn.Module) -> None:
        """Equal weights on all replicas are no part of the step."""


class PlanMesh(Placeholders, XlaSpmdRuntime):
    """All devices as one, from a process with as many virtual ones."""

    def __init__(self, config: XlaConfig, kind: str) -> None:
        super().__init__(config)
        self.held, self.kind, self.row_parts = {}, kind, 1
        self.partition: _PlanPartition = _PlanPartition(self.partition.mesh, self.shape)

    def hold(self, name: str, like: Tensor) -> Tensor:
        tensor = super().hold(name, like)
        self.partition.names[tensor] = name
        return tensor

    def hold_batch(self, config: XlaPretrainConfig) -> Tensor:
        batch = super().hold_batch(config)
        self.partition.mark(batch, self._rows_layout(1, batch.dim()))
        return batch

    def argument_shardings(self) -> dict[str, str]:
        return {name: self.partition.texts.get(name, REPLICATED) for name in self.held}

    def result_shardings(self, results: list[Tensor]) -> list[str]:
        # Parameters and state are changed in place: the results are the very tensors that were marked.
        return [self.partition.texts.get(self.partition.names.get(result, ""), REPLICATED) for result in results]


class _PlanPartition(Partition):
    """Marks placeholders, which torch_xla's own mark_sharding would try to copy to the devices."""

    def __init__(self, mesh: xs.Mesh, shape: MeshShape) -> None:
        super().__init__(mesh, shape)
        self.names: dict[Tensor, str] = {}
        self.texts: dict[str, str] = {}

    def mark(self, tensor: Tensor, layout: Layout) -> None:
        torch_xla._XLAC._xla_annotate_custom_sharding(tensor, self.mesh.get_op_sharding(partition_spec(layout)))
        self.texts[self.names[tensor]] = torch_xla._XLAC._get_xla_sharding_spec(tensor)


def plan_runtime(config: XlaPretrainConfig, devices: int, kind: str) -> PlanReplica | PlanMesh:
    """The runtime that plans for what `config` says, on `devices` devices that PJRT calls `kind`."""
    runtime = dataclasses.replace(config.runtime, compile_cache=None)
    return PlanMesh(runtime, kind) if runtime.sharding == "fsdp" else PlanReplica(runtime, devices, kind)
