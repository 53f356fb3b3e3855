"""Tiles laid out as CATMAID's tile sources of type 1, 4 and 5, in files or behind a web server.

See CATMAID's documentation, "Tile sources". Each file is one tile.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from prefect_biomed.clients.boss.images import ImageWindow
from prefect_biomed.clients.boss.plugins.base import PathProcessor, TileProcessor, only_sample, parameter
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable
from prefect_biomed.clients.http import HttpSession, Timeouts

__all__ = [
    "CatmaidDirectoryImageStackPathProcessor",
    "CatmaidDirectoryImageStackTileProcessor",
    "CatmaidFileImageStackPathProcessor",
    "CatmaidFileImageStackTileProcessor",
    "CatmaidFileImageStackZoomLevelPathProcessor",
    "CatmaidFileImageStackZoomLevelTileProcessor",
    "CatmaidURLPathProcessor",
    "CatmaidURLTileProcessor",
    "CatmaidZoomInSliceImageStackPathProcessor",
    "CatmainURLTileProcessor",
]


class _Stack(PathProcessor):
    """Parameters: `root_dir`, `filetype`. The resolution of the job is the zoom level in names."""

    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True
    layout: ClassVar[str]

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take `root_dir` and `filetype`."""
        super().setup(parameters)
        self._root = str(parameter(parameters, "root_dir", self))
        self._filetype = str(parameter(parameters, "filetype", self))
        self._zoom = parameters["ingest_job"]["resolution"]

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file of a tile."""
        only_sample(t_index, self)
        name = self.layout.format(x=x_index, y=y_index, z=z_index, zoom=self._zoom, type=self._filetype)
        return os.path.join(self._root, *name.split("/"))  # noqa: PTH118  # a hundred thousand times


class CatmaidFileImageStackPathProcessor(_Stack):
    """Type 1: `{root}/{z}/{row}_{column}_{zoom}.{filetype}`."""

    layout = "{z}/{y}_{x}_{zoom}.{type}"


class CatmaidFileImageStackZoomLevelPathProcessor(_Stack):
    """Type 4 as boss-ingest has it: `{root}/{zoom}/{z}/{row}_{column}.{filetype}`."""

    layout = "{zoom}/{z}/{y}_{x}.{type}"


class CatmaidZoomInSliceImageStackPathProcessor(_Stack):
    """Type 4 as CATMAID has it: `{root}/{z}/{zoom}/{row}_{column}.{filetype}`."""

    layout = "{z}/{zoom}/{y}_{x}.{type}"


class CatmaidDirectoryImageStackPathProcessor(_Stack):
    """Type 5: `{root}/{zoom}/{z}/{row}/{column}.{filetype}`."""

    layout = "{zoom}/{z}/{y}/{x}.{type}"


class CatmaidFileImageStackTileProcessor(TileProcessor):
    """Takes a file as it is; smaller ones are padded to the tile's size."""

    thread_safe: ClassVar[bool] = True

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> ImageWindow:
        """Name the whole file as the tile."""
        return ImageWindow(file_path, whole=True)


class CatmaidFileImageStackZoomLevelTileProcessor(CatmaidFileImageStackTileProcessor):
    """The same for type 4."""


class CatmaidDirectoryImageStackTileProcessor(CatmaidFileImageStackTileProcessor):
    """The same for type 5."""


class CatmaidURLPathProcessor(PathProcessor):
    """Tiles behind a web server have no path here."""

    thread_safe: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Return an empty path."""
        return ""


class CatmaidURLTileProcessor(TileProcessor):
    """Fetches `{url}{z}/{row}/{column}.{filetype}`.

    Parameters: `url`, `filetype`, `z_offset` (added to the slice; 0). A tile that the server does not have counts as
    missing, and the policy for missing sources decides.
    """

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the URL and open a session."""
        super().setup(parameters)
        url = str(parameter(parameters, "url", self))
        if "?" in url:
            raise ConfigurationError("The URL of a CATMAID stack may not have a query.")
        self._filetype = str(parameter(parameters, "filetype", self))
        self._z_offset = int(parameter(parameters, "z_offset", self, 0))
        self._http = HttpSession(url, timeouts=Timeouts(10, 60), connections=64, max_body_bytes=256 * 1024 * 1024)

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> bytes:
        """Fetch one tile.

        Raises:
            SourceUnreadable: The server does not have it.
            NetworkError: The server cannot be reached; the tile stays in the queue.
        """
        only_sample(t_index, self)
        path = f"/{z_index + self._z_offset}/{y_index}/{x_index}.{self._filetype}"
        with self._http.open("GET", path) as response:
            if response.status_code != 200:
                raise SourceUnreadable(f"{self._http.base_url}{path}: HTTP {response.status_code}.")
            return b"".join(self._http.chunks(response))


CatmainURLTileProcessor = CatmaidURLTileProcessor  # as boss-ingest spells it
