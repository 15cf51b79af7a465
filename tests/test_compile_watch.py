"""Compilations after warm-up are told, with what changed, and stop the run where that is wanted."""

import json

import pytest
import torch
from commands import PYTHON, QUICK_XLA, ROOT, TINY, data_flags, finish, records, start

from gpt2_xla.runtime.base import CompileStats
from gpt2_xla.runtime.compile_watch import CompileWatch


class CountingRuntime:
    """A runtime as far as the watch sees one."""

    def __init__(self):
        self.count, self.stops = 0, 0

    def compile_stats(self):
        return CompileStats(self.count, float(self.count))

    def request_stop(self):
        self.stops += 1


@pytest.fixture
def runtime():
    return CountingRuntime()


def test_the_first_of_each_kind_of_work_may_compile_and_later_ones_may_not(runtime):
    lines = []
    watch = CompileWatch(runtime, lines.append)
    for step, kind, compiled in [(1, "training", 2), (1, "validation", 1), (2, "training", 0), (2, "saving", 1)]:
        runtime.count += compiled
        watch.worked(kind, step)
    assert (watch.recompiles, lines) == (0, [])
    runtime.count += 1
    watch.worked("validation", 3)
    assert watch.recompiles == 1
    assert lines[0].startswith("warning: step 3: validation compiled 1 program again, in 1.0 s; ")


def test_it_tells_which_shape_or_graph_changed(runtime):
    lines = []
    watch = CompileWatch(runtime, lines.append)
    for batch, graph in [((2, 4), "a"), ((2, 3), "b"), ((2, 3), "c"), ((2, 3), "c")]:
        runtime.count += 1
        watch.worked("training", 1, torch.zeros(batch), graph)
    assert "batch (2, 4) float32 became batch (2, 3) float32, graph a became b" in lines[0]
    assert lines[1].endswith("; graph b became c")
    assert "batch (2, 3) float32 did not change" in lines[2]


def test_a_graph_that_changes_in_every_step_does_not_drown_the_log(runtime):
    lines = []
    watch = CompileWatch(runtime, lines.append)
    for step in range(100):
        runtime.count += 1
        watch.worked("training", step)
    assert watch.recompiles == 99
    assert len(lines) == 6
    assert "only counted" in lines[-1]


def test_the_limit_asks_once_to_stop(runtime):
    watch = CompileWatch(runtime, lambda _: None, limit=2)
    for step in range(6):
        runtime.count += 1
        watch.worked("training", step)
        assert runtime.stops == (step > 2)
        assert (watch.verdict is not None) == (step > 2)
    assert "step 3: training" in watch.verdict
    assert watch.verdict.endswith("That is more than --max-recompiles 2")


def test_the_summary_says_that_it_counts_more_than_training(runtime):
    watch = CompileWatch(runtime, lambda _: None)
    assert watch.summary() == ""
    runtime.count += 1
    together = "training, validation and saving together: "
    assert watch.summary() == f"{together}1 program compiled in 1.0 s, 0 of them after warm-up"
    runtime.count += 2
    assert watch.summary() == f"{together}3 programs compiled in 3.0 s, 0 of them after warm-up"


@pytest.mark.xla
def test_a_changing_shape_saves_and_stops_the_run(tmp_path, text_data):
    flags = [*TINY, *data_flags(text_data), "--train-steps", "50", "--checkpoints-dir", tmp_path / "run"]
    script = ROOT / "tests" / "xla_changing_shape.py"
    limits = ("--max-recompiles", "0", "--compile-cache", tmp_path / "cache")
    process = start(*PYTHON, script, *flags, *limits, **QUICK_XLA)
    output = finish(process)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "warning: step 4: training compiled 1 program again" in output
    assert "batch (1, 8, 33) int64 became batch (1, 8, 17) int64, graph " in output
    assert "step 4 is saved, and the same command with a higher limit goes on from it\n" in output
    assert json.loads((tmp_path / "run" / "step-00000004" / "trainer_state" / "state.json").read_text())["step"] == 4
    assert records(tmp_path / "run")[0]["compiles"] == 2  # Adam's zeros, and the step
    # The cache: written here, but not readable on CPU.
    assert "note: --compile-cache saves nothing on CPU" in output
    assert "--compile-cache: 0 hits, 3 misses" in output
    assert list((tmp_path / "cache" / "replica-0").iterdir())
