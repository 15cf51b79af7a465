"""Write docs/configuration.md from the options that gpt2_xla/config.py declares. Takes no arguments."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.errors import UserError, run_main
from gpt2_xla.option_docs import configuration_page


def main() -> None:
    """Write the page."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if sys.argv[1:]:
        raise UserError(f"write_configuration_md.py takes no arguments, got {' '.join(sys.argv[1:])}")
    page = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
    page.write_text(configuration_page(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_main(main))
