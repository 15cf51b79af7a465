"""Time the training step on this machine: see `python scripts/bench.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.bench_config import BenchConfig
from gpt2_xla.cli import parse
from gpt2_xla.errors import UserError, run_main


def main() -> None:
    """Measure every row and print the table."""
    description = "Time the training step of both runtimes: tokens/s, step time, input wait, memory, compilations."
    config = parse(BenchConfig, sys.argv[1:], description).config
    from gpt2_xla.benchmark import bench, table

    rows = bench(config, lambda text: print(text, file=sys.stderr, flush=True))
    if not rows:
        raise UserError("nothing could be measured; the lines above say why")
    print(
        f"{rows[0].parameters:,} parameters, {config.bench.train_batch_size} × {config.model.seq_length} tokens a micro-step\n"
    )
    print(table(rows))


if __name__ == "__main__":
    sys.exit(run_main(main))
