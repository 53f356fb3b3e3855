"""The exchange test: runs are judged by runs, whatever their noise is.

When nothing has changed, the N reference runs and the M new ones are exchangeable: which of them are called new is
chance. So the runs are called new and old in all ways, a few statistics are computed for each of these labellings, and
the labelling that was observed is compared with all others. That is exact for any noise, any correlation of the points
and any grid that values are rounded to. All statistics of all measures of all files are put on one scale by
their size, and only the largest counts (Westfall and Young): the error rate is that of the whole judgement.

Everything that is computed from the data before a labelling is chosen treats all runs alike, or the exchange would not
hold: points are centred over all runs, in double precision, and scaled by the spread of all runs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

__all__ = ["Evidence", "Labellings", "Scan", "intraclass_correlation", "runs_needed", "smallest_p"]

Floats = NDArray[np.float64]

LABELLINGS = 10_000
"""So many are drawn when there are more ways to exchange the runs."""

# Of the scatter of a typical point: on a grid of few values some point is separated by chance with no spread at all, so
# the largest difference is that of a point that is large for the measure, too.
_GRID = 0.05
POINT_LEVEL = 0.01
"""Level at which a single point is said to stand out, to show where; the test does not use it."""
MAX_WHERE = 5

# Of the spread of all runs: no within-group spread counts as smaller. Bounds what a point without any spread can say.
_FLOOR = 1e-5
# Labellings whose statistics differ by no more than rounding are ties, and ties count against a change.
_TIE = 1e-9
_SEED = 2307
# Of no more ways than these all are listed before some are drawn.
_LISTED = 1 << 18
_TABLE_BITS = 18
_WORD_BITS = 24
_BITS = np.array([1 << bit for bit in range(_WORD_BITS)], dtype=np.float32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TINY = 1e-300
# Distance from the middle to the lowest tenth, of a normal and of a Gumbel variable.
_NORMAL_HALF = float(stats.norm.isf(0.1))
_GUMBEL_HALF = float(stats.gumbel_r.isf(0.5) - stats.gumbel_r.isf(0.9))


def smallest_p(references: int, runs: int) -> float:
    """Tell the smallest p value that a number of runs can reach.

    Args:
        references: Number of reference units.
        runs: Number of new units.

    Returns:
        One over the number of ways to choose the new ones; twice that for equal numbers, where the labelling that
        swaps the two groups can tell the same.
    """
    if not references or not runs:
        return 1.0
    return min(1.0, (2.0 if references == runs else 1.0) / math.comb(references + runs, runs))


def runs_needed(references: int, runs: int, level: float) -> tuple[int, int]:
    """Tell how many runs would reach a level.

    Args:
        references: Number of reference units there are.
        runs: Number of new units there are.
        level: The level.

    Returns:
        The number of new units that would do with these references, and the number of references that would do with
        these new units.
    """
    enough = next(m for m in range(max(runs, 1), 10_000) if smallest_p(max(references, 1), m) <= level)
    base = next(n for n in range(max(references, 1), 10_000) if smallest_p(n, max(runs, 1)) <= level)
    return enough, base


class Labellings:
    """The ways to call some of the runs new. The first is the one that was observed.

    Args:
        references: Number of reference runs; they come first.
        runs: Number of new runs.
        units: Runs that can only be exchanged together, as one number for each run; every run alone when None. Units
            must be of one size, and hold either references or new runs.
        limit: So many are drawn, with a fixed seed and the observed one among them, when there are more.

    Raises:
        ValueError: The units differ in size or mix references and new runs.
    """

    def __init__(
        self, references: int, runs: int, *, units: Sequence[int] | None = None, limit: int = LABELLINGS
    ) -> None:
        self.references, self.runs = references, runs
        members = _members(references + runs, units)
        new_units = [number for number, unit in enumerate(members) if unit[-1] >= references]
        if any(unit[0] < references <= unit[-1] for unit in members) or len({len(unit) for unit in members}) > 1:
            raise ValueError("units of exchange must be of one size, each of references or of new runs only")
        self.units, self.new_units = len(members), len(new_units)
        total = math.comb(self.units, self.new_units)
        self.is_exact = total <= limit
        chosen = combinations(range(self.units), self.new_units) if self.is_exact else self._drawn(limit)
        observed = tuple(new_units)
        rows = [observed, *(labelling for labelling in chosen if labelling != observed)]
        self.is_new = np.zeros((len(rows), references + runs), dtype=np.bool_)
        # Units are of one size, so the runs of all labellings are one array.
        runs_of = np.array(members)[np.array(rows)].reshape(len(rows), -1)
        self.is_new[np.arange(len(rows))[:, np.newaxis], runs_of] = True
        new = self.is_new.astype(np.float64)
        size = math.sqrt(references * runs / (references + runs))
        # Contrasts of length one.
        self.weights: Floats = size * (new / runs - (1.0 - new) / references)
        self.smallest_p = smallest_p(self.units - self.new_units, self.new_units) if self.is_exact else 1.0 / len(rows)
        self._words = _words(self.is_new.T)
        self._order = np.argsort(self._words)
        # Most sets are found, or known to be none, at one look; few labellings share a place with another.
        self._table = np.full(1 << _TABLE_BITS, -1, dtype=np.int32)
        self._table[_place(self._words)] = np.arange(len(rows))
        # Sums of these are whole numbers that single precision holds, in whatever order they are added.
        most = (1 << _WORD_BITS) // (references + runs)
        self._weights = np.random.default_rng(_SEED).integers(most, size=references + runs).astype(np.float32)
        self._sums = np.zeros(1 << _TABLE_BITS, dtype=np.bool_)
        self._sums[self._sum(self.is_new.T)] = True

    def _drawn(self, limit: int) -> list[tuple[int, ...]]:
        """Different ones: of two that are the same only one would be found by the points that vote for it."""
        generator = np.random.default_rng(_SEED)
        if math.comb(self.units, self.new_units) <= _LISTED:
            every = list(combinations(range(self.units), self.new_units))
            return [every[place] for place in generator.choice(len(every), limit, replace=False)]
        drawn = (generator.permutation(self.units)[: self.new_units].tolist() for _ in range(limit))
        return list(dict.fromkeys(tuple(sorted(labelling)) for labelling in drawn))

    def __len__(self) -> int:
        """Number of labellings, the observed one counted."""
        return len(self.is_new)

    def find(self, chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Find the labellings that call certain runs new.

        Args:
            chosen: Which runs, shape (runs, sets).

        Returns:
            Their numbers; -1 for sets that are no labelling or were not drawn.
        """
        if self.is_exact:
            return self._find(chosen)
        # Where labellings are drawn most sets are none of them, and one sum tells.
        likely = np.flatnonzero(self._sums[self._sum(chosen)])
        found = np.full(chosen.shape[1], -1, dtype=np.intp)
        found[likely] = self._find(chosen[:, likely])
        return found

    def _sum(self, chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
        sums = self._weights @ chosen.astype(np.float32)
        return sums.astype(np.int32) & np.int32((1 << _TABLE_BITS) - 1)

    def _find(self, chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
        words = _words(chosen)
        found = self._table[_place(words)].astype(np.intp)
        some = np.flatnonzero(found >= 0)
        other = some[self._words[found[some]] != words[some]]
        place = np.searchsorted(self._words, words[other], sorter=self._order)
        there = self._order[np.minimum(place, len(self) - 1)]
        found[other] = np.where(self._words[there] == words[other], there, -1)
        return found


def _words(chosen: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Name sets of runs, one in each column, by one number: their bits, hashed where there are more than 48.

    As products of matrices, which is the fastest there is; whole numbers below 2 ** 24 are exact in single precision.
    """
    parts = [chosen[first : first + _WORD_BITS] for first in range(0, len(chosen), _WORD_BITS)]
    words = np.zeros(chosen.shape[1], dtype=np.uint64)
    for part, factor in zip(parts, _factors(len(parts)), strict=True):
        words += (_BITS[: len(part)] @ part.astype(np.float32)).astype(np.uint64) * factor
    return words


@cache
def _factors(parts: int) -> NDArray[np.uint64]:
    """What the parts of a word are multiplied by: places of their own for two, hashed for more."""
    if parts <= 2:
        return np.array([1, 1 << _WORD_BITS], dtype=np.uint64)[:parts]
    return np.random.default_rng(_SEED).integers(2**63, size=parts, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _place(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where a set of runs is in the table."""
    places: NDArray[np.uint64] = (words * _GOLDEN) >> np.uint64(64 - _TABLE_BITS)
    return places


def _members(count: int, units: Sequence[int] | None) -> list[list[int]]:
    if units is None:
        return [[number] for number in range(count)]
    return [[i for i, unit in enumerate(units) if unit == wanted] for wanted in dict.fromkeys(units)]


class Scan:
    """One pass over the points of one measure.

    Args:
        labellings: The labellings.
    """

    def __init__(self, labellings: Labellings) -> None:
        self._labellings = labellings
        count = labellings.references + labellings.runs
        self.points = self.outside = 0
        self._rooms: tuple[Floats, Floats] = (np.empty(0), np.empty(0))
        self._scatter = np.zeros((count, count))
        self._total = np.zeros(count)
        self._votes = np.zeros(len(labellings))
        self._explained = np.zeros(len(labellings))
        self._typical = 0.0
        self._left_out = np.zeros(count)
        self._standing_out: list[tuple[float, int]] = []
        # What the difference of the groups explains of the scatter of a point that stands out.
        within = max(count - 2, 1)
        critical = float(stats.t.isf(POINT_LEVEL / 2, within)) ** 2
        self._critical = critical / (within + critical)

    def add(self, values: Floats, start: int = 0, total: Floats | None = None) -> None:
        """Take in some points.

        Args:
            values: Shape (runs, points), references first, all finite. Points that do not vary say nothing.
            start: Number of the first point.
            total: The sum of the runs at each point, where that is known.
        """
        varies = _varies(values)
        if not varies.any():
            return
        if not varies.all():
            values, total = values[:, varies], None if total is None else total[varies]
        if values.size > self._rooms[0].size:
            # Got once, since to get memory from the system for each block takes longer than to compute with it.
            self._rooms = np.empty(values.size), np.empty(values.size)
        scaled, spread = _standardised(values, total, self._rooms[0][: values.size].reshape(values.shape))
        self.points += spread.size
        self._scatter += scaled @ scaled.T
        self._total += scaled.sum(axis=1)
        self._typical = self._typical or float(np.median(spread))
        self._vote(scaled, spread)
        if self._labellings.runs == 1:
            alone = scaled**2 * (len(scaled) / self._labellings.references)
            self._left_out += (alone / np.maximum(1.0 - alone, _FLOOR)).sum(axis=1)
        self._stand_out(scaled, np.flatnonzero(varies) + start)

    def _vote(self, scaled: Floats, spread: Floats) -> None:
        """Let each point vote for the labellings whose new runs it has above, or below, all others."""
        references, runs = self._labellings.references, self._labellings.runs
        # Short rows that lie together are sorted several times faster than long columns.
        ordered = self._rooms[1][: scaled.size].reshape(scaled.shape[::-1])
        ordered[:] = scaled.T
        ordered.sort(axis=1)
        place = np.arange(references + runs)
        for edge, highest in ((references, True), (runs, False)):
            limit = np.ascontiguousarray(ordered[:, edge])
            labelling = self._labellings.find(scaled >= limit if highest else scaled < limit)
            # Without runs that share the limit, of which some would be in the set and some not.
            chosen = np.flatnonzero((limit > ordered[:, edge - 1]) & (labelling >= 0))
            if not chosen.size:
                continue
            labelling = labelling[chosen]
            # In the order of their size, so that it does not matter which run has which value.
            values = ordered if 2 * chosen.size > len(ordered) else ordered[chosen]
            sums = values @ ((place >= edge) == highest).astype(np.float64)
            sums = sums[chosen] if values is ordered else sums
            explained = sums * sums * (1.0 / references + 1.0 / runs)
            left = np.maximum(1.0 - explained, 0.0) + _GRID * (self._typical / spread[chosen]) ** 2
            self._votes += np.bincount(labelling, minlength=self._votes.size)
            np.maximum.at(self._explained, labelling, explained / (explained + left))

    def _stand_out(self, scaled: Floats, positions: NDArray[np.intp]) -> None:
        """Note where the new runs differ most from the references; the test makes no use of it."""
        sums = scaled[self._labellings.references :].sum(axis=0)
        explained = sums**2 * (1.0 / self._labellings.references + 1.0 / self._labellings.runs)
        self.outside += int(np.count_nonzero(explained > self._critical))
        if len(self._standing_out) == MAX_WHERE:
            further = np.flatnonzero(explained > self._standing_out[-1][0])
            explained, positions = explained[further], positions[further]
        for index in np.argsort(-explained, kind="stable")[:MAX_WHERE]:
            self._standing_out.append((float(explained[index]), int(positions[index])))
        self._standing_out = heapq.nlargest(MAX_WHERE, self._standing_out)

    @property
    def where(self) -> tuple[int, ...]:
        """Positions at which the new runs differ most from the references, for their spread."""
        return tuple(position for _, position in self._standing_out)

    def statistics(self) -> dict[str, Floats]:
        """Compute the statistics, each for all labellings and on one scale, that of a standard normal variable.

        Returns:
            By name. Statistics that are the same for all labellings are absent.
        """
        if not self.points:
            return {}
        count = self._labellings.references + self._labellings.runs
        weights = self._labellings.weights
        between = np.einsum("lr,rs,ls->l", weights, self._scatter, weights, optimize=True)
        own, total = np.diag(self._scatter), float(np.trace(self._scatter))
        ratio = between / np.maximum(total - between, _FLOOR * total)
        found = {
            "common shift": _as_normal(weights @ self._total, self._total),
            "spread": _as_normal(weights @ own, own - own.mean()),
            "mean square": _by_bulk(np.cbrt(ratio)) if self.points > 1 else None,
            "separated points": _by_bulk(2.0 * np.sqrt(self._votes + 0.375), least=1.0),
            "largest": _by_extremes(-_log_p(self._explained, count), least=1.0),
        }
        return {name: values for name, values in found.items() if values is not None}

    @property
    def scatter(self) -> Floats:
        """Products of the runs, centred over all of them and scaled point by point, summed over the points."""
        return self._scatter

    def distances(self) -> Floats:
        """Tell how far each run is from the centre of all, relative to the others: the mean over the points."""
        own = np.diag(self._scatter)
        result: Floats = own / max(float(own.mean()), _TINY)
        return result

    def left_out_distance(self) -> dict[str, Floats]:
        """Compute for all labellings of one new run how far it is from the centre of the others, on one scale.

        Returns:
            The mean square over the points, for the spread of the others, and the largest; both one-sided, since a run
            nearer to the centre than others is inside. Absent when nothing varies.
        """
        count = self._labellings.references + 1
        found = {
            "distance": _by_bulk(np.log(self._labellings.is_new @ self._left_out + _TINY)),
            "largest": _by_extremes(-_log_p(self._explained, count), least=1.0),
        }
        return {name: values for name, values in found.items() if values is not None}


def _varies(values: Floats) -> NDArray[np.bool_]:
    """Tell at which points runs differ; mostly the first and the last do, and the others need not be looked at."""
    differs: NDArray[np.bool_] = values[0] != values[-1]
    alike = np.flatnonzero(~differs)
    if 4 * alike.size > differs.size:
        differs = (values != values[0]).any(axis=0)
    else:
        differs[alike] = (values[:, alike] != values[0, alike]).any(axis=0)
    return differs


def _standardised(values: Floats, total: Floats | None, room: Floats) -> tuple[Floats, Floats]:
    """Centre points over the runs and scale them to length one, in the room that is given; the lengths they had."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total = values.sum(axis=0) if total is None else total
        centred = np.subtract(values, total / len(values), out=room)
        squares = np.einsum("rp,rp->p", centred, centred)
    extreme = ~(np.isfinite(squares) & (squares > _TINY))
    lengths = np.sqrt(squares)
    if extreme.any():
        # Numbers of which the squares are no doubles: by powers of two, which round nothing.
        chosen = values[:, extreme]
        exponents = np.frexp(np.abs(chosen).max(axis=0))[1]
        moved = np.ldexp(chosen, -exponents)
        moved = moved - moved.mean(axis=0)
        sizes = np.abs(moved).max(axis=0)
        moved /= np.where(sizes > 0.0, sizes, 1.0)
        centred[:, extreme] = moved
        lengths[extreme] = np.maximum(np.sqrt(np.einsum("rp,rp->p", moved, moved)), _TINY)
    scaled = np.multiply(centred, 1.0 / lengths, out=centred)
    if extreme.any():
        with np.errstate(over="ignore", under="ignore"):
            lengths[extreme] = np.clip(np.ldexp(lengths[extreme] * sizes, exponents), _TINY, 1.0 / _TINY)
    return scaled, lengths


def intraclass_correlation(scatter: Floats, units: Sequence[int]) -> float | None:
    """Tell how alike runs of one unit are, over all points together (one-way analysis of variance).

    Args:
        scatter: Products of runs, as of `Scan.scatter`.
        units: Unit of each run; all of one size.

    Returns:
        From below 0, when runs of one unit differ more than those of different units, to 1, when they are the same;
        None with fewer than two units, or one run in each, or no variation.
    """
    kinds = np.array([[unit == kind for unit in units] for kind in dict.fromkeys(units)], dtype=np.float64)
    groups, count = kinds.shape
    size = count // groups
    if groups < 2 or size < 2:
        return None
    middle = np.eye(count) - 1.0 / count
    centred = middle @ scatter @ middle
    between = float(np.einsum("gr,rs,gs->", kinds, centred, kinds)) / size / (groups - 1)
    within = (float(np.trace(centred)) - between * (groups - 1)) / (count - groups)
    whole = between + (size - 1) * within
    return (between - within) / whole if whole > _TINY else None


def _log_p(explained: Floats, count: int) -> Floats:
    """Log of the probability that chance explains as much of the scatter of one normal variable."""
    within = 1.0 - np.minimum(explained, 1.0) / (1.0 + _FLOOR)
    result: Floats = np.log(np.maximum(special.betainc(max(count - 2, 1) / 2.0, 0.5, within), _TINY))
    return result


def _as_normal(contrast: Floats, values: Floats) -> Floats | None:
    """Put the difference of the groups in one number a run on the scale of a normal variable."""
    total = float(values @ values)
    if total <= _TINY:
        return None
    result: Floats = -special.ndtri_exp(_log_p(contrast**2 / total, values.size) - math.log(2.0))
    return result


def _bulk(values: Floats) -> tuple[float, float] | None:
    """Middle and spread of the lower half, which a change does not reach; None when nothing varies."""
    middle, low = (float(value) for value in np.quantile(values, (0.5, 0.1)))
    if np.ptp(values) <= _TIE * (1.0 + abs(middle)):
        return None
    return middle, middle - low


def _by_bulk(values: Floats, *, least: float = 0.0) -> Floats | None:
    """Centre and scale what is nearly normal over the labellings."""
    bulk = _bulk(values)
    if bulk is None:
        return None
    middle, half = bulk
    whole = float(values.std())
    # Few points take few values, and then the lower half may be one value.
    spread = max(half / _NORMAL_HALF, whole / 10.0) if half > _TIE * whole else whole
    return (values - middle) / max(spread, least)


def _by_extremes(values: Floats, *, least: float) -> Floats | None:
    """Centre and scale what is a maximum over points, and so nearly of the Gumbel distribution."""
    bulk = _bulk(values)
    if bulk is None:
        return None
    excess = (values - bulk[0]) / max(bulk[1] / _GUMBEL_HALF, least) - math.log(math.log(2.0))
    tail = -np.expm1(-np.exp(-np.clip(excess, -5.0, 600.0)))
    # What many labellings reach, as on a grid of few values, says no more than its rarity.
    result: Floats = np.minimum(-special.ndtri_exp(np.log(tail)), (values - values.mean()) / values.std())
    return result


@dataclass(frozen=True)
class Found:
    """What one measure says of the labelling that was observed.

    Attributes:
        name: The statistic that says most.
        size: Its size, on the scale of all statistics.
    """

    name: str
    size: float


class Evidence:
    """The largest of all statistics of all measures, for each labelling.

    Args:
        labellings: The labellings.
        is_inside: Whether the question is only if the new runs are further from the centre than the others.
    """

    def __init__(self, labellings: Labellings, *, is_inside: bool = False) -> None:
        self._labellings, self._is_inside = labellings, is_inside
        self._largest = np.full(len(labellings), -np.inf)

    def add(self, scan: Scan) -> Found | None:
        """Take in a measure.

        Args:
            scan: The measure, all of its points seen.

        Returns:
            What it says; None when it says nothing, because it does not vary.
        """
        statistics = scan.left_out_distance() if self._is_inside else scan.statistics()
        for values in statistics.values():
            np.maximum(self._largest, values, out=self._largest)
        if not statistics:
            return None
        name = max(statistics, key=lambda known: statistics[known][0])
        return Found(name, float(statistics[name][0]))

    def merge(self, other: Evidence) -> None:
        """Take in the measures of another.

        Args:
            other: Evidence over the same labellings.
        """
        np.maximum(self._largest, other._largest, out=self._largest)

    @property
    def p(self) -> float | None:
        """Share of the labellings that say at least as much as the observed one; None when nothing varied."""
        return None if self.size is None else self.p_of(self.size)

    @property
    def size(self) -> float | None:
        """The largest statistic of the observed labelling; None when nothing varied."""
        return float(self._largest[0]) if np.isfinite(self._largest[0]) else None

    def p_of(self, size: float) -> float:
        """Share of the labellings whose largest statistic is at least so large: p of one measure, adjusted for all.

        Args:
            size: A size on the scale of all statistics.
        """
        return float(np.mean(self._largest >= size - _TIE * (1.0 + abs(size))))
