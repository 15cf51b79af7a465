"""Time the training step on this machine: see `python scripts/bench.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.bench_config import BenchConfig
from gpt2_xla.cli import parse
from gpt2_xla.config import ENTRY_POINTS
from gpt2_xla.errors import run_main


def main() -> None:
    """Measure what the options say, and print the tables."""
    description = (
        "Time the training step: tokens/s, memory and MFU of our loop, of bare ones in turns with it, and of more "
        "processes; and the parts of our step. Takes model, optimizer and runtime flags of run_pretrain.py."
    )
    mistakes: list[str] = []
    parsed = parse(BenchConfig, sys.argv[1:], description, mistakes=mistakes, others=ENTRY_POINTS)
    from gpt2_xla.bench.command import bench

    bench(parsed, mistakes)


if __name__ == "__main__":
    sys.exit(run_main(main))
