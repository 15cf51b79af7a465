"""FineWeb to token shards: see `python scripts/prepare_fineweb.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import FinewebConfig


def main() -> None:
    """Parse the command line and prepare the data."""
    config = parse(
        FinewebConfig, sys.argv[1:], "Turn FineWeb, or a local parquet copy of it, into token shards."
    ).config
    from gpt2_xla.data.prepare import prepare_fineweb  # after --help, which should be quick

    prepare_fineweb(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
