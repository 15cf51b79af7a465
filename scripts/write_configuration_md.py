"""Write docs/configuration.md from the options that gpt2_xla/config.py declares."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.option_docs import configuration_page

if __name__ == "__main__":
    Path(__file__).resolve().parent.parent.joinpath("docs", "configuration.md").write_text(
        configuration_page(), encoding="utf-8"
    )
