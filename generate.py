"""Text from a trained model: python generate.py --model runs/gpt2 --prompt "Once upon a time"."""

import io
import sys

from gpt2_xla.cli import parse
from gpt2_xla.errors import run_main
from gpt2_xla.generation import run
from gpt2_xla.script_config import GenerateConfig


def main() -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a character shows "?"
            stream.reconfigure(errors="replace")
    run(parse(GenerateConfig, sys.argv[1:], __doc__ or "").config)


if __name__ == "__main__":
    sys.exit(run_main(main))
