"""Evidence of a lasting change over all series since a baseline, which may be looked at whenever one likes.

The p values of series that are judged by one baseline hang together: an unlucky baseline is unlucky every week, and of
52 looks at 5 % a year some are wrong. The evidence here is money: it starts at 1, is bet on each series in a way that
wins nothing on average while nothing changes, and so is above `1 / level` at any time with a probability of at most
`level` (Ville's inequality), all year, for all looks together. It is bet in two ways, which share the money:

- *by the baseline*: a part is set on each series, and wins by that series' own exact p value. It finds large changes at
  once, and needs no earlier series. That the p values depend on each other does no harm to a sum.
- *by the series before*: given the baseline, the sizes of what the series show are exchangeable while nothing changes.
  So the rank of each among all so far (a smoothed conformal p value) is uniform and independent of the ranks before,
  and money that is set on *all series since the t-th are larger* may be let ride (a martingale). It finds small changes
  that last, after some quiet series.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Monitor", "Shown"]

Floats = NDArray[np.float64]

# Shares of the money: by the baseline, and of that on the first series.
_BY_BASELINE = 0.6
_ON_FIRST = 0.35
# One half of the rest falls off with the number of the series, one is the same for so many.
_EVEN_SERIES = 62
# By the baseline: on the smallest p value that the numbers of runs allow, and on p values up to a bound.
_ON_SMALLEST = 0.7
_BOUND = 0.0125
# By the series before: what is kept when a series is not among the largest.
_KEPT = 0.1
_INTERVAL = 0.95


@dataclass(frozen=True)
class Shown:
    """What one series shows.

    Attributes:
        name: Its name. Ties of ranks are broken by a digest of it, so that all who look see the same.
        p: Its p value against the baseline; None when nothing varied.
        smallest_p: The smallest that its number of runs could reach.
        size: Size of its largest statistic; None when nothing varied.
    """

    name: str
    p: float | None
    smallest_p: float
    size: float | None


class Monitor:
    """Evidence since a baseline.

    Args:
        level: Probability that the monitor ever raises an alarm when nothing changes.
        series: What the series show, oldest first.
    """

    def __init__(self, level: float, series: Sequence[Shown] = ()) -> None:
        self.threshold = 1.0 / level
        self.evidence: list[float] = []
        self._series: list[Shown] = []
        self._won = 0.0
        self._riding: Floats = np.empty(0)
        for shown in series:
            self.add(shown)

    def add(self, shown: Shown) -> float:
        """Take in the next series.

        Args:
            shown: What it shows.

        Returns:
            The evidence after it.
        """
        rank = self._rank(shown)
        self._series.append(shown)
        number = len(self._series)
        self._won += _set_on(number) * _win(shown)
        self._riding = np.append(self._riding, _share_from(number))
        # Money that waits for a later start is worth what it was.
        since = np.arange(number, 0, -1) / number
        self._riding *= (1.0 - _KEPT) * (rank <= since) / since + _KEPT
        waiting = 1.0 - sum(_share_from(n) for n in range(1, number + 1))
        self.evidence.append(
            _BY_BASELINE * self._won + (1.0 - _BY_BASELINE) * (float(self._riding.sum()) + max(waiting, 0.0))
        )
        return self.evidence[-1]

    @property
    def alarm(self) -> int | None:
        """Number of the series with which the evidence came above the threshold, from 0; None when it never did."""
        return next((number for number, value in enumerate(self.evidence) if value >= self.threshold), None)

    def start(self) -> tuple[int, int, int]:
        """Estimate with which series the change began.

        Returns:
            Numbers of the likeliest series, from 0, and of the first and the last of those that together have 95 % of
            the likelihood, each start taken as equally likely before.
        """
        each = np.array([math.log(_likelihood(shown)) for shown in self._series])
        riding = np.log(np.maximum(self._riding / [_share_from(n) for n in range(1, len(each) + 1)], 1e-300))
        total = np.cumsum(each[::-1])[::-1] + riding
        weights = np.exp(total - total.max())
        weights /= weights.sum()
        best = int(np.argmax(weights))
        order = np.argsort(-weights)
        needed = int(np.searchsorted(np.cumsum(weights[order]), _INTERVAL)) + 1
        return best, int(order[:needed].min()), int(order[:needed].max())

    def _rank(self, shown: Shown) -> float:
        """Smoothed conformal p value of a series among all so far: small when it shows most."""
        digest = hashlib.sha256(shown.name.encode()).digest()
        chance = (int.from_bytes(digest[:7], "big") + 0.5) / 2.0**56
        own = _size(shown)
        sizes = [_size(earlier) for earlier in self._series]
        larger = sum(size > own for size in sizes)
        ties = sum(size == own for size in sizes) + 1
        return (larger + chance * ties) / (len(sizes) + 1)


def _size(shown: Shown) -> float:
    return -math.inf if shown.size is None else shown.size


def _set_on(number: int) -> float:
    """Part of the money by the baseline that is set on a series; over all series it sums up to at most 1."""
    if number == 1:
        return _ON_FIRST
    even = 1.0 / _EVEN_SERIES if number <= _EVEN_SERIES + 1 else 0.0
    return (1.0 - _ON_FIRST) * (0.5 / (number * (number - 1)) + 0.5 * even)


def _share_from(number: int) -> float:
    """Part of the money by the series before that starts to ride with a series; it sums up to at most 1."""
    return 0.5 / (number * (number + 1)) + (0.5 / _EVEN_SERIES if number <= _EVEN_SERIES else 0.0)


def _win(shown: Shown) -> float:
    """What one unit that is set on a series wins: at most 1 on average when nothing has changed."""
    if shown.p is None:
        return 0.0
    smallest = max(shown.smallest_p, 1e-12)
    hit = shown.p <= smallest * (1.0 + 1e-9)
    return _ON_SMALLEST * hit / smallest + (1.0 - _ON_SMALLEST) * (shown.p <= _BOUND) / _BOUND


def _likelihood(shown: Shown) -> float:
    """How much likelier a p value is after a change than before, averaged over sizes of the change."""
    p = max(min(shown.p if shown.p is not None else 1.0, 1.0 - 1e-6), 1e-12)
    return (1.0 - p + p * math.log(p)) / (p * math.log(p) ** 2)
