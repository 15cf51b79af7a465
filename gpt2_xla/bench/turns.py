"""Starts the loops' processes and gives them their turns: what slows the machine slows all of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from gpt2_xla.bench.child import FINISH
from gpt2_xla.bench.complaint import complaint
from gpt2_xla.bench.contenders import Seat
from gpt2_xla.bench.link import Link
from gpt2_xla.bench_config import BenchOptions
from gpt2_xla.child_environment import import_path

CHILD = "gpt2_xla.bench.child"


class LoopFailed(Exception):
    """A loop's process ended early; the text says why."""


class SeatProcess:
    """A started seat."""

    def __init__(self, seat: Seat, folder: Path, runtime: str, number: int, environment: dict[str, str]) -> None:
        self.seat, self.names = seat, [contender.name for contender in seat.contenders]
        path = folder / f"{runtime}-{number}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(0.2)
        self._link: Link | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={seat.processes}"]
        command = [*(launcher if seat.processes > 1 else []), "-m", CHILD, str(folder), runtime, str(number)]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def wait_until_warm(self) -> list[str]:
        """Return when its loops have been warmed up, with those that it left out; raises `LoopFailed`."""
        while self._link is None:
            try:
                self._link = Link(self._listener.accept()[0])
            except TimeoutError:
                if self._process.poll() is not None:
                    raise LoopFailed(self._why()) from None
        warm = self._answer("warm")
        left_out, self.names = [name for name in self.names if name not in warm], warm
        return left_out

    def turn(self, name: str) -> float:
        """Seconds that a turn of that loop took; raises `LoopFailed`."""
        self._ask(name)
        return self._answer("seconds")

    def finish(self) -> dict[str, dict[str, Any]]:
        """What was seen of each loop in it; raises `LoopFailed`."""
        self._ask(FINISH)
        seen = self._answer("seen")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        return seen

    def close(self) -> None:
        """End it, and all that it started."""
        if self._link is not None:
            self._link.close()
        self._listener.close()
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def _ask(self, what: str) -> None:
        assert self._link is not None
        try:
            self._link.send(ask=what)
        except OSError:
            raise LoopFailed(self._why()) from None

    def _answer(self, name: str) -> Any:
        assert self._link is not None
        try:
            return self._link.receive()[name]
        except (EOFError, OSError):
            raise LoopFailed(self._why()) from None

    def _why(self) -> str:
        """What its standard error says of its end, once it has ended."""
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            return "it hung up"
        self._errors.seek(0)
        return complaint(self._errors.read().decode(errors="replace"), self._process.returncode)


class Match:
    """All processes of one runtime; on leaving it they are gone."""

    def __init__(
        self, seats: list[Seat], folder: Path, runtime: str, options: BenchOptions, say: Callable[[str], None]
    ) -> None:
        self._options, self._say = options, say
        environment = child_environment(max(options.processes))
        self._processes: list[SeatProcess] = []
        try:
            for number, seat in enumerate(seats):
                self._processes.append(SeatProcess(seat, folder, runtime, number, environment))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Match":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes:
            process.close()

    def play(self) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
        """Seconds of each turn, and what was seen, of each loop that got through; `say` hears why one did not."""
        for process in list(self._processes):
            self._gets_through(process, lambda p=process: self._tell(p.wait_until_warm()))  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for process in self._processes for name in process.names}
        for turn in range(self._options.turns):
            order = [(process, name) for process in self._processes for name in process.names]
            for process, name in order if turn % 2 == 0 else reversed(order):
                if process in self._processes:
                    self._gets_through(process, lambda p=process, n=name: times[n].append(p.turn(n)))  # type: ignore[misc]
        seen: dict[str, dict[str, Any]] = {}
        for process in list(self._processes):
            for _ in range(process.seat.profiled_turns(self._options)):
                self._gets_through(process, lambda p=process: p.turn(p.names[0]))  # type: ignore[misc]
        for process in list(self._processes):
            self._gets_through(process, lambda p=process: seen.update(p.finish()))  # type: ignore[misc]
        return times, seen

    def _tell(self, left_out: list[str]) -> None:
        for name in left_out:
            self._say(f"not run: {name}: it is for one device, and ours has several replicas here")

    def _gets_through(self, process: SeatProcess, work: Callable[[], object]) -> None:
        """Do it; a process that fails is out."""
        try:
            work()
        except LoopFailed as failure:
            self._say(f"not run: {', '.join(process.names)}: {failure}")
            self._processes.remove(process)
            process.close()


def child_environment(processes: int) -> dict[str, str]:
    """The environment of a loop's process, where up to that many run at the same time."""
    path = import_path()
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    return {"PJRT_DEVICE": "CPU", **threads, **os.environ, "PYTHONPATH": path}
