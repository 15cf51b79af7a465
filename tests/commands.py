"""Start the program as a user does, with a hard time limit, and read what it wrote."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds after which something hangs. Python and torch alone take 6 to start where nothing else runs, and five times as long
# where the cores are shared.
PATIENCE = 300.0

# 117,000 parameters, 8 × 32 tokens a step: a step takes milliseconds.
TINY = shlex.split(
    "--num-layers 2 --num-heads 2 --d-model 64 --seq-length 32 --train-batch-size 8 --gradient-accum-step 1 "
    "--eval-batch-size 8 --learning-rate 1e-3 --min-lr 1e-4 --warmup-steps 50 --mixed-precision no --log-interval 1 "
    "--valid-interval 0 --save-interval 0"
)

# For programs of XLA that run a few times: it shall not take long to make them fast.
QUICK_XLA = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

PYTHON = (sys.executable,)
TRAIN = (*PYTHON, str(ROOT / "run_pretrain.py"))
TRAIN_XLA = (*PYTHON, str(ROOT / "run_pretrain_xla.py"))


def torchrun(processes: int, program: str = TRAIN[-1]) -> tuple[str, ...]:
    """The command line of run_pretrain.py, or another program, under torchrun."""
    return (*PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", program)


def xla_replicas(replicas: int) -> tuple[str, ...]:
    """The command line of run_pretrain_xla.py with that many replicas on CPU."""
    return (*PYTHON, str(ROOT / "tests" / "xla_cpu_replicas.py"), str(replicas))


def data_flags(folder: Path) -> list[str]:
    """--train-dir and --valid-dir of a prepared folder."""
    return ["--train-dir", str(folder / "train"), "--valid-dir", str(folder / "valid")]


def start(*command: str, **environment: str) -> subprocess.Popen:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PJRT_DEVICE": "CPU", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = PATIENCE) -> str:
    """Wait for it and return its output; past the time limit the whole group is killed and the test fails."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"timed out after {timeout} s:\n{output}") from None


def run(*command: str, timeout: float = PATIENCE, **environment: str) -> str:
    """Run a command to its end, expect exit status 0, return its output."""
    process = start(*command, **environment)
    output = finish(process, timeout)
    assert process.returncode == 0, output
    return output


def records(run_dir: Path, kind: str = "train") -> list[dict]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path, kind: str = "train") -> list[float]:
    """The logged losses of a run, in order."""
    return [record["loss"] for record in records(run_dir, kind)]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, timeout: float = PATIENCE) -> None:
    """Return once the run has logged `step`; fails if it ends or takes too long before that."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + timeout
    while not (metrics.exists() and _last_step(metrics) >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue


def _last_step(metrics: Path) -> int:
    """The last step that a metrics.jsonl tells of, which may be growing: what is behind its last end of line is no record yet."""
    lines = metrics.read_text().rpartition("\n")[0].splitlines()
    return max((record["step"] for record in map(json.loads, lines) if record["kind"] == "train"), default=0)


def wait_until(process: subprocess.Popen, happened: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Return once `happened()`, which is asked again and again; fails if the process ends or it takes too long before that."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def replica_processes(parent: int) -> list[int]:
    """Children of a process that run replicas (multiprocessing's resource tracker is none)."""
    return [child for child in children(parent) if b"resource_tracker" not in _of_process(child, "cmdline")]


def children(parent: int, running: str = "") -> list[int]:
    """Children of a process, or those with a word in their command lines: a new one has its parent's for a moment."""
    found = map(int, _of_process(parent, f"task/{parent}/children").split())
    return [child for child in found if running.encode() in _of_process(child, "cmdline")]


def _of_process(pid: int, file: str) -> bytes:
    """A file of /proc; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def is_alive(pid: int) -> bool:
    """Whether the process still runs (a zombie does not)."""
    return _state(pid) not in "ZX"


def is_asleep(pid: int) -> bool:
    """Whether the process's first thread waits for something; for a core does not count."""
    return _state(pid) == "S"


def _state(pid: int) -> str:
    """A letter, as proc(5) lists them; X when the process is gone."""
    return _of_process(pid, "stat").decode(errors="replace").rpartition(")")[2].strip()[:1] or "X"


def still_alive(pids: Iterable[int], timeout: float = 60) -> list[int]:
    """Those that have not ended after `timeout` seconds: a killed process needs a moment, and more on a busy machine."""
    deadline = time.monotonic() + timeout
    left = list(pids)
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [pid for pid in left if is_alive(pid)]
    return left
