"""What scripts/plan_tpu.py says while it works, with children that answer at once in the compiler's place."""

import io
import re
import sys

import pytest
from tpu_answers import TOO_LARGE

from gpt2_xla.config import DataConfig
from gpt2_xla.script_config import PlanConfig, PlanOptions
from gpt2_xla.tpu_plan import plan
from gpt2_xla.tpu_plan.jobs import Job
from gpt2_xla.tpu_plan.plan import Planner, Wish
from gpt2_xla.tpu_plan.progress import Progress
from gpt2_xla.tpu_plan.topology import topology

TRACER = """
import json, pathlib, sys
answer = {"arguments": [], "argument_shardings": [], "result_shardings": [], "parameters": 1, "digest": "d"}
pathlib.Path(json.loads(pathlib.Path(sys.argv[1]).read_text())["answer"]).write_text(json.dumps(answer))
"""
COMPILER = f"""
import gzip, json, os, pathlib, sys
request = json.loads(pathlib.Path(sys.argv[1]).read_text())
if request["topology"].startswith("v5e"):
    os.abort()
if request["topology"].startswith("v3"):
    gzip.open(request["hlo"], "wt").write("program")
error = "" if request["topology"].startswith("v3") else {TOO_LARGE!r}
pathlib.Path(request["answer"]).write_text(json.dumps({{"error": error, "arguments": 0 if error else 5 * 2**30}}))
"""


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Plan a step on three slices; what became of them."""
    for name, code in (("tracing", TRACER), ("compiler", COMPILER)):
        (tmp_path / f"fake_{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(plan, "Job", lambda name, module, *rest: Job(name, f"fake_{module.split('.')[-1]}", *rest))
    monkeypatch.setattr(plan.PlanCache, "key", lambda _, request, digest: request.topology.replace(":", "-"))
    monkeypatch.setattr(plan, "count_traffic", lambda _: None)
    options = PlanOptions(plan_cache=str(tmp_path / "cache"), jobs=1)
    config = PlanConfig(data=DataConfig(train_batch_size=64), plan=options)
    wishes = [Wish(topology("v3-8"), config, "--attention math")]
    wishes += [Wish(topology(name), config) for name in ("v4-8", "v5e-8")]

    def run():
        with Progress() as progress:
            return Planner(config, progress.tick, progress.compiled).compile(wishes)

    return run


def test_a_log_file_tells_each_compilation_when_it_begins_and_ends(planned, capsys):
    assert [one.fits for one in planned()] == [True, False, False]
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"tracing \d steps", lines[0])
    expected = [
        "compiling --attention math on v3-8",
        r"1 of 3: --attention math on v3-8: 5.00 GiB of 15.48, \d+ s",
        "compiling v4-8",
        r"2 of 3: v4-8: does not fit: 34.28 GiB of 15.48, \d+ s",
        "compiling v5e-8",
        r"3 of 3: v5e-8: the compiler crashed with SIGABRT: it said nothing, \d+ s",
    ]
    for line, pattern in zip(lines[1:], expected, strict=True):
        assert re.fullmatch(pattern, line)
    assert [one.fits for one in planned()] == [True, False, False]
    again = capsys.readouterr().err  # what is known is not compiled
    assert "1 of 1: v5e-8: " in again
    assert "v3-8" not in again


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar(planned, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    planned()
    assert "\rcompiling:" in terminal.getvalue()
    assert "--attention math on v3-8 0 s" in terminal.getvalue()
    assert "1 of 3" not in terminal.getvalue()
