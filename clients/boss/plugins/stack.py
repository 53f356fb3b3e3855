"""One image per slice, and one image cut into tiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from prefect_biomed.clients.boss.images import ImageWindow
from prefect_biomed.clients.boss.plugins.base import (
    Missing,
    PathProcessor,
    TileProcessor,
    filled_in,
    local_file,
    only_sample,
    parameter,
    window,
)
from prefect_biomed.clients.boss.plugins.filesystem import DynamicFilesystem
from prefect_biomed.clients.errors import SourceUnreadable
from prefect_biomed.clients.texts import logger_of

__all__ = [
    "SingleImagePathProcessor",
    "SingleImageTileProcessor",
    "ZindexStackPathProcessor",
    "ZindexStackTileProcessor",
]

logger = logger_of(__name__)


class ZindexStackPathProcessor(PathProcessor):
    """One file per slice: `{root_dir}/{base_filename}.{extension}`.

    Parameters: `root_dir`, `base_filename` (`<>` stands for the slice, `<o:200p:4>` adds 200 and pads to 4 digits),
    `extension`. `<x>` and `<y>` stand for column and row of a tile that has a file of its own.
    """

    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True

    @property
    def one_file_per_tile(self) -> bool:
        """Whether the template names tiles rather than slices."""
        return "<x>" in self._name or "<y>" in self._name

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the parts of the name."""
        super().setup(parameters)
        self._root = str(parameter(parameters, "root_dir", self))
        self._name = f"{parameter(parameters, 'base_filename', self)}.{parameter(parameters, 'extension', self)}"

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file of a slice."""
        only_sample(t_index, self)
        name = filled_in(self._name, z_index, x_index, y_index, z_index)
        return os.path.join(self._root, name)  # noqa: PTH118  # a hundred thousand times


class _Window(TileProcessor):
    """Cuts the tile out of an image that is as large as the slice."""

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Refuse other file systems."""
        super().setup(parameters)
        local_file(parameters, self)

    def process(
        self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0
    ) -> ImageWindow | Missing:
        """Name the window of the tile."""
        return window(self.parameters, file_path, x_index, y_index)


class ZindexStackTileProcessor(_Window):
    """Cuts tiles out of the slice's image; those at the edge are padded.

    A template with `<x>` or `<y>` names one file per tile, and then the file is the tile; `one_file_per_tile` says the
    same of a path processor of one's own. With `fail_gracefully`, a file that is not there although its folder is
    becomes a tile of the fill value (0), and the report names it among those that were filled.
    """

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take what is done with files that are not there."""
        super().setup(parameters)
        self.fs = DynamicFilesystem(str(parameters.get("filesystem", "local")), parameters)
        self._gracefully = bool(parameters.get("fail_gracefully", False))
        self._whole = bool(parameters.get("one_file_per_tile", False))

    def process(
        self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0
    ) -> ImageWindow | Missing:
        """Name the window of the tile."""
        path = Path(file_path)
        if self._gracefully and not path.exists() and path.parent.is_dir():
            logger.warning("%s: there is no such file; the tile is filled, as fail_gracefully says", file_path)
            return Missing(file_path)
        if self._whole:
            return ImageWindow(file_path, whole=True)
        return super().process(file_path, x_index, y_index, z_index, t_index)


class SingleImagePathProcessor(PathProcessor):
    """The same file for all tiles. Parameter: `filename`."""

    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the file name."""
        super().setup(parameters)
        self._filename = str(parameter(parameters, "filename", self))

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file."""
        only_sample(t_index, self)
        return self._filename


class SingleImageTileProcessor(_Window):
    """Cuts tiles out of one image; its pages are the slices, counted from `first_slice` (the extent's first)."""

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the number of the slice that the first page is."""
        super().setup(parameters)
        self._first = int(parameters.get("first_slice", parameters["ingest_job"]["extent"]["z"][0]))

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> ImageWindow:
        """Name the window of the tile."""
        if z_index < self._first:
            raise SourceUnreadable(f"{file_path}: its first page is slice {self._first}, and {z_index} is asked for.")
        return window(self.parameters, file_path, x_index, y_index, page=z_index - self._first)
