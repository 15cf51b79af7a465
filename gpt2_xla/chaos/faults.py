"""What is done to a run, each fault by its name, and the moments at which it is done."""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from gpt2_xla.chaos.victim import SAVE_INTERVAL, STEPS, VALID_INTERVAL, Victim, any_file

ALL = ("torch", "torchrun", "xla", "xla-replicas")
JOINT = ("torchrun", "xla", "xla-replicas")  # the process that is started only minds those that train
MOMENTS = ("start-up", "step", "evaluation", "save")
FULL_SECONDS = 20.0  # that a full disk lasts at most


@dataclass(frozen=True)
class Pace:
    """Seconds of an uninterrupted run, on this machine, now."""

    start_up: float  # until the first step is logged
    whole: float


@dataclass(frozen=True)
class Moment:
    """A point in a run's life; `fraction` (0 to 1) says where in the part that `kind` names."""

    kind: str
    fraction: float

    def come(self, victim: Victim, pace: Pace, deadline: float) -> bool:
        """Wait for it; False if the run ends before. What is past for a resumed run is taken from what remains."""
        newest = victim.checkpoints()[:1]
        done = int(newest[0].name.removeprefix("step-")) if newest else 0
        if self.kind == "start-up":
            deadline = min(deadline, time.monotonic() + self.fraction * pace.start_up)
            victim.until(lambda: False, deadline)
            return victim.lasts()
        if self.kind == "step":
            step = done + 1 + int(self.fraction * (STEPS - done))
            return victim.until(lambda: victim.logged_step() >= step, deadline)
        if self.kind == "evaluation":
            number = 1 + done // VALID_INTERVAL
            number += int(self.fraction * (STEPS // VALID_INTERVAL + 1 - number))
            came = victim.until(lambda: victim.logged_step() >= number * VALID_INTERVAL, deadline)
            time.sleep(self.fraction * 7 % 1 * 0.05)
            return came and victim.lasts()
        return self._save_comes(victim, 1 + int(self.fraction * (1 + (STEPS - done) // SAVE_INTERVAL)), deadline)

    def _save_comes(self, victim: Victim, number: int, deadline: float) -> bool:
        seen: set[str] = set()

        def happened() -> bool:
            seen.update(victim.partial_saves())
            return len(seen) >= number

        came = victim.until(happened, deadline)
        time.sleep(self.fraction * 7 % 1 * 0.02)
        return came and victim.lasts()


Strike = Callable[[Victim, Random, float], str]


@dataclass(frozen=True)
class Fault:
    """Something bad. `strike(victim, chance, deadline)` does it, and says in a word or two what exactly."""

    name: str
    strike: Strike
    runtimes: tuple[str, ...] = ALL
    moments: tuple[str, ...] = MOMENTS
    graceful: bool = False  # the run shall end with status 0 and no traceback
    needs_disk: bool = False  # a small disk of its own


def kill_all(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """As a power cut."""
    victim.kill()
    return ""


def kill_first(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """Only the process that was started; the others have to die with it, as the restart comes at once."""
    victim.process.send_signal(signal.SIGKILL)
    return ""


def terminate(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """As a scheduler does."""
    victim.process.send_signal(signal.SIGTERM)
    return ""


def interrupt(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """Ctrl-C, which a terminal sends to the whole group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(victim.process.pid, signal.SIGINT)
    return ""


def user_signal(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """SIGUSR1, as Slurm sends ahead of time."""
    victim.process.send_signal(signal.SIGUSR1)
    return ""


def preempt(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """SIGTERM, and SIGKILL soon after: a notice that is too short."""
    victim.process.send_signal(signal.SIGTERM)
    notice = chance.uniform(0, 1.0)
    victim.wait(notice)
    victim.kill()
    return f"{notice:.2f} s"


def truncate(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """After a kill, a file of the newest checkpoint has lost its end."""

    def cut(file: Path) -> str:
        size = chance.randrange(max(file.stat().st_size, 1))
        os.truncate(file, size)
        return f"to {size}"

    return _damage(victim, chance, cut)


def flip(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """After a kill, one bit of a file of the newest checkpoint is another."""

    def turn(file: Path) -> str:
        content = bytearray(file.read_bytes())
        where = chance.randrange(len(content))
        content[where] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        return f"at {where}"

    return _damage(victim, chance, turn)


def delete(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """After a kill, a file of the newest checkpoint is gone."""

    def remove(file: Path) -> str:
        file.unlink()
        return ""

    return _damage(victim, chance, remove)


def _damage(victim: Victim, chance: Random, do: Callable[[Path], str]) -> str:
    victim.kill()
    newest = victim.checkpoints()[:1]
    if not newest:
        return "no checkpoint yet"
    file = any_file(newest[0], chance)
    return f"{newest[0].name}/{file.relative_to(newest[0])} {do(file)}".strip()


def fill_disk(victim: Victim, chance: Random, deadline: float) -> str:
    """The disk is full, but for a few bytes, until the run ends or is told that there is room again."""
    ballast, left = victim.home / "disk" / "ballast", chance.randrange(300_000)
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        size = file.tell()
        os.ftruncate(file.fileno(), max(size - left, 0))
    for_good = chance.random() < 0.5
    seconds = FULL_SECONDS if for_good else chance.uniform(0, 1)
    victim.wait(min(seconds, deadline - time.monotonic()))
    ballast.unlink()
    return f"{left} bytes left" + ("" if for_good else f" for {seconds:.2f} s")


def kill_replica(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """One of the processes that train dies, as for want of memory."""
    return _to_replica(victim, chance, signal.SIGKILL)


def stop_replica(victim: Victim, chance: Random, deadline: float) -> str:  # noqa: ARG001
    """One of the processes that train stands still for ever: --hang-timeout has to end the others."""
    return _to_replica(victim, chance, signal.SIGSTOP)


def _to_replica(victim: Victim, chance: Random, number: signal.Signals) -> str:
    replicas = victim.replicas()
    if not replicas:
        return "none yet"
    which = chance.randrange(len(replicas))
    with contextlib.suppress(ProcessLookupError):
        os.kill(replicas[which], number)
    return f"number {which} of {len(replicas)}"


FAULTS = (
    Fault("SIGKILL", kill_all),
    Fault("SIGKILL-first", kill_first, JOINT),
    Fault("SIGTERM", terminate, graceful=True),
    Fault("SIGINT", interrupt, graceful=True),
    Fault("SIGUSR1", user_signal, ("torch", "xla", "xla-replicas"), graceful=True),
    Fault("preempt", preempt),
    Fault("truncate", truncate),
    Fault("flip", flip),
    Fault("delete", delete),
    Fault("full-disk", fill_disk, needs_disk=True),
    Fault("kill-replica", kill_replica, JOINT),
    Fault("stop-replica", stop_replica, ("torchrun",), moments=("step", "evaluation")),
)
