"""Check that a run saw every token once, in order: python scripts/verify_run.py RUN_DIR; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import UserError, run_main
from gpt2_xla.script_config import VerifyRunConfig


def main() -> int:
    """Print what the ledger tells, and every problem; exit status 1 if there is one."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):  # the folder may stand first, without its flag
        argv = ["--run", *argv]
    description = (
        "Check that a run saw every token once, in order: python scripts/verify_run.py RUN_DIR [--flag value ...]"
    )
    config = parse(VerifyRunConfig, argv, description).config
    if config.run is None:
        raise UserError("no run folder was named: python scripts/verify_run.py RUN_DIR, for example runs/gpt2")
    from gpt2_xla.run_verification import verify_run

    summary, problems = verify_run(config, Path(config.run))
    print(summary)
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
