"""The benchmark of the training step: bare loops do what ours does, turns are taken, tables say what was measured."""

import math
import socket
import statistics
import threading

import pytest
import torch
from commands import PYTHON, QUICK_XLA, ROOT, finish, run, start
from torch.autograd.profiler_util import FunctionEvent

from gpt2_xla.bench.breakdown import MARK, PARTS, parts
from gpt2_xla.bench.child import FINISH, train_ours
from gpt2_xla.bench.contenders import WARMUP_STEPS, Contender, option_mistakes, seats, write_random_tokens
from gpt2_xla.bench.link import Link
from gpt2_xla.bench.table import make_row, scaling_table, table
from gpt2_xla.bench_config import BenchConfig, BenchOptions
from gpt2_xla.cli import parse
from gpt2_xla.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TorchConfig,
    TorchDeviceConfig,
    TorchPretrainConfig,
)
from gpt2_xla.errors import UserError
from gpt2_xla.model import build_model, parameter_count
from gpt2_xla.runtime.bare_torch_loop import BareGPT, BareTorchLoop
from gpt2_xla.runtime.torch_runtime import TorchRuntime

MODEL = ModelConfig(vocab_size=61, seq_length=16, d_model=32, num_layers=2, num_heads=2)
BENCH = (*PYTHON, str(ROOT / "scripts" / "bench.py"), "--num-layers", "1", "--num-heads", "1", "--d-model", "16")
TINY = ("--seq-length", "8", "--vocab-size", "32", "--turns", "2", "--mixed-precision", "no")
SMALL = (*TINY, "--device", "cpu")


def tables(output):
    """The tables that a command printed: of each its rows, by their first cell, as cells by the title."""
    found = []
    for block in output.split("\n\n"):
        lines = [line.strip("|").split("|") for line in block.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line] for line in lines]
        found += [{row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}] if rows else []
    return found


def number(cell):
    """The number that a cell begins with."""
    return float(cell.split()[0].replace(",", "").rstrip("%"))


def test_the_bare_model_is_the_same_mathematics():
    ours, bare = build_model(MODEL, 0, seed=1), BareGPT(MODEL)
    names = {"attn.c_attn": "qkv", "attn.c_proj": "proj", "mlp.c_fc": "up", "mlp.c_proj": "down", "lm_head": "head"}

    def bare_name(name):
        return next((name.replace(old, new) for old, new in names.items() if old in name), name)

    bare.load_state_dict({bare_name(name): value for name, value in ours.state_dict().items()})
    assert parameter_count(bare) == parameter_count(ours)
    tokens = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(2))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses = [model(inputs, targets) for model in (ours, bare)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    found = dict(bare.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(found[bare_name(name)].grad, parameter.grad)


def test_a_bare_model_begins_like_ours():
    torch.manual_seed(0)
    bare, ours = BareGPT(MODEL), build_model(MODEL, 0, seed=1)
    spreads = [sorted((tuple(p.shape), float(p.detach().std())) for p in model.parameters()) for model in (bare, ours)]
    for (shape, one), (other_shape, other) in zip(*spreads, strict=True):
        assert shape == other_shape
        assert one == pytest.approx(other, rel=0.2)


def training(folder, **options):
    """A configuration over random tokens in the folder, so few that they can be learned by heart."""
    write_random_tokens(folder, MODEL, 40)
    return TorchPretrainConfig(
        MODEL,
        DataConfig((str(folder),), train_batch_size=4, gradient_accum_step=2),
        OptimConfig(learning_rate=1e-2, warmup_steps=5),
        RunConfig(train_steps=101),
        runtime=TorchConfig(mixed_precision="bf16"),
    )


def test_the_bare_loop_learns(tmp_path):
    loop = BareTorchLoop(training(tmp_path), torch.device("cpu"), compiled=False)
    loop.run(1)
    assert loop.loss == pytest.approx(math.log(61), abs=0.2)
    loop.run(100)
    assert loop.loss < 1.0


class CountingRuntime(TorchRuntime):
    """Counts optimizer steps."""

    steps = 0

    def update(self, *arguments):
        self.steps += 1
        return super().update(*arguments)


class CountingLoop:
    """A bare loop that only counts."""

    steps, loss = 0, 1.5

    def run(self, steps):
        self.steps += steps


def test_our_loop_trains_when_it_is_asked_to_and_no_further(tmp_path):
    options = BenchOptions(turns=2, steps=4, breakdown=True)
    (tmp_path / "data").mkdir()
    write_random_tokens(tmp_path / "data", MODEL, 1000)
    bench = BenchConfig(MODEL, OptimConfig(), TorchDeviceConfig(device="cpu", mixed_precision="no"), options)
    (seat,) = seats(bench, tmp_path)["torch"]
    runtime = CountingRuntime(seat.contenders[0].config.runtime)
    ends = socket.socketpair()
    ours, link = (Link(end) for end in ends)
    found = {}

    def work():
        try:
            found.update(train_ours(seat.contenders[0].config, runtime, seat, options, ours))
            ours.send(seen=True)
        finally:
            ours.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert link.receive() == {"warm": ["ours"]}
    assert runtime.steps == WARMUP_STEPS
    for turn in (1, 2, 3):  # the last one under the profiler
        link.send(ask="ours")
        assert link.receive()["seconds"] > 0
        assert runtime.steps == WARMUP_STEPS + 4 * turn
    link.send(ask=FINISH)
    assert link.receive() == {"seen": True}
    thread.join()
    link.close()
    seen = found["ours"]
    assert runtime.steps == WARMUP_STEPS + 12
    assert seen["loss"] == pytest.approx(math.log(61), abs=0.2)
    assert seen["peak_memory"] > 2**20
    assert set(seen["parts"]) == {*PARTS, "other"}
    assert min(seen["parts"][part] for part in ("data", "forward", "backward", "optimizer")) > 0
    assert seen["parts"]["reduce"] == 0
    assert not list(tmp_path.glob("run-1/step-*"))  # no checkpoint of what is no run
    assert TorchRuntime.update.__name__ == "update"  # the marks are gone
    assert "__call__" not in vars(type(build_model(MODEL, 0, 1)))


def test_a_command_tells_all_loops_side_by_side_and_why_one_did_not_run():
    output = run(*BENCH, *SMALL, "--against", "bare", "--bare-precisions", "same", "fp16", "bf16", "--breakdown")
    rows, breakdown = tables(output)
    assert list(rows) == ["ours", "bare, eager, float32", "bare, eager, bf16"]
    assert "not run: bare, eager, fp16: --mixed-precision fp16 needs a CUDA GPU" in output
    assert [row["precision"] for row in rows.values()] == ["float32", "float32", "bf16"]
    for row in rows.values():
        assert number(row["tokens/s"]) > 0
        assert number(row["peak memory"]) > 100
        assert number(row["loss"]) == pytest.approx(math.log(32), abs=0.2)
    for name in ("bare, eager, float32", "bare, eager, bf16"):
        assert number(rows[name]["ours is faster"]) >= 0  # that it is told; how fast is what a busy machine decides
        memory = number(rows["ours"]["peak memory"]) / number(rows[name]["peak memory"])
        assert number(rows[name]["ours needs"]) == pytest.approx(memory, abs=0.01)
    assert list(breakdown) == [*PARTS, "other", "a step under the profiler", "a step without it"]
    *times, whole, alone = (number(row["ours: ms"]) for row in breakdown.values())
    assert sum(times) == pytest.approx(whole, abs=0.05)
    assert alone == pytest.approx(number(rows["ours"]["step"]), abs=0.06)


def test_more_processes_are_held_against_one():
    rows, scaling, breakdown = tables(run(*BENCH, *SMALL, "--processes", "1", "2", "--breakdown", OMP_NUM_THREADS="1"))
    assert [row["machine"] for row in rows.values()] == ["1 × cpu, 1 thread", "2 × cpu, 1 thread (gloo)"]
    assert [row["tokens a step"] for row in scaling.values()] == ["32", "64"]
    assert number(scaling["1"]["efficiency"]) == 1
    assert number(scaling["2"]["efficiency"]) >= 0  # shown as 0.00 where the cores are busy
    reduce = {title: number(cell) for title, cell in breakdown["reduce"].items() if title.endswith("ms")}
    assert reduce["ours × 1: ms"] == 0
    assert reduce["ours × 2: ms"] > 0


@pytest.mark.xla
def test_xla_loops_share_a_process():
    (rows,) = tables(run(*BENCH, *TINY, "--runtimes", "xla", "--against", "bare", **QUICK_XLA))
    assert list(rows) == ["ours", "bare torch_xla"]
    assert rows["ours"]["machine"].startswith("1 × XLA CPU")
    assert int(rows["ours"]["compiles"]) > 0
    assert number(rows["bare torch_xla"]["ours is faster"]) > 0
    assert {row["peak memory"] for row in rows.values()} == {"–"}
    losses = [number(row["loss"]) for row in rows.values()]
    assert losses == pytest.approx([math.log(32)] * 2, abs=0.2)


def seen(**facts):
    common = {"machine": "m", "peak_flops": None, "compiles": None, "compile_seconds": None, "loss": 1.0}
    return {**common, "peak_memory": 7 * 2**20, **facts}


def test_ratios_are_medians_of_turns_that_were_neighbours():
    config = TorchPretrainConfig(MODEL, DataConfig(train_batch_size=4, gradient_accum_step=1))
    slow_machine = [1.0, 5.0, 1.0, 2.0, 9.0]  # turn by turn
    ours = make_row(Contender("ours", config), [2.0 * s for s in slow_machine], 10, seen(peak_flops=1e6))
    bare = make_row(Contender("bare", config), [3.0 * s for s in slow_machine], 10, seen(peak_memory=14 * 2**20))
    assert ours.step == pytest.approx(0.4)  # median 2 of the turns, of 10 steps each
    assert ours.tokens_per_second == pytest.approx(4 * 16 / 0.4)
    assert bare.speed_of(ours) == pytest.approx(1.5)
    (cells,) = tables(table([ours, bare]))
    assert (cells["bare"]["ours is faster"], cells["bare"]["ours needs"]) == ("1.50 ×", "0.50 ×")
    assert cells["ours"]["ours is faster"] == "–"
    double = TorchPretrainConfig(MODEL, DataConfig(train_batch_size=8, gradient_accum_step=1))
    two = make_row(Contender("ours × 2", double, 2), [2.5 * s for s in slow_machine], 10, seen())
    (scaling,) = tables(scaling_table([ours, two]))
    assert scaling["2"]["efficiency"] == f"{statistics.median([2 / 2.5] * 5):.2f}"


def event(name, start, end, kernels=()):
    found = FunctionEvent(id=0, name=name, thread=1, start_us=start, end_us=end)
    for kernel, duration in kernels:
        found.append_kernel(kernel, 0, duration)
    return found


HOST = [
    event(MARK + "data", 0, 10),
    event(MARK + "forward", 10, 40),
    event(MARK + "backward", 40, 100),
    event("autograd::engine::evaluate_function: MmBackward0", 45, 80),
    event(MARK + "optimizer", 100, 150),
    event(MARK + "reduce", 110, 125),
]


def test_parts_of_the_host_do_not_count_twice():
    expected = {"data": 10, "forward": 30, "backward": 60, "optimizer": 35, "reduce": 15}
    found = parts(HOST, reduces=False)
    assert {name: round(seconds * 1e6) for name, seconds in found.items()} == expected
    found = parts(HOST, reduces=True)  # after the last gradient DDP waits for its reductions
    assert {name: round(s * 1e6) for name, s in found.items()} == expected | {"backward": 40, "reduce": 35}


def test_parts_of_a_device_are_its_kernels():
    kernels = [
        event("aten::mm", 15, 16, [("gemm", 500)]),
        event("aten::mm", 50, 51, [("gemm", 900), ("ncclDevKernel_AllReduce", 300)]),
        event("aten::_fused_adamw_", 130, 131, [("adam", 100)]),
        event("aten::add", 200, 201, [("add", 70)]),  # of no part
    ]
    found = parts([*HOST, *kernels], reduces=True)
    expected = {"data": 0, "forward": 500, "backward": 900, "optimizer": 100, "reduce": 300}
    assert {name: round(seconds * 1e6) for name, seconds in found.items()} == expected


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        (
            ["--turns", "0", "--steps", "-1", "--processes", "0", "--profile-steps", "1:2"],
            ["--turns 0 must", "--steps -1 must", "--processes 0 must", "--profile-steps has no meaning here"],
        ),
        (["--bare-models", "eager"], ["--bare-models has no meaning without --against bare"]),
        (
            ["--against", "bare", "--position", "rope", "--optim-type", "muon"],
            ["which --position, --optim-type departs from"],
        ),
        (["--runtimes", "xla", "--breakdown"], ["--breakdown is for torch, but --runtimes is xla"]),
        (
            ["--runtimes", "xla", "--device", "cuda", "--sharding", "fsdp", "--compile"],
            [f"{flag} is for torch, but --runtimes is xla" for flag in ("--device", "--sharding", "--compile")],
        ),
        (
            ["--processes", "1", "2", "3", "--sharding", "none"],
            ["torchrun starts 2, each of", "torchrun starts 3, each of"],
        ),
        (
            ["--processes", "1", "4", "6", "--sharding", "hsdp", "--mesh", "data=2,fsdp=2"],
            ["--mesh data=2,fsdp=2 is for 4 processes, but torchrun starts 6; use --mesh data=2,fsdp=3"],
        ),
        (["--processes", "1", "2", "--sharding", "hsdp"], []),
        (["--sharding", "fsdp"], ["--sharding fsdp has no meaning with one process; add --processes 2"]),
        (["--runtimes", "torch", "xla", "--device", "cpu", "--compile"], []),
        (["--loss-chunk", "-1", "--d-model", "100"], ["--d-model 100 is not divisible", "--loss-chunk -1 must be"]),
        (["--turns", "0", "--loss-chunk", "-1"], ["--turns 0 must", "--loss-chunk -1 must"]),
        (
            ["--against", "bare", "--mixed-precision", "fp8", "--position", "rope"],
            ["the bare loop has no --mixed-precision fp8", "which --position departs from"],
        ),
        (["--runtimes", "torch", "xla", "--processes", "2", "--sharding", "hsdp", "--mesh", "fsdp=2"], []),
        (["--against", "bare", "--runtimes", "xla", "--position", "rope"], []),
    ],
)
def test_what_cannot_be_measured_is_said_in_sentences(flags, sentences):
    parsed = parse(BenchConfig, flags, "")
    mistakes = option_mistakes(parsed.config, parsed.explicit)
    assert len(mistakes) == len(sentences)
    assert all(any(sentence in mistake for mistake in mistakes) for sentence in sentences)


def test_the_options_of_a_run_that_a_measurement_has_no_use_for_are_unknown():
    with pytest.raises(UserError) as caught:
        parse(BenchConfig, ["--find-batch", "--memory-limit=2"], "")
    assert [mistake.split()[2].rstrip(",;") for mistake in caught.value.mistakes] == ["--find-batch", "--memory-limit"]


def test_nothing_measured_is_a_mistake_without_a_traceback():
    process = start(*BENCH, *SMALL, "--mixed-precision", "fp16")
    output = finish(process)
    assert process.returncode == 2, output
    assert "not run: ours: --mixed-precision fp16 needs a CUDA GPU" in output
    assert "Traceback" not in output


def test_all_mistakes_of_a_command_are_told_together():
    process = start(*BENCH, "--turns", "0", "--processes", "0", "--steps", "x", "--find-batch")
    output = finish(process)
    assert process.returncode == 2, output
    assert output.startswith("4 errors:")
    for flag in (
        "--turns 0 ",
        "--processes 0 ",
        "--steps x ",
        "unknown flag --find-batch, which belongs to run_pretrain.py",
    ):
        assert flag in output
