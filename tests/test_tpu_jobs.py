"""Compilations as processes: limits of time and memory, what they leave behind, what is kept of them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from commands import PATIENCE, PYTHON, start
from tpu_answers import TOO_LARGE

from gpt2_xla.config import PRESETS, ModelConfig, XlaConfig
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.cache import PlanCache
from gpt2_xla.tpu_plan.compiler import Answer, Request
from gpt2_xla.tpu_plan.jobs import Job, run_jobs
from gpt2_xla.tpu_plan.plan import compile_memory
from gpt2_xla.tpu_plan.tracing import ORIGIN

# Children


class Patient(Job):
    """A job that has as long as a busy machine needs for it, whatever the limit of the others."""

    def has_ended(self, limit):
        return super().has_ended(PATIENCE)


def job(tmp_path, name, code, kind=Patient):
    """A job that runs some Python."""
    (tmp_path / f"{name}.py").write_text(f"import pathlib, sys, os, time\nanswer = sys.argv[1] + '.answer'\n{code}")
    file = tmp_path / f"{name}.request"
    return kind(name, name, file, Path(f"{file}.answer"))


def test_children_that_fail_leave_the_results_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = [
        job(tmp_path, "good", "pathlib.Path(answer).write_text('x')"),
        job(tmp_path, "raises", "raise ValueError('no such thing')"),
        job(tmp_path, "aborts", "os.abort()"),
        job(tmp_path, "killed", "os.kill(os.getpid(), 9)"),
        job(tmp_path, "sleeps", "time.sleep(100_000)", Job),
    ]
    ended = {one.name: one.failure for one in run_jobs(jobs, 2, 2.0, lambda *_: None)}
    assert ended["good"] == ""
    assert ended["raises"] == "failed: ValueError: no such thing"
    assert ended["aborts"].startswith("crashed with SIGABRT")
    assert "memory was too small" in ended["killed"]
    assert ended["sleeps"] == "did not end within 2 s and was killed; a longer --time-limit may help"
    assert not list(tmp_path.glob("*.err"))


def test_memory_decides_how_many_children_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("gpt2_xla.tpu_plan.jobs.free_memory", lambda: 3e9)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    together = {}
    for memory in (1e9, 2e9, 9e9):
        jobs = [job(tmp_path, f"job{i}", "time.sleep(0.3)\npathlib.Path(answer).write_text('x')") for i in range(2)]
        for one in jobs:
            one.memory = memory
        seen = []
        assert not [
            one.failure
            for one in run_jobs(jobs, None, 9.0, lambda now, _, seen=seen: seen.append(len(now)))
            if one.failure
        ]
        together[memory] = max(seen)
    assert together == {1e9: 2, 2e9: 1, 9e9: 1}


def test_a_child_without_memory_says_so_and_what_it_held(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hold = f"data = bytearray(300_000_000)\nwhile not pathlib.Path({str(tmp_path / 'seen')!r}).exists(): time.sleep(0.01)\n"
    jobs = [
        job(tmp_path, "killed", hold + "os.kill(os.getpid(), 9)"),
        job(tmp_path, "refused", "raise MemoryError"),
    ]

    def look(*_):
        if jobs[0]._held > 3e8:
            (tmp_path / "seen").touch()

    killed, refused = sorted(run_jobs(jobs, 2, 9.0, look), key=lambda one: one.name)
    assert re.match(r"was killed when it held 0\.[34] GB; this machine's memory was too small", killed.failure)
    assert re.match(r"ended when it held .* GB; this machine's memory was too small", refused.failure)


def test_a_larger_model_keeps_more_memory_free():
    small, large = (PlanConfig(ModelConfig(**PRESETS[name])) for name in ("gpt2", "gpt2-xl"))
    assert compile_memory(small) == pytest.approx(3.7e9, rel=0.05)
    assert compile_memory(large) == pytest.approx(12e9, rel=0.05)
    assert compile_memory(dataclasses.replace(large, runtime=XlaConfig(scan_layers=True))) < 2e9


# Kept answers


def ask(folder, **changes):
    """A request whose compilation has ended in `folder`."""
    return Request("", "v5e:2x4", {}, [0], 8, hlo=str(folder / "hlo"), answer=str(folder / "answer"), **changes)


@pytest.mark.tpu_compiler
def test_an_answer_is_found_by_its_program_its_slice_and_the_compilers_flags(tmp_path, monkeypatch):
    cache = PlanCache(tmp_path)
    request = ask(tmp_path)
    key = cache.key(request, "digest")
    assert cache.key(dataclasses.replace(request, program="/elsewhere.pb", hlo="x", answer="y"), "digest") == key
    others = {cache.key(request, "another"), cache.key(dataclasses.replace(request, topology="v6e:2x4"), "digest")}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_jf_something=1")
    others.add(cache.key(request, "digest"))
    assert len(others - {key}) == 3


@pytest.mark.parametrize(("error", "kept"), [("", True), (TOO_LARGE, True), ("INTERNAL: once only", False)])
def test_only_what_the_compiler_would_say_again_is_kept(tmp_path, error, kept):
    cache = PlanCache(tmp_path)
    with cache.workspace() as folder:
        request = ask(folder)
        Path(request.hlo).write_text("program")
        Path(request.answer).write_text(json.dumps({"error": error, "arguments": 1}))
        assert cache.keep("key", request) == Answer(error, 1)
    assert cache.find("key") == (Answer(error, 1) if kept else None)
    assert not list(tmp_path.glob("run-*"))


def test_an_answer_that_lost_its_program_or_was_cut_off_is_unknown(tmp_path):
    cache = PlanCache(tmp_path)
    (tmp_path / "lost.json").write_text(json.dumps({"arguments": 1}))
    (tmp_path / "cut.json").write_text('{"argum')
    assert (cache.find("lost"), cache.find("cut"), cache.find("never")) == (None, None, None)


def test_what_a_killed_run_left_is_swept_by_the_next_but_not_what_a_living_one_uses(tmp_path):
    code = (
        "import os, sys, pathlib, time\nfrom gpt2_xla.tpu_plan.cache import PlanCache\n"
        "with PlanCache(pathlib.Path(sys.argv[1])).workspace() as folder:\n"
        "    (folder / 'half.tmp').write_text('x')\n    print(folder, flush=True)\n    time.sleep(600)\n"
    )
    dead, living = (start(*PYTHON, "-c", code, str(tmp_path)) for _ in range(2))
    left, used = (Path(process.stdout.readline().strip()) for process in (dead, living))
    try:
        dead.kill()
        dead.wait(PATIENCE)
        assert (left / "half.tmp").exists()
        with PlanCache(tmp_path).workspace():
            assert not left.exists()
            assert (used / "half.tmp").exists()
    finally:
        living.kill()
        living.wait(PATIENCE)
    with PlanCache(tmp_path).workspace():
        pass
    assert not list(tmp_path.iterdir())


def test_a_programs_digest_forgets_where_its_source_lies():
    text = """computations {
  instructions {
    name: "x.1"
    metadata {
      op_name: "aten__add"
      source_file: "%s"
      source_line: %d
      stack_frame_id: %d
    }
  }
}
stack_frame_index {
  file_names: "%s"
  file_locations {
    line: %d
  }
}
"""
    one, other = (ORIGIN.sub("", text % (path, n, n, path, n)) for path, n in (("/a/x.py", 3), ("/b/x.py", 7)))
    assert one == other
    assert "aten__add" in one
    assert one.count("\n") == 8
