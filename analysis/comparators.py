"""What a file says, apart from how it is packed: its facts (text) and its measures (numbers).

The rooms of `readers` make a `Content` of each format. Nothing there runs code from a file: no pickle, no codec or tag
that makes objects, no entity, no link to another place.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_biomed.analysis.models import Rules
from prefect_biomed.clients.errors import UnsafeContent
from prefect_biomed.clients.files import digest

__all__ = [
    "BLOCK",
    "Content",
    "Measure",
    "blocks",
    "content_digest",
    "decompressed",
    "decompressed_digest",
    "is_store",
    "without_packing",
]

BLOCK = 1 << 18
"""Values that are held in memory at once, of all runs together; with more, little stays in a processor's cache."""
_LEAST_POINTS = 1024

_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_COPY_BYTES = 1 << 20
_MAX_UNPACKED = 64 * 1024**3
_PACKINGS = (".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class Measure:
    """Numbers that belong together: the voxels of an image, a column of a table.

    Attributes:
        name: Name within the file.
        values: One-dimensional; a memory map where the file allows.
        shape: Shape of the whole.
        order: Which axis runs fastest in `values`: the first (`F`) or the last (`C`).
        slope: Scaling of the stored values.
        intercept: Added after scaling.
        place: Says in words where a point is; its index is spelt out when None.
        point: What one point is called.
        spacing: Millimetres from voxel to voxel along the first three axes; None for what is no image of voxels.
        keys: Names of the points, by which runs that have others beside them can be laid side by side.
        left_out: Names of the points that were left out because another run lacks them.
    """

    name: str
    values: NDArray[Any]
    shape: tuple[int, ...]
    order: str = "C"
    slope: float = 1.0
    intercept: float = 0.0
    place: Callable[[int], str] | None = None
    point: str = "value"
    keys: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()
    spacing: tuple[float, ...] | None = None

    @property
    def size(self) -> int:
        """Number of points."""
        return int(self.values.size)

    @property
    def may_be_labels(self) -> bool:
        """Whether it is stored as label maps are: unscaled, as whole numbers or as voxels of any type."""
        is_stored_so = self.values.dtype.kind in "iub" or self.spacing is not None
        return is_stored_so and self.slope == 1.0 and self.intercept == 0.0

    def read(self, start: int, stop: int) -> NDArray[np.float64]:
        """Read points.

        Args:
            start: First point.
            stop: Point after the last.

        Returns:
            Their values.
        """
        block = np.empty(max(min(stop, self.size) - start, 0))
        self.read_into(block, start)
        return block

    def read_into(self, block: NDArray[np.float64], start: int) -> None:
        """Read as many points as there is room for.

        Args:
            block: Where they go.
            start: First point.
        """
        block[:] = self.values[start : start + block.size]
        if self.slope != 1.0 or self.intercept != 0.0:
            block *= self.slope
            block += self.intercept

    def only(self, names: Collection[str]) -> Measure:
        """Leave out points by name.

        Args:
            names: Names of the points that stay.

        Returns:
            The measure of those; the same when its points have no names.
        """
        if self.keys is None:
            return self
        chosen = [index for index, key in enumerate(self.keys) if key in names]
        place = self.place
        where = None if place is None else lambda index: place(chosen[index])
        keys = tuple(self.keys[index] for index in chosen)
        left_out = tuple(key for key in self.keys if key not in names)
        return replace(
            self, values=self.values[chosen], shape=(len(chosen),), place=where, keys=keys, left_out=left_out
        )

    def volume(self) -> NDArray[Any]:
        """Return the values in their shape, unscaled."""
        return self.values.reshape(self.shape, order="F" if self.order == "F" else "C")

    def in_rows(self, file: Path) -> Measure:
        """Lay the points out with the last axis running fastest.

        Args:
            file: Where they go, since they may be too many for the memory.

        Returns:
            The same measure in the other order.
        """
        values = np.memmap(file, self.values.dtype, "w+", shape=self.shape)
        values[...] = self.volume()
        return replace(self, values=values.reshape(-1), order="C")

    def where(self, index: int) -> str:
        """Say where a point is.

        Args:
            index: Its number.

        Returns:
            For instance `voxel (12, 30, 4)`.
        """
        if self.place is not None:
            return self.place(index)
        position = np.unravel_index(index, self.shape, order="F" if self.order == "F" else "C")
        return f"{self.point} ({', '.join(str(int(axis)) for axis in position)})"


@dataclass(frozen=True)
class Content:
    """What a file says.

    Attributes:
        kind: Name of the format.
        facts: Everything that is no number, as text by field.
        measures: Numbers by name.
        note: What stood in the way of a closer look.
        digests: SHA-256 of what cannot be looked into, by name of the part. Where it varies it is not judged.
        environment: What made the file, such as versions, by name: reported where it varies, and no result.
    """

    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    note: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, str]:
        """Facts and digests: all that is either equal or not."""
        return self.facts | self.digests

    def without_ignored(self, rules: Rules) -> Content:
        """Leave out the fields that the rules ignore.

        Args:
            rules: The rules.

        Returns:
            The rest.
        """
        return Content(
            self.kind,
            {name: value for name, value in self.facts.items() if not rules.ignores_field(name)},
            {name: measure for name, measure in self.measures.items() if not rules.ignores_field(name)},
            self.note,
            {name: value for name, value in self.digests.items() if not rules.ignores_field(name)},
            {name: value for name, value in self.environment.items() if not rules.ignores_field(name)},
        )


def blocks(measures: Sequence[Measure], values: int = BLOCK) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Read the same points of several runs, block by block.

    Args:
        measures: The measure in each run; all of one size.
        values: About so many values in a block, of all runs together.

    Yields:
        Number of the first point, and the values, shape (runs, points), which are there until the next ones are taken.
    """
    size = measures[0].size
    step = max(values // len(measures), _LEAST_POINTS)
    # Each slice of a memory map would be made a map, which takes longer than to read it.
    measures = [replace(measure, values=np.asarray(measure.values)) for measure in measures]
    # One room for all blocks: to get memory from the system for each takes longer than to read it.
    room = np.empty((len(measures), min(step, size)))
    for start in range(0, size, step):
        block = room[:, : size - start]
        for row, measure in zip(block, measures, strict=True):
            measure.read_into(row, start)
        yield start, block


def without_packing(name: str) -> str:
    """Take the suffix of a compression from a name.

    Args:
        name: A name in small letters.

    Returns:
        It without `.gz`, `.bz2` or `.xz`; FreeSurfer's `.mgz` stays.
    """
    for suffix in _PACKINGS:
        name = name.removesuffix(suffix)
    return name


def is_store(folder: Path) -> bool:
    """Tell whether a folder is a Zarr store, which is compared as one file.

    Args:
        folder: The folder.

    Returns:
        Whether it holds the metadata of one.
    """
    return any((folder / name).is_file() for name in (".zarray", ".zgroup", "zarr.json"))


def _opener(path: Path) -> Callable[[Path], Any] | None:
    if path.is_dir():
        return None
    with path.open("rb") as file:
        magic = file.read(6)
    return next((make for start, make in _OPENERS.items() if magic.startswith(start)), None)


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content; damaged streams raise UnsafeContent."""
    opener = _opener(path)
    total = 0
    try:
        with opener(path) if opener else path.open("rb") as stream:
            while piece := stream.read(_COPY_BYTES):
                total += len(piece)
                if opener and total > _MAX_UNPACKED:
                    raise UnsafeContent(f"{path.name} decompresses to more than {_MAX_UNPACKED} bytes.")
                yield piece
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UnsafeContent(f"{path.name} is damaged: {error}") from None


def content_digest(path: Path) -> str:
    """Compute the SHA-256 of the decompressed content, so that time stamps in gzip headers do not count.

    Args:
        path: A file, compressed with gzip, bzip2, xz or not at all; or a Zarr store.

    Returns:
        64 hexadecimal digits; those of the raw bytes when the compressed stream is damaged.
    """
    content = hashlib.sha256()
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            if inner.is_file():
                content.update(f"{inner.relative_to(path).as_posix()} {content_digest(inner)}\n".encode())
        return content.hexdigest()
    try:
        for piece in _pieces(path):
            content.update(piece)
    except (UnsafeContent, OSError):
        return digest(path)
    return content.hexdigest()


def decompressed(path: Path, target: Path) -> Path:
    """Write the decompressed content to a file, unless it is not compressed.

    Args:
        path: The file.
        target: Where to write; used only for compressed files.

    Returns:
        `target`, or `path` when there was nothing to do.

    Raises:
        UnsafeContent: The stream is damaged or larger than 64 GiB.
    """
    if _opener(path) is None:
        return path
    with target.open("wb") as file:
        for piece in _pieces(path):
            file.write(piece)
    return target


def decompressed_digest(path: Path, target: Path) -> tuple[Path, str]:
    """Write the decompressed content to a file, unless it is not compressed, and compute its SHA-256 on the way.

    Args:
        path: The file.
        target: Where to write; used only for compressed files.

    Returns:
        What `decompressed` returns, and what `content_digest` does.

    Raises:
        UnsafeContent: The stream is damaged or larger than 64 GiB.
    """
    if _opener(path) is None:
        return path, content_digest(path)
    content = hashlib.sha256()
    with target.open("wb") as file:
        for piece in _pieces(path):
            content.update(piece)
            file.write(piece)
    return target, content.hexdigest()
