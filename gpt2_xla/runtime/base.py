"""The seam between the loop and the machine: everything that differs between one CPU process and a TPU pod."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2_xla.config import OptimConfig


@dataclass(frozen=True)
class CompileStats:
    """What compilers did so far in this process."""

    count: int = 0
    seconds: float = 0.0


class Runtime(Protocol):
    """One replica's view of the machine. Methods are called by every replica, in the same order, unless said otherwise."""

    device: torch.device
    rank: int  # 0 … world_size - 1; rank 0 writes files and prints
    world_size: int  # replicas that share each batch

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

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-step; gradients need not be reduced until the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the loss, scaled if the precision needs it."""
        ...

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        """Average the gradients over the replicas, clip, step, clear them; return the norm before clipping, on device."""
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

    def to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """CPU copies on rank 0, nothing on the others. Waits for the device."""
        ...

    def watch_signals(self) -> None:
        """From now on the first SIGTERM or Ctrl-C only makes should_stop() true; a second one ends the process at once."""
        ...

    def should_stop(self, step: int) -> bool:
        """Whether to stop before optimizer step `step`; the same answer on every replica, without waiting for the device."""
        ...

    def scaler_state(self) -> dict[str, Any] | None:
        """The gradient scaler's state for the checkpoint; None where there is none."""
        ...

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Restore what scaler_state() returned."""
        ...

    def compile_stats(self) -> CompileStats:
        """Compilations of this process so far."""
        ...

    def peak_memory(self) -> int:
        """Peak bytes in use: of the device where it has its own memory, else resident in this process."""
        ...

    def peak_flops(self) -> float | None:
        """The published dense peak of all replicas' devices together in the configured precision, FLOP/s; None if unknown."""
        ...

    def close(self) -> None:
        """Leave the process group; idempotent."""
        ...
