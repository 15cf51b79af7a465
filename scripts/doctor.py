"""Examine this machine, the installation and the folders: see `python scripts/doctor.py --help`."""

import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if sys.version_info < (3, 11):  # noqa: UP036 - an older one can't even read the package
    print("problem  python          " + platform.python_version() + " is older than 3.11")
    print(
        "                         → python3.11 -m venv .venv && .venv/bin/pip install -r requirements.txt -c constraints.txt"
    )
    sys.exit(1)

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import DoctorConfig


def main() -> int:
    """Print each finding as it comes; 1 if one of them is a problem."""
    description = (
        "Check versions, devices, memory, environment, disk and data; for each problem, the command that mends it."
    )
    config = parse(DoctorConfig, sys.argv[1:], description).config
    from gpt2_xla.doctor.examine import examine, verdict

    findings = []
    for finding in examine(config):
        print(finding.shown(), flush=True)
        findings.append(finding)
    print(verdict(findings))
    return int(any(finding.state == "problem" for finding in findings))


if __name__ == "__main__":
    sys.exit(run_main(main))
