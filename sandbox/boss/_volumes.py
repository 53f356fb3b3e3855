"""Where ingested pixels end up, and how they are read back as arrays.

Tiles are kept encoded and decoded when somebody looks, because decoding them during an ingest
would measure the sandbox rather than the client. Placement follows what the tile-ingest lambda
and the cuboid store of the Boss do, their silent misplacements included.
"""

from __future__ import annotations

import io
import itertools
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

CUBOID_X, CUBOID_Y, CUBOID_Z = 512, 512, 16

Range = tuple[int, int]
BlobRef = tuple[int, int]
Array = npt.NDArray[np.generic]


class Blobs:
    """Bytes by the thousand: in memory up to a bound, then in one file, so that the sandbox stays small.

    Args:
        path: The file; gone on with when it exists.
        memory_bytes: How much is kept in memory and lost with the process.
    """

    def __init__(self, path: Path, memory_bytes: int = 512 * 1024 * 1024) -> None:
        # Unbuffered: what was put survives the process.
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._lock = threading.Lock()
        self._end = 0
        self._memory: dict[int, bytes] = {}
        self._left = memory_bytes

    def put(self, content: bytes) -> BlobRef:
        """Keep some bytes and tell where."""
        with self._lock:
            reference = (self._end, len(content))
            self._end += max(1, len(content))
            if self._left >= len(content):
                self._memory[reference[0]] = content
                self._left -= len(content)
            else:
                self._write(reference[0], content)
        return reference

    def get(self, reference: BlobRef) -> bytes:
        """Read back what `put` kept."""
        with self._lock:
            if reference[0] in self._memory:
                return self._memory[reference[0]]
            self._file.seek(reference[0])
            return self._file.read(reference[1])

    @property
    def end(self) -> int:
        """Where the next content goes."""
        return self._end

    def continue_from(self, end: int) -> None:
        """Go on where an earlier process was; what it wrote behind that is overwritten."""
        self._end = end

    def keep_all(self) -> None:
        """Have everything in the file, also what comes from now on."""
        with self._lock:
            for start, content in self._memory.items():
                self._write(start, content)
            self._memory.clear()
            self._left = -1

    def _write(self, start: int, content: bytes) -> None:
        self._file.seek(start)
        self._file.write(content)

    def close(self) -> None:
        """Forget what is in memory."""
        self._memory.clear()
        self._file.close()


def image_header(content: bytes) -> tuple[tuple[int, int], int] | None:
    """Size (x, y) and number of array dimensions of an encoded image; None when unreadable."""
    if not content:
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size, 2 if len(image.getbands()) == 1 else 3
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None


@dataclass(slots=True)
class TileRef:
    """One uploaded tile of a chunk; `blob` is None for the black tile of an unreadable image."""

    key: str
    z: int
    blob: BlobRef | None
    x_size: int
    y_size: int
    is_clipped: bool = False


@dataclass(slots=True)
class TileChunk:
    """Up to sixteen tiles above one another, as the tile-ingest lambda writes them."""

    x_index: int
    y_index: int
    z_chunk: int
    t: int
    width: int
    height: int
    tiles: list[TileRef]


@dataclass(slots=True)
class Cuboid:
    """One 512x512x16 cuboid of a volumetric ingest, still compressed."""

    x_index: int
    y_index: int
    z_index: int
    t: int
    blob: BlobRef


@dataclass
class Volume:
    """All that was ingested into one channel."""

    datatype: str
    pieces: list[TileChunk | Cuboid] = field(default_factory=list)


def unblosc(content: bytes) -> bytes:
    """Decode one blosc1 frame: by the blosc package, or by hand when it is uncompressed.

    Raises:
        ValueError: Not a blosc frame, or a compressed one while blosc is not installed.
    """
    if len(content) < 16:
        raise ValueError("not a blosc frame: shorter than its header")
    version, _, flags, _, size, _, total = struct.unpack("<BBBBIII", content[:16])
    if version != 2 or total != len(content):
        raise ValueError("not a blosc frame: header does not fit the content")
    if flags & 0x02:
        return content[16 : 16 + size]
    try:
        import blosc
    except ImportError as error:
        raise ValueError("a compressed frame needs the blosc package to be read back") from error
    decoded: bytes = blosc.decompress(content)
    return decoded


class Volumes:
    """The cuboid store of all channels.

    Args:
        blobs: Where the encoded tiles and cuboids are.
        on_black: Called with the key of a tile that turned out to be undecodable.
    """

    def __init__(self, blobs: Blobs, on_black: Callable[[str], None]) -> None:
        self._blobs = blobs
        self._on_black = on_black
        self._lock = threading.Lock()
        self._channels: dict[str, Volume] = {}

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Volume]]:
        """Give what was ingested, and change nothing meanwhile."""
        with self._lock:
            yield self._channels

    def restore(self, channels: dict[str, Volume]) -> None:
        """Go on from what `frozen` gave."""
        self._channels = channels

    def add(self, lookup_key: str, datatype: str, piece: TileChunk | Cuboid) -> None:
        """Write one chunk or cuboid; what was there before is overwritten."""
        with self._lock:
            self._channels.setdefault(lookup_key, Volume(datatype)).pieces.append(piece)

    def write(self, lookup_key: str, datatype: str, block: Array, corner: tuple[int, int, int], t: int) -> None:
        """Write a block of any size into the cuboids that it touches, as the cutout service does: zeros change nothing.

        Args:
            lookup_key: `collection&experiment&channel` by number.
            datatype: dtype of the channel.
            block: Array of shape (z, y, x).
            corner: Where it begins, in x, y and z.
            t: Sample.
        """
        sizes, shape = (CUBOID_X, CUBOID_Y, CUBOID_Z), block.shape[::-1]
        spans = (
            range(low // size, -(-(low + length) // size))
            for low, length, size in zip(corner, shape, sizes, strict=True)
        )
        for at in itertools.product(*spans):
            origin = (at[0] * CUBOID_X, at[1] * CUBOID_Y, at[2] * CUBOID_Z)
            x, y, z = ((low, low + size) for low, size in zip(origin, sizes, strict=True))
            there = self.read(lookup_key, datatype, x, y, z, (t, t + 1))[0]
            new = np.zeros_like(there)
            _place(new, block, corner, origin)
            content = np.where(new != 0, new, there).tobytes()
            head = struct.pack("<BBBBIII", 2, 1, 0x02, new.itemsize, len(content), len(content), len(content) + 16)
            self.add(lookup_key, datatype, Cuboid(at[0], at[1], at[2], t, self._blobs.put(head + content)))

    def read(self, lookup_key: str, datatype: str, x: Range, y: Range, z: Range, t: Range) -> Array:
        """Assemble a block.

        Args:
            lookup_key: `collection&experiment&channel` by number.
            datatype: dtype of the channel.
            x: Half-open range in voxels; `y`, `z` and `t` likewise.
            y: See `x`.
            z: See `x`.
            t: See `x`, in samples.

        Returns:
            Array of shape (t, z, y, x); zero where nothing was ingested.
        """
        out = np.zeros((t[1] - t[0], z[1] - z[0], y[1] - y[0], x[1] - x[0]), dtype=datatype)
        with self._lock:
            volume = self._channels.get(lookup_key)
            pieces = list(volume.pieces) if volume else []
        for piece in pieces:
            if not t[0] <= piece.t < t[1]:
                continue
            if isinstance(piece, Cuboid):
                origin = (piece.x_index * CUBOID_X, piece.y_index * CUBOID_Y, piece.z_index * 16)
                if _overlaps(origin, (CUBOID_X, CUBOID_Y, CUBOID_Z), (x, y, z)):
                    raw = unblosc(self._blobs.get(piece.blob))
                    block = np.frombuffer(raw, dtype=datatype)
                    block = block.reshape(CUBOID_Z, CUBOID_Y, CUBOID_X)
                    _place(out[piece.t - t[0]], block, origin, (x[0], y[0], z[0]))
            else:
                self._place_tiles(out[piece.t - t[0]], piece, datatype, (x, y, z))
        return out

    def _place_tiles(self, out: Array, chunk: TileChunk, datatype: str, wanted: Sequence[Range]) -> None:
        # The lambda counts cuboids per tile from the image's own width, so that a tile whose
        # width is no multiple of 512 pushes all its right neighbours away. Likewise in y; in z
        # the first tile lands at the start of the cuboid wherever its slice really is.
        columns, rows = -(-chunk.width // CUBOID_X), -(-chunk.height // CUBOID_Y)
        z0 = chunk.z_chunk * CUBOID_Z
        origin = (chunk.x_index * columns * CUBOID_X, chunk.y_index * rows * CUBOID_Y, z0)
        if not _overlaps(origin, (columns * CUBOID_X, rows * CUBOID_Y, CUBOID_Z), wanted):
            return
        for rank, tile in enumerate(chunk.tiles):
            if not wanted[2][0] <= z0 + rank < wanted[2][1]:
                continue
            pixels = np.zeros((1, rows * CUBOID_Y, columns * CUBOID_X), dtype=datatype)
            image = self._decode(tile, datatype)
            pixels[0, : image.shape[0], : image.shape[1]] = image
            corner = (wanted[0][0], wanted[1][0], wanted[2][0])
            _place(out, pixels, (origin[0], origin[1], z0 + rank), corner)

    def _decode(self, tile: TileRef, datatype: str) -> Array:
        black = np.zeros((tile.x_size, tile.y_size), dtype=datatype)  # transposed, as theirs
        if tile.blob is None:
            return black
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(self._blobs.get(tile.blob))) as image:
                    pixels = np.asarray(image).astype(datatype)  # wraps silently, as theirs
                    return np.minimum(pixels, 127 if datatype == "uint8" else 255) if tile.is_clipped else pixels
        except (OSError, ValueError, SyntaxError, struct.error):
            tile.blob = None
            self._on_black(tile.key)
            return black


def _overlaps(origin: Sequence[int], size: Sequence[int], wanted: Sequence[Range]) -> bool:
    return all(
        start < high and start + length > low for start, length, (low, high) in zip(origin, size, wanted, strict=True)
    )


def _place(out: Array, block: Array, origin: Sequence[int], corner: Sequence[int]) -> None:
    """Copy the part of `block` (z, y, x at `origin`) that lies in `out` (at `corner`)."""
    target: list[slice] = []
    source: list[slice] = []
    for axis in (2, 1, 0):
        start = origin[axis] - corner[axis]
        length = block.shape[2 - axis]
        low, high = max(start, 0), min(start + length, out.shape[2 - axis])
        if low >= high:
            return
        target.append(slice(low, high))
        source.append(slice(low - start, high - start))
    out[tuple(target)] = block[tuple(source)]
