"""scripts/plan_tpu.py: from its options to what it prints."""

import importlib.util
import json
from dataclasses import replace

from gpt2_xla.cli import Parsed
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.xla_installation import package_mistakes
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.cheapest_settings import SettingSearch, cheapest_settings
from gpt2_xla.tpu_plan.comparison import AS_GIVEN, Row, table, variants
from gpt2_xla.tpu_plan.largest_batch import Search, largest_batches
from gpt2_xla.tpu_plan.outcome import facts
from gpt2_xla.tpu_plan.plan import Planner, Wish
from gpt2_xla.tpu_plan.progress import Progress
from gpt2_xla.tpu_plan.refusals import division_mistakes
from gpt2_xla.tpu_plan.report import headline, report
from gpt2_xla.tpu_plan.topology import Topology, topology
from gpt2_xla.validation import config_mistakes

INSTALL = "pip install -r requirements-xla_tpu.txt -c constraints.txt"


def plan_tpu(parsed: Parsed[PlanConfig], mistakes: list[str]) -> int:
    """Plan and print; 1 if a slice cannot run it, or was not found out. Raises `UserError` with all mistakes of the options."""
    # No evaluation is planned: its batch is as good as that of training.
    size = parsed.config.data.train_batch_size
    config = replace(parsed.config, data=replace(parsed.config.data, eval_batch_size=size))
    found = [*mistakes, *config_mistakes(config, parsed.explicit), *installation_mistakes()]
    config = _with_largest_batch(config)
    steps = variants(config, found)
    slices = _slices(config, found)
    with Progress() as progress:
        compile = Planner(config, progress.tick, progress.compiled).compile
        if config.plan.find_batch:
            searches = largest_batches(slices, config, compile)
        elif config.plan.find_settings:
            settings = cheapest_settings(slices, config, parsed.explicit, compile)
        else:
            wishes = [(name, Wish(one, step, name)) for one in slices for name, step in steps]
            results = compile([wish for _, wish in wishes])
            rows = [Row(name, one) for (name, _), one in zip(wishes, results, strict=True)]
    if config.plan.find_batch:
        return _print_batches(config, searches)
    if config.plan.find_settings:
        return _print_settings(config, settings)
    return _print_rows(config, rows)


def _with_largest_batch(config: PlanConfig) -> PlanConfig:
    """Of --batch-size-schedule the stage with the largest batch, as if all steps were like that."""
    try:
        micro_steps = max(count for _, count in config.batch_sizes.stages)
    except UserError:  # among the mistakes already
        return config
    return replace(config, data=replace(config.data, gradient_accum_step=micro_steps, batch_size_schedule=None))


def _print_rows(config: PlanConfig, rows: list[Row]) -> int:
    results = [row.compiled for row in rows]
    compared = bool(config.plan.compare)
    if config.plan.json:
        print(json.dumps([{"step": row.name} | facts(row.compiled) for row in rows], indent=2))
    elif compared:
        print(f"{headline(config)}\n\n{table(rows)}")
    else:
        print("\n\n".join([headline(config), *map(report, results)]))
    if not compared:
        return int(not all(one.fits for one in results))
    # That a variant does not fit, or cannot be on a slice, is what the table is for.
    given = all(row.compiled.fits for row in rows if row.name == AS_GIVEN)
    return int(not given or any(one.trouble and not one.refused for one in results))


def _print_batches(config: PlanConfig, searches: list[Search]) -> int:
    results = [(search, one) for search in searches if (one := search.result)]
    if config.plan.json:
        print(json.dumps([facts(one) | {"search": search.ended()} for search, one in results], indent=2))
    else:
        print("\n\n".join([headline(config), *(report(one) for _, one in results), *(s.ended() for s in searches)]))
    return int(any(search.best is None or search.stopped for search in searches))


def _print_settings(config: PlanConfig, searches: list[SettingSearch]) -> int:
    if config.plan.json:
        print(json.dumps([search.facts() for search in searches], indent=2))
    else:
        tables = [table([Row(name, one) for name, one in search.rows()]) for search in searches]
        print("\n\n".join([headline(config), *tables, *(search.ended() for search in searches)]))
    return int(any(search.best() is None or search.stopped for search in searches))


def installation_mistakes() -> list[str]:
    """What is missing to compile for TPUs here."""
    mistakes = package_mistakes()
    missing = [name for name in ("libtpu", "jax", "jaxlib") if importlib.util.find_spec(name) is None]
    if missing and not mistakes:
        mistakes.append(f"{' and '.join(missing)} missing, which the TPU compiler needs; {INSTALL}")
    return mistakes


def _slices(config: PlanConfig, mistakes: list[str]) -> list[Topology]:
    """The slices that --tpu names. Raises `UserError` with the given mistakes and those of the given step on each slice."""
    mistakes = list(mistakes)
    options = config.plan
    modes = {"--find-batch": options.find_batch, "--find-settings": options.find_settings, "--compare": options.compare}
    asked = [flag for flag, value in modes.items() if value]
    if len(asked) > 1:
        mistakes.append(f"{' and '.join(asked)} answer different questions; use one of them at a time")
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
        mistakes += [f"{one.name}: {mistake}" for one in slices for mistake in division_mistakes(config, one)]
    if mistakes:
        raise UserError(mistakes)
    return slices
