"""Values of a config.json that may hold anything, checked: each mistake is one sentence."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2_xla.cli import LARGEST_NUMBER


def fixed_mistakes(hf_config: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """Values that make the function another one than our model computes."""
    return [
        f"{name} is {_shown(hf_config[name])}; this model has {value!r} only"
        for name, value in fixed.items()
        if hf_config.get(name, value) != value
    ]


def size_mistakes(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Values that are no whole numbers above 0."""
    wrong = [name for name in names if type(values[name]) is not int or not 1 <= values[name] <= LARGEST_NUMBER]
    return [f"{name} is {_shown(values[name])}; expected a whole number above 0" for name in wrong]


def number_mistakes(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Values that are no numbers above 0."""
    kinds = (int, float)
    wrong = [name for name in names if type(values[name]) not in kinds or not 0 < values[name] <= LARGEST_NUMBER]
    return [f"{name} is {_shown(values[name])}; expected a number above 0" for name in wrong]


def switch_mistakes(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Values that are neither true nor false."""
    wrong = [name for name in names if type(values[name]) is not bool]
    return [f"{name} is {_shown(values[name])}; expected true or false" for name in wrong]


def named_strangers(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(name[:80] for name in names[:4])}{more}"


def _shown(value: Any) -> str:
    return repr(value)[:60]
