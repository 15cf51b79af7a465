"""Trace the step, compile it for each slice, remember what the compiler said."""

import gzip
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpt2_xla.config import to_dict
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.compiler import Answer, Request
from gpt2_xla.tpu_plan.hlo import Program
from gpt2_xla.tpu_plan.jobs import Job, parallel_jobs, run_jobs
from gpt2_xla.tpu_plan.topology import Topology
from gpt2_xla.tpu_plan.tracing import Trace, TraceRequest
from gpt2_xla.tpu_plan.traffic import Traffic, count_traffic

TRACE_LIMIT = 300.0  # seconds; GPT-2 124M takes 6
COMPILER = ("libtpu", "jax", "jaxlib")  # packages that decide what a program becomes


@dataclass(frozen=True)
class Wish:
    """One step on one slice."""

    slice: Topology
    config: PlanConfig

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
    answer: Answer = Answer()
    parameters: int = 0
    program: Path | None = None  # file of the scheduled program's text (gzip); None where there is none
    traffic: Traffic | None = None  # what it moves

    @property
    def fits(self) -> bool:
        """Whether the slice can run it."""
        return not self.failure and not self.answer.error


class Planner:
    """Compiles wishes, keeping what it learnt in a folder."""

    def __init__(self, config: PlanConfig, tick: Callable[[str, list[Job], int, int], None]) -> None:
        self._cache = Path(config.plan.plan_cache).expanduser()
        self._cache.mkdir(parents=True, exist_ok=True)
        self._limit = float(config.plan.time_limit)
        self._at_a_time = config.plan.jobs or parallel_jobs()
        self._tick = tick

    def compile(self, wishes: list[Wish]) -> list[Compiled]:
        """All of them, in their order."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            traces = self._trace({wish.key: wish for wish in wishes}, folder)
            requests = [
                None
                if traces[wish.key].failure
                else self._request(wish, folder / f"{wish.key}.pb", _read_trace(traces[wish.key]))
                for wish in wishes
            ]
            failures = self._compile({request.answer: request for request in requests if request}, folder)
            return [
                self._result(wish, traces[wish.key], request, failures)
                for wish, request in zip(wishes, requests, strict=True)
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
            jobs[key] = Job("tracing", "gpt2_xla.tpu_plan.tracing", file, answer)
        for _ in self._run("tracing", list(jobs.values()), TRACE_LIMIT):
            pass
        return jobs

    def _request(self, wish: Wish, program: Path, trace: Trace) -> Request:
        """The compiler's request; its files in the cache have the name of what decides their contents."""
        sharded, devices = wish.config.runtime.sharding == "fsdp", wish.slice.devices
        request = Request(
            str(program),
            wish.slice.compiler_name,
            wish.slice.options,
            donated=[number for number, name in enumerate(trace.arguments) if name not in ("", "batch")],
            replicas=1 if sharded else devices,
            partitions=devices if sharded else 1,
            argument_shardings=list(trace.argument_shardings),
            result_shardings=list(trace.result_shardings),
        )
        versions = [importlib.metadata.version(name) for name in COMPILER]
        facts = [asdict(replace(request, program="")), versions, os.environ.get("LIBTPU_INIT_ARGS", "")]
        key = hashlib.sha256(json.dumps(facts).encode() + program.read_bytes()).hexdigest()[:24]
        return replace(request, hlo=str(self._cache / f"{key}.hlo.gz"), answer=str(self._cache / f"{key}.json"))

    def _compile(self, requests: dict[str, Request], folder: Path) -> dict[str, str]:
        """Compile what is not known yet; why some did not, by their answers' files."""
        jobs = []
        for answer, request in requests.items():
            if not Path(answer).exists():
                file = folder / f"{Path(answer).stem}.request"
                file.write_text(json.dumps(asdict(request)))
                jobs.append(Job(request.topology, "gpt2_xla.tpu_plan.compiler", file, Path(answer)))
        return {str(job.answer): job.failure for job in self._run("compiling", jobs, self._limit) if job.failure}

    def _run(self, what: str, jobs: list[Job], limit: float) -> list[Job]:
        return list(
            run_jobs(jobs, self._at_a_time, limit, lambda running, ended: self._tick(what, running, ended, len(jobs)))
        )

    def _result(self, wish: Wish, trace: Job, request: Request | None, failures: dict[str, str]) -> Compiled:
        if request is None:
            return Compiled(wish, failure=f"the step could not be traced: {trace.failure}")
        parameters = _read_trace(trace).parameters
        if request.answer in failures:
            return Compiled(wish, f"the compiler {failures[request.answer]}", parameters=parameters)
        answer = Answer(**json.loads(Path(request.answer).read_text()))
        if answer.error:
            return Compiled(wish, "", answer, parameters)
        program = Path(request.hlo)
        return Compiled(wish, "", answer, parameters, program, count_traffic(read_program(program)))


def read_program(file: Path) -> Program:
    """A program that the cache keeps."""
    return Program(gzip.decompress(file.read_bytes()).decode())


def _read_trace(job: Job) -> Trace:
    return Trace(**json.loads(job.answer.read_text()))


def _traced(config: PlanConfig) -> Any:
    """Options of the step alone: what else a command says shall not trace it anew."""
    return replace(config, plan=type(config.plan)(reference=config.plan.reference))
