"""The steps since the last log step, which a checkpoint keeps: a resumed run logs what one that never stopped does."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OpenWindow:
    """Sums over steps that no record tells of yet; loss and norm are sums of float32, and as exact."""

    steps: int = 0
    loss: float = 0.0  # nats per token, over the steps that were not skipped
    grad_norm: float = 0.0  # over the same
    skipped: float = 0.0  # steps whose loss or gradients were not finite; a whole number, like the next
    skipped_in_a_row: float = 0.0  # up to and including the last step, also of windows before

    def saved(self) -> dict[str, Any]:
        """For JSON; {} where a sum has grown beyond float32, so that the record says so of the window's other steps alone."""
        values = dataclasses.asdict(self)
        return values if is_open_window(values) else {}


def is_open_window(saved: dict[str, Any]) -> bool:
    """Whether what a checkpoint has can be one: {} of a run that begins a window, or the fields, with numbers for values."""
    names = {field.name for field in dataclasses.fields(OpenWindow)}
    return saved.keys() <= names and all(map(is_number, saved.values())) and type(saved.get("steps", 0)) is int


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
