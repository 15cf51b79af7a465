"""scripts/plan_tpu.py: from its options to what it prints."""

import importlib.util
import json
import sys
from dataclasses import replace

from tqdm import tqdm

from gpt2_xla.cli import Parsed
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.mesh import mesh_mistakes
from gpt2_xla.runtime.xla_installation import package_mistakes
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.comparison import AS_GIVEN, table, variants
from gpt2_xla.tpu_plan.jobs import Job
from gpt2_xla.tpu_plan.largest_batch import Search, largest_batches
from gpt2_xla.tpu_plan.outcome import facts
from gpt2_xla.tpu_plan.plan import Planner, Wish
from gpt2_xla.tpu_plan.report import headline, report
from gpt2_xla.tpu_plan.topology import Topology, topology
from gpt2_xla.validation import config_mistakes, replica_mistakes

INSTALL = "pip install -r requirements-xla_tpu.txt -c constraints.txt"


def plan_tpu(parsed: Parsed[PlanConfig], mistakes: list[str]) -> int:
    """Plan and print; 1 if a slice cannot run it. Raises `UserError` with all mistakes of the options."""
    # No evaluation is planned: its batch is as good as that of training.
    size = parsed.config.data.train_batch_size
    config = replace(parsed.config, data=replace(parsed.config.data, eval_batch_size=size))
    found = [*mistakes, *config_mistakes(config, parsed.explicit), *installation_mistakes()]
    steps = variants(config, found)
    slices = _slices(steps, found)
    with _Progress() as progress:
        planner = Planner(config, progress.tick)
        if config.plan.find_batch:
            searches = largest_batches(slices, config, planner.compile)
            results = [one for search in searches if (one := search.best or search.failed)]
        else:
            searches = []
            results = planner.compile([Wish(one, step) for _, step in steps for one in slices])
    if config.plan.json:
        print(json.dumps([facts(compiled) for compiled in results], indent=2))
    elif len(steps) > 1:
        names = [name for name, _ in steps for _ in slices]
        print(f"{headline(config)}\n\n{table(list(zip(names, results, strict=True)))}")
    else:
        print("\n\n".join([headline(config), *map(report, results), *map(_ended, searches)]))
    return int(not all(compiled.fits for compiled in results))


def installation_mistakes() -> list[str]:
    """What is missing to compile for TPUs here."""
    mistakes = package_mistakes()
    missing = [name for name in ("libtpu", "jax", "jaxlib") if importlib.util.find_spec(name) is None]
    if missing and not mistakes:
        mistakes.append(f"{' and '.join(missing)} missing, which the TPU compiler needs; {INSTALL}")
    return mistakes


def _slices(steps: list[tuple[str, PlanConfig]], mistakes: list[str]) -> list[Topology]:
    """The slices that --tpu names. Raises `UserError` with the given mistakes and those of each step on each slice."""
    mistakes = list(mistakes)
    options = steps[0][1].plan
    if options.find_batch and options.compare:
        mistakes.append("--find-batch looks for one batch, --compare compares given ones; use one of them")
    if not options.tpu:
        mistakes.append("--tpu needs a slice, such as v3-8")
    for flag, value in (("--tokens", options.tokens), ("--time-limit", options.time_limit), ("--jobs", options.jobs)):
        if value is not None and value <= 0:
            mistakes.append(f"{flag} {value} must be above 0")
    slices = []
    for name in options.tpu:
        try:
            slices.append(topology(name))
        except UserError as error:
            mistakes += error.mistakes
    if not options.find_batch:
        for name, step in steps:
            where = "" if name == AS_GIVEN else f"--compare {name!r}: "
            mistakes += [where + mistake for one in slices for mistake in _slice_mistakes(step, one)]
    if mistakes:
        raise UserError(mistakes)
    return slices


def _slice_mistakes(config: PlanConfig, one: Topology) -> list[str]:
    """Why the step cannot be spread over a slice."""
    if config.runtime.sharding == "none":
        found = replica_mistakes(config, one.devices)
    else:
        try:
            found = mesh_mistakes(config, config.runtime.mesh, one.devices, 1)
        except UserError:  # of --mesh itself, which validation.py has told
            return []
    return [f"{one.name}: {mistake}" for mistake in found if not mistake.startswith("--eval-batch-size")]


def _ended(search: Search) -> str:
    """Where a search ended."""
    if search.best is None:
        return f"{search.slice.name}: not even {search.unit} sequences fit"
    largest = search.best.wish.config.data.train_batch_size
    above = search.failed
    text = f"{search.slice.name}: --train-batch-size {largest} is the largest that fits"
    if above is None:
        return text
    why = above.failure and f" ({above.failure})"
    return f"{text}; {above.wish.config.data.train_batch_size} does not{why}"


class _Progress:
    """A bar on standard error, which says what runs."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._what = ""

    def tick(self, what: str, running: list[Job], ended: int, total: int) -> None:
        if self._bar is None or (what, total) != (self._what, self._bar.total):
            self.close()
            self._what = what
            self._bar = tqdm(total=total, desc=what, file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
        self._bar.set_postfix_str(", ".join(f"{job.name} {job.seconds:.0f} s" for job in running), refresh=False)
        self._bar.update(ended - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
