"""What the doctor does on a device of any kind: a matmul and an all-reduce, each with a known result and a time."""

import time
from collections.abc import Callable
from typing import Any

import torch

from gpt2_xla.doctor.children import report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEATS = 3
REDUCED = 4 * 2**20  # float32 elements of an all-reduce


def check_matmul(device: torch.device, dtype: str, size: int, wait: Callable[[], None], **who: Any) -> None:
    """Report seconds and error of an N × N matmul of small whole numbers; rows of the result are compared with float64.

    The error is relative to the largest expected value: 0 in float32, below 2^-7 in bf16 (8 bits of mantissa).
    """
    numbers = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-3, 4, (size, size), generator=numbers).to(DTYPES[dtype]) for _ in range(2))
    on_device = a.to(device), b.to(device)

    def multiply() -> torch.Tensor:
        return on_device[0] @ on_device[1]

    product, seconds = timed(multiply, wait)
    rows = torch.arange(0, size, size // 16)
    expected = a[rows].double() @ b.double()
    error = (product.cpu()[rows].double() - expected).abs().max() / expected.abs().max()
    report(stage="matmul", device=str(device), dtype=dtype, size=size, seconds=seconds, error=error.item(), **who)


def check_all_reduce(
    reduce: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    rank: int,
    world: int,
    wait: Callable[[], None],
    **who: Any,
) -> None:
    """Report seconds of summing rank + 1 over all ranks, and whether every element is 1 + … + world.

    `reduce` returns the sum and leaves its argument as it is.
    """
    value = torch.full((REDUCED,), rank + 1.0).to(device)  # made on the host: ranks must not trace different graphs
    total, seconds = timed(lambda: reduce(value), wait)
    right = bool((total.cpu() == world * (world + 1) / 2).all())
    report(stage="all-reduce", rank=rank, world=world, bytes=REDUCED * 4, seconds=seconds, right=right, **who)


def timed(work: Callable[[], torch.Tensor], wait: Callable[[], None]) -> tuple[torch.Tensor, float]:
    """The result, and the best time of a few calls after one that compiles and warms up."""
    result, best = work(), float("inf")
    wait()
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = work()
        wait()
        best = min(best, time.perf_counter() - started)
    return result, best
