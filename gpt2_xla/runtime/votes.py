"""Processes that share nothing but a gloo group agree: on when to stop, and on where they begin."""

import contextlib
from datetime import timedelta

import torch
import torch.distributed as dist

from gpt2_xla.runtime.stop_signals import StopRequest


class Votes:
    """A `StopSource`: as soon as one process was asked to stop, all stop at the same poll.

    Votes travel between the hosts' CPUs and never wait for an accelerator. The vote of one poll is counted in the next,
    when it has long arrived; only the first poll waits for its own.
    """

    def __init__(self, stop: StopRequest, group: dist.ProcessGroup | None) -> None:
        self._stop, self._group = stop, group
        self._cast: tuple[dist.Work, torch.Tensor] | None = None
        self._agreed = False

    def poll(self) -> bool:
        if self._agreed:
            return True
        if self._cast is None:
            self._vote()
        assert self._cast is not None
        work, vote = self._cast
        work.wait()
        self._agreed = bool(vote[0] > 0)
        if not self._agreed:
            self._vote()
        return self._agreed

    def request_stop(self) -> None:
        self._stop.request_stop()

    def equal(self, value: int) -> bool:
        """Whether all processes call this with the same number; waits for them."""
        return self.smallest(value) == -self.smallest(-value)

    def smallest(self, value: int) -> int:
        """The smallest of the numbers that the processes call this with; waits for them."""
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self._group)
        return int(found)

    def close(self) -> None:
        """Let the last vote arrive; after an error of this or another process it may never."""
        if self._cast is not None and not self._agreed:
            with contextlib.suppress(RuntimeError):
                self._cast[0].wait(timedelta(seconds=5))
        self._cast = None

    def _vote(self) -> None:
        vote = torch.tensor([float(self._stop.requested)])
        work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._cast = (work, vote)


def join_hosts(address: str, port: int, rank: int, hosts: int) -> None:
    """Open the process group of one process per host; host 0, which `address` names, listens on `port`."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=hosts)


def leave_hosts() -> None:
    """Close what `join_hosts` opened; idempotent."""
    if dist.is_initialized():
        dist.destroy_process_group()
