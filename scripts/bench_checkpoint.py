"""Time how long a checkpoint holds the training loop up: see `python scripts/bench_checkpoint.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.bench_config import SavingBenchConfig
from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main


def main() -> None:
    """Measure and print the table."""
    description = "Time a checkpoint: how long the loop stands still, against the time that writing it takes."
    config = parse(SavingBenchConfig, sys.argv[1:], description).config
    from gpt2_xla.saving_benchmark import bench, table

    print(table(bench(config)))


if __name__ == "__main__":
    sys.exit(run_main(main))
