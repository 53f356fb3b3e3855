"""A series of DICOM slices as a volume: in the order of their positions in space, whatever their files are called."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from prefect_biomed.clients.boss.caching import DecodeCache
from prefect_biomed.clients.boss.pictures import Array
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["Series", "opened"]

_CACHE_BYTES = 256 * 1024 * 1024
_NOT_SLICES = ("dicomdir", "thumbs.db", "desktop.ini")
_SLICE_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
# Rounding of positions in files is far below this share of a step, a slice that is missing far above.
_UNEVEN = 0.25


class _Slice(NamedTuple):
    path: str
    place: float
    header: Any


class Series:
    """The slices of one series, each decoded when it is wanted.

    Args:
        filesystem: Where they are, as fsspec has it.
        slices: In the order of their positions.

    Attributes:
        shape: Voxels in z, y, x.
        dtype: Of the values as they are stored.
    """

    def __init__(self, filesystem: Any, slices: list[_Slice]) -> None:
        first = slices[0].header
        self._filesystem, self._slices = filesystem, slices
        self._cache = DecodeCache(_CACHE_BYTES)
        self.shape = (len(slices), int(first.Rows), int(first.Columns))
        signed = int(first.get("PixelRepresentation", 0)) == 1
        self.dtype: np.dtype[Any] = np.dtype(f"{'i' if signed else 'u'}{int(first.BitsAllocated) // 8}")

    def read(self, where: tuple[slice | int, ...]) -> Array:
        """Read a part, by slices or indices in z, y, x.

        Raises:
            SourceUnreadable: A slice is damaged.
        """
        z, y, x = where
        numbers = range(*z.indices(len(self._slices))) if isinstance(z, slice) else range(z, z + 1)
        part = np.stack([self._plane(number)[y, x] for number in numbers])
        return part if isinstance(z, slice) else part[0]

    def _plane(self, number: int) -> Array:
        def load() -> tuple[Array, int]:
            import pydicom

            path = self._slices[number].path
            try:
                with self._filesystem.open(path, "rb") as file:
                    plane = np.asarray(pydicom.dcmread(file).pixel_array)
            except Exception as error:  # whatever its decoders raise
                raise SourceUnreadable(f"{path}: the slice cannot be decoded ({error}).") from error
            if plane.shape != self.shape[1:]:
                raise SourceUnreadable(f"{path}: has the shape {plane.shape}, its header says {self.shape[1:]}.")
            return plane, plane.nbytes

        plane: Array = self._cache.get(number, load)
        return plane


def opened(filesystem: Any, root: str, *, wanted: str | None = None, stored: bool = False) -> Series:
    """Open the series of a folder.

    Args:
        filesystem: Where it is, as fsspec has it.
        root: The folder.
        wanted: SeriesInstanceUID, where the folder holds several series.
        stored: Take values as they are stored, where a header says that they mean others.

    Returns:
        The series; its pixels were not read.

    Raises:
        ConfigurationError: No slice, a file that is no slice, several series, or slices that make no volume: of
            different sizes, without positions, twice in one place, or with one missing between.
    """
    by_series: dict[str, list[_Slice]] = {}
    for path in sorted(filesystem.find(root)):
        name = PurePosixPath(path).name.lower()
        suffix = PurePosixPath(name).suffix
        # Names without an ending may have points, such as the numbers of an identifier.
        if name.startswith(".") or name in _NOT_SLICES or not (suffix in _SLICE_SUFFIXES or suffix[1:].isdigit()):
            continue
        header = _header(filesystem, path)
        by_series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(_Slice(path, 0.0, header))
    if not by_series:
        raise ConfigurationError(f"{root}: there are no DICOM slices.")
    if wanted is None and len(by_series) > 1:
        told = "; ".join(
            f"{uid} ({len(slices)} slices, {slices[0].header.get('SeriesDescription', 'no description')})"
            for uid, slices in list(by_series.items())[:10]
        )
        raise ConfigurationError(
            f"{root}: slices of {len(by_series)} series. Say in the parameter series which is read: {told}."
        )
    slices = by_series.get(wanted, []) if wanted is not None else next(iter(by_series.values()))
    if not slices:
        raise ConfigurationError(f"{root}: has no series {wanted}; there are: {', '.join(by_series)}.")
    _check_alike(slices, stored=stored)
    return Series(filesystem, _in_space(slices))


def _header(filesystem: Any, path: str) -> Any:
    import pydicom

    try:
        with filesystem.open(path, "rb") as file:
            return pydicom.dcmread(file, stop_before_pixels=True)
    except Exception as error:  # whatever a damaged header makes it raise
        raise ConfigurationError(f"{path}: is no readable DICOM file ({error}). Mend it or take it away.") from error


def _check_alike(slices: list[_Slice], *, stored: bool) -> None:
    """Refuse slices that differ in size or kind, or whose values are not what they mean."""
    names = ("Rows", "Columns", "BitsAllocated", "PixelRepresentation", "ImageOrientationPatient")
    first = slices[0]
    for one in slices:
        header = one.header
        for name in names:
            if header.get(name) != first.header.get(name):
                raise ConfigurationError(
                    f"{one.path}: {name} is {header.get(name)}, of {first.path} it is {first.header.get(name)}."
                )
        if int(header.get("SamplesPerPixel", 1)) != 1 or int(header.get("NumberOfFrames", 1) or 1) != 1:
            raise ConfigurationError(f"{one.path}: is in colour or has several frames. Convert it to grey slices.")
        if int(header.HighBit) != int(header.BitsStored) - 1:
            raise ConfigurationError(
                f"{one.path}: its values of {header.BitsStored} bits end at bit {header.HighBit}, which readers do not "
                "follow. Convert the slices."
            )
        if not stored and (meant := _meant(header)):
            raise ConfigurationError(f"{one.path}: {meant}. Take values as they are stored with stored=true.")


def _meant(header: Any) -> str | None:
    """What stored values mean where that is not themselves."""
    photometric = header.get("PhotometricInterpretation")
    slope, plus = (
        usual if header.get(name) in (None, "") else float(header.get(name))
        for name, usual in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if photometric != "MONOCHROME2":
        return "white is zero" if photometric == "MONOCHROME1" else f"values are {photometric}, not grey"
    if header.get("ModalityLUTSequence"):
        return "values are to be looked up in a table"
    return f"values are times {slope:g} and plus {plus:g}" if (slope, plus) != (1.0, 0.0) else None


def _in_space(slices: list[_Slice]) -> list[_Slice]:
    placed = []
    for one in slices:
        position, orientation = one.header.get("ImagePositionPatient"), one.header.get("ImageOrientationPatient")
        if position is None or orientation is None:
            raise ConfigurationError(f"{one.path}: tells no position in space, so its place is not known.")
        directions = np.asarray(orientation, float)
        place = float(np.dot(np.asarray(position, float), np.cross(directions[:3], directions[3:])))
        if not math.isfinite(place):
            raise ConfigurationError(f"{one.path}: its position {position} is none.")
        placed.append(one._replace(place=place))
    placed.sort(key=lambda one: one.place)
    steps = np.diff([one.place for one in placed])
    usual = float(np.median(steps)) if len(steps) else 1.0
    for before, after, step in zip(placed, placed[1:], steps, strict=False):
        if step <= usual * _UNEVEN:
            raise ConfigurationError(f"{before.path} and {after.path} lie in one place. Take one of them away.")
        if step > usual * (1 + _UNEVEN):
            raise ConfigurationError(f"Between {before.path} and {after.path}, {step:g} mm apart, slices are missing.")
    return placed
