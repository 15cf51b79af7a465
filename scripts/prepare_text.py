"""Text to token shards: see `python scripts/prepare_text.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import PrepareConfig


def main() -> None:
    """Parse the command line and prepare the data."""
    config = parse(
        PrepareConfig,
        sys.argv[1:],
        "Turn text into token shards: Python's own documentation, local files, folders, JSONL or parquet.",
    ).config
    from gpt2_xla.data.prepare import prepare_text  # after --help, which should be quick

    prepare_text(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
