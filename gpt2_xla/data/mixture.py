"""Which source each training sample comes from: a pure function of the sample's number and the sources' weights.

A source's share is a whole number p out of a period of P samples. Its count among the first n samples never differs from
n*p/P by one or more, for every n and any number of sources. The order is periodic, so that a seek is a division.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 2**16  # samples; weights that would need a longer one are rounded to this many parts


class Mixture:
    """The order in which sources take turns. With one source all samples are its own."""

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        """`weights` are positive; only their ratios matter."""
        self.shares = whole_shares(weights)
        self.period = sum(self.shares)
        self._order = _schedule(self.shares)  # (P,) the source of each sample of a period
        # For each source, its samples in a period; and for each sample, how many of its source came before it.
        self._places = [np.flatnonzero(self._order == source) for source in range(len(self.shares))]
        self._earlier = np.empty(self.period, np.int64)
        for places in self._places:
            self._earlier[places] = np.arange(len(places))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For samples (n,) of the mixture: the source of each (n,), and its number among that source's samples (n,)."""
        periods, places = np.divmod(samples, self.period)
        sources = self._order[places]
        return sources, periods * np.array(self.shares)[sources] + self._earlier[places]

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source gives."""
        periods, rest = divmod(samples, self.period)
        pairs = zip(self.shares, self._places, strict=True)
        return [periods * share + int(np.searchsorted(places, rest)) for share, places in pairs]


def whole_shares(weights: Sequence[Fraction | int]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratios of the weights; rounded, if their sum would pass LONGEST_PERIOD.

    Rounded, no share is below 1 and all but the largest differ from the exact one by less than 1 part in LONGEST_PERIOD.
    """
    exact = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = _reduced([int(weight * scale) for weight in exact])
    if sum(shares) > LONGEST_PERIOD:
        parts = [weight / sum(exact) * LONGEST_PERIOD for weight in exact]
        rounded = [max(1, math.floor(part)) for part in parts]
        missing = LONGEST_PERIOD - sum(rounded)
        for source in sorted(range(len(parts)), key=lambda i: math.floor(parts[i]) - parts[i])[: max(missing, 0)]:
            rounded[source] += 1  # the largest remainders
        rounded[rounded.index(max(rounded))] += min(missing, 0)  # the largest pays for those raised to 1
        shares = _reduced(rounded)
    return tuple(shares)


def _reduced(shares: list[int]) -> list[int]:
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def _schedule(shares: Sequence[int]) -> np.ndarray:
    """The source of each sample of one period (P,).

    The j-th sample of a source with share p (j from 0) may come no earlier than number floor(j*P/p), no later than number
    ceil((j+1)*P/p) - 1: then every count stays within one of its due. Taking, of those that may come, the one with the
    earliest deadline meets all deadlines (Steiner and Yeomans 1993, on just-in-time schedules; Tijdeman 1980).
    """
    period = sum(shares)
    order = np.empty(period, np.int64)
    waiting = [(0, source, 0) for source in range(len(shares))]  # (first place, source, j), a heap
    ready: list[tuple[int, int]] = []  # (last place, source), a heap
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, j = heapq.heappop(waiting)
            share = shares[source]
            heapq.heappush(ready, (((j + 1) * period - 1) // share, source))
            if j + 1 < share:
                heapq.heappush(waiting, ((j + 1) * period // share, source, j + 1))
        order[place] = heapq.heappop(ready)[1]
    return order
