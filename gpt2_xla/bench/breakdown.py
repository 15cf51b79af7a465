"""The parts of our step on torch, from its profiler: data, forward, backward, reduce, optimizer, other."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from gpt2_xla.training_log import TrainingLog

if TYPE_CHECKING:
    from gpt2_xla.train import Run

PARTS = ("data", "forward", "backward", "reduce", "optimizer")
MARK = "part of the step: "


class Breakdown:
    """Marks, from outside, where each part of the steps to come begins and ends; the loop itself has no marks to pay for."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._recording = ExitStack()

    def start(self) -> None:
        """Record the steps from here on."""
        places: list[tuple[Any, str, str]] = [
            (TrainingLog, "next_batch", "data"),
            (type(self._run.forward), "__call__", "forward"),
            (torch.Tensor, "backward", "backward"),
            (dist, "all_reduce", "reduce"),
            (type(self._run.runtime), "update", "optimizer"),
        ]
        for owner, name, part in places:
            self._recording.enter_context(_marked(owner, name, part))
        self._profiler = self._recording.enter_context(torch.profiler.profile())
        self._started = time.perf_counter()

    def finish(self, steps: int) -> dict[str, float]:
        """Seconds of each part of a step, `other` last; call when the device has done all its work."""
        whole = time.perf_counter() - self._started
        self._recording.close()
        events = list(self._profiler.events() or ())
        found = parts(events, reduces=self._run.runtime.world_size > 1)
        found["other"] = max(0.0, whole - sum(found.values()))
        return {name: seconds / steps for name, seconds in found.items()}


@contextmanager
def _marked(owner: Any, name: str, part: str) -> Iterator[None]:
    """Inside, each call of that function is a range of the profile."""
    own = name in vars(owner)
    function: Callable[..., Any] = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + part):
            return function(*args, **kwargs)

    setattr(owner, name, marked)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


def parts(events: list[FunctionEvent], reduces: bool) -> dict[str, float]:
    """Seconds of each part: of the device's kernels by the part that launched them; without any, of the host.

    On the host a range that lies in another is not counted as part of it. `reduces`: what DDP does after the last
    gradient of a backward pass, waiting for its reductions, counts as reduce; what goes on beside the backward pass does not.
    """
    ranges = sorted(
        ((e.time_range.start, e.time_range.end, e.name.removeprefix(MARK)) for e in events if _is_mark(e)),
        key=lambda found: (found[0], -found[1]),
    )
    found = dict.fromkeys(PARTS, 0.0)
    kernels = [(e.time_range.start, kernel) for e in events for kernel in e.kernels]
    if kernels:
        for launched, kernel in kernels:
            inside = [part for start, end, part in ranges if start <= launched <= end]
            part = "reduce" if "nccl" in kernel.name.lower() else inside[-1] if inside else None
            if part is not None:
                found[part] += kernel.duration * 1e-6
        return found
    open_ranges: list[tuple[float, str]] = []  # that hold the coming one: end, part
    for start, end, part in ranges:
        while open_ranges and open_ranges[-1][0] <= start:
            open_ranges.pop()
        found[part] += (end - start) * 1e-6
        if open_ranges:
            found[open_ranges[-1][1]] -= (end - start) * 1e-6
        open_ranges.append((end, part))
    if reduces:
        gradients = [e.time_range.end for e in events if e.name.startswith("autograd::engine::evaluate_function")]
        for start, end, part in ranges:
            if part == "backward":
                last = max((g for g in gradients if start <= g <= end), default=end)
                found["backward"] -= (end - last) * 1e-6
                found["reduce"] += (end - last) * 1e-6
    return found


def _is_mark(event: FunctionEvent) -> bool:
    return event.name.startswith(MARK) and event.device_type.name == "CPU"  # a GPU has ranges of the same names
