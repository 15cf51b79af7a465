"""Hurt a training run at random moments and see that it loses nothing: python scripts/chaos.py --trials 50; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import ChaosConfig


def main() -> int:
    """Run the trials; exit status 1 if one of them failed."""
    description = (
        "Train a tiny model, kill it, damage its files, fill its disk, start it again until it is finished, and compare "
        "the weights, the optimizer's state, the losses and the data's order with a run that nobody hurt."
    )
    config = parse(ChaosConfig, sys.argv[1:], description).config
    from gpt2_xla.chaos.session import chaos

    return chaos(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
