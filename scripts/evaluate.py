"""Compare models on the same tokens or questions: python scripts/evaluate.py --model gpt2 runs/mine --data DIR; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.script_config import EvaluateConfig


def main() -> None:
    """Print the tables."""
    config = parse(EvaluateConfig, sys.argv[1:], __doc__ or "").config
    from gpt2_xla.evaluation import run

    run(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
