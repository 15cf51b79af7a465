"""Compile the training step for TPU slices, without one: see `python scripts/plan_tpu.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.config import ENTRY_POINTS
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import PlanConfig


def main() -> int:
    """Print what each slice would need and could do; 1 if one cannot run it."""
    description = (
        "Trace the training step, compile it with the TPU compiler for each slice, and tell its memory, traffic and "
        "bounds on its speed. Takes the flags of run_pretrain_xla.py."
    )
    mistakes: list[str] = []
    parsed = parse(PlanConfig, sys.argv[1:], description, mistakes=mistakes, others=ENTRY_POINTS)
    from gpt2_xla.tpu_plan.command import plan_tpu

    return plan_tpu(parsed, mistakes)


if __name__ == "__main__":
    sys.exit(run_main(main))
