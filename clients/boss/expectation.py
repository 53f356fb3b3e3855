"""What the Boss should have, as the sources tell it: voxels, block by block, to be compared with what it has."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from prefect_biomed.clients.boss import images
from prefect_biomed.clients.boss._keys import CUBOID_X, CUBOID_Y, CUBOID_Z, Position
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.models import Channel, Made, UploadSettings
from prefect_biomed.clients.boss.proofs import Box, Range, Region
from prefect_biomed.clients.boss.sources import Piece, TileSource, open_source, padded
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["Expectation", "Grid", "Plane", "Treatment", "crop"]

Treatment = Literal["left out", "blank"]
"""What an ingest did with a tile instead of sending its source."""

_JPEG = b"\xff\xd8"
_JPEG_TOLERANCE = 2


class Plane(NamedTuple):
    """One slice of a block.

    Attributes:
        content: Values in C order, little endian; None where they cannot be told.
        tolerance: By so much the Boss's decoder may differ.
        made: Whether all of it is from the source, see `sources.Piece`.
        reason: Why they cannot be told; empty where the tile was left out on purpose.
    """

    content: bytes | None
    tolerance: int = 0
    reason: str = ""
    made: Made = "whole"


class Grid:
    """The cuboids and chunks of a job, or of a region of it, without listing them.

    Args:
        config: Configuration of the job.
        channel: The channel; what lies outside its coordinate frame cannot be read.
        region: Part of the job.

    Raises:
        ConfigurationError: The region has nothing of the job.
    """

    def __init__(self, config: IngestConfig, channel: Channel, region: Region | None = None) -> None:
        extent, size, region = config.ingest_job.extent, config.piece_size, region or Region()
        self.volumetric = config.volumetric
        self.piece = (size["x"], size["y"], size["z"] if config.volumetric else CUBOID_Z)
        self.x = _common(extent.x, channel.bounds["x"], region.x)
        self.y = _common(extent.y, channel.bounds["y"], region.y)
        self.z = _common(extent.z, channel.bounds["z"], region.z)
        self.t = _common(extent.t, (0, channel.time_samples), region.t)
        if any(low >= high for low, high in (self.x, self.y, self.z, self.t)):
            raise ConfigurationError(f"The region has nothing of what the configuration describes: {self.ranges}.")
        self._counts = tuple(
            -(-high // step) - low // step
            for (low, high), step in ((self.x, CUBOID_X), (self.y, CUBOID_Y), (self.z, CUBOID_Z))
        )

    @property
    def ranges(self) -> dict[str, Range]:
        """Half-open ranges by axis."""
        return {"x": self.x, "y": self.y, "z": self.z, "t": self.t}

    def __len__(self) -> int:
        """Number of cuboids."""
        x, y, z = self._counts
        return x * y * z * (self.t[1] - self.t[0])

    def cuboid(self, number: int) -> Box:
        """One of the cuboids, cut to the region."""
        rest, x = divmod(number, self._counts[0])
        rest, y = divmod(rest, self._counts[1])
        t, z = divmod(rest, self._counts[2])
        origin = (self.x[0] // CUBOID_X + x, self.y[0] // CUBOID_Y + y, self.z[0] // CUBOID_Z + z)
        return self._cut(origin, (CUBOID_X, CUBOID_Y, CUBOID_Z), self.t[0] + t)

    def chunk_of(self, box: Box) -> Position:
        """The chunk that a cuboid lies in; its z counts chunks."""
        x, y, z = self.piece
        return Position(box.x[0] // x, box.y[0] // y, box.z[0] // z, box.t)

    def chunk(self, chunk: Position) -> Box:
        """The voxels of a chunk, cut to the region."""
        return self._cut((chunk.x, chunk.y, chunk.z), self.piece, chunk.t)

    def chunks(self) -> Iterator[Position]:
        """All chunks."""
        x, y, z = self.piece
        axes = ((self.z, z), (self.y, y), (self.x, x))
        indices = [range(low // step, -(-high // step)) for (low, high), step in axes]
        for t, z, y, x in itertools.product(range(*self.t), *indices):
            yield Position(x, y, z, t)

    def cuboids_of(self, chunk: Position) -> list[Box]:
        """The cuboids of a chunk."""
        whole = self.chunk(chunk)
        steps = ((whole.z, CUBOID_Z), (whole.y, CUBOID_Y), (whole.x, CUBOID_X))
        indices = [range(low // step, -(-high // step)) for (low, high), step in steps]
        return [
            self._cut((x, y, z), (CUBOID_X, CUBOID_Y, CUBOID_Z), chunk.t) for z, y, x in itertools.product(*indices)
        ]

    def tile(self, chunk: Position, z: int) -> Position:
        """The tile of a slice; in a volumetric job the chunk itself."""
        return chunk if self.volumetric else chunk._replace(z=z)

    def _cut(self, origin: Sequence[int], size: Sequence[int], t: int) -> Box:
        spans = zip(origin, size, (self.x, self.y, self.z), strict=True)
        x, y, z = ((max(index * step, low), min((index + 1) * step, high)) for index, step, (low, high) in spans)
        return Box(x, y, z, t)


class Expectation:
    """The voxels that a job should have written.

    Args:
        config: Configuration of the job.
        channel: The channel.
        settings: How tiles were made.
        grid: Cuboids and chunks.
        treatments: Tiles whose source was not sent, by name.
    """

    def __init__(
        self,
        config: IngestConfig,
        channel: Channel,
        settings: UploadSettings,
        grid: Grid,
        treatments: Mapping[str, Treatment] | None = None,
    ) -> None:
        self._source = open_source(config, channel.datatype, settings)
        self._grid = grid
        self._treatments = treatments or {}
        self.item_bytes = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8}[channel.datatype]

    def is_left_out(self, tile: Position) -> bool:
        """Whether a tile was left out of the ingest on purpose."""
        return self._treatments.get(str(tile)) == "left out"

    def fingerprint(self, tiles: Iterable[Position]) -> str:
        """Tell the state of the files that tiles are made of, so that a change of one is noticed without reading it.

        Args:
            tiles: Tiles (the chunk itself in a volumetric job).

        Returns:
            A digest of their paths, sizes and times of change; empty where the plugin names no local files.
        """
        if not self._source.names_files:
            return ""
        states = []
        for path in sorted({self._source.path(tile) for tile in tiles}):
            try:
                found = Path(path).stat()
            except OSError as error:
                states.append((path, str(error.errno)))
            else:
                states.append((path, f"{found.st_size} {found.st_mtime_ns}"))
        return hashlib.sha256(repr(states).encode()).hexdigest()

    def planes(self, chunk: Position, boxes: Sequence[Box], only: Collection[int] | None = None) -> list[list[Plane]]:
        """Tell the slices of blocks of one chunk, from one reading of its sources.

        Args:
            chunk: The chunk; its z counts chunks.
            boxes: The blocks.
            only: Slices that are wanted; all when None.

        Returns:
            For each block one plane for each slice of it.
        """
        if isinstance(self._source, TileSource):
            return self._planes_of_tiles(self._source, chunk, boxes, only)
        tile = str(chunk)
        if self._treatments.get(tile) == "left out":
            return [[Plane(None)] * box.shape[0] for box in boxes]
        try:
            is_blank = tile in self._treatments
            whole, made = Piece(self._source.blank(), "blank") if is_blank else self._source.piece(chunk)
        except SourceUnreadable as error:
            return [[Plane(None, reason=str(error))] * box.shape[0] for box in boxes]
        sx, sy, sz = self._grid.piece
        planes = []
        for box in boxes:
            x0, y0, z0 = box.x[0] - chunk.x * sx, box.y[0] - chunk.y * sy, box.z[0] - chunk.z * sz
            depth, height, width = box.shape
            part = whole[z0 : z0 + depth, y0 : y0 + height, x0 : x0 + width]
            planes.append([Plane(plane.tobytes(), made=made) for plane in padded(part, box.shape)])
        return planes

    def _planes_of_tiles(
        self, source: TileSource, chunk: Position, boxes: Sequence[Box], only: Collection[int] | None
    ) -> list[list[Plane]]:
        sx, sy, _ = self._grid.piece
        found: list[list[Plane]] = [[] for _ in boxes]
        slices = sorted({z for box in boxes for z in range(*box.z)})
        for z in slices:
            tile = self._grid.tile(chunk, z)
            whole = self._tile(source, tile) if only is None or z in only else Plane(None)
            frame = Box((chunk.x * sx, (chunk.x + 1) * sx), (chunk.y * sy, (chunk.y + 1) * sy), (z, z + 1), chunk.t)
            for planes, box in zip(found, boxes, strict=True):
                if not box.z[0] <= z < box.z[1]:
                    continue
                content = whole.content
                kept = None if content is None else crop(content, frame, box, self.item_bytes)
                planes.append(whole._replace(content=kept))
        return found

    def _tile(self, source: TileSource, tile: Position) -> Plane:
        treatment = self._treatments.get(str(tile))
        if treatment == "left out":
            return Plane(None)
        try:
            encoded, made = Piece(source.blank(), "blank") if treatment == "blank" else source.piece(tile)
            content = images.pixels(encoded, source.format, str(tile))
        except SourceUnreadable as error:
            return Plane(None, reason=str(error))
        return Plane(content, _JPEG_TOLERANCE if encoded.startswith(_JPEG) else 0, made=made)


def crop(content: bytes | memoryview, frame: Box, box: Box, item_bytes: int) -> bytes:
    """Cut one plane out of another.

    Args:
        content: Values of a plane.
        frame: Where it lies.
        box: What is wanted of it; nothing that leaves the frame.
        item_bytes: Bytes of one value.

    Returns:
        The values of the part.
    """
    row = (frame.x[1] - frame.x[0]) * item_bytes
    left, width = (box.x[0] - frame.x[0]) * item_bytes, (box.x[1] - box.x[0]) * item_bytes
    top, bottom = box.y[0] - frame.y[0], box.y[1] - frame.y[0]
    if width == row:
        return bytes(content[top * row : bottom * row])
    return b"".join(content[y * row + left : y * row + left + width] for y in range(top, bottom))


def _common(extent: Range, bounds: Range, wanted: Range | None) -> Range:
    low, high = max(extent[0], bounds[0]), min(extent[1], bounds[1])
    return (low, high) if wanted is None else (max(low, wanted[0]), min(high, wanted[1]))
