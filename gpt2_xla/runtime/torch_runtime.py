"""One process, or several under torchrun, on CPU, CUDA or any other torch accelerator."""

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gpt2_xla import optim as optimizers
from gpt2_xla.config import OptimConfig, TorchConfig
from gpt2_xla.data.prefetch import prefetch
from gpt2_xla.errors import UserError
from gpt2_xla.held_blocks import held
from gpt2_xla.model import GPT
from gpt2_xla.runtime.base import CompileStats
from gpt2_xla.runtime.cpu_attention import cpu_attention
from gpt2_xla.runtime.fp8 import float8_mistakes, multiply_in_float8
from gpt2_xla.runtime.memory import keep_freed_memory, memory_mistakes, peak_resident
from gpt2_xla.runtime.peaks import gpu_peak
from gpt2_xla.runtime.process_mesh import world_size
from gpt2_xla.runtime.recomputation import recompute_activations
from gpt2_xla.runtime.rendezvous import backend_mistakes, open_group, pick_backend
from gpt2_xla.runtime.stop_signals import StopRequest, StopSource
from gpt2_xla.runtime.votes import Votes
from gpt2_xla.shares import Share, whole_shares

Called = TypeVar("Called", bound=Callable[..., Any])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # fp8: of all but the blocks' matrices


class TorchRuntime:
    """See `Runtime`. Under torchrun each process is one replica, joined by DDP; `ShardedRuntime` cuts the model up."""

    def __init__(self, config: TorchConfig, stop: StopRequest | None = None) -> None:
        if mistakes := device_mistakes(config):
            raise UserError(mistakes)
        self.config = config
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), world_size()
        self.writers = 1
        kind, local_rank = pick_accelerator(config.device), int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(kind) if kind == "cpu" else torch.device(kind, local_rank)
        if kind != "cpu":
            torch.accelerator.set_device_index(local_rank)
        else:
            keep_freed_memory()
        self.backend = pick_backend(config.ddp_backend, kind)
        if config.matmul_precision != "highest":  # torch's own default
            torch.set_float32_matmul_precision(config.matmul_precision)
        self._scaler = GradScaler(self.device.type, enabled=config.mixed_precision == "fp16")
        self.compiles = config.compile
        asked = stop or StopRequest()
        self._stop: StopSource = asked
        self._votes: Votes | None = None
        if self.world_size > 1:
            self._stop = self._votes = Votes(asked, open_group(self.backend, self.device, asked))

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            name += f", {threads} thread{'s' if threads > 1 else ''}"
        return f"{self.world_size} × {name} ({self.backend})" if self.world_size > 1 else f"1 × {name}"

    def place(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if isinstance(model, GPT):
            self._pull_levers(model)
        placed = model
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            placed = DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return compiled(placed) if self.config.compile else placed

    def _pull_levers(self, model: GPT) -> None:
        """The options that trade memory, or precision, for time."""
        if self.config.residual_precision == "bf16":
            model.use(residual_dtype=torch.bfloat16)
        if self.config.mixed_precision == "fp8":
            multiply_in_float8(model)
        if self.device.type == "cpu":
            model.use(attend=cpu_attention)
        again = functools.partial(checkpoint, use_reentrant=False)
        recompute_activations(model, self.config.activation_checkpointing, again)

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
        fused = self.device.type in ("cpu", "cuda")
        precision = torch.bfloat16 if self.config.mixed_precision in ("bf16", "fp8") else torch.float32
        optimizer = optimizers.build_torch_optimizer(model, optim, fused=fused, matmul_dtype=precision)
        optimizers.prime_state(model, optimizer, step_device=None if fused else torch.device("cpu"))
        return optimizer

    def batches(self, host_batches: Iterator[Tensor], rows_dim: int) -> Generator[Tensor, None, None]:  # noqa: ARG002
        with contextlib.closing(prefetch(host_batches, depth=8)) as ready:
            if self.device.type == "cpu":
                yield from ready
                return
            ahead: Tensor | None = None
            for batch in ready:  # copy batch n + 1 while the device still works on batch n
                pinned = batch.pin_memory() if self.device.type == "cuda" else batch
                current, ahead = ahead, pinned.to(self.device, non_blocking=True)
                if current is not None:
                    yield current
            if ahead is not None:
                yield ahead

    def seed_dropout(self, seed: int) -> None:
        torch.manual_seed(seed + self.rank)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.config.mixed_precision])

    def compute_gradients(self, forward: nn.Module, batch: Tensor) -> Tensor:
        losses = []
        for micro_step, tokens in enumerate(batch):  # (A, B, T+1) -> (B, T+1)
            with self._reduction(forward, last=micro_step == len(batch) - 1):
                with self.autocast():
                    loss = forward(tokens[:, :-1], tokens[:, 1:])
                self._scaler.scale(loss / len(batch)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: Tensor) -> Tensor:
        loss = self.mean(loss)
        if self._scaler.is_enabled():
            # The scaler looks at the gradients alone: a loss that is not finite must show in one of them (0 · inf is NaN).
            held(next(p.grad for p in model.parameters() if p.grad is not None and p.dim() < 2)).add_(loss * 0)
            self._unscale(optimizer)
        norm = self._clip(model, max_grad_norm)
        values = torch.stack([loss, norm])
        if self._scaler.is_enabled():
            self._scaler.step(optimizer)
            self._scaler.update()
        else:
            optimizers.take_step(optimizer, optimizers.not_finite(values), _step_unless)
        optimizer.zero_grad(set_to_none=True)
        return values

    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self._scaler.unscale_(optimizer)

    def _clip(self, model: nn.Module, max_norm: float) -> Tensor:
        return clip_gradients(model, max_norm)

    def mean(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def end_step(self) -> None:
        pass  # torch launches each operation as it is called

    def fetch_later(self, value: Tensor) -> Callable[[], list[float]]:
        if self.device.type != "cuda":
            return value.tolist
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[float]:
            copied.synchronize()  # not the stream: the next step may already be queued behind the copy
            return host.tolist()

        return read

    def to_host(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Share]:
        if self.rank != 0:
            return []
        self._copy_to_host(tensors, buffers)
        return whole_shares(buffers)

    def _copy_to_host(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        pinned = self.device.type == "cuda"
        for name, tensor in tensors.items():
            # Fresh memory costs more than the copy: the kernel clears each page when it is first touched.
            if name not in buffers:
                buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            buffers[name].copy_(tensor.detach(), non_blocking=pinned)
        self._wait_for_device()

    def should_stop(self) -> bool:
        return self._stop.poll()

    def request_stop(self) -> None:
        self._stop.request_stop()

    def agree_on(self, value: int) -> bool:
        return self._votes is None or self._votes.equal(value)

    def smallest(self, value: int) -> int:
        """The smallest of the numbers that the replicas pass; waits for them."""
        return value if self._votes is None else self._votes.smallest(value)

    def abandon(self, error: Exception) -> None:
        """torchrun sees the exit status; there is nobody else to tell."""

    def scaler_state(self) -> dict[str, Any] | None:
        return self._scaler.state_dict() if self._scaler.is_enabled() else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)

    def compile_stats(self) -> CompileStats:
        if not self.config.compile:
            return CompileStats()
        # Private, checked on torch 2.9 and 2.11: the only counters torch.compile keeps.
        from torch._dynamo.utils import calculate_time_spent, counters

        return CompileStats(counters["stats"]["unique_graphs"], calculate_time_spent().get("total_wall_time", 0.0))

    @contextlib.contextmanager
    def profile(self, folder: Path, name: str) -> Iterator[str]:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.trace.json.gz"
        self._wait_for_device()
        with torch.profiler.profile(record_shapes=True) as recorded:
            yield f"open {file} at https://ui.perfetto.dev"
            self._wait_for_device()
        recorded.export_chrome_trace(str(file))

    def _wait_for_device(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def graph_hash(self, queued: Tensor) -> str:  # noqa: ARG002
        return ""

    def peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident()

    def peak_flops(self) -> float | None:
        if self.device.type != "cuda" or self.config.mixed_precision == "no":
            return None
        peak = gpu_peak(torch.cuda.get_device_name(self.device))
        return peak * self.world_size if peak else None

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            self._stop.close()
            dist.destroy_process_group()

    def _reduction(self, forward: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Let DDP reduce the gradients after the last micro-step only."""
        wrapped = getattr(forward, "_orig_mod", forward)  # torch.compile's wrapper hides no_sync
        if last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()


def _step_unless(adam: torch.optim.Optimizer, skip: Tensor) -> None:
    """A step of torch's own Adam(W), unless `skip` is 1."""
    if adam.defaults["fused"]:
        adam.found_inf = skip  # type: ignore[attr-defined]
        adam.step()
    elif not skip:  # waits for the device: without the fused kernel nothing there can skip
        adam.step()


def compiled(called: Called) -> Called:
    """What computes the same faster, once it is compiled at its first call."""
    # Shapes never change here, so a symbolic one would only slow the kernels.
    return torch.compile(called, backend="inductor", dynamic=False)  # type: ignore[return-value]


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the global gradient norm (0: only measure it); return it, on the device, without a host sync."""
    if max_norm:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def pick_accelerator(wanted: str) -> str:
    """The device type for --device; raises `UserError` if this machine or this torch lacks it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = accelerator.type if accelerator else "cpu"
    if wanted in ("auto", "cpu", found):
        return found if wanted == "auto" else wanted
    raise UserError(
        f"--device {wanted}: torch {torch.__version__} finds no such device here, only {found}; use --device auto"
    )


def device_mistakes(config: TorchConfig) -> list[str]:
    """What the options ask of this machine that it cannot do."""
    try:
        kind = pick_accelerator(config.device)
    except UserError as error:
        return list(error.mistakes)
    mistakes = []
    count, processes = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind != "cpu" and processes > count:
        mistakes.append(
            f"--nproc_per_node={processes}, but this machine has {count} {kind} devices; start at most {count} processes"
        )
    if world_size() > 1 or config.ddp_backend != "auto":
        mistakes += backend_mistakes(config.ddp_backend, kind)
    if config.find_batch:
        mistakes += memory_mistakes(kind)
    if config.compile:
        mistakes += compile_mistakes(kind)
    if config.mixed_precision == "fp16" and kind != "cuda":
        mistakes.append(
            f"--mixed-precision fp16 needs a CUDA GPU, but the device is {kind}; use --mixed-precision bf16 or no"
        )
    if config.mixed_precision == "fp8":
        mistakes += float8_mistakes(kind)
    return mistakes


def compile_mistakes(kind: str) -> list[str]:
    """Why torch.compile has nothing to compile with on a device of that type; told before minutes of set-up."""
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        return ["--compile needs triton on CUDA; pip install triton, or leave --compile out"]
    wanted = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch's inductor looks for it
    if kind == "cpu" and shutil.which(wanted) is None:
        return [
            f"--compile needs a C++ compiler on the CPU, but {wanted} is not found; install it (apt install g++), "
            "set CXX to another one, or leave --compile out"
        ]
    return []
