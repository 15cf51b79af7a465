"""Which texts to continue: --prompt, the lines of --prompt-file, or none for what is typed."""

import sys
from pathlib import Path

from gpt2_xla.errors import UserError
from gpt2_xla.notes import note


def given_prompts(prompt: str | None, prompt_file: str | None) -> list[str] | None:
    """The prompts of the command line; None where there are none, and the user shall type them.

    Raises UserError for both at once, and for a file that can't be read or holds no prompt.
    """
    if prompt is not None and prompt_file is not None:
        raise UserError("--prompt and --prompt-file are both given; use one of them")
    if prompt_file is not None:
        return _lines(prompt_file)
    return [prompt] if prompt is not None else None


def _lines(file: str) -> list[str]:
    """The lines of a file, or of standard input for "-", that are not blank."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt-file {file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"--prompt-file {file} is not UTF-8 text, line {line}; save it as UTF-8") from error
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {file} holds no prompt; write one a line")
    if blank := len(lines) - len(prompts):
        note(f"--prompt-file {file}: {blank} blank line{'s' if blank > 1 else ''} skipped")
    return prompts
