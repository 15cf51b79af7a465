"""The train step, traced without memory and compiled by the TPU compiler: what it becomes on each kind of slice."""

import json
import re
from dataclasses import replace

import pytest
from commands import PYTHON, ROOT

from gpt2_xla.config import DataConfig, ModelConfig, RunConfig, XlaConfig
from gpt2_xla.script_config import PlanConfig, PlanOptions

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.timeout(400)]

# 2.1 million parameters, 2 micro-steps of 2 × 256 tokens per device: a compilation takes 5 s.
MODEL = ModelConfig(seq_length=256, d_model=256, num_layers=2, num_heads=4, vocab_size=1024)
DATA = DataConfig(train_batch_size=16, gradient_accum_step=2)
SLICES = ("v3-8", "v5e-8", "v6e-8")
DEVICES = 8
PARAMETERS = 1024 * 256 + 256 * 256 + 2 * (12 * 256**2 + 13 * 256) + 2 * 256
STATE = 3 * 4 * PARAMETERS  # bytes of parameters and both moments


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What became of the step, by sharding and slice."""
    from gpt2_xla.tpu_plan.plan import Planner, Wish
    from gpt2_xla.tpu_plan.topology import topology

    options = PlanOptions(plan_cache=str(tmp_path_factory.mktemp("cache")), jobs=2, time_limit=120)
    configs = [PlanConfig(MODEL, DATA, runtime=XlaConfig(sharding=s), plan=options) for s in ("none", "fsdp")]
    wishes = [Wish(topology(name), config) for config in configs for name in SLICES]
    results = Planner(configs[0], lambda *_: None).compile(wishes)
    return {(one.wish.config.runtime.sharding, one.wish.slice.name): one for one in results}


@pytest.fixture(params=[(sharding, name) for sharding in ("none", "fsdp") for name in SLICES], ids="-".join)
def case(request, compiled):
    return compiled[request.param]


@pytest.fixture
def program(case):
    from gpt2_xla.tpu_plan.cache import read_program

    return read_program(case.program)


def test_the_step_compiles_and_fits(case):
    assert case.failure == case.answer.error == ""
    assert case.parameters == PARAMETERS
    assert 0 < case.answer.peak < case.wish.slice.device.hbm


def test_what_compiling_took_is_told(case):
    assert 0.5 < case.answer.seconds < 120
    assert 2e8 < case.answer.host_memory < 3e9


def test_the_same_program_is_not_compiled_again_whatever_else_the_command_says(compiled):
    from gpt2_xla.tpu_plan.plan import Planner, Wish

    known = compiled["none", "v5e-8"]
    config = replace(known.wish.config, run=RunConfig(seed=7, train_steps=9), data=replace(DATA, eval_batch_size=64))
    ran = []
    planner = Planner(config, lambda what, running, *_: ran.extend(what for _ in running))
    (again,) = planner.compile([Wish(known.wish.slice, config)])
    assert set(ran) <= {"tracing"}
    assert (again.answer, again.program) == (known.answer, known.program)
    assert not list(known.program.parent.glob("run-*"))


def test_results_take_the_place_of_parameters_and_optimizer_state(case):
    held = STATE / (DEVICES if case.wish.config.runtime.sharding == "fsdp" else 1)
    assert held <= case.answer.aliased < 1.05 * held  # vectors are padded to tiles
    assert held <= case.answer.arguments < 1.1 * held  # the rest is the batch


def test_all_matrix_products_are_bf16_and_counted_once_per_micro_step(case):
    assert case.traffic.other_dots == 0
    tokens = DATA.train_batch_size * DATA.gradient_accum_step * MODEL.seq_length / DEVICES
    # 6 FLOPs a weight and token; the embedding is the output layer. Those of the attention kernel are not among them.
    matrices = tokens * 6 * (1024 * 256 + 2 * 12 * 256**2)
    calls = sum(times for *_, times in case.traffic.kernels)
    assert calls == DATA.gradient_accum_step * MODEL.num_layers * 2  # forward and backward
    assert case.traffic.dot_flops == pytest.approx(matrices, rel=0.02)


def test_nothing_goes_to_the_host_and_no_array_is_float64(case, program):
    assert case.traffic.host_transfers == 0
    arrays = [array for _, instruction, _ in program.everywhere() for array in instruction.arrays]
    assert len(arrays) > 1000
    assert not [array for array in arrays if array.dtype == "f64" and array.shape]


@pytest.mark.parametrize("name", SLICES)
def test_replicas_take_one_all_reduce_of_all_gradients_and_the_loss(compiled, name):
    collectives = compiled["none", name].traffic.collectives
    assert set(collectives) == {"all-reduce"}
    count, size = collectives["all-reduce"]
    assert count == 1
    assert 4 * PARAMETERS < size <= 4 * PARAMETERS + 16


@pytest.mark.parametrize("name", SLICES)
def test_fsdp_gathers_weights_and_scatters_the_gradients_of_matrices(compiled, name):
    collectives = compiled["fsdp", name].traffic.collectives
    assert collectives["all-gather"][1] > 2 * 2 * 2 * 12 * 256**2  # bf16 weights of the blocks, for each micro-step
    if name == "v3-8":  # its compiler has no reduce-scatter: each core takes its part of an all-reduce
        assert "reduce-scatter" not in collectives
        return
    # bf16 gradients of the blocks' matrices and, on some, that of the embedding, for each micro-step.
    assert collectives["reduce-scatter"][1] >= 2 * 2 * 2 * 12 * 256**2
    assert collectives["all-reduce"][1] < 0.2 * collectives["reduce-scatter"][1]


def test_a_device_of_fsdp_holds_its_part(compiled):
    for name in SLICES:
        assert compiled["fsdp", name].answer.arguments < 0.15 * compiled["none", name].answer.arguments


def test_the_command_tells_what_does_not_fit_and_keeps_the_other_results(tmp_path):
    # 20.6 GB of parameters and optimizer state: more than a v3 core has, less than a v6e chip.
    flags = "--num-layers 1 --d-model 4096 --num-heads 32 --vocab-size 400000 --seq-length 128 --train-batch-size 8"
    command = (*PYTHON, str(ROOT / "scripts" / "plan_tpu.py"), *flags.split(), "--gradient-accum-step", "1", "--json")
    import subprocess

    done = subprocess.run(
        [*command, "--tpu", "v3-8", "v5p-8", "--plan-cache", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    small, large = json.loads(done.stdout)
    assert (small["slice"], small["fits"]) == ("v3-8", False)
    assert small["needed"] > 20.5 * 2**30
    assert "f32[400000,4096]" in small["largest"][0]
    assert (large["slice"], large["fits"], large["ran"]) == ("v5p-8", True, False)


def test_the_report_says_that_nothing_ran(tmp_path, compiled):
    from gpt2_xla.tpu_plan.report import headline, report

    case = compiled["none", "v5e-8"]
    assert re.search(r"Compiled by the TPU compiler \(libtpu [\d.]+\), not run", headline(case.wish.config))
    text = report(case)
    assert "v5e-8 (8 chips, 8 devices; replicas)" in text
    assert re.search(r"fits +0\.\d\d of 15\.75 GiB", text)
    assert "1 all-reduce of 7.6 MB" in text
    assert "syncfree/_functional.py:" in text  # a source line
