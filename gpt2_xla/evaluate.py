"""Validation loss over a whole split, the same for any number of replicas."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gpt2_xla.loss import IGNORED
from gpt2_xla.runtime.base import Runtime


def evaluate(
    forward: nn.Module, host_batches: Iterator[Tensor], runtime: Runtime, go_on: Callable[[], bool] = lambda: True
) -> float | None:
    """Mean loss in nats per token over batches (B, 2, T) of inputs and targets; targets of -100 are padding.

    Sums on the device and fetches once, at the end. None if `go_on`, asked before each batch, said no.
    """
    was_training = forward.training
    forward.eval()
    total = torch.zeros(2).to(runtime.device)  # copied, not computed: every batch runs one and the same graph
    whole = True
    with torch.no_grad(), contextlib.closing(runtime.batches(host_batches, rows_dim=0)) as batches:
        for batch in batches:
            if not (whole := go_on()):
                break
            total = total + evaluation_step(forward, batch, runtime)
            runtime.end_step()
    forward.train(was_training)
    if not whole:
        return None
    loss, count = runtime.fetch_later(total)()
    return loss / count


def evaluation_step(forward: nn.Module, batch: Tensor, runtime: Runtime) -> Tensor:
    """Summed loss and number of targets of one batch (B, 2, T), averaged over the replicas: float32 (2,)."""
    inputs, targets = batch.unbind(dim=1)  # (B, 2, T) -> 2 × (B, T)
    with runtime.autocast():
        loss = forward(inputs, targets)
    count = (targets != IGNORED).sum()
    return runtime.mean(torch.stack([loss * count, count.float()]))
