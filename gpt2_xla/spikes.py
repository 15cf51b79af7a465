"""--spike-factor: when a loss has jumped away from those before it."""

import math
import statistics

REMEMBERED = 20  # log windows
FEWEST = 5  # below that many there is no median to speak of


def is_spike(loss: float, recent: list[float], factor: float | None) -> bool:
    """Whether a window's mean loss exceeds `factor` times the median of the windows before it.

    False without a factor, for fewer than FEWEST windows, and for a NaN: a window of which no step counted.
    """
    if factor is None or len(recent) < FEWEST:
        return False
    return loss > factor * statistics.median(recent)


def remember(loss: float, recent: list[float]) -> list[float]:
    """The windows to judge the next one by: the newest REMEMBERED means, without those of which no step counted."""
    return [*recent, loss][-REMEMBERED:] if math.isfinite(loss) else recent
