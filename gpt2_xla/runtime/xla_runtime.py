"""A replica of xmp.spawn: one XLA device (TPU, CPU, or a plugin's) with its own copy of the model."""

import contextlib
import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla.amp import syncfree
from torch_xla.distributed.parallel_loader import MpDeviceLoader

from gpt2_xla import optim as optimizers
from gpt2_xla.config import OptimConfig, XlaConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT
from gpt2_xla.runtime.base import CompileStats
from gpt2_xla.runtime.memory import peak_resident
from gpt2_xla.runtime.micro_step_loop import MicroStepLoop
from gpt2_xla.runtime.peaks import gpu_peak, tpu_peak
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.stop_signals import StopSource
from gpt2_xla.runtime.torch_runtime import clip_gradients
from gpt2_xla.runtime.xla_levers import pull_levers
from gpt2_xla.runtime.xla_profile import xla_profile
from gpt2_xla.runtime.xla_shards import copied
from gpt2_xla.runtime.xla_splash import Mapped
from gpt2_xla.shares import Share, whole_shares

_cache_lock = threading.Lock()


class XlaRuntime:
    """See `Runtime`. Operations are queued as a graph, which end_step() compiles once and then only launches."""

    compiles = True

    def __init__(self, config: XlaConfig, stop: StopSource) -> None:
        self.config, self._stop = config, stop
        if config.compile_cache:
            _open_compile_cache(Path(config.compile_cache))
        self.device = torch_xla.device()
        self.rank, self.world_size, self.writers = xr.global_ordinal(), xr.world_size(), 1
        self._loops: dict[tuple[nn.Module, torch.Size], MicroStepLoop] = {}
        self.device_count = self.world_size  # over all hosts
        self._attention = ""  # chosen when the model is placed
        if config.mixed_precision == "no":
            _set_matmul_precision(config.matmul_precision)

    def describe(self) -> str:
        return f"{self.device_count} × XLA {xr.device_type()} (torch_xla {torch_xla.__version__}){self._attention}"

    def place(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if isinstance(model, GPT):
            model.tie_weights()  # moving to an XLA device makes two tensors of a tied one
        self._lay_out(model)
        self._pull_levers(model)  # after the layout, whose own attention a lever may wrap
        self.end_step()
        return model

    def _pull_levers(self, model: nn.Module) -> None:
        if isinstance(model, GPT):
            attention = pull_levers(model, self.config, self._device_kind(), self._mapped())
            self._attention = f", {attention} attention"

    def _mapped(self) -> Mapped | None:
        """Who holds which heads, if not each device all of its own."""
        return None

    def _lay_out(self, model: nn.Module) -> None:
        """Before the first launch: who holds which part of the weights. Here every replica gets rank 0's."""
        if self.world_size > 1:
            xm.broadcast_master_param(model)

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
        precision = torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32
        if not self.config.use_syncfree_optim:
            # Counting on the device: the host cannot know which steps were skipped.
            optimizer = optimizers.build_torch_optimizer(
                model, optim, fused=False, capturable=True, matmul_dtype=precision
            )
            optimizers.prime_state(model, optimizer)
        else:
            optimizer = optimizers.build_optimizer(model, optim, functools.partial(syncfree_adam, optim), precision)
            optimizers.prime_state(model, optimizer)
            for state in optimizer.state.values():
                if "exp_avg" in state:
                    state["max_exp_avg_sq"] = torch.empty(0, dtype=torch.float, device=self.device)
        self._lay_out_state(model, optimizer)
        self.end_step()
        return optimizer

    def _lay_out_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Before the first launch: who holds which part of the optimizer's state. Here every replica has all of it."""

    def batches(self, host_batches: Iterator[Tensor], rows_dim: int) -> Generator[Tensor, None, None]:
        source = _Relay(host_batches)
        loader = MpDeviceLoader(
            source,
            self.device,
            loader_prefetch_size=self.config.loader_prefetch_size,
            device_prefetch_size=self.config.device_prefetch_size,
            batches_per_execution=2**62,  # end_step() alone launches
            input_sharding=self._input_sharding(rows_dim),
        )
        try:
            yield from loader
            source.raise_error()
        finally:
            if loader._parallel_loader is not None:  # private, checked on 2.9: the loader has no close() of its own
                loader._parallel_loader.close()

    def _input_sharding(self, rows_dim: int) -> Any:  # noqa: ARG002
        """How a batch lies on the devices, for MpDeviceLoader; here a replica has one device."""
        return None

    def seed_dropout(self, seed: int) -> None:
        # The seed enters the graph as data, not as a constant: no recompile.
        xm.set_rng_state(seed + self.rank, str(self.device))

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast("xla", dtype=torch.bfloat16)

    def compute_gradients(self, forward: nn.Module, batch: Tensor) -> Tensor:
        key = (forward, batch.shape)
        if key not in self._loops:
            self._loops[key] = MicroStepLoop(forward, batch, self.autocast)
        return self._loops[key](batch)

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: Tensor) -> Tensor:
        self._average([*(parameter.grad for parameter in model.parameters() if parameter.grad is not None), loss])
        norm = clip_gradients(model, max_grad_norm)
        values = torch.stack([loss, norm])
        step = _syncfree_step if self.config.use_syncfree_optim else optimizers.step_unless
        optimizers.take_step(optimizer, optimizers.not_finite(values), step)
        optimizer.zero_grad(set_to_none=True)
        return values

    def _average(self, tensors: list[Tensor]) -> None:
        """Replace gradients and loss by their means over the replicas, in one all-reduce."""
        if self.world_size > 1:
            xm.all_reduce(xm.REDUCE_SUM, tensors, scale=1.0 / self.world_size)

    def mean(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            return xm.all_reduce(xm.REDUCE_SUM, value, scale=1.0 / self.world_size)
        return value

    def end_step(self) -> None:
        torch_xla.sync()

    def fetch_later(self, value: Tensor) -> Callable[[], list[float]]:
        return lambda: value.cpu().tolist()  # a launched tensor is copied as it is: no graph, no compilation

    def to_host(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Share]:
        buffers.clear()  # a copy from an XLA device always is in new memory: let go of the last one first
        if self.rank == 0:
            buffers.update({name: copied(tensor.detach()) for name, tensor in tensors.items()})
        return whole_shares(buffers)

    def should_stop(self) -> bool:
        return self._stop.poll()

    def request_stop(self) -> None:
        self._stop.request_stop()

    def agree_on(self, value: int) -> bool:  # noqa: ARG002
        return True  # replicas of one host read one and the same folder

    def abandon(self, error: Exception) -> None:
        if isinstance(self._stop, ReplicaBoard):
            self._stop.report_failure(error)

    def scaler_state(self) -> dict[str, Any] | None:
        return None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        pass  # no fp16 here, so no scaler

    def compile_stats(self) -> CompileStats:
        timing = xla_metrics.metric_data("CompileTime")  # (count, total nanoseconds, samples)
        fetches = xla_metrics.metric_data("TransferFromDeviceTime")
        return CompileStats(
            count=int(timing[0]) if timing else 0,
            seconds=timing[1] / 1e9 if timing else 0.0,
            executions=_count("ExecuteComputation") + _count("ExecuteReplicated"),
            fetches=int(fetches[0]) if fetches else 0,
            cache_hits=_count("PersistentCacheHit"),
            cache_misses=_count("PersistentCacheMiss"),
            cache_failures=_count("PersistentCacheDeserializeFailure"),
        )

    def graph_hash(self, queued: Tensor) -> str:
        # Private, checked on 2.9. 0.3 ms for the loss and the norm of 12 layers; the whole step with its optimizer: 2 ms.
        return torch_xla._XLAC._get_graph_hash([queued]).hex()[:12]

    def profile(self, folder: Path, name: str) -> AbstractContextManager[str]:  # noqa: ARG002 - XProf names its files
        return xla_profile(folder)

    def peak_memory(self) -> int | None:
        if xr.device_type() == "CPU":
            return peak_resident()
        try:
            information = xm.get_memory_info(self.device)
        except RuntimeError:  # a plugin may leave that out
            return None
        return int(information.get("peak_bytes_used", information["bytes_used"]))

    def peak_flops(self) -> float | None:
        if xr.device_type() == "CPU" or self.config.mixed_precision == "no":
            return None
        kind = self._device_kind()
        peak = tpu_peak(kind) or gpu_peak(kind)
        return peak * self.device_count if peak else None

    def _device_kind(self) -> str:
        """What PJRT calls a device of this kind."""
        return str(xm.xla_device_kind(str(self.device)))

    def close(self) -> None:
        self._stop.close()


def syncfree_adam(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch_xla's AdamW or Adam, which can skip a step on the device."""
    kind = syncfree.Adam if optim.optim_type == "adam" else syncfree.AdamW
    return kind(groups, **optimizers.optimizer_arguments(optim))


def _syncfree_step(adam: torch.optim.Optimizer, skip: Tensor) -> None:
    adam.step(found_inf=skip)  # type: ignore[call-overload]


def _count(name: str) -> int:
    """One of torch_xla's counters; 0 before it first counts."""
    return int(xla_metrics.counter_value(name) or 0)


class _Relay:
    """An iterable whose error survives MpDeviceLoader, which would print it in a thread and end the data early."""

    def __init__(self, items: Iterator[Tensor]) -> None:
        self._items = items
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Tensor]:
        try:
            yield from self._items
        except Exception as error:  # noqa: BLE001 - raised again in the loop by raise_error()
            self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _set_matmul_precision(wanted: str) -> None:
    """float32 matmuls on TPU run in bf16 unless told otherwise; torch_xla's levels are default, high and highest."""
    if importlib.util.find_spec("torch_xla.backends") is None:  # torch_xla 2.7, which has no way to say it
        return
    import torch_xla.backends as backends

    logger = logging.getLogger("torch_xla.backends")
    logger.setLevel(logging.ERROR)  # it warns at every call
    backends.set_mat_mul_precision("default" if wanted == "medium" else wanted)


def _open_compile_cache(folder: Path) -> None:
    """Keep this replica's programs in a folder of its own: two writers of one file would spoil it.

    Raises `UserError` if it cannot be written.
    """
    # Under SPMD a host has one program for all its devices, and the ordinal is 0 on every host.
    ordinal = xr.process_index() if xr.is_spmd() else xr.global_ordinal()
    own = folder / f"replica-{ordinal}"
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--compile-cache {folder} cannot be written: {error.strerror or error}") from error
    with _cache_lock:  # threads of one process share one cache
        if not os.environ.get("XLA_PERSISTENT_CACHE_PATH"):
            xr.initialize_cache(str(own))
    if ordinal == 0 and xr.device_type() == "CPU":
        print(
            "note: --compile-cache saves nothing on CPU: torch_xla writes the programs but cannot read them back",
            flush=True,
        )
