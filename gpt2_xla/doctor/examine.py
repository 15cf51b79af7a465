"""The whole examination, in order: what is installed, where, how it is set up, the folders, the devices."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from gpt2_xla.data.train_dirs import parse_train_dirs
from gpt2_xla.doctor.children import Deadline, run_child
from gpt2_xla.doctor.devices import torch_all_reduce, torch_devices, xla_devices
from gpt2_xla.doctor.finding import Finding
from gpt2_xla.doctor.host import cores, host_findings
from gpt2_xla.doctor.installation import installation
from gpt2_xla.doctor.place import place_findings, recognise
from gpt2_xla.doctor.variables import variables
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import DoctorConfig

FOLDERS = "gpt2_xla.doctor.folders"


def examine(config: DoctorConfig, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Every finding, as soon as it is there; no later than about --time-limit.

    Raises `UserError` for options that make no sense.
    """
    if config.time_limit < 10:
        raise UserError(f"--time-limit {config.time_limit} must be at least 10: starting torch alone takes seconds")
    parse_train_dirs(config.train_dir)
    deadline = Deadline(config.time_limit)
    place = recognise(environ)
    yield from installation(bool(place.chips))
    yield from place_findings(place, environ, Path(config.checkpoints_dir))
    yield from variables(environ, place, cores())
    yield from host_findings()
    yield from _folders(config, deadline, environ)
    yield from torch_devices(deadline, environ)
    yield from torch_all_reduce(deadline, environ)
    yield from xla_devices(deadline, place, environ)


def _folders(config: DoctorConfig, deadline: Deadline, environ: Mapping[str, str]) -> Iterator[Finding]:
    outcome = run_child(FOLDERS, json.dumps(asdict(config)), seconds=deadline.share(0.25), environ=environ)
    yield from (Finding(**facts) for facts in outcome.facts)
    if outcome.failure:
        slow = "did not end within" in outcome.failure
        again = f"--verify-data size --time-limit {config.time_limit * 4}" if slow else ""
        yield Finding("folders", "problem", outcome.failure, f"python scripts/doctor.py {again}".strip())


def verdict(findings: list[Finding]) -> str:
    """The last line."""
    problems, warnings = (sum(f.state == state for f in findings) for state in ("problem", "warning"))
    counted = [f"{n} {word}{'s' * (n != 1)}" for n, word in ((problems, "problem"), (warnings, "warning")) if n]
    return " and ".join(counted) or "no problem found"
