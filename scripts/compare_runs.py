"""Compare groups of runs by validation loss and tokens: python scripts/compare_runs.py --runs gpt2=runs/a,runs/b modern=runs/c."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import UserError, run_main
from gpt2_xla.script_config import CompareRunsConfig


def main() -> None:
    config = parse(CompareRunsConfig, sys.argv[1:], __doc__ or "").config
    if not config.runs:
        raise UserError("--runs names no run: python scripts/compare_runs.py --runs gpt2=runs/a,runs/b modern=runs/c")
    from gpt2_xla.run_comparison import draw, read_groups, table

    groups = read_groups(config.runs)
    print(table(groups))
    if config.picture is not None:
        try:
            draw(groups, Path(config.picture))
        except (OSError, ValueError) as error:  # ValueError: a kind of file that matplotlib cannot write
            raise UserError(f"--picture {config.picture} can't be written: {error}") from error
        print(f"picture: {config.picture}")


if __name__ == "__main__":
    sys.exit(run_main(main))
