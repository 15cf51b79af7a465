"""Planning for TPUs, without the compiler: slices, programs' texts, what they move, bounds, mistakes."""

import dataclasses
import json

import pytest
from commands import PYTHON, ROOT, finish, start
from tpu_answers import TOO_LARGE

from gpt2_xla.errors import UserError
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.compiler import Answer
from gpt2_xla.tpu_plan.estimate import bounds, kernel_flops, training_days
from gpt2_xla.tpu_plan.hlo import Array, Program, arrays_of
from gpt2_xla.tpu_plan.plan import Compiled
from gpt2_xla.tpu_plan.shortage import shortage
from gpt2_xla.tpu_plan.topology import known_names, topology
from gpt2_xla.tpu_plan.traffic import Traffic, count_traffic

MIB = 2**20


def program(body, *computations):
    """A module whose entry is `body`; each computation is (name, lines)."""
    parts = ["HloModule test, is_scheduled=true", ""]
    for name, lines in (*computations, ("ENTRY %main", body)):
        head = name if name.startswith("ENTRY") else f"%{name}"
        parts += [f"{head} (p: f32[1]) -> f32[1] {{", *(f"  {line}" for line in lines), "}", ""]
    return Program("\n".join(parts))


# Slices


@pytest.mark.parametrize(
    ("name", "compiler_name", "devices", "chips"),
    [
        ("v3-8", "v3:2x2", 8, 4),
        ("v3-128", "v3:8x8", 128, 64),
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v5litepod-8", "v5e:2x4", 8, 8),
        ("V5E-16", "v5e:4x4", 16, 16),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v6e-1", "v6e:1x1", 1, 1),
    ],
)
def test_slices_have_the_names_that_they_are_rented_by(name, compiler_name, devices, chips):
    found = topology(name)
    assert (found.compiler_name, found.devices, found.chips) == (compiler_name, devices, chips)


def test_a_single_chip_and_a_v4_need_options_of_their_own():
    assert topology("v5e-1").options == {"chips_per_host_bounds": (1, 1, 1)}
    assert topology("v4-8").options == {"chip_config_name": "megacore"}


def test_an_unknown_slice_lists_the_known_ones():
    with pytest.raises(UserError, match=r"--tpu v3-9 is no slice.*did you mean v3-8\?.*v5e-1 4 8 16"):
        topology("v3-9")
    assert all(topology(name).name == name for name in known_names())


# Programs


def test_arrays_of_a_type_and_their_place():
    kind = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, pred[3]{0})"
    on_chip, scalar, small = arrays_of(kind)
    assert (on_chip.bytes, on_chip.hbm, scalar.bytes, small.bytes) == (2048, 0, 4, 3)


def test_an_elementwise_fusion_reads_its_operands_and_writes_its_results():
    found = count_traffic(
        program(
            [
                "%a = f32[1024,256]{1,0} parameter(0)",
                "%b = f32[1024,256]{1,0:S(1)} parameter(1)",
                'ROOT %f = f32[1024,256]{1,0} fusion(%a, %b), kind=kLoop, calls=%sum, metadata={op_name="x/aten__add" '
                'source_file="/home/me/gpt2_xla/model.py" source_line=95}',
            ],
            (
                "sum",
                [
                    "%p0 = f32[1024,256]{1,0} parameter(0)",
                    "%p1 = f32[1024,256]{1,0} parameter(1)",
                    "ROOT %s = f32[1024,256]{1,0} add(%p0, %p1)",
                ],
            ),
        )
    )
    assert found.hbm == 2 * MIB  # %b is on the chip
    (mover,) = found.movers
    assert (mover.source, mover.count, mover.bytes) == ("aten__add gpt2_xla/model.py:95", 1, 2 * MIB)


def test_a_fusion_that_takes_or_changes_a_slice_moves_the_slice():
    found = count_traffic(
        program(
            [
                "%big = f32[64,256]{1,0} parameter(0)",
                "%i = s32[]{:S(1)} parameter(1)",
                "ROOT %f = f32[64,256]{1,0} fusion(%big, %i), kind=kLoop, calls=%update",
            ],
            (
                "update",
                [
                    "%p0 = f32[64,256]{1,0} parameter(0)",
                    "%p1 = s32[] parameter(1)",
                    "%row = f32[1,256]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,256}",
                    "%twice = f32[1,256]{1,0} add(%row, %row)",
                    "ROOT %u = f32[64,256]{1,0} dynamic-update-slice(%p0, %twice, %p1)",
                ],
            ),
        )
    )
    assert found.hbm == 2 * 256 * 4


def test_a_prefetch_moves_its_slice_once():
    found = count_traffic(
        program(
            [
                "%w = f32[1024,256]{1,0} parameter(0)",
                "%s = (f32[1024,256]{1,0}, f32[256,256]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%w), slice={[0:256], [0:256]}",
                "ROOT %d = f32[256,256]{1,0:S(1)} slice-done(%s)",
            ]
        )
    )
    assert found.hbm == 256 * 256 * 4


LOOP_BODY = [
    "%state = (s32[], bf16[256,256]{1,0}) parameter(0)",
    "%x = bf16[256,256]{1,0} get-tuple-element(%state), index=1",
    "%d = f32[256,256]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    "ROOT %t = (s32[], bf16[256,256]{1,0}) tuple(%state, %x)",
]


@pytest.mark.parametrize(
    ("told", "bound"), [(', backend_config={"known_trip_count":{"n":"5"}}', 99), ("", 5)], ids=["told", "by condition"]
)
def test_a_loop_counts_as_often_as_it_runs(told, bound):
    found = count_traffic(
        program(
            [
                "%init = (s32[], bf16[256,256]{1,0}) parameter(0)",
                f"ROOT %w = (s32[], bf16[256,256]{{1,0}}) while(%init), condition=%more, body=%step{told}",
            ],
            (
                "more",
                [
                    "%s = (s32[], bf16[256,256]{1,0}) parameter(0)",
                    f"%n = s32[]{{:T(128)}} constant({bound})",
                    "%i = s32[]{:T(128)} get-tuple-element(%s), index=0",
                    "ROOT %c = pred[] compare(%i, %n), direction=LT",
                ],
            ),
            ("step", LOOP_BODY),
        )
    )
    assert found.dot_flops == 5 * 2 * 256**3
    assert found.hbm == 5 * (2 * 256 * 256 * 2 + 256 * 256 * 4)
    assert (found.bf16_dots, found.other_dots) == (1, 0)


def test_a_loop_that_counts_in_twos_runs_half_as_often():
    state = "(bf16[256,256]{1,0}, u32[])"
    found = count_traffic(
        program(
            [f"%init = {state} parameter(0)", f"ROOT %w = {state} while(%init), condition=%more, body=%step"],
            (
                "more",
                [
                    "%n = u32[]{:T(128)} constant(8)",
                    f"%s = {state} parameter(0)",
                    "%i = u32[]{:T(128)} get-tuple-element(%s), index=1",
                    "ROOT %c = pred[] compare(%i, %n), direction=LT",
                ],
            ),
            (
                "step",
                [
                    f"%s = {state} parameter(0)",
                    "%x = bf16[256,256]{1,0} get-tuple-element(%s), index=0",
                    "%i = u32[] get-tuple-element(%s), index=1",
                    "%one = u32[] constant(1)",
                    "%half = u32[] add(%i, %one)",
                    "%next = u32[] add(%half, %one)",
                    "%d = bf16[256,256]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
                    f"ROOT %t = {state} tuple(%d, %next)",
                ],
            ),
        )
    )
    assert found.dot_flops == 4 * 2 * 256**3


def test_a_float32_product_is_told_apart():
    lines = [
        "%a = f32[64,32]{1,0} parameter(0)",
        "%b = f32[32,16]{1,0} parameter(1)",
        "ROOT %d = f32[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    ]
    found = count_traffic(program(lines))
    assert (found.bf16_dots, found.other_dots, found.dot_flops) == (0, 1, 2 * 64 * 16 * 32)


def test_a_product_written_as_a_convolution_counts_what_it_sums_over():
    lines = [
        "%a = bf16[8,64,32]{2,1,0} parameter(0)",
        "%b = bf16[8,32,16]{2,1,0} parameter(1)",
        "ROOT %c = f32[8,64,16]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, "
        "dim_labels=0bf_0io->0bf",
    ]
    assert count_traffic(program(lines)).dot_flops == 8 * 2 * 64 * 16 * 32


def test_collectives_by_kind_and_bytes_of_their_larger_side():
    found = count_traffic(
        program(
            [
                "%g = f32[256]{0} parameter(0)",
                "%h = bf16[1024]{0} parameter(1)",
                "%r = (f32[256]{0}, bf16[1024]{0}) all-reduce(%g, %h), replica_groups={}, to_apply=%sum",
                "%s = (f32[256]{0}, f32[2048]{0}) all-gather-start(%g), dimensions={0}",
                "%d = f32[2048]{0} all-gather-done(%s)",
                "ROOT %f = bf16[128]{0} fusion(%h), kind=kCustom, calls=%all-reduce-scatter.1",
            ],
            (
                "all-reduce-scatter.1",
                [
                    "%p = bf16[1024]{0} parameter(0)",
                    "%a = bf16[1024]{0} all-reduce(%p), replica_groups={}, to_apply=%sum",
                    "ROOT %s = bf16[128]{0} dynamic-slice(%a, %a), dynamic_slice_sizes={128}",
                ],
            ),
            ("sum", ["%x = f32[] parameter(0)", "ROOT %y = f32[] add(%x, %x)"]),
        )
    )
    assert found.collectives == {"all-reduce": (1, 3072), "all-gather": (1, 8192), "reduce-scatter": (1, 2048)}


def test_transfers_to_the_host_are_counted():
    lines = ["%a = f32[8]{0} parameter(0)", "ROOT %o = token[] outfeed(%a, %a)"]
    assert count_traffic(program(lines)).host_transfers == 1


# Bounds


def test_the_slowest_resource_sets_the_bound():
    device = topology("v3-8").device
    one_second = Traffic(hbm=int(device.hbm_bandwidth), movers=[], dot_flops=0.5 * device.peak)
    found = bounds(one_second, device, 8)
    assert found.step == pytest.approx(1.0)
    assert (found.compute, found.limit) == (pytest.approx(0.5), "hbm")


def test_an_all_reduce_sends_its_bytes_twice_and_an_all_gather_once():
    device = topology("v5e-8").device
    factors = {"all-reduce": 2 * 7 / 8, "all-gather": 7 / 8, "reduce-scatter": 7 / 8, "collective-permute": 1}
    for kind, factor in factors.items():
        traffic = Traffic(0, [], {kind: (1, int(device.interconnect))})
        assert bounds(traffic, device, 8).interconnect == pytest.approx(factor)


def test_the_kernel_counts_its_blocks_up_to_the_diagonal():
    q = Array("bf16", (2, 3, 2048, 128), False)
    blocks = 3 / 4  # of 2 x 2 blocks, one lies above the diagonal
    assert kernel_flops((q, q, q)) == 2 * 2 * 6 * 2048**2 * 128 * blocks
    assert kernel_flops((q, q, q, q)) == 2.5 * kernel_flops((q, q, q))


def test_days_are_a_range():
    found = training_days(86400.0 * 1000, 1000.0)
    assert 1 < found.least < 2 < found.most < 3


# What the compiler says


def test_a_program_that_does_not_fit_names_its_largest_buffers():
    found = shortage(TOO_LARGE)
    assert found.needed == pytest.approx(34.28 * 2**30)
    assert found.usable == pytest.approx(15.48 * 2**30)
    assert found.buffers == ("6.10G f32[400000,4096] xla__cross_replica_sum", "256.00M f32[4096,16384]")
    assert shortage("INTERNAL: something else") is None


# The command


def plan(*flags):
    """Exit status and output of scripts/plan_tpu.py."""
    process = start(*PYTHON, ROOT / "scripts" / "plan_tpu.py", *flags)
    return finish(process), process.returncode


@pytest.mark.tpu_compiler
def test_all_mistakes_are_told_at_once():
    output, status = plan("--tpu", "v3-9", "--tokens", "0", "--num-heads", "7", "--train-batch-sise", "8")
    assert status == 2
    assert "4 errors" in output
    for sentence in ("--tpu v3-9 is no slice", "--tokens 0.0 must be above 0", "did you mean --train-batch-size?"):
        assert sentence in output
    assert "--d-model 768 is not divisible by --num-heads 7" in output


@pytest.mark.tpu_compiler
def test_batches_and_meshes_that_a_slice_cannot_share_are_told_for_each():
    output, _ = plan("--tpu", "v3-8", "v5e-4", "--train-batch-size", "6")
    assert "v3-8: --train-batch-size 6 is not divisible by the 8 replicas; use 8" in output
    assert "v5e-4: --train-batch-size 6 is not divisible by the 4 replicas; use 4 or 8" in output
    output, _ = plan("--tpu", "v5e-4", "--sharding", "fsdp", "--mesh", "fsdp=2,tensor=8")
    assert "v5e-4: --mesh fsdp=2,tensor=8 is for 16 devices, but there are 4" in output
    assert "--eval-batch-size" not in output


def test_a_missing_compiler_gives_the_command_that_installs_it(monkeypatch):
    import importlib.util

    from gpt2_xla.tpu_plan.command import installation_mistakes

    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("libtpu", "jax") else real(name))
    if real("torch_xla") is None:
        pytest.skip("needs torch_xla")
    (mistake,) = installation_mistakes()
    assert "libtpu and jax" in mistake
    assert "pip install -r requirements-xla_tpu.txt" in mistake


def test_the_facts_of_a_failed_compilation_are_json():
    from gpt2_xla.tpu_plan.outcome import facts
    from gpt2_xla.tpu_plan.plan import Wish

    wish = Wish(topology("v3-8"), PlanConfig())
    assert json.loads(json.dumps(facts(Compiled(wish, failure="aborted"))))["fits"] is None
    refused = facts(dataclasses.replace(Compiled(wish), answer=Answer(error=TOO_LARGE)))
    assert (refused["fits"], refused["needed"]) == (False, pytest.approx(34.28 * 2**30))
