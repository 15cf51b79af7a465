"""--find-batch: the largest --train-batch-size that fits a slice, doubled until one does not fit, then halving the gap."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gpt2_xla.runtime.mesh import mesh_shape
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.plan import Compiled, Wish
from gpt2_xla.tpu_plan.topology import Topology

# Between fits and does not fit: 5 % of a batch is not worth another compilation.
CLOSE = 0.05


@dataclass
class Search:
    """The search on one slice. Batches are in units of what the slice's devices divide a batch into."""

    slice: Topology
    config: PlanConfig
    best: Compiled | None = None
    failed: Compiled | None = None  # the smallest that does not fit
    stopped: Compiled | None = None  # of which nothing is known, such as one that took too long

    @property
    def unit(self) -> int:
        """Sequences that a batch can grow by."""
        return batch_unit(self.config, self.slice)

    @property
    def result(self) -> Compiled | None:
        """What to report in full."""
        return self.best or self.failed or self.stopped

    def next(self) -> Wish | None:
        """What to compile now; None at the end."""
        if self.stopped:
            return None
        low = self.best.wish.config.data.train_batch_size // self.unit if self.best else 0
        high = self.failed.wish.config.data.train_batch_size // self.unit if self.failed else None
        if high is None:
            size = 2 * low if low else max(1, self.config.data.train_batch_size // self.unit)
        elif high - low <= max(1, CLOSE * high):
            return None
        else:
            size = (low + high) // 2
        data = replace(self.config.data, train_batch_size=size * self.unit)
        return Wish(self.slice, replace(self.config, data=data), f"--train-batch-size {size * self.unit}")

    def learn(self, compiled: Compiled) -> None:
        """What became of the last wish."""
        if compiled.fits:
            self.best = compiled
        elif compiled.shortage:
            self.failed = compiled
        else:  # a crash or a time limit says nothing of HBM
            self.stopped = compiled

    def ended(self) -> str:
        """Where the search ended."""
        fits = f"--train-batch-size {_size(self.best)}" if self.best else ""
        if self.stopped:
            so_far = f"; {fits} fits" if fits else ""
            so_far += f"; {_size(self.failed)} does not" if self.failed else ""
            return f"{self.slice.name}: the search stopped at {_size(self.stopped)}: {self.stopped.trouble}{so_far}"
        if not fits:
            return f"{self.slice.name}: not even {self.unit} sequences fit"
        above = f"; {_size(self.failed)} does not" if self.failed else ""
        return f"{self.slice.name}: {fits} is the largest that fits{above}"


def _size(compiled: Compiled) -> int:
    return compiled.wish.config.data.train_batch_size


def batch_unit(config: PlanConfig, slice: Topology) -> int:
    """Sequences that the slice's devices can divide among themselves at least."""
    if config.runtime.sharding == "none":
        return slice.devices
    return mesh_shape(config.runtime.mesh, slice.devices).row_shards


def largest_batches(
    slices: list[Topology], config: PlanConfig, compile: Callable[[list[Wish]], list[Compiled]]
) -> list[Search]:
    """Search on all slices at the same time."""
    searches = [Search(one, config) for one in slices]
    while open_ := [(search, wish) for search in searches if (wish := search.next()) is not None]:
        for (search, _), compiled in zip(open_, compile([wish for _, wish in open_]), strict=True):
            search.learn(compiled)
    return searches
