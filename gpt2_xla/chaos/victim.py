"""The run that is hurt: a tiny model on tiny data, the commands that train it, and what is seen of it from outside."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.manifest import Manifest, ShardEntry
from gpt2_xla.data.shards import write_shard
from gpt2_xla.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_INTERVAL, VALID_INTERVAL = 60, 8, 15
LAST = f"step-{STEPS:08d}"
# 117,000 parameters, 256 tokens a step; dropout, so that a wrong seed shows. 10 s without progress ends a joint run.
FLAGS = shlex.split(
    "--num-layers 2 --num-heads 2 --d-model 64 --seq-length 32 --dropout 0.1 --train-batch-size 8 --gradient-accum-step 1 "
    "--eval-batch-size 8 --learning-rate 1e-3 --min-lr 1e-4 --warmup-steps 20 --mixed-precision no --log-interval 1 "
    f"--train-steps {STEPS} --save-interval {SAVE_INTERVAL} --valid-interval {VALID_INTERVAL} --saved-checkpoint-limit 3"
)
MARK = "GPT2_XLA_CHAOS"  # in the environment of every process of a victim
POLL_SECONDS = 0.001


def commands() -> dict[str, list[str]]:
    """The start of each runtime's command line."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return {
        "torch": [sys.executable, str(ROOT / "run_pretrain.py")],
        "torchrun": [sys.executable, *torchrun, str(ROOT / "run_pretrain.py"), "--hang-timeout", "10"],
        "xla": [sys.executable, str(ROOT / "run_pretrain_xla.py")],
        "xla-replicas": [sys.executable, str(ROOT / "tests" / "xla_cpu_replicas.py"), "2"],
    }


def write_data(folder: Path) -> Path:
    """Fill a folder with train/ (12,000 random bytes as tokens, 1.3 epochs) and valid/ (6,000)."""
    tokenizer = ByteTokenizer()
    chance = np.random.default_rng(0)
    for split, count in (("train", 12_000), ("valid", 6_000)):
        tokens = chance.integers(0, 64, count, dtype=np.uint16)
        (folder / split).mkdir(parents=True)
        digest = write_shard(folder / split / "shard.npy", tokens)
        shard = ShardEntry("shard.npy", count, 1, digest)
        manifest = Manifest(
            split=split,
            dtype="uint16",
            tokens=count,
            shards=(shard,),
            tokenizer="bytes",
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
        )
        manifests.write(folder / split, manifest)
    return folder


class Victim:
    """One command that is started again and again; all its processes carry a mark, so that none can hide."""

    def __init__(self, runtime: str, home: Path, data: Path, options: tuple[str, ...] = ()) -> None:
        """`home` gets run/ (the run folder), tmp/ (TMPDIR) and output.txt; `options` go to torchrun."""
        self.runtime, self.home, self.run = runtime, home, home / "run"
        self.temporary, self.output = home / "tmp", home / "output.txt"
        self.temporary.mkdir(parents=True)
        first, *rest = commands()[runtime]
        folders = ["--train-dir", str(data / "train"), "--valid-dir", str(data / "valid")]
        where = rest.index("--standalone") + 1 if "--standalone" in rest else 0
        self.command = [first, *rest[:where], *options, *rest[where:], *FLAGS, *folders]
        self.command += ["--checkpoints-dir", str(self.run)]
        self.mark = f"{os.getpid()}:{home}"
        self.starts = 0

    def start(self) -> None:
        """Run the command."""
        self.starts += 1
        self._seen_before = self._metrics_size()
        self._output_before = self.output.stat().st_size if self.output.exists() else 0
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary), "PJRT_DEVICE": "CPU"}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def lasts(self) -> bool:
        """Whether the process that was started still runs."""
        return self.process.poll() is None

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it has not ended in time."""
        try:
            return self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None

    def until(self, happened: Callable[[], bool], deadline: float) -> bool:
        """Return True at once when `happened()`; False if the run ended or time was up before."""
        while self.lasts() and time.monotonic() < deadline:
            if happened():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def text(self) -> str:
        """What it printed since it was last started."""
        with self.output.open("rb") as file:
            file.seek(self._output_before)
            return file.read().decode(errors="replace")

    def family(self) -> list[int]:
        """The processes, started by it or by one of them, that still run."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):  # gone by now, or another user's
                    if wanted in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return [pid for pid in found if _state(pid) not in "ZX"]

    def replicas(self) -> list[int]:
        """The processes that train, if they are not the one that was started."""
        return [pid for pid in self.family() if pid != self.process.pid and _trains(pid)]

    def gone(self, seconds: float) -> list[int]:
        """Wait until no process of it is left; those that still run after that."""
        deadline = time.monotonic() + seconds
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def kill(self) -> None:
        """SIGKILL for every process of it, until none is left."""
        deadline = time.monotonic() + 10
        while (left := self.family()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if self.starts:
            self.wait(10)

    def logged_step(self) -> int:
        """The last step that it has logged since it was last started; 0 before the first."""
        if self._metrics_size() <= self._seen_before:
            return 0
        with (self.run / "metrics.jsonl").open("rb") as file:
            file.seek(self._seen_before)
            return max((one["step"] for one in records(file.read()) if one["kind"] == "train"), default=0)

    def partial_saves(self) -> set[str]:
        """The checkpoints that are being written now."""
        try:
            return {name for name in os.listdir(self.run) if name.startswith(".step-")}  # noqa: PTH208 - often
        except FileNotFoundError:
            return set()

    def checkpoints(self) -> list[Path]:
        """Its checkpoints, newest first."""
        return sorted(self.run.glob("step-*"), reverse=True)

    def age_litter(self, seconds: float) -> None:
        """Make what lies in its temporary folder look `seconds` older, as if the restart came that much later."""
        for path in self.temporary.iterdir():
            with contextlib.suppress(OSError):
                then = path.stat().st_mtime - seconds
                os.utime(path, (then, then))

    def _metrics_size(self) -> int:
        try:
            return (self.run / "metrics.jsonl").stat().st_size
        except FileNotFoundError:
            return 0


def records(text: bytes) -> list[dict]:
    """The whole lines of a JSONL file as objects."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def any_file(folder: Path, chance: Random) -> Path:
    """A random file of a folder."""
    return chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except OSError:
        return "X"


def _trains(pid: int) -> bool:
    """Whether a process is a worker of torchrun or a replica of xmp.spawn, not one of Python's own helpers."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"resource_tracker" not in words and (b"run_pretrain" in words or b"multiprocessing" in words)
