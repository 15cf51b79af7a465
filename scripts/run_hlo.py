"""Export the training step, run it with jax: see `python scripts/run_hlo.py --help`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import HloConfig


def main() -> None:
    """Export, run, and print losses, step time, MFU and memory."""
    description = (
        "Export the training step as the program that torch_xla compiles, run it on whatever device jax has, and compare "
        "its losses with those of torch_xla on the CPU."
    )
    mistakes: list[str] = []
    parsed = parse(HloConfig, sys.argv[1:], description, mistakes=mistakes)
    from gpt2_xla.hlo.command import report, run_hlo

    if (found := run_hlo(parsed.config, parsed.explicit, mistakes)) is not None:
        print(json.dumps(found, indent=2) if parsed.config.step.json else report(found))


if __name__ == "__main__":
    sys.exit(run_main(main))
