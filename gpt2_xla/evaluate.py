"""Loss over a whole split, with its standard error, the same for any number of replicas and any batch size."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt2_xla.data.manifest import Manifest
from gpt2_xla.loss import IGNORED
from gpt2_xla.runtime.base import Runtime


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some tokens."""

    loss: float  # nats per token
    tokens: int  # that were predicted
    standard_error: float | None  # of the loss; None for a single sequence

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """e to the loss in nats; no more than a float can hold."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, manifest: Manifest) -> float | None:
    """Bits per byte of the split's text, from nats per token; None where its manifest has no byte count.

    The end-of-text tokens' loss counts, their bytes do not: they are in no text.
    """
    return loss / math.log(2) * manifest.tokens / manifest.text_bytes if manifest.text_bytes else None


def evaluate(
    forward: nn.Module,
    host_batches: Iterator[Tensor],
    runtime: Runtime,
    tokens: int,
    go_on: Callable[[], bool] = lambda: True,
) -> Evaluation | None:
    """Mean loss over batches (B, 2, T) of inputs and targets, `tokens` of which are not -100 (padding), over all replicas.

    Sums on the device and fetches once, at the end. None if `go_on`, asked before each batch, said no.
    """
    was_training = forward.training
    forward.eval()
    total = torch.zeros(5).to(runtime.device)  # copied, not computed: every batch runs one and the same graph
    whole, length = True, 1
    with torch.no_grad(), contextlib.closing(runtime.batches(host_batches, rows_dim=0)) as batches:
        for batch in batches:
            if not (whole := go_on()):
                break
            length = batch.shape[2]
            total = total + evaluation_step(forward, batch, runtime)
            runtime.end_step()
    forward.train(was_training)
    return _evaluation(runtime.fetch_later(total)(), tokens, length) if whole else None


def evaluation_step(forward: nn.Module, batch: Tensor, runtime: Runtime) -> Tensor:
    """What one batch (B, 2, T) adds to the sums over all sequences, averaged over the replicas: float32 (5,).

    With a a sequence's loss and b its targets, both divided by T so that float32 holds the sums: a, b, a², ab, b².
    """
    inputs, targets = batch.unbind(dim=1)  # (B, 2, T) -> 2 × (B, T)
    with runtime.autocast():
        losses = forward(inputs, targets, by_sequence=True)
    a = losses / targets.shape[1]
    b = (targets != IGNORED).sum(dim=1).float() / targets.shape[1]
    return runtime.mean(torch.stack([a.sum(), b.sum(), (a * a).sum(), (a * b).sum(), (b * b).sum()]))


def _evaluation(sums: list[float], tokens: int, length: int) -> Evaluation:
    """The loss is the ratio of two sums over sequences; its standard error is that of a ratio (Cochran 1977, 6.4).

    Sequences are the sample, because the tokens of one are not independent. The sums are those of all replicas, or their
    mean: the number of tokens tells.
    """
    a, b, aa, ab, bb = sums
    loss = a / b
    sequences, scale = -(-tokens // length), tokens / length / b
    if sequences < 2:
        return Evaluation(loss, tokens, None)
    squares = max(0.0, aa - 2 * loss * ab + loss * loss * bb) * scale
    return Evaluation(loss, tokens, math.sqrt(squares * sequences / (sequences - 1)) / (scale * b))
