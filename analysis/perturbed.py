"""Judging runs by references that were perturbed on purpose (fuzzy arithmetic), the practice of the field.

The question is another than that of `judge_runs`. Perturbed references and a plain run are not repetitions of each
other, so they cannot be exchanged to learn whether something has *changed*. What can be asked is whether the plain run
is *inside* the numerical variability: whether it is further from the centre of all than a perturbed run would be. The
answer is its rank among the references, each taken as the odd one in turn, and so needs no model of the noise.

The checks of Chatelain et al. (arXiv 2307.01373) on the references are options: a brain mask, smoothing, normality, and
each reference judged by the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from prefect_biomed.analysis.comparators import Measure
from prefect_biomed.analysis.comparison import FileGroup, opened
from prefect_biomed.analysis.models import Rules, Variability
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["Mask", "SelfTest", "band", "points_of", "read_mask"]

Floats = NDArray[np.float64]

_LEAST_REFERENCES = 3
_NORMALITY_LEVEL = 0.05
# The test of Shapiro and Wilk goes point by point, so it sees this many of each measure.
_NORMALITY_POINTS = 2000
_SIGMA_OF_WIDTH = 1.0 / (2.0 * math.sqrt(2.0 * math.log(2.0)))


def band(references: int, level: float) -> int:
    """Tell how many references may fail their own test: the end of the binomial 95 % band.

    Args:
        references: Number of references.
        level: Probability with which each fails.

    Returns:
        A number of references.
    """
    return int(stats.binom.ppf(0.975, references, level))


@dataclass(frozen=True)
class Mask:
    """Where an image counts.

    Attributes:
        shape: Shape of the image.
        inside: Whether each point counts, in the order in which images are stored.
    """

    shape: tuple[int, ...]
    inside: NDArray[np.bool_]


def read_mask(path: Path) -> Mask:
    """Read a mask.

    Args:
        path: An image of any format that is read.

    Returns:
        Its voxels that are not zero.

    Raises:
        ConfigurationError: The mask is not there or holds no numbers.
    """
    if not path.is_file():
        raise ConfigurationError(f"The mask {path} does not exist.")
    with opened(FileGroup(path.name, {"": path}), Rules()) as contents:
        measure = next(iter(contents[""].measures.values()), None)
        if measure is None:
            raise ConfigurationError(f"The mask {path} holds no numbers.")
        return Mask(measure.shape, measure.read(0, measure.size) != 0.0)


def points_of(measure: Measure, checks: Variability, mask: Mask | None) -> Floats:
    """Read the points of a measure that count, smoothed when asked for. Images are held whole.

    Args:
        measure: The measure.
        checks: The checks.
        mask: Where images of its shape count; everywhere when None.

    Returns:
        The values; those outside the mask are 0.
    """
    values = measure.read(0, measure.size)
    if checks.smoothing and len(measure.shape) == 3:
        order: Literal["F", "C"] = "F" if measure.order == "F" else "C"
        volume = values.reshape(measure.shape, order=order)
        values = ndimage.gaussian_filter(volume, checks.smoothing * _SIGMA_OF_WIDTH).reshape(-1, order=order)
    if mask is not None and mask.shape == measure.shape:
        values = np.where(mask.inside, values, 0.0)
    return values


class SelfTest:
    """Judges each reference by the others, point by point, over all measures.

    Args:
        references: Number of references.
        checks: What to count.
    """

    def __init__(self, references: int, checks: Variability) -> None:
        self._checks = checks
        self._points = 0
        self._largest = np.zeros(references)
        self._tested = self._not_normal = 0

    def add(self, references: Floats) -> None:
        """Take in the points of one measure.

        Args:
            references: Shape (references, points), all finite.
        """
        count = len(references)
        if count < _LEAST_REFERENCES:
            return
        varies = (references != references[0]).any(axis=0)
        values = references[:, varies]
        self._points += values.shape[1]
        deviations = values - values.mean(axis=0)
        squares = np.einsum("rp,rp->p", deviations, deviations)
        others = count - 1
        for number, own in enumerate(deviations):
            left = np.maximum(squares - own**2 * count / others, 1e-9 * squares)
            spread = np.sqrt(left / (others - 1) * (1.0 + 1.0 / others))
            self._largest[number] = max(
                self._largest[number], float((np.abs(own) * count / others / spread).max(initial=0.0))
            )
        if self._checks.normality:
            for column in values[:, :: max(1, values.shape[1] // _NORMALITY_POINTS)].T:
                self._tested += 1
                self._not_normal += bool(stats.shapiro(column).pvalue < _NORMALITY_LEVEL)

    def merge(self, other: SelfTest) -> None:
        """Take over what another has seen.

        Args:
            other: One of the same references.
        """
        self._points += other._points
        self._largest = np.maximum(self._largest, other._largest)
        self._tested += other._tested
        self._not_normal += other._not_normal

    def failures(self, level: float) -> int:
        """Count the references with a point that is further out than all points together allow (Bonferroni).

        Args:
            level: The level.
        """
        others = len(self._largest) - 1
        if not self._points:
            return 0
        single = 2.0 * stats.t.sf(self._largest, max(others - 1, 1))
        return int(np.count_nonzero(single * self._points <= level))

    @property
    def not_normal(self) -> float | None:
        """Share of the points seen at which the references are not normal (5 % by chance); None without points."""
        return self._not_normal / self._tested if self._tested else None
