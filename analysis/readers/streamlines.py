"""Bundles of streamlines (TrackVis, MRtrix) as sets: their order, which threads decide, does not count."""

from __future__ import annotations

from typing import Any

import numpy as np
from nibabel.streamlines.tck import TckFile
from nibabel.streamlines.trk import TrkFile
from numpy.typing import NDArray

from prefect_biomed.analysis.comparators import Content, Measure
from prefect_biomed.analysis.readers.source import Parts, Source

__all__ = ["tck", "trk"]

Floats = NDArray[np.float64]

_QUANTILES = np.linspace(0.0, 1.0, 21)
_CELL_MM = 8.0
_CELLS = 64
_BATCH_POINTS = 1 << 18
_VOLATILE_ENTRIES = frozenset({"magic_number", "voxel_order", "hdr_size"})


def tck(source: Source) -> Content:
    """Read an MRtrix file."""
    return _bundle(source, TckFile, "tck")


def trk(source: Source) -> Content:
    """Read a TrackVis file."""
    return _bundle(source, TrkFile, "trk")


class _Bundle:
    """What is known of a set of streamlines after each has passed by once."""

    def __init__(self) -> None:
        self.lengths: list[float] = []
        self.points: list[int] = []
        self.middles: list[Floats] = []
        self.ends: list[Floats] = []
        self.density = np.zeros(_CELLS**3, dtype=np.int64)
        self._waiting: list[Floats] = []
        self._count = 0

    def add(self, line: Floats) -> None:
        self.lengths.append(float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum()))
        self.points.append(len(line))
        self.middles.append(line.mean(axis=0))
        # A streamline has no direction: the end that comes first in space is called the first.
        first, last = line[0], line[-1]
        self.ends.append(np.concatenate((first, last) if tuple(first) <= tuple(last) else (last, first)))
        self._waiting.append(line)
        self._count += len(line)
        if self._count > _BATCH_POINTS:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        points = np.concatenate(self._waiting)
        cells = np.clip(np.nan_to_num(points / _CELL_MM) + _CELLS // 2, 0, _CELLS - 1).astype(np.int64)
        flat = (cells[:, 0] * _CELLS + cells[:, 1]) * _CELLS + cells[:, 2]
        self.density += np.bincount(flat, minlength=_CELLS**3)
        self._waiting, self._count = [], 0


def _bundle(source: Source, file_type: Any, kind: str) -> Content:
    tractogram = file_type.load(str(source.path), lazy_load=True)
    parts = Parts(source.volatile)
    for key, value in tractogram.header.items():
        if key in _VOLATILE_ENTRIES or key.startswith("_") or key in ("file", "count"):
            continue
        entry = np.asarray(value)
        if entry.dtype.kind == "f":
            for index, number in enumerate(entry.ravel()):
                parts.number(f"{key}[{index}]", float(number), "header", key)
        elif entry.dtype.kind == "S":
            parts.word(f"header {key}", b" ".join(entry.ravel().tolist()).decode("latin-1"), key)
        elif key != "nb_streamlines":
            parts.text(f"header {key}", str(value), "header", key)
    bundle = _Bundle()
    scalars: dict[str, list[Floats]] = {}
    for item in tractogram.tractogram:
        line = np.asarray(item.streamline, dtype=np.float64)
        if len(line):
            bundle.add(line)
        for name, values in (item.data_for_streamline | item.data_for_points).items():
            scalars.setdefault(name, []).append(np.asarray(values, dtype=np.float64).ravel().mean(keepdims=True))
    bundle.flush()
    parts.number("number of streamlines", len(bundle.lengths), "numbers")
    parts.number("number of points", sum(bundle.points), "numbers")
    _spread(parts, "lengths", np.array(bundle.lengths))
    for title, rows in (("middle", bundle.middles), ("end", bundle.ends)):
        table = np.array(rows) if rows else np.empty((0, 1))
        for axis in range(table.shape[1]):
            _spread(parts, f"{title} {'xyz'[axis % 3]}{axis // 3 + 1}", table[:, axis])
    for name, found in scalars.items():
        _spread(parts, f"data {name}", np.concatenate(found))
    shape = (_CELLS, _CELLS, _CELLS)
    title = f"density ({_CELL_MM:g} mm)"
    parts.measures[title] = Measure(title, bundle.density, shape, point="cell")
    return parts.content(kind)


def _spread(parts: Parts, name: str, values: Floats) -> None:
    """Quantiles and mean of a set, whatever its order: sorted first, so that sums are the same to the last bit."""
    ordered = np.sort(values)
    if not ordered.size:
        return
    for share, value in zip(_QUANTILES, np.quantile(ordered, _QUANTILES), strict=True):
        parts.number(f"{name}, {100 * share:g} % of the streamlines below", float(value), name)
    parts.number(f"mean of {name}", float(ordered.mean()), name)
