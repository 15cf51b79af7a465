"""The seam between the loop and the machine: everything that differs between one CPU process and a TPU pod."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2_xla.config import OptimConfig
from gpt2_xla.shares import Share


@dataclass(frozen=True)
class CompileStats:
    """What compilers and devices did so far in this process; zeros where nobody counts."""

    count: int = 0  # programs compiled
    seconds: float = 0.0  # spent compiling them
    executions: int = 0  # programs executed
    fetches: int = 0  # copies from a device to the host
    cache_hits: int = 0  # programs taken from a persistent cache
    cache_misses: int = 0
    cache_failures: int = 0  # programs found there that could not be read back


class Runtime(Protocol):
    """One replica's view of the machine. Methods are called by every replica, in the same order, unless said otherwise."""

    device: torch.device
    rank: int  # 0 … world_size - 1; rank 0 writes files and prints
    world_size: int  # replicas that share each batch
    writers: int  # replicas, from rank 0 on, that hold a part of the state each; 1 where every replica holds all of it
    compiles: bool  # whether the first piece of work of each kind is compiled first, for minutes perhaps

    def describe(self) -> str:
        """The machine in words for the summary: `2 × cpu (gloo)`."""
        ...

    def place(self, model: nn.Module) -> nn.Module:
        """Move the model to the device, give every replica rank 0's weights; return what the loop shall call.

        The given module stays the owner of the parameters; the returned one may wrap it (DDP, torch.compile).
        """
        ...

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
        """The runtime's optimizer over the placed model's parameters, with its state already allocated."""
        ...

    def batches(self, host_batches: Iterator[Tensor], rows_dim: int) -> Generator[Tensor, None, None]:
        """The host's batches on the device, read and copied ahead in the background; close() ends that.

        `rows_dim` is the dimension along which a batch holds sequences that may go to different devices.
        An error of the host's iterator surfaces in next().
        """
        ...

    def seed_dropout(self, seed: int) -> None:
        """Seed the device's random numbers for the coming step, differently on each replica, without a recompile."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass in the configured precision."""
        ...

    def compute_gradients(self, forward: nn.Module, batch: Tensor) -> Tensor:
        """Forward and backward of every micro-step of batch (A, B, T+1); their mean gradient is left in .grad.

        Returns the mean loss of this replica's sequences: a float32 scalar, on device. update() must follow.
        """
        ...

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: Tensor) -> Tensor:
        """Average gradients and loss over the replicas, clip, step, clear the gradients.

        Returns float32 [loss, gradient norm before clipping], on device and the same on every replica. If one of them is
        not finite, on whichever replica that began, the step changes nothing on any: no weight, no moment, no step count.
        """
        ...

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the replicas of a small device tensor, as part of the step's queued work."""
        ...

    def end_step(self) -> None:
        """Launch the work queued since the last call; never waits for it."""
        ...

    def fetch_later(self, value: Tensor) -> Callable[[], list[float]]:
        """Begin copying a small vector to the host; the returned function waits for this copy and nothing queued later."""
        ...

    def to_host(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Share]:
        """CPU copies of what this process shall write of the tensors; nothing beyond the writers. Waits for the device.

        `buffers`, a dictionary that the caller keeps between calls with the same tensors, is where the copies may live.
        """
        ...

    def should_stop(self) -> bool:
        """Whether to save and stop here; the same answer on every replica, without waiting for the device.

        A signal is heard from the start of the process on; once True it stays so.
        """
        ...

    def request_stop(self) -> None:
        """Have all replicas stop at a coming should_stop(), as a signal does."""
        ...

    def agree_on(self, value: int) -> bool:
        """Whether all replicas pass the same number; waits for them."""
        ...

    def abandon(self, error: Exception) -> None:
        """Leave word, for whoever started this replica, of the error that ends it without being raised."""
        ...

    def scaler_state(self) -> dict[str, Any] | None:
        """The gradient scaler's state for the checkpoint; None where there is none."""
        ...

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Restore what scaler_state() returned."""
        ...

    def compile_stats(self) -> CompileStats:
        """Compilations of this process so far; cheap enough for every step."""
        ...

    def graph_hash(self, queued: Tensor) -> str:
        """A name for the queued work that computes a tensor, the same for the same program; "" where nothing is queued."""
        ...

    def profile(self, folder: Path, name: str) -> AbstractContextManager[str]:
        """Record what host and device do inside the context into files under `folder`; its value says how to open them.

        Called by rank 0 alone. Waits for the device at both ends. Raises OSError or RuntimeError if it can't.
        """
        ...

    def peak_memory(self) -> int | None:
        """Peak bytes in use: of the device where it has its own memory, else resident in this process; None if unknown."""
        ...

    def peak_flops(self) -> float | None:
        """The published dense peak of all replicas' devices together in the configured precision, FLOP/s; None if unknown.

        For fp8 it is bf16's: only a part of the work is in float8, and so MFU compares with that of a run in bf16.
        """
        ...

    def close(self) -> None:
        """Leave the process group; idempotent."""
        ...
