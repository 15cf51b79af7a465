"""The steps since the last log step, which a checkpoint keeps: a resumed run logs what one that never stopped does."""

import dataclasses
from dataclasses import dataclass
from typing import Any

LARGEST = 3.4028234663852886e38  # float32
MOST_STEPS = 2**24  # that float32 counts


@dataclass(frozen=True)
class OpenWindow:
    """Sums over steps that no record tells of yet; loss and norm are sums of float32, and as exact."""

    steps: int = 0
    loss: float = 0.0  # nats per token, over the steps that were not skipped
    grad_norm: float = 0.0  # over the same
    skipped: float = 0.0  # steps whose loss or gradients were not finite; a whole number, like the next
    skipped_in_a_row: float = 0.0  # up to and including the last step, also of windows before

    def forgiven(self) -> "OpenWindow":
        """For the checkpoint of a run that too many skipped steps have ended: who continues it may have as many again."""
        return dataclasses.replace(self, skipped_in_a_row=0.0)

    def saved(self) -> dict[str, Any]:
        """For JSON; {} where a sum has grown beyond float32: then the window's record will be of the steps to come alone."""
        values = dataclasses.asdict(self)
        return values if is_open_window(values) else {}


def is_open_window(saved: dict[str, Any]) -> bool:
    """Whether what a checkpoint has can be one: {} of a run that begins a window, or the fields, with values that fit together."""
    names = {field.name for field in dataclasses.fields(OpenWindow)}
    if not (saved.keys() <= names and all(map(is_number, saved.values())) and type(saved.get("steps", 0)) is int):
        return False
    window = OpenWindow(**saved)
    return 0 <= window.skipped <= window.steps < MOST_STEPS and 0 <= window.skipped_in_a_row < MOST_STEPS


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that float32 can hold."""
    return type(value) in (int, float) and abs(value) <= LARGEST
