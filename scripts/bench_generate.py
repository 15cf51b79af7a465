"""Time generation against recomputing the prefix and against transformers: see `python scripts/bench_generate.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.bench_config import GenerationBenchConfig
from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main


def main() -> None:
    """Measure every row and print the table, in tokens/s."""
    description = "Time generation in tokens/s: with the cache, by transformers, and computing the whole prefix again."
    config = parse(GenerationBenchConfig, sys.argv[1:], description).config
    from gpt2_xla.generation_benchmark import HEADER, bench, line, machine_text

    for number, row in enumerate(bench(config)):
        if number == 0:
            print(f"{machine_text(config)}\n\n{HEADER}")
        print(line(row), flush=True)  # each as it is measured: all of them take minutes


if __name__ == "__main__":
    sys.exit(run_main(main))
