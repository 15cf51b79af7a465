"""Searches and comparisons of scripts/plan_tpu.py, on a compiler that is a formula."""

import dataclasses

import pytest
from tpu_answers import TOO_LARGE

from gpt2_xla.config import PRESETS, DataConfig, ModelConfig, XlaConfig
from gpt2_xla.script_config import PlanConfig, PlanOptions
from gpt2_xla.tpu_plan.cheapest_settings import as_flags, cheapest_settings, settings_for
from gpt2_xla.tpu_plan.comparison import COLUMNS, Row, table, variants
from gpt2_xla.tpu_plan.compiler import Answer
from gpt2_xla.tpu_plan.largest_batch import largest_batches
from gpt2_xla.tpu_plan.plan import Compiled
from gpt2_xla.tpu_plan.refusals import refusals
from gpt2_xla.tpu_plan.topology import topology
from gpt2_xla.tpu_plan.traffic import Traffic

V3, V4, V5E = topology("v3-8"), topology("v4-8"), topology("v5e-8")
GPT2 = ModelConfig(**PRESETS["gpt2"])


KEPT = {"none": 1.0, "selective": 0.7, "block": 0.2}
WEIGHTS = 10.0  # GB that each micro-step moves


class Formula:
    """A compiler: a step takes memory and HBM traffic by its sequences per device and its settings."""

    def __init__(self, limit, traffic, crashes=()):
        self.limit, self.traffic, self.crashes = limit, traffic, crashes
        self.asked = []

    def __call__(self, wishes):
        return [self.compile(wish) for wish in wishes]

    def compile(self, wish):
        runtime, data = wish.config.runtime, wish.config.data
        kind = "math" if runtime.attention == "math" else runtime.activation_checkpointing
        self.asked.append((wish.slice.name, data.train_batch_size, kind, runtime.loss_chunk))
        if (wish.slice.name, kind) in self.crashes:
            return Compiled(wish, failure="the compiler did not end within 9 s and was killed")
        rows = data.train_batch_size / wish.slice.devices
        memory = rows * KEPT[runtime.activation_checkpointing] + runtime.loss_chunk / 2048
        if memory > self.limit:
            return Compiled(wish, answer=Answer(error=TOO_LARGE))
        moved = (self.traffic[kind] - runtime.loss_chunk / 1e9) * rows + WEIGHTS
        traffic = Traffic(hbm=int(moved * data.gradient_accum_step * 1e9), movers=[])
        return Compiled(wish, answer=Answer(temporaries=int(memory * 2**30)), parameters=1000, traffic=traffic)


# The largest batch


@pytest.mark.parametrize("limit", [3, 8, 9, 40, 41, 1000])
@pytest.mark.parametrize("start", [1, 8, 64])
def test_the_largest_batch_is_found_by_few_compilations(limit, start):
    config = PlanConfig(data=DataConfig(train_batch_size=start * 8), runtime=XlaConfig(loss_chunk=0))
    rounds = []
    formula = Formula(limit, {"none": 1.0})

    def compile(wishes):
        rounds.append(len(wishes))
        return formula(wishes)

    for search in largest_batches([V3, V4], config, compile):
        best = search.best.wish.config.data.train_batch_size
        assert best % search.slice.devices == 0
        assert 0.94 * limit <= best / search.slice.devices <= limit or limit - best / search.slice.devices < 1
    assert len(rounds) < 20


def test_a_search_ends_where_nothing_fits():
    config = PlanConfig(runtime=XlaConfig(sharding="fsdp"))
    (search,) = largest_batches([topology("v5e-4")], config, Formula(0, {"none": 1.0}))
    assert search.best is None
    assert search.failed.wish.config.data.train_batch_size == 4
    assert search.ended() == "v5e-4: not even 4 sequences fit"


def test_a_compilation_that_fails_stops_the_search_on_its_slice_only():
    formula = Formula(20, {"none": 1.0}, crashes=[("v5e-8", "none")])
    config = PlanConfig(data=DataConfig(train_batch_size=64))
    stopped, other = largest_batches([V5E, V3], config, formula)
    assert (stopped.best, stopped.failed) == (None, None)
    assert stopped.ended() == "v5e-8: the search stopped at 64: the compiler did not end within 9 s and was killed"
    assert len([name for name, *_ in formula.asked if name == "v5e-8"]) == 1
    assert other.ended() == "v3-8: --train-batch-size 152 is the largest that fits; 160 does not"


# The cheapest settings


def search(formula, rows=16, accum=1, explicit=(), slices=(V3,), **runtime):
    config = PlanConfig(
        GPT2, DataConfig(train_batch_size=8 * rows, gradient_accum_step=accum), runtime=XlaConfig(**runtime)
    )
    return cheapest_settings(list(slices), config, {"train_batch_size", *explicit}, formula)


COST = {"none": 1.0, "selective": 1.3, "block": 1.2, "math": 9.0}


def test_a_step_that_fits_as_given_needs_no_setting():
    formula = Formula(17, COST)
    (found,) = search(formula)
    assert found.ended() == "v3-8: fits as given: no setting is needed"
    assert {(size, kind, chunk) for _, size, kind, chunk in formula.asked} == {(128, "none", 2048), (128, "block", 512)}


def test_of_the_settings_that_fit_the_one_of_the_lowest_bound_is_taken():
    (found,) = search(Formula(13, COST))
    setting, compiled = found.best()
    assert setting == {"activation_checkpointing": "block"}  # selective moves more, though it recomputes less
    assert found.ended() == "v3-8: use --activation-checkpointing block: of those that fit, the lowest bound"
    assert compiled.fits
    assert len(found.tried) == 7 + 1  # and the given one with half of the sequences
    (cheaper,) = search(Formula(13, COST | {"selective": 1.1}))
    assert cheaper.best()[0] == {"activation_checkpointing": "selective"}


def test_a_smaller_micro_step_competes_where_recomputing_costs_more_and_the_whole_step_stays():
    formula = Formula(9, {"none": 1.0, "selective": 3.0, "block": 3.0})
    (found,) = search(formula, accum=4)
    assert found.best()[0] == {"train_batch_size": 64, "gradient_accum_step": 8}
    assert found.ended().startswith("v3-8: use --train-batch-size 64 --gradient-accum-step 8:")
    (kept,) = search(Formula(9, COST), accum=4)  # weights read once more cost more than recomputing
    assert kept.best()[0] == {"activation_checkpointing": "block"}


def test_sizes_that_nothing_fits_are_passed_by_and_halving_ends_at_one_sequence_per_device():
    formula = Formula(0.9, COST)
    (found,) = search(formula, rows=12)
    assert [size // 8 for _, size, kind, chunk in formula.asked if (kind, chunk) == ("none", 2048)] == [12, 6, 3, 1]
    assert found.best()[0] == {
        "loss_chunk": 512,
        "activation_checkpointing": "block",
        "train_batch_size": 24,
        "gradient_accum_step": 4,
    }
    (nothing,) = search(Formula(0, COST))
    assert nothing.best() is None
    assert nothing.ended() == "v3-8: nothing that was tried fits"


def test_what_the_command_gives_is_not_varied():
    formula = Formula(9, COST)
    (found,) = search(formula, explicit=["activation_checkpointing", "loss_chunk"])
    assert {(kind, chunk) for *_, kind, chunk in formula.asked} == {("none", 2048)}
    assert found.best()[0] == {"train_batch_size": 64, "gradient_accum_step": 2}


def test_attention_without_the_kernel_competes_where_there_is_one():
    math = {"attention": "math", "activation_checkpointing": "selective"}
    config = PlanConfig(GPT2)
    assert math in settings_for(config, set(), V5E)
    dropping = dataclasses.replace(config, model=dataclasses.replace(GPT2, dropout=0.1))
    assert math not in settings_for(dropping, set(), V5E)  # the kernel has no dropout
    assert math not in settings_for(config, {"attention"}, V5E)
    assert as_flags(math) == "--attention math --activation-checkpointing selective"


def test_a_failure_stops_the_slice_and_leaves_what_was_found():
    stopped, other = search(Formula(13, COST, crashes=[("v5e-8", "math")]), slices=(V5E, V3))
    assert (
        "the search stopped at --attention math --activation-checkpointing selective: the compiler did not"
        in stopped.ended()
    )
    assert stopped.ended().endswith("so far: use --activation-checkpointing block: of those that fit, the lowest bound")
    assert other.stopped is None
    (needless,) = search(Formula(17, COST, crashes=[("v3-8", "block")]))
    assert (needless.stopped, needless.ended()) == (None, "v3-8: fits as given: no setting is needed")


# Comparisons


def test_the_table_has_a_row_for_each_step_and_slice_and_ratios_to_the_first():
    config = PlanConfig(
        GPT2, DataConfig(train_batch_size=64), plan=PlanOptions(compare=("reference", "attention=flash dropout=0.1"))
    )
    steps = variants(config, [])
    assert [name for name, _ in steps] == ["--reference", "as given", "--attention flash --dropout 0.1"]
    small = Compiled(wish(steps[1][1]), answer=Answer(temporaries=2**30), traffic=Traffic(10**9, []), parameters=1000)
    large = dataclasses.replace(small, answer=Answer(temporaries=2**31), traffic=Traffic(4 * 10**9, []))
    short = Compiled(wish(config), answer=Answer(error=TOO_LARGE))
    refused = Compiled(wish(config), refused="; ".join(refusals(steps[2][1], V3)))
    lines = table([Row("--reference", large), Row("as given", small), Row("a", short), Row("b", refused)]).splitlines()
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    rows = [dict(zip(COLUMNS[:3], line.strip("| ").split(" | "), strict=False)) for line in lines[2:]]
    assert rows[0] == {"step": "`--reference`", "slice": "v3-8", "sequences × micro-steps": "64 × 16"}
    assert "| 2.00 | 2.00 | 1.00 |" in lines[2]
    assert "| 1.00 | 1.00 | 0.50 |" in lines[3]
    assert "| 1.0 | 0.25 |" in lines[3]
    assert "does not fit: 34.28 of 15.48" in lines[4]
    assert "refused: --attention flash has no dropout" in lines[5]


def wish(config, slice=V3):
    from gpt2_xla.tpu_plan.plan import Wish

    return Wish(slice, config)


def test_levers_are_each_compared_once_and_those_that_change_nothing_not():
    config = PlanConfig(GPT2, DataConfig(train_batch_size=64), plan=PlanOptions(compare=("levers",)))
    mistakes = []
    names = [name for name, _ in variants(config, mistakes)]
    assert mistakes == []
    assert names[:2] == ["--reference", "as given"]
    assert "--num-heads 6" in names  # D = 128
    assert "--num-heads 12" not in names
    assert "--train-batch-size 128" in names
    assert len(names) == len(set(names)) >= 12


def test_levers_that_do_not_go_with_the_given_options_are_refused_not_mistakes():
    plan = PlanOptions(compare=("levers",))
    config = PlanConfig(GPT2, runtime=XlaConfig(sharding="fsdp"), plan=plan)
    mistakes = []
    steps = dict(variants(config, mistakes))
    assert mistakes == []
    (reason,) = refusals(steps["--scan-layers"], V5E)
    assert "not supported with --sharding fsdp" in reason
    variants(dataclasses.replace(config, plan=PlanOptions(compare=("scan-layers", "num-heads=5"))), mistakes)
    assert len(mistakes) == 2
    assert mistakes[0].startswith("--compare 'scan-layers': --scan-layers is not supported with --sharding fsdp")
