"""Chunks of a volumetric job out of a Zarr array or an OME-Zarr image. Needs the `volumetric` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import zarr

from prefect_biomed.clients.boss.plugins.base import ZYX_ORDER, ChunkProcessor, PathProcessor, parameter
from prefect_biomed.clients.boss.storage import bucket_store, driver_options
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["ZarrChunkProcessor", "ZarrPathProcessor"]

_SPATIAL = "zyx"
_BUCKETS = ("s3://", "gs://")


class ZarrPathProcessor(PathProcessor):
    """The chunk processor knows where the array is."""

    thread_safe: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Return an empty path."""
        return ""


class ZarrChunkProcessor(ChunkProcessor):
    """Reads an array of shape (z, y, x), or an image of OME-Zarr (0.4 and 0.5), whose axes have names.

    Parameters: `cloud_path` (a local folder, `s3://…` or `gs://…`, or what fsspec has a driver for), `volume_name` (the
    array or image in the group; none when `cloud_path` is it), `level` of an image (0, the finest, by default),
    `t` and `c` (which sample and channel is read; needed where there are several), `axes` (names of the axes in their
    order, such as `tczyx`, when the file does not tell), `storage_options`, such as `{"anon": true}`, never keys.

    Attributes:
        array: What was opened.
        axes: Names of its axes.
        name: Where it is.
    """

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Open the array.

        Raises:
            ConfigurationError: It is not there, its axes are not known, or a sample or channel has to be chosen.
        """
        super().setup(parameters)
        path = str(parameter(parameters, "cloud_path", self)).rstrip("/")
        name = str(parameters.get("volume_name") or "").strip("/")
        self.name = f"{path}/{name}".rstrip("/")
        opened = self._open(path, name)
        named: Sequence[str]
        if isinstance(opened, zarr.Group):
            self.array, named = self._level(opened)
        else:
            self.array, named = opened, ()
            if not parameters.get("axes"):
                named = self._named_by_parent(path, name) or _own_names(opened)
        axes = list(parameters.get("axes") or named or (_SPATIAL if self.array.ndim == 3 else ""))
        self.axes = [str(axis).lower() for axis in axes]
        if len(self.axes) != self.array.ndim or not {"x", "y"} <= set(self.axes):
            raise ConfigurationError(
                f"Zarr array {self.name} has the shape {self.array.shape}, and its axes are "
                f"{''.join(self.axes) or 'not told'}. Say in the parameter axes which they are, such as tczyx."
            )
        self._chosen = {axis: self._choice(axis) for axis in self.axes if axis not in _SPATIAL}

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int) -> tuple[Any, int]:
        """Read one chunk, smaller at the far ends of the array."""
        x, y, z = self.bounds(x_index, y_index, z_index)
        where: dict[str, slice | int] = {"x": x, "y": y, "z": z, **self._chosen}
        try:
            block = np.asarray(self.array[tuple(where[axis] for axis in self.axes)])
        except Exception as error:  # whatever the codec or the driver raises
            raise SourceUnreadable(f"{self.name}: chunk {x_index} {y_index} {z_index} is damaged ({error}).") from error
        left = [axis for axis in self.axes if axis in _SPATIAL]
        block = block.transpose([left.index(axis) for axis in _SPATIAL if axis in left])
        if "z" not in left:
            block = block[np.newaxis][z]
        if not block.size:
            raise SourceUnreadable(
                f"{self.name}: chunk {x_index} {y_index} {z_index} lies outside the array, whose shape is "
                f"{self.array.shape}."
            )
        return block, ZYX_ORDER

    def _open(self, path: str, name: str) -> Any:
        try:
            if path.startswith(_BUCKETS):
                return zarr.open(bucket_store(path, self.parameters), mode="r", path=name or None)
            options = driver_options(path, self.parameters)
            given: dict[str, Any] = {"storage_options": options} if options else {}
            return zarr.open(path, mode="r", path=name or None, **given)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever the driver of the store raises
            raise ConfigurationError(f"Zarr array {name!r} in {path} cannot be opened: {error}.") from error

    def _level(self, group: Any) -> tuple[Any, Sequence[str]]:
        """The array of the resolution that is wanted, and the names of its axes."""
        images = _images(group)
        if len(images) != 1:
            inside = ", ".join(sorted(group.keys())) or "nothing"
            raise ConfigurationError(
                f"{self.name} is a group with {len(images)} images of OME-Zarr, not one. Name the array (or the "
                f"image) in volume_name; there are: {inside}."
            )
        level = int(self.parameters.get("level", 0))
        try:
            paths = [str(found["path"]) for found in images[0]["datasets"]]
            axes = _axis_names(images[0])
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"{self.name}: multiscales are damaged ({error!r}).") from error
        if not 0 <= level < len(paths):
            raise ConfigurationError(f"{self.name} has the levels 0 to {len(paths) - 1}, not {level}.")
        try:
            array = group[paths[level]]
        except Exception as error:  # whatever the driver of the store raises
            raise ConfigurationError(f"{self.name}/{paths[level]} cannot be opened: {error!r}.") from error
        self.name = f"{self.name}/{paths[level]}"
        return array, axes

    def _named_by_parent(self, path: str, name: str) -> Sequence[str]:
        """Names of the axes by the image that an array is a level of; none where it is of no image."""
        outer, _, own = name.rpartition("/") if name else path.rpartition("/")
        if not name and (not outer or outer.endswith(":/")):
            return ()  # a bucket, or a folder in the working directory
        try:
            parent = self._open(path if name else outer, outer if name else "")
        except ConfigurationError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            return ()  # an array by itself
        images = _images(parent) if isinstance(parent, zarr.Group) else []
        return next((_axis_names(one) for one in images if {"path": own} in _paths(one)), ())

    def _choice(self, axis: str) -> int:
        """Which index of an axis that is not of space is read."""
        size = int(self.array.shape[self.axes.index(axis)])
        if axis not in self.parameters and size != 1:
            raise ConfigurationError(
                f"Zarr array {self.name} has {size} indices on the axis {axis}. Say in the parameter {axis} "
                "which is read."
            )
        index = int(self.parameters.get(axis, 0))
        if not 0 <= index < size:
            raise ConfigurationError(
                f"Zarr array {self.name} has {size} indices on the axis {axis}, not one of {index}."
            )
        return index


def _images(group: Any) -> list[Any]:
    """What a group tells of images: in 0.5 below `ome`, in 0.4 beside other attributes."""
    attributes = group.attrs.asdict()
    found = attributes.get("ome", attributes)
    images = found.get("multiscales", []) if isinstance(found, Mapping) else []
    return images if isinstance(images, list) else []


def _paths(image: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"path": str(found.get("path"))} for found in image.get("datasets", [])]


def _axis_names(image: Mapping[str, Any]) -> Sequence[str]:
    """Names of the axes; before 0.4 they were no objects, and before 0.3 not told."""
    return [str(axis["name"] if isinstance(axis, Mapping) else axis) for axis in image.get("axes", [])]


def _own_names(array: Any) -> Sequence[str]:
    """What an array of Zarr 3 calls its dimensions, when that tells where x and y are."""
    names = [str(name).lower() for name in getattr(array.metadata, "dimension_names", None) or []]
    return names if {"x", "y"} <= set(names) else ()
