"""One trial: a run is hurt several times and started again until it is finished, then held against the unhurt one."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gpt2_xla import checkpoint
from gpt2_xla.chaos.faults import Fault, Moment, Pace
from gpt2_xla.chaos.victim import LAST, Victim, records
from gpt2_xla.errors import UserError
from gpt2_xla.run_verification import verify_run
from gpt2_xla.script_config import VerifyRunConfig

MOST_FAULTS, MORE_STARTS = 4, 4
PATIENCE = 15  # uninterrupted runs that a trial may take
DISK = "16m"  # of a tmpfs: some ten checkpoints
ORPHAN_SECONDS = 8.0  # that processes may outlive the one which started them: many on a busy machine, few elsewhere
OLD = 120.0  # seconds between a death and the restart, for what is swept by age
TORCHS_FOLDERS = ("torchelastic_", "pymp-")  # what torchrun leaves when it is killed
TORCHS_FILES = {"_remote_module_non_scriptable.py", "__pycache__"}  # in a folder that `import torch.distributed` makes
ALL_DAMAGED = "all are damaged"  # says a run that finds no good checkpoint among those it has
STATE_FILES = ("model.safetensors", "trainer_state/optimizer.safetensors")


@dataclass(frozen=True)
class Reference:
    """What the uninterrupted run came to."""

    state: dict[str, bytes]  # of STATE_FILES
    losses: dict[tuple[str, int], float]  # by kind and step
    names: frozenset[str]  # in the run folder, beside checkpoints
    pace: Pace


@dataclass
class Strike:
    """One fault of a trial: what, when, and whether it came to that."""

    fault: Fault
    moment: Moment
    detail: str | None = None  # None: the run had ended before

    def __str__(self) -> str:
        words = f"{self.fault.name} in {self.moment.kind}"
        return f"{words} (too late)" if self.detail is None else f"{words} {self.detail}".strip()


@dataclass
class Trial:
    """A trial and what came of it."""

    seed: int
    runtime: str
    strikes: list[Strike]
    options: tuple[str, ...] = ()
    starts: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        faults = [
            {
                "fault": one.fault.name,
                "moment": one.moment.kind,
                "fraction": one.moment.fraction,
                "struck": one.detail is not None,
                "detail": one.detail,
            }
            for one in self.strikes
        ]
        keys = ("seed", "runtime", "starts", "seconds", "problems")
        return {"faults": faults, **{key: getattr(self, key) for key in keys}}


def plan(seed: int, runtime: str, faults: list[Fault]) -> Trial:
    """Draw a trial's faults; the same for the same arguments."""
    chance = Random(f"{seed} {runtime}")
    possible = [fault for fault in faults if runtime in fault.runtimes]
    strikes = []
    for _ in range(chance.randint(2, MOST_FAULTS)):
        fault = chance.choice(possible)
        strikes.append(Strike(fault, Moment(chance.choice(fault.moments), chance.random())))
    options = ("--max-restarts=2",) if runtime == "torchrun" and chance.random() < 0.5 else ()
    return Trial(seed, runtime, strikes, options)


def reference_run(runtime: str, home: Path, data: Path, limit: float) -> Reference:
    """Train without faults; raises UserError if that does not work."""
    victim = Victim(runtime, home, data)
    began = time.monotonic()
    try:
        victim.start()
        victim.until(lambda: victim.logged_step() > 0, began + limit)
        pace = Pace(start_up=time.monotonic() - began, whole=0.0)
        status = victim.wait(began + limit - time.monotonic())
        if status != 0 or not _finished(victim):
            raise UserError(f"the run that nobody hurts ends with {_told(status)}; see {victim.output}")
    finally:
        victim.kill()
    pace = Pace(pace.start_up, time.monotonic() - began)
    state = {name: (victim.run / LAST / name).read_bytes() for name in STATE_FILES}
    return Reference(state, _losses(victim), _names(victim), pace)


def run_trial(trial: Trial, home: Path, data: Path, reference: Reference, limit: float) -> None:
    """Do what was planned, and note in `trial` all that is not as it should be; never leaves a process or a mount.

    The time limit is `limit` seconds, or as many uninterrupted runs as PATIENCE says if that is longer on this machine.
    """
    limit = max(limit, PATIENCE * reference.pace.whole)
    victim = Victim(trial.runtime, home, data, trial.options)
    began = time.monotonic()
    chance = Random(f"{trial.seed} {trial.runtime} strikes")
    with _disk(victim, any(one.fault.needs_disk for one in trial.strikes)):
        try:
            _hurt_until_finished(trial, victim, reference.pace, chance, began + limit)
            if not trial.problems:
                trial.problems += differences(victim, reference)
        finally:
            trial.starts, trial.seconds = victim.starts, round(time.monotonic() - began, 1)
            victim.kill()


def _hurt_until_finished(trial: Trial, victim: Victim, pace: Pace, chance: Random, deadline: float) -> None:
    pending = list(trial.strikes)
    for _ in range(len(pending) + MORE_STARTS):
        victim.start()
        strike = pending.pop(0) if pending else None
        if strike and strike.moment.come(victim, pace, deadline):
            strike.detail = strike.fault.strike(victim, chance, deadline)
        status = victim.wait(deadline - time.monotonic())
        if status is None:
            trial.problems.append("has not ended by the time limit")
            return
        trial.problems += odd_end(victim, strike, status)
        if left := victim.gone(ORPHAN_SECONDS):
            trial.problems.append(f"{len(left)} processes outlive the one that was started by {ORPHAN_SECONDS:g} s")
        if trial.problems or (status == 0 and _finished(victim)):
            return
        if ALL_DAMAGED in victim.text():  # and shall be moved away, it says
            for folder in victim.checkpoints():
                shutil.rmtree(folder)
        victim.age_litter(OLD)
    trial.problems.append(f"is not finished after {victim.starts} starts")


def odd_end(victim: Victim, strike: Strike | None, status: int) -> list[str]:
    """Whether the run ended otherwise than it may after this fault."""
    text = victim.text()
    if ALL_DAMAGED in text:  # by an earlier fault: it has ended of itself, whatever was done to it in its last moments
        return []
    if strike is None or strike.detail is None:
        return [f"ends with {_told(status)} though nothing was done to it: {_end(text)}"] if status != 0 else []
    full = strike.fault.needs_disk
    if victim.runtime == "torchrun" or not (strike.fault.graceful or full):
        return []
    # Python itself starts and ends without our handlers.
    young = strike.moment.kind == "start-up" and not text.strip()
    if status < 0 or status == 130:
        return (
            [] if young or (strike.fault.graceful and _finished(victim)) else [f"died by {_told(status)}: {_end(text)}"]
        )
    if (status not in (0, 2) if full else status != 0) and not young:
        return [f"ends with {_told(status)} after {strike}: {_end(text)}"]
    return [f"a traceback after {strike}: {_end(text)}"] if "Traceback" in text and not young else []


def differences(victim: Victim, reference: Reference) -> list[str]:
    """What the finished run differs in from the one that nobody hurt, and what it left behind."""
    last = victim.run / LAST
    found = [f"{LAST}: {mistake}" for mistake in checkpoint.problems(last)]
    for name, content in reference.state.items():
        if not (last / name).is_file() or (last / name).read_bytes() != content:
            found.append(f"{LAST}/{name} differs from the uninterrupted run's")
    losses = _losses(victim)
    wrong = [key for key in reference.losses if losses.get(key) != reference.losses[key]]
    found += [f"the {kind} loss of step {step} in metrics.jsonl is missing or another" for kind, step in wrong[:3]]
    try:
        summary, problems = verify_run(VerifyRunConfig(), victim.run)
        found += [f"ledger: {problem}" for problem in problems]
        if not problems and "every token once an epoch, in order" not in summary:
            found.append(f"ledger: {summary}")
    except UserError as error:
        found += [f"ledger: {mistake}" for mistake in error.mistakes]
    left = sorted(_names(victim) - reference.names)
    found += [f"left in the run folder: {', '.join(left)}"] if left else []
    litter = sorted(one.name for one in victim.temporary.iterdir() if not _is_torchs(one))
    return found + ([f"left in the folder of temporary files: {', '.join(litter)}"] if litter else [])


def _finished(victim: Victim) -> bool:
    """Whether nothing is left to do, not even a validation that a stop broke off."""
    if "the same command continues" in victim.text():
        return False
    return (victim.run / LAST).is_dir() and not checkpoint.problems(victim.run / LAST)


def _losses(victim: Victim) -> dict[tuple[str, int], float]:
    """Losses by kind and step; of a step that was made twice, the last."""
    lines = records((victim.run / "metrics.jsonl").read_bytes())
    return {(one["kind"], one["step"]): one["loss"] for one in lines if one["kind"] in ("train", "valid")}


def _names(victim: Victim) -> frozenset[str]:
    return frozenset(one.name for one in victim.run.iterdir() if not checkpoint.STEP_FOLDER.fullmatch(one.name))


def _is_torchs(path: Path) -> bool:
    if path.name.startswith(TORCHS_FOLDERS):
        return True
    return path.is_dir() and {one.name for one in path.iterdir()} <= TORCHS_FILES


def _told(status: int | None) -> str:
    return "no end in time" if status is None else f"signal {-status}" if status < 0 else f"status {status}"


def _end(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:])[-400:]


@contextlib.contextmanager
def _disk(victim: Victim, small: bool) -> Iterator[None]:
    """Put the run folder on a small tmpfs, if asked; what is on it is copied out, and it is unmounted, at the end."""
    if not small:
        yield
        return
    disk = victim.home / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "gpt2_xla_chaos", str(disk)], check=True)
    try:
        (disk / "run").mkdir()
        victim.run.symlink_to(disk / "run")
        yield
    finally:
        victim.run.unlink(missing_ok=True)
        shutil.copytree(disk / "run", victim.run)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def why_no_disk(folder: Path) -> str | None:
    """Why no tmpfs can be mounted here; None if one can."""
    place = folder / "try"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "gpt2_xla_chaos", str(place)]
    try:
        tried = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no mount command"
    if tried.returncode:
        return (tried.stderr.strip().splitlines() or ["mount failed"])[0]
    subprocess.run(["umount", str(place)], check=True)
    place.rmdir()
    return None
