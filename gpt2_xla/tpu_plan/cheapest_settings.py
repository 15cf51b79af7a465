"""--find-settings: what makes the wanted batch fit a slice at the least cost in time, by compiling.

Tried are recomputation of activations, smaller chunks of the loss and, where none of them is enough, more micro-steps of fewer
sequences. Those that fit compete by their bounds. An option that the command gives stays as it is.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from gpt2_xla.cli import replace_fields
from gpt2_xla.runtime.xla_flash import flash_obstacles
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.largest_batch import batch_unit
from gpt2_xla.tpu_plan.outcome import facts, speed
from gpt2_xla.tpu_plan.plan import Compiled, Wish
from gpt2_xla.tpu_plan.topology import Topology
from gpt2_xla.validation import config_mistakes

Setting = dict[str, Any]  # fields that differ from those given
SMALLER_CHUNK = 4  # times: the float32 logits of 512 tokens instead of 2048


@dataclass
class SettingSearch:
    """The search on one slice: rounds of compilations, at first with the micro-step's sequences as given."""

    slice: Topology
    config: PlanConfig
    settings: list[Setting]  # the given one first, the one that takes the least memory last
    tried: list[tuple[Setting, Compiled]] = field(default_factory=list)
    stopped: Compiled | None = None  # of which nothing is known, such as one that took too long
    _rows: int = 0  # sequences of a micro-step
    _round: list[Setting] = field(default_factory=list)
    _probed: bool = False  # the two ends of the settings were compiled with so many

    def __post_init__(self) -> None:
        self._rows = self.config.data.train_batch_size
        self._round = self._ends()

    def next(self) -> list[Wish]:
        """What to compile now; nothing at the end."""
        whole = [setting | self._split() for setting in self._round]
        return [Wish(self.slice, replace_fields(self.config, setting), as_flags(setting)) for setting in whole]

    def learn(self, results: list[Compiled]) -> None:
        """What became of the last round, and so what the next one is."""
        self.tried += [(setting | self._split(), one) for setting, one in zip(self._round, results, strict=True)]
        given, thrifty = self.settings[0], self.settings[-1]
        fitting = self._fitting()
        trouble = next((one for one in results if one.trouble), None)
        if given in fitting:
            self._round = []
        elif trouble:
            self._round, self.stopped = [], trouble
        elif not self._probed and thrifty in fitting:
            self._probed = True
            self._round = [setting for setting in self.settings[1:-1] if setting not in fitting]
            if not self._round:
                self._halve()
        else:
            self._halve()

    def best(self) -> tuple[Setting, Compiled] | None:
        """Of what fits, that with the least seconds a step, by its bound."""
        fits = [(setting, one) for setting, one in self.tried if one.fits]
        return min(fits, key=lambda each: speed(each[1]).bounds.step, default=None)

    def rows(self) -> list[tuple[str, Compiled]]:
        """What was tried, as rows of a table."""
        return [(as_flags(setting), one) for setting, one in self.tried]

    def facts(self) -> dict[str, Any]:
        """All of it, for --json."""
        best = self.best()
        return {
            "slice": self.slice.name,
            "use": None if best is None else best[0],
            "search": self.ended(),
            "tried": [{"setting": setting} | facts(one) for setting, one in self.tried],
        }

    def ended(self) -> str:
        """Where the search ended."""
        best = self.best()
        if best is None:
            end = "nothing that was tried fits"
        elif not best[0]:
            end = "fits as given: no setting is needed"
        else:
            end = f"use {as_flags(best[0])}: of those that fit, the lowest bound"
        if self.stopped:
            end = f"the search stopped at {as_flags(self._of(self.stopped))}: {self.stopped.trouble}; so far: {end}"
        return f"{self.slice.name}: {end}"

    def _of(self, compiled: Compiled) -> Setting:
        return next(setting for setting, one in self.tried if one is compiled)

    def _fitting(self) -> list[Setting]:
        """Settings that fit with a micro-step of some size: a smaller one would only read the weights more often."""
        return [
            {name: value for name, value in setting.items() if name not in ("train_batch_size", "gradient_accum_step")}
            for setting, one in self.tried
            if one.fits
        ]

    def _ends(self) -> list[Setting]:
        """The given setting, and that of the least memory: if that does not fit, nothing will."""
        ends = [self.settings[0], *self.settings[1:][-1:]]
        return [setting for setting in ends if setting not in self._fitting()]

    def _halve(self) -> None:
        """Go on with at most half as many sequences in a micro-step; the whole step keeps all of them."""
        rows = self._rows // batch_unit(self.config, self.slice)
        parts = next((n for n in range(2, rows + 1) if rows % n == 0), None)
        if parts is None:
            self._round = []
            return
        self._rows //= parts
        self._probed = False
        self._round = self._ends()

    def _split(self) -> Setting:
        """The fields that cut the micro-step."""
        data = self.config.data
        if self._rows == data.train_batch_size:
            return {}
        micro_steps = data.gradient_accum_step * data.train_batch_size // self._rows
        return {"train_batch_size": self._rows, "gradient_accum_step": micro_steps}


def as_flags(setting: Setting) -> str:
    """A setting as one would type it."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in setting.items()) or "as given"


def settings_for(config: PlanConfig, explicit: Set[str], slice: Topology) -> list[Setting]:
    """The settings to try on a slice, the given one first and the one that takes the least memory last."""
    runtime = config.runtime
    recomputed = ["block"] if runtime.scan_layers else ["selective", "block"]
    choices: dict[str, list[Any]] = {
        "loss_chunk": [runtime.loss_chunk // SMALLER_CHUNK] if runtime.loss_chunk >= SMALLER_CHUNK else [],
        "activation_checkpointing": [] if runtime.activation_checkpointing == "block" else recomputed,
    }
    free = [[{}, *({name: value} for value in values)] for name, values in choices.items() if name not in explicit]
    found: list[Setting] = [{name: value for part in parts for name, value in part.items()} for parts in product(*free)]
    kernel = runtime.attention != "math" and not flash_obstacles(config.model, runtime, slice.device.kind)
    if kernel and not {"attention", "activation_checkpointing"} & explicit and not runtime.scan_layers:
        # Attention without the kernel keeps T x T matrices: it competes only where they are computed again.
        found.insert(1, {"attention": "math", "activation_checkpointing": "selective"})
    return [setting for setting in found if not config_mistakes(replace_fields(config, setting))]


def cheapest_settings(
    slices: list[Topology],
    config: PlanConfig,
    explicit: Set[str],
    compile: Callable[[list[Wish]], list[Compiled]],
) -> list[SettingSearch]:
    """Search on all slices at the same time."""
    searches = [SettingSearch(one, config, settings_for(config, explicit, one)) for one in slices]
    while any(rounds := [search.next() for search in searches]):
        results = iter(compile([wish for wishes in rounds for wish in wishes]))
        for search, wishes in zip(searches, rounds, strict=True):
            if wishes:
                search.learn([next(results) for _ in wishes])
    return searches
