"""How large a change is: in the unit of the numbers, in spreads, in digits, by label and by region of an atlas.

All of it is counted while the points of a measure pass by once. Label maps are compared with the label that most of the
runs have at a point, so that the work grows with the number of runs and not with that of their pairs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from prefect_biomed.analysis.comparators import Measure, decompressed
from prefect_biomed.analysis.models import Effect, RegionChange, Rules
from prefect_biomed.analysis.readers.registry import open_content
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["Atlas", "EffectSize", "Labels", "hausdorff"]

Floats = NDArray[np.float64]

_FEW_LABELS = 64
_LOWEST, _HIGHEST = -1024, 1 << 16
# Of neighbours of which one is no background, so many are alike in label maps, and few in images.
_CONTIGUOUS = 0.5
_BIN = 0.005
_BINS = np.arange(-30.0, 30.0, _BIN)
_MAX_LISTED = 200
_NORMAL_95 = 1.96
_EPSILON = float(np.finfo(np.float64).eps)
_MOST_BITS = 53.0
_MAX_HAUSDORFF_LABELS = 3
_MAX_HAUSDORFF_POINTS = 1 << 25


class Labels:
    """Counts overlaps of label maps of any number of labels and of any type of number, block by block.

    Args:
        runs: Number of runs.
        voters: How many of them, from the first on, say which label a point has; all when None.
    """

    def __init__(self, runs: int, voters: int | None = None) -> None:
        self._voters = runs if voters is None else voters
        self._sizes = np.zeros((runs, _HIGHEST - _LOWEST), dtype=np.int64)
        # Not of `zeros_like`, which touches all of it; most measures show at once that they are no label maps.
        self._shared = np.zeros(self._sizes.shape, dtype=np.int64)
        self._agreed = np.zeros(_HIGHEST - _LOWEST, dtype=np.int64)
        self._pairs = self._alike = 0
        self._next_look = 1000
        self.is_map = True

    def add(self, block: Floats) -> None:
        """Count a block, shape (runs, points), unless it shows that this is no label map."""
        if not self.is_map:
            return
        if not (
            block.min(initial=0.0) >= _LOWEST and block.max(initial=0.0) < _HIGHEST and (block == np.rint(block)).all()
        ):
            self.is_map = False
            return
        codes = block.astype(np.int64) - _LOWEST
        first = codes[0]
        inside = (first[1:] != -_LOWEST) | (first[:-1] != -_LOWEST)
        self._pairs += int(np.count_nonzero(inside))
        self._alike += int(np.count_nonzero(inside & (first[1:] == first[:-1])))
        agreed = self._vote(codes[: self._voters])
        width = self._agreed.size
        self._agreed += np.bincount(agreed, minlength=width)
        for number, row in enumerate(codes):
            self._sizes[number] += np.bincount(row, minlength=width)
            self._shared[number] += np.bincount(row[row == agreed], minlength=width)
        if self._pairs > self._next_look and self._alike < _CONTIGUOUS * self._pairs:
            self._next_look = 4 * self._pairs
            self.is_map = int(np.count_nonzero(self._sizes.any(axis=0))) <= _FEW_LABELS

    @staticmethod
    def _vote(codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The label that most runs have at each point; that of the first run when others are not more."""
        agreed: NDArray[np.int64] = codes[0].copy()
        odd = np.flatnonzero((codes != codes[0]).any(axis=0))
        if not odd.size:
            return agreed
        votes = np.sort(codes[:, odd], axis=0)
        best, most = codes[0, odd].copy(), np.count_nonzero(codes[:, odd] == codes[0, odd], axis=0)
        length = np.ones(odd.size, dtype=np.int64)
        for before, now in pairwise(votes):
            length = np.where(now == before, length + 1, 1)
            better = length > most
            best[better], most[better] = now[better], length[better]
        agreed[odd] = best
        return agreed

    @property
    def labels(self) -> list[int]:
        """The labels that any run has; none when it is no label map."""
        return [int(code) + _LOWEST for code in np.flatnonzero(self._sizes.any(axis=0))] if self.is_map else []

    def dice(self, runs: slice = slice(None)) -> dict[str, float]:
        """Give the smallest Dice coefficient of each label.

        Args:
            runs: Which runs count.

        Returns:
            Coefficients with what most voters say, by label.
        """
        found = {}
        for label in self.labels:
            code = label - _LOWEST
            whole = self._sizes[runs, code] + self._agreed[code]
            overlap = 2.0 * self._shared[runs, code] / np.maximum(whole, 1)
            found[str(label)] = float(np.where(whole > 0, overlap, 1.0).min())
        return found

    def volumes(self, runs: slice, unit: float) -> dict[str, float]:
        """Give the mean volume of each label.

        Args:
            runs: Which runs count.
            unit: Volume of one point.

        Returns:
            Volumes by label.
        """
        return {str(label): float(self._sizes[runs, label - _LOWEST].mean()) * unit for label in self.labels}


@dataclass(frozen=True)
class Atlas:
    """Regions of an image.

    Attributes:
        codes: Number of the region of each point, from 0, in the order of the file.
        labels: Labels of the regions.
        shape: Shape of the image.
        order: Which axis runs fastest.
    """

    codes: NDArray[np.int64]
    labels: tuple[int, ...]
    shape: tuple[int, ...]
    order: str

    @classmethod
    def read(cls, path: Path) -> Atlas:
        """Read a label image.

        Args:
            path: A file of any format whose first numbers are labels: NIfTI, MGH, GIFTI, an annotation.

        Returns:
            The atlas.

        Raises:
            ConfigurationError: It is no label image.
        """
        if not path.is_file():
            raise ConfigurationError(f"The atlas {path} is no file.")
        with tempfile.TemporaryDirectory(prefix="biomed-atlas-") as workspace:
            plain = decompressed(path, Path(workspace, "content"))
            content = open_content(plain, path.name, Path(workspace), origin=path, rules=Rules())
            measure = next(iter(content.measures.values()), None)
            values = measure.read(0, measure.size) if measure is not None else np.empty(0)
        if measure is None or not values.size or not (values == np.rint(values)).all():
            raise ConfigurationError(f"The atlas {path} is no label image: {content.note or content.kind}.")
        labels, codes = np.unique(values, return_inverse=True)
        return cls(codes.astype(np.int64), tuple(int(n) for n in labels), measure.shape, measure.order)

    def fits(self, measure: Measure) -> bool:
        """Tell whether the points of a measure are those of the atlas.

        Args:
            measure: The measure.

        Returns:
            Whether shape and order are the same.
        """
        return measure.shape == self.shape and measure.order == self.order


class EffectSize:
    """Measures how far new runs are from references, block by block.

    Args:
        references: Number of references; they are the first rows of each block.
        runs: Number of all runs.
        measure: What is measured.
        atlas: Regions whose means are wanted.
    """

    def __init__(self, references: int, runs: int, measure: Measure, atlas: Atlas | None = None) -> None:
        self._references = references
        self._unit = float(np.prod(measure.spacing or (1.0,)))
        self._labels = Labels(runs, references) if measure.may_be_labels else None
        self._atlas = atlas if atlas is not None and atlas.fits(measure) else None
        regions = len(self._atlas.labels) if self._atlas else 0
        self._sums = np.zeros((runs, regions))
        self._counts = np.zeros(regions, dtype=np.int64)
        self._absolute, self._relative, self._spreads = (np.zeros(_BINS.size + 1, dtype=np.int64) for _ in range(3))
        self._noise_before, self._noise = (np.zeros(_BINS.size + 1, dtype=np.int64) for _ in range(2))
        self._difference = self._squares = 0.0
        self._largest = [0.0, 0.0, 0.0]
        self._points = self._differing = 0
        self._before = self._now = 0.0

    def add(self, values: Floats, start: int) -> None:
        """Take in a block.

        Args:
            values: Shape (runs, points).
            start: Number of the first point.
        """
        if self._labels is not None:
            self._labels.add(values)
        if self._atlas is not None:
            codes = self._atlas.codes[start : start + values.shape[1]]
            self._counts += np.bincount(codes, minlength=self._counts.size)
            for number, row in enumerate(values):
                self._sums[number] += np.bincount(codes, weights=np.nan_to_num(row), minlength=self._counts.size)
        old, new = values[: self._references], values[self._references :]
        with np.errstate(all="ignore"):
            before, now = old.mean(axis=0), new.mean(axis=0)
            known = np.isfinite(before) & np.isfinite(now)
            self._points += int(np.count_nonzero(known))
            self._before += float(before[known].sum())
            self._now += float(now[known].sum())
            spread_before = _spread(old, before)
            _count(self._noise_before, spread_before / np.abs(before))
            _count(self._noise, _spread(new, now) / np.abs(now))
            apart = known & (before != now)
            _drop_rounding(apart, np.abs(now - before), before, values)
            if not apart.any():
                return
            self._differing += int(np.count_nonzero(apart))
            signed = now[apart] - before[apart]
            self._difference += float(signed.sum())
            self._squares += float(signed @ signed)
            difference = np.abs(signed)
            sizes = (difference, difference / np.abs(before[apart]), difference / spread_before[apart])
        for place, (counts, size) in enumerate(
            zip((self._absolute, self._relative, self._spreads), sizes, strict=True)
        ):
            self._largest[place] = max(self._largest[place], _count(counts, size))

    def result(self, measures: Sequence[Measure]) -> Effect:
        """Say how large it is.

        Args:
            measures: The same of all runs, of which label maps are looked at once more.

        Returns:
            The effect.
        """
        absolute, relative, spreads = (
            _median(counts, most)
            for counts, most in zip((self._absolute, self._relative, self._spreads), self._largest, strict=True)
        )
        labels = self._labels if self._labels is not None and self._labels.labels else None
        old, new = slice(0, self._references), slice(self._references, None)
        return Effect(
            points=self._points,
            differing=self._differing,
            before=self._before / self._points if self._points else None,
            now=self._now / self._points if self._points else None,
            absolute=absolute,
            absolute_largest=self._largest[0] or None,
            relative=relative,
            relative_largest=self._largest[1] or None,
            spreads=spreads,
            spreads_largest=self._largest[2] or None,
            digits=None if not relative else round(-math.log10(relative), 2),
            bias=self._difference / self._points if self._points else None,
            limits=self._limits(),
            bits_before=_bits(self._noise_before),
            bits=_bits(self._noise),
            dice=_first(labels.dice(new)) if labels else None,
            dice_before=_first(labels.dice(old)) if labels else None,
            hausdorff=self._hausdorff(labels.dice(new), measures) if labels else None,
            volumes_before=labels.volumes(old, self._unit) if labels else None,
            volumes=labels.volumes(new, self._unit) if labels else None,
            regions=self._regions(),
        )

    def _limits(self) -> tuple[float, float] | None:
        if self._points < 2:
            return None
        bias = self._difference / self._points
        variance = (self._squares - self._points * bias * bias) / (self._points - 1)
        half = _NORMAL_95 * math.sqrt(variance) if variance > 0.0 else 0.0
        return (bias - half, bias + half) if math.isfinite(self._squares) else None

    def _hausdorff(self, dice: dict[str, float], measures: Sequence[Measure]) -> dict[str, float] | None:
        one, other = measures[0], measures[self._references]
        if one.spacing is None or len(one.shape) != 3 or one.size > _MAX_HAUSDORFF_POINTS:
            return None
        before, now = one.volume(), other.volume()
        found = {}
        for label in [label for label in _first(dice) if dice[label] < 1.0][:_MAX_HAUSDORFF_LABELS]:
            distance = hausdorff(np.asarray(before == int(label)), np.asarray(now == int(label)), one.spacing)
            if distance is not None:
                found[label] = distance
        return found

    def _regions(self) -> tuple[RegionChange, ...]:
        if self._atlas is None:
            return ()
        means = self._sums / np.maximum(self._counts, 1)
        before, now = means[: self._references].mean(axis=0), means[self._references :].mean(axis=0)
        spread = means[: self._references].std(axis=0, ddof=1) if self._references > 1 else np.zeros_like(before)
        found = [
            RegionChange(
                label=label,
                points=int(count),
                before=float(old),
                now=float(new),
                relative=float((new - old) / abs(old)) if old else None,
                spreads=float((new - old) / wide) if wide else None,
            )
            for label, count, old, new, wide in zip(self._atlas.labels, self._counts, before, now, spread, strict=True)
        ]
        return tuple(sorted(found, key=lambda region: -abs(region.relative or 0.0))[:_MAX_LISTED])


def _spread(values: Floats, mean: Floats) -> Floats:
    """Standard deviation of the runs at each point, of which the mean is known; no number for a single run."""
    if len(values) < 2:
        return np.full(values.shape[1], np.nan)
    centred = values - mean
    result: Floats = np.sqrt(np.einsum("rp,rp->p", centred, centred) / (len(values) - 1))
    varies = result > 0.0
    _drop_rounding(varies, result, mean, values)
    result[~varies] *= 0.0
    return result


def _drop_rounding(chosen: NDArray[np.bool_], sizes: Floats, mean: Floats, values: Floats) -> None:
    """Take out points at which all runs are the same, and only their mean was rounded."""
    small = np.flatnonzero(chosen & (sizes <= len(values) * _EPSILON * np.abs(mean)))
    if small.size:
        chosen[small] = (values[:, small] != values[0, small]).any(axis=0)


def _count(counts: NDArray[np.int64], sizes: Floats) -> float:
    """Add sizes to a histogram of their logarithms; the largest of them."""
    usable = sizes[(sizes > 0.0) & (sizes < np.inf)]
    if not usable.size:
        return 0.0
    # The place that a search would find, computed, which is several times faster; in single precision, which is a
    # hundredth of a bin. What is no number of that lies beyond the bins, too.
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        decades = np.log(usable.astype(np.float32)) * np.float32(1.0 / math.log(10.0))
    places = np.ceil((decades - np.float32(_BINS[0])) * np.float32(1.0 / _BIN)).clip(0.0, _BINS.size).astype(np.intp)
    first = int(places.min())
    found = np.bincount(places - first)
    counts[first : first + found.size] += found
    return float(usable.max())


def _bits(counts: NDArray[np.int64]) -> float | None:
    noise = _median(counts)
    return None if noise is None else round(min(max(-math.log2(noise), 0.0), _MOST_BITS), 1)


def _median(counts: NDArray[np.int64], most: float = math.inf) -> float | None:
    """The middle of the bin that holds it, and no more than the largest."""
    total = int(counts.sum())
    if not total:
        return None
    place = int(np.searchsorted(np.cumsum(counts), 0.5 * total))
    return min(float(f"{10.0 ** (_BINS[min(place, _BINS.size - 1)] - 0.0025):.4g}"), most)


def _first(dice: dict[str, float]) -> dict[str, float]:
    """The labels that agree least."""
    return dict(sorted(dice.items(), key=lambda item: item[1])[:_MAX_LISTED])


def hausdorff(one: NDArray[np.bool_], other: NDArray[np.bool_], spacing: tuple[float, ...]) -> float | None:
    """Measure how far two shapes are apart at most.

    Args:
        one: A shape.
        other: Another of the same size.
        spacing: Distance of neighbouring points along each axis.

    Returns:
        The symmetric Hausdorff distance in the unit of the spacing; None when one of them is empty.
    """
    if not one.any() or not other.any():
        return None
    # Distances are needed within the box of both alone.
    box = ndimage.find_objects((one | other).astype(np.int8))[0]
    one, other = one[box], other[box]
    to_one = ndimage.distance_transform_edt(~one, sampling=spacing)
    to_other = ndimage.distance_transform_edt(~other, sampling=spacing)
    return float(max(to_one[other].max(), to_other[one].max()))
