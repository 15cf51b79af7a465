"""Time the data loader over sparse shards: see `python scripts/bench_loader.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.bench_config import BenchLoaderConfig
from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main


def main() -> None:
    """Measure every row and print the table."""
    description = "Time the data loader on one folder and on a mixture of two: start-up, seek, tokens/s, memory."
    config = parse(BenchLoaderConfig, sys.argv[1:], description).config
    from gpt2_xla.data.loader_benchmark import bench, table

    rows = bench(config)
    print(
        f"{config.shards} shards of {config.shard_size:,} tokens a folder, {config.tokens_per_step:,} tokens a step\n"
    )
    print(table(rows))


if __name__ == "__main__":
    sys.exit(run_main(main))
