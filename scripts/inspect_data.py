"""Check and describe prepared data: python scripts/inspect_data.py DIR; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import UserError, run_main
from gpt2_xla.script_config import InspectConfig


def main() -> None:
    """Print the report and the path of the picture."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):  # the folder may stand first, without its flag
        argv = ["--data", *argv]
    description = "Check and describe a folder of token shards: python scripts/inspect_data.py DIR [--flag value ...]"
    config = parse(InspectConfig, argv, description).config
    if config.data is None:
        raise UserError("no folder was named: python scripts/inspect_data.py DIR, for example data/pydoc/train")
    if Path(config.data).is_file():
        from gpt2_xla.bad_batches import describe_bad_batch

        print(describe_bad_batch(Path(config.data), config.tokenizer))
        return
    from gpt2_xla.data.inspection import inspect

    report, picture = inspect(config, Path(config.data))
    print(f"{report}\n\n  picture       {picture}")


if __name__ == "__main__":
    sys.exit(run_main(main))
