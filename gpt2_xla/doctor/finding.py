"""One line of the doctor's list."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem", "not run"]


@dataclass(frozen=True)
class Finding:
    """What one check found. `mend` is a command to type, and must be there for a problem."""

    name: str
    state: State
    text: str
    mend: str | None = None

    def shown(self) -> str:
        """The finding as it is printed: one line, and its mend beneath."""
        text = " ".join(self.text.split())
        line = f"{self.state:<8} {self.name:<15} {text}"
        return f"{line}\n{'':<8} {'':<15} → {self.mend}" if self.mend else line


def python_command() -> str:
    """How the user starts this very Python: `python` where that is it, else its path."""
    plain = shutil.which("python")
    return "python" if plain and os.path.samefile(plain, sys.executable) else sys.executable  # noqa: PTH121
