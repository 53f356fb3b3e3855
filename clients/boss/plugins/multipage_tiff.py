"""Time series in multi-page TIFF files."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from prefect_biomed.clients.boss.images import ImageWindow
from prefect_biomed.clients.boss.plugins.base import (
    PathProcessor,
    TileProcessor,
    filled_in,
    local_file,
    parameter,
    window,
)

__all__ = [
    "SingleTimeTiffPathProcessor",
    "SingleTimeTiffTileProcessor",
    "TiffMultiFileHyperStackPathProcessor",
    "TiffMultiFileHyperStackTileProcessor",
]


class SingleTimeTiffPathProcessor(PathProcessor):
    """One file per slice, its pages are the samples. Parameters: `z_<slice>` for each slice, a path."""

    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file of a slice."""
        return str(parameter(self.parameters, f"z_{z_index}", self))


class SingleTimeTiffTileProcessor(TileProcessor):
    """Cuts tiles out of the page of the sample; those at the edge are padded.

    Parameter `datatype` is accepted and ignored: the channel decides.
    """

    thread_safe: ClassVar[bool] = True

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> ImageWindow:
        """Name the window of the tile."""
        return window(self.parameters, file_path, x_index, y_index, page=t_index)


class TiffMultiFileHyperStackPathProcessor(PathProcessor):
    """A hyperstack in several files, split in time.

    Parameters: `root_dir`, `base_filename` (`<>` stands for the number of the file), `extension`, `time_chunk_size`
    (pages in one file).
    """

    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the parts of the name."""
        super().setup(parameters)
        self._root = str(parameter(parameters, "root_dir", self))
        self._name = f"{parameter(parameters, 'base_filename', self)}.{parameter(parameters, 'extension', self)}"
        self._pages = int(parameter(parameters, "time_chunk_size", self))

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file of a sample."""
        number = (t_index or 0) // self._pages
        name = filled_in(self._name, number, x_index, y_index, z_index)
        return os.path.join(self._root, name)  # noqa: PTH118  # a hundred thousand times


class TiffMultiFileHyperStackTileProcessor(TileProcessor):
    """Takes the page of a sample, slice and colour.

    Parameters: `time_chunk_size`, `num_z_slices`, `num_channels`, `channel_index`.
    """

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the shape of the hyperstack."""
        super().setup(parameters)
        local_file(parameters, self)
        names = ("time_chunk_size", "num_z_slices", "num_channels", "channel_index")
        self._pages, self._slices, self._colours, self._colour = (
            int(parameter(parameters, name, self)) for name in names
        )

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> ImageWindow:
        """Name the window of the tile."""
        frame = (t_index * self._slices + z_index) * self._colours + self._colour
        return window(self.parameters, file_path, x_index, y_index, page=frame % self._pages)
