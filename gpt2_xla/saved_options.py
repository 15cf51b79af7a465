"""Options that a resumed run took over from its checkpoint: a mistake that names one says where it comes from."""

import re
from collections.abc import Set
from pathlib import Path

from gpt2_xla import cli
from gpt2_xla.config import PretrainConfig


def with_origin(mistakes: list[str], config: PretrainConfig, explicit: Set[str], source: Path) -> list[str]:
    """The mistakes; one that names an option as checkpoint `source` has it, and the command did not give it, says so.

    `explicit` names the options that the command gave. Those that have their default are left as they are.
    """
    saved = [text for flag in cli.flags_of(type(config)) if flag.key not in explicit and (text := _given(flag, config))]
    told = []
    for mistake in mistakes:
        theirs = [text for text in saved if re.search(rf"{re.escape(text)}(?![\w-]|\.\d)", mistake)]
        told.append(f"{mistake} ({', '.join(theirs)}: saved in {source})" if theirs else mistake)
    return told


def _given(flag: cli.Flag, config: PretrainConfig) -> str | None:
    """The flag as a command gives it and a sentence names it; None for one that has its default, or is a list."""
    value = getattr(getattr(config, str(flag.group)), flag.key)
    if value == flag.field.default or not isinstance(value, str | int | float):
        return None
    if isinstance(value, bool):
        return flag.name if value else None
    return f"{flag.name} {value:g}" if isinstance(value, float) else f"{flag.name} {value}"
