"""Time the preparation of data on this machine: see `python scripts/bench_data.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.bench_config import DataBenchConfig
from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main


def main() -> None:
    """Measure every row and print the table."""
    description = "Time preparing data: ours, the usual pool of tokenizing processes, and the bare tokenizers."
    config = parse(DataBenchConfig, sys.argv[1:], description).config
    if not Path(config.sample).is_dir():
        print(f"skipped: --sample {config.sample} is no folder of parquet files with web pages")
        return
    from gpt2_xla.data.benchmark import bench_data, table
    from gpt2_xla.data.workers import default_workers

    rows = bench_data(config, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{rows[0].text_bytes / 1e6:,.0f} MB of distinct text, {config.tokenizer}, {rows[0].tokens:,} tokens\n")
    print(table(rows, default_workers()))


if __name__ == "__main__":
    sys.exit(run_main(main))
