"""What counts as a spike of the loss."""

import math

from gpt2_xla.spikes import FEWEST, REMEMBERED, is_spike, remember


def test_a_spike_exceeds_the_factor_times_the_median():
    recent = [3.0, 2.0, 2.0, 1.0, 100.0]  # one earlier spike hardly moves the median
    assert not is_spike(3.0, recent, 1.5)
    assert is_spike(3.01, recent, 1.5)
    assert is_spike(math.inf, recent, 1.5)


def test_nothing_is_a_spike_without_a_factor_without_enough_windows_or_without_a_loss():
    assert not is_spike(1e9, [1.0] * FEWEST, None)
    assert not is_spike(1e9, [1.0] * (FEWEST - 1), 1.5)
    assert not is_spike(math.nan, [1.0] * FEWEST, 1.5)


def test_the_newest_windows_are_remembered_and_none_that_has_no_loss():
    recent: list[float] = []
    for loss in range(REMEMBERED + 3):
        recent = remember(float(loss), recent)
    assert recent == [float(loss) for loss in range(3, REMEMBERED + 3)]
    assert remember(math.nan, recent) == recent
