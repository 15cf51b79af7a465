"""The largest --train-batch-size that fits a slice, by compiling: doubled until one does not fit, then halving the gap."""

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

    @property
    def unit(self) -> int:
        """Sequences that a batch can grow by."""
        runtime, devices = self.config.runtime, self.slice.devices
        return devices if runtime.sharding == "none" else mesh_shape(runtime.mesh, devices).row_shards

    def next(self) -> Wish | None:
        """What to compile now; None at the end."""
        low = self.best.wish.config.data.train_batch_size // self.unit if self.best else 0
        high = self.failed.wish.config.data.train_batch_size // self.unit if self.failed else None
        if high is None:
            size = 2 * low if low else max(1, self.config.data.train_batch_size // self.unit)
        elif high - low <= max(1, CLOSE * high):
            return None
        else:
            size = (low + high) // 2
        data = replace(self.config.data, train_batch_size=size * self.unit)
        return Wish(self.slice, replace(self.config, data=data))

    def learn(self, compiled: Compiled) -> None:
        """What became of the last wish."""
        if compiled.fits:
            self.best = compiled
        else:  # a compilation that failed otherwise says that larger ones are no use either
            self.failed = compiled


def largest_batches(
    slices: list[Topology], config: PlanConfig, compile: Callable[[list[Wish]], list[Compiled]]
) -> list[Search]:
    """Search on all slices at the same time."""
    searches = [Search(one, config) for one in slices]
    while open_ := [(search, wish) for search in searches if (wish := search.next()) is not None]:
        for (search, _), compiled in zip(open_, compile([wish for _, wish in open_]), strict=True):
            search.learn(compiled)
    return searches
