"""Draw a run's loss curves: python scripts/plot_loss.py RUN_FOLDER → RUN_FOLDER/loss.png"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.errors import UserError, run_main


def main() -> None:
    """Draw the picture and print its path."""
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(arguments) != 1:
        raise UserError(f"plot_loss.py takes one run folder, got {len(arguments)} arguments")
    from gpt2_xla.report import draw_loss_curve

    print(draw_loss_curve(Path(arguments[0])))


if __name__ == "__main__":
    sys.exit(run_main(main))
