"""Trace the step, compile it for each slice, remember what the compiler said."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gpt2_xla.config import to_dict
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.cache import PlanCache, read_program
from gpt2_xla.tpu_plan.compiler import Answer, Request
from gpt2_xla.tpu_plan.jobs import Job, run_jobs
from gpt2_xla.tpu_plan.refusals import refusals
from gpt2_xla.tpu_plan.shortage import Shortage, shortage
from gpt2_xla.tpu_plan.topology import Topology
from gpt2_xla.tpu_plan.tracing import Trace, TraceRequest
from gpt2_xla.tpu_plan.traffic import Traffic, count_traffic

TRACE_LIMIT = 300.0  # seconds; GPT-2 124M takes 6
TRACE_MEMORY = 1e9  # bytes; GPT-2 1.5B takes 0.8
# Bytes that compiling takes, and for each layer: GPT-2 124M takes 3.7 GB, 1.5B about 12, by the length of their programs.
COMPILE_MEMORY, LAYER_MEMORY = 1e9, 0.23e9


@dataclass(frozen=True)
class Wish:
    """One step on one slice."""

    slice: Topology
    config: PlanConfig
    name: str = field(default="", compare=False)  # how the step differs from the one that was given, as flags

    @property
    def title(self) -> str:
        """For a person."""
        return f"{self.name} on {self.slice.name}" if self.name else self.slice.name

    @property
    def key(self) -> str:
        """The same for wishes that one trace serves."""
        content = [to_dict(_traced(self.config)), self.slice.devices, self.slice.device.kind]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Compiled:
    """What became of a wish."""

    wish: Wish
    failure: str = ""  # why the compiler said nothing
    refused: str = ""  # why it was not asked
    answer: Answer = Answer()
    parameters: int = 0
    program: Path | None = None  # file of the scheduled program's text (gzip); None where there is none
    traffic: Traffic | None = None  # what it moves

    @property
    def fits(self) -> bool:
        """Whether the slice can run it."""
        return not self.failure and not self.refused and not self.answer.error

    @property
    def shortage(self) -> Shortage | None:
        """By how much it does not fit; None if it fits, or if nothing is known."""
        return shortage(self.answer.error)

    @property
    def trouble(self) -> str:
        """Why it is not known whether it fits; empty if it is."""
        if self.refused:
            return f"refused: {self.refused}"
        return self.failure or (
            "" if self.fits or self.shortage else f"the compiler refused: {self.answer.error[:300]}"
        )


class Planner:
    """Compiles wishes, keeping what it learnt in a folder."""

    def __init__(
        self,
        config: PlanConfig,
        tick: Callable[[str, list[Job], int, int], None],  # hears what runs
        compiled: Callable[[Wish, Answer | str, float, int, int], None] = lambda *_: None,  # hears what has ended
    ) -> None:
        self._cache = PlanCache(Path(config.plan.plan_cache).expanduser())
        self._limit = float(config.plan.time_limit)
        self._at_a_time = config.plan.jobs
        self._tick, self._compiled = tick, compiled

    def compile(self, wishes: list[Wish]) -> list[Compiled]:
        """All of them, in their order. What has ended is kept, also when the others are interrupted."""
        reasons = ["; ".join(refusals(wish.config, wish.slice)) for wish in wishes]
        possible = iter(self._compile_all([wish for wish, why in zip(wishes, reasons, strict=True) if not why]))
        return [
            Compiled(wish, refused=why) if why else next(possible) for wish, why in zip(wishes, reasons, strict=True)
        ]

    def _compile_all(self, wishes: list[Wish]) -> list[Compiled]:
        with self._cache.workspace() as folder:
            traces = self._trace({wish.key: wish for wish in wishes}, folder)
            keys: list[str] = []
            requests: dict[str, tuple[Request, Wish]] = {}
            for wish in wishes:
                job = traces[wish.key]
                if job.failure:
                    keys.append("")
                    continue
                request = _request(wish, folder / f"{wish.key}.pb", _read_trace(job))
                keys.append(self._cache.key(request, _read_trace(job).digest))
                requests[keys[-1]] = request, wish
            answers = self._compile(requests, folder)
            return [
                self._result(wish, traces[wish.key], key, answers.get(key))
                for wish, key in zip(wishes, keys, strict=True)
            ]

    def _trace(self, wishes: dict[str, Wish], folder: Path) -> dict[str, Job]:
        jobs = {}
        for key, wish in wishes.items():
            answer, file = folder / f"{key}.json", folder / f"{key}.request"
            request = TraceRequest(
                to_dict(_traced(wish.config)),
                wish.slice.devices,
                wish.slice.device.kind,
                str(folder / f"{key}.pb"),
                str(answer),
            )
            file.write_text(json.dumps(asdict(request)))
            jobs[key] = Job("tracing", "gpt2_xla.tpu_plan.tracing", file, answer, TRACE_MEMORY)
        for _ in self._run("tracing", list(jobs.values()), TRACE_LIMIT):
            pass
        return jobs

    def _compile(self, requests: dict[str, tuple[Request, Wish]], folder: Path) -> dict[str, Answer | str]:
        """An answer for each request, or why there is none; what is not known yet is compiled."""
        found: dict[str, Answer | str] = {}
        jobs: dict[Path, tuple[str, Request, Wish]] = {}
        todo = []
        for key, (request, wish) in requests.items():
            if known := self._cache.find(key):
                found[key] = known
                continue
            file, answer = folder / f"{key}.request", folder / f"{key}.json"
            placed = replace(request, hlo=str(folder / f"{key}.hlo.gz"), answer=str(answer))
            file.write_text(json.dumps(asdict(placed)))
            todo.append(Job(wish.title, "gpt2_xla.tpu_plan.compiler", file, answer, compile_memory(wish.config)))
            jobs[file] = key, placed, wish
        for ended, job in enumerate(self._run("compiling", todo, self._limit), start=1):
            key, placed, wish = jobs[job.file]
            found[key] = f"the compiler {job.failure}" if job.failure else self._cache.keep(key, placed)
            self._compiled(wish, found[key], job.seconds, ended, len(todo))
        return found

    def _run(self, what: str, jobs: list[Job], limit: float) -> Iterator[Job]:
        return run_jobs(
            jobs, self._at_a_time, limit, lambda running, ended: self._tick(what, running, ended, len(jobs))
        )

    def _result(self, wish: Wish, trace: Job, key: str, answer: Answer | str | None) -> Compiled:
        if answer is None:
            return Compiled(wish, failure=f"the step could not be traced: {trace.failure}")
        parameters = _read_trace(trace).parameters
        if isinstance(answer, str):
            return Compiled(wish, answer, parameters=parameters)
        if answer.error:
            return Compiled(wish, answer=answer, parameters=parameters)
        program = self._cache.program(key)
        return Compiled(wish, "", "", answer, parameters, program, count_traffic(read_program(program)))


def compile_memory(config: PlanConfig) -> float:
    """Bytes of this machine's memory to keep for a compilation. A loop over the layers holds one of them."""
    return COMPILE_MEMORY + LAYER_MEMORY * (1 if config.runtime.scan_layers else config.model.num_layers)


def _request(wish: Wish, program: Path, trace: Trace) -> Request:
    sharded, devices = wish.config.runtime.sharding == "fsdp", wish.slice.devices
    return Request(
        str(program),
        wish.slice.compiler_name,
        wish.slice.options,
        donated=[number for number, name in enumerate(trace.arguments) if name not in ("", "batch")],
        replicas=1 if sharded else devices,
        partitions=devices if sharded else 1,
        argument_shardings=list(trace.argument_shardings),
        result_shardings=list(trace.result_shardings),
    )


def _read_trace(job: Job) -> Trace:
    return Trace(**json.loads(job.answer.read_text()))


def _traced(config: PlanConfig) -> Any:
    """Options of the step alone: what else a command says shall not trace it anew."""
    return replace(config, plan=type(config.plan)(reference=config.plan.reference))
