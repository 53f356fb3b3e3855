"""Files of every kind that images come in, and what becomes of their values: `PYTHONPATH=tests python -m
harness.image_formats`, or `make pixels`.

Each kind is written larger than a tile, of its size and smaller, and read for channels of 8, 16 and 64 bits. A cell is
equal (the tile holds what was written), refused by name, or wrong; to be refused without need is wrong as well.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import imagecodecs
import imageio.v3 as imageio
import numpy as np
import tifffile
from PIL import Image

from harness.ingest_lab import volume
from prefect_biomed.clients.boss import images
from prefect_biomed.clients.boss.images import DecodeCache, ImageWindow, TileFormat
from prefect_biomed.clients.errors import SourceUnreadable

# The tile, and images that are the tile, larger and smaller.
TILE = (48, 64)
SHAPES = {"whole": TILE, "cut": (150, 200), "padded": (30, 20)}
DATATYPES = ("uint8", "uint16", "uint64")
FILL = 7
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))

Make = Callable[[Path, tuple[int, int]], np.ndarray | None]


def png(path: Path, pixels: np.ndarray, bits: int, interlaced: bool = False) -> None:
    """Write a grey PNG of any depth, which Pillow cannot."""

    def rows(part: np.ndarray) -> bytes:
        if bits == 16:
            return b"".join(b"\0" + row.astype(">u2").tobytes() for row in part)
        planes = [(part >> bit) & 1 for bit in reversed(range(bits))]
        return b"".join(
            b"\0" + np.packbits(np.stack([plane[y] for plane in planes], 1).ravel()).tobytes() for y in range(len(part))
        )

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape
    passes = [pixels[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [pixels]
    content = b"".join(rows(part) for part in passes if part.size)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, int(interlaced))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    )


def grey_png(bits: int, interlaced: bool = False) -> Make:
    def make(path: Path, shape: tuple[int, int]) -> np.ndarray:
        pixels = volume(shape, "uint16" if bits == 16 else "uint8") & 2**bits - 1
        png(path, pixels, bits, interlaced)
        return pixels

    return make


def pillow(mode: str, kind: str, **save: Any) -> Make:
    """A picture that Pillow writes, and that has no single value in a pixel."""

    def make(path: Path, shape: tuple[int, int]) -> None:
        grey = Image.fromarray(volume(shape))
        picture = grey.convert("RGB").quantize(16) if mode == "P" else grey.convert(mode)
        picture.save(path, kind, **save)

    return make


def tiff(dtype: str, **options: Any) -> Make:
    def make(path: Path, shape: tuple[int, int]) -> np.ndarray:
        kept = options.get("kept", {})
        pixels = volume(shape, dtype) if np.issubdtype(dtype, np.integer) else volume(shape).astype(dtype) / 3
        if options.get("negative"):
            pixels = -pixels
        if options.get("small"):
            pixels = pixels % 100
        tifffile.imwrite(path, pixels, **kept)
        return np.asarray(pixels)

    return make


def kept(dtype: str = "uint8", **kept: Any) -> Make:
    return tiff(dtype, kept={"photometric": "minisblack", **kept})


def pages(dtype: str = "uint8", count: int = 3, **options: Any) -> Make:
    def make(path: Path, shape: tuple[int, int]) -> None:
        tifffile.imwrite(path, volume((count, *shape), dtype), photometric="minisblack", **options)

    return make


def pyramid(path: Path, shape: tuple[int, int]) -> np.ndarray:
    pixels = volume(shape)
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, photometric="minisblack", metadata=None)
        file.write(pixels[::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    return pixels


def colour_tiff(**options: Any) -> Make:
    def make(path: Path, shape: tuple[int, int]) -> None:
        pixels = np.stack([volume(shape, seed=n) for n in range(3)], 0 if "planarconfig" in options else 2)
        tifffile.imwrite(path, pixels, photometric="rgb", **options)

    return make


def bare_tiff(
    planes: int = 1, bits: int = 8, rows: int | None = None, refused: bool = False, **more: int | None
) -> Make:
    """A TIFF of one directory, with tags that no writer offers; `t317=2` is the tag 317.

    Rows are those of a strip; of several, only the first is written.
    """

    def make(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
        pixels = volume((planes, *shape), "uint16" if bits > 8 else "uint8") & 2**bits - 1
        content = b"".join(packed(plane, bits) for plane in pixels)
        tags = {256: shape[1], 257: shape[0], 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: shape[0]}
        tags |= {279: len(content) // planes} | {int(name[1:]): value for name, value in more.items()}
        tags = {tag: value for tag, value in tags.items() if value is not None}
        long = {33629: (5, planes, struct.pack("<6I", 1, 1, 0, 0, 0, 0) * planes)} if 33629 in tags else {}
        if rows is not None:
            pixels[:, rows:] = 0
            tags |= {278: rows}
            strips = -(-shape[0] // rows)
            written = struct.pack("<I", rows * (shape[1] * bits // 8))
            long |= {
                tag: (4, strips, first + bytes(4 * strips - 4))
                for tag, first in ((273, struct.pack("<I", 8)), (279, written))
            }
        start = 8 + len(content) + len(content) % 2
        behind = start + 2 + 12 * len(tags) + 4
        entries, after = b"", b""
        for tag, value in sorted(tags.items()):
            kind, count, values = long.get(tag, (4, 1, b""))
            entries += struct.pack("<HHII", tag, kind, count, behind + len(after) if values else value)
            after += values
        directory = struct.pack("<H", len(tags)) + entries + bytes(4) + after
        path.write_bytes(struct.pack("<4sI", b"II*\0", start) + content + bytes(len(content) % 2) + directory)
        return None if refused else pixels[0]

    return make


def packed(pixels: np.ndarray, bits: int) -> bytes:
    """Values bit by bit, rows from a byte on."""
    if bits == 16:
        return pixels.astype("<u2").tobytes()
    planes = np.stack([(pixels >> bit) & 1 for bit in reversed(range(bits))], -1).astype(np.uint8)
    return np.packbits(planes.reshape(len(pixels), -1), axis=1).tobytes()


def sgi(path: Path, shape: tuple[int, int]) -> None:
    header = struct.pack(">HBBHHHHII", 474, 0, 2, 2, shape[1], shape[0], 1, 0, 65535).ljust(512, b"\0")
    path.write_bytes(header + volume(shape, "uint16").astype(">u2").tobytes())


def jpeg2000_of_24_bits(path: Path, shape: tuple[int, int]) -> None:
    pixels = volume(shape, "uint32") & 2**24 - 1
    path.write_bytes(imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, bitspersample=24))


def jpeg(path: Path, shape: tuple[int, int]) -> np.ndarray:
    Image.fromarray(volume(shape)).save(path, "JPEG")
    return np.asarray(imagecodecs.jpeg_decode(path.read_bytes()))


def tiff_jpeg(path: Path, shape: tuple[int, int]) -> np.ndarray:
    tifffile.imwrite(path, volume(shape), photometric="minisblack", compression="jpeg")
    return np.asarray(tifffile.imread(path))


def rotated(path: Path, shape: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(volume(shape)).save(path, "JPEG", exif=exif)


def jpeg2000(dtype: str, bits: int) -> Make:
    def make(path: Path, shape: tuple[int, int]) -> np.ndarray:
        pixels = volume(shape, dtype) & 2**bits - 1
        path.write_bytes(imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, bitspersample=bits))
        return pixels

    return make


def pgm(most: int) -> Make:
    def make(path: Path, shape: tuple[int, int]) -> np.ndarray:
        pixels = (volume(shape, "uint16").astype(int) % (most + 1)).astype("uint16")
        content = pixels.astype(">u2" if most > 255 else "u1").tobytes()
        path.write_bytes(f"P5 {shape[1]} {shape[0]} {most}\n".encode() + content)
        return pixels

    return make


def bmp(path: Path, shape: tuple[int, int]) -> np.ndarray:
    Image.fromarray(volume(shape)).save(path, "BMP")
    return np.asarray(imageio.imread(path, plugin="pillow"))


def raw(path: Path, shape: tuple[int, int]) -> None:
    path.write_bytes(volume(shape).tobytes())


FORMATS: dict[str, Make] = {
    **{f"PNG of {bits} bits": grey_png(bits) for bits in (1, 2, 4, 8, 16)},
    **{f"PNG of {bits} bits, interlaced": grey_png(bits, interlaced=True) for bits in (2, 8, 16)},
    **{f"PNG {mode}": pillow(mode, "PNG") for mode in ("LA", "RGB", "RGBA", "P", "1")},
    **{
        f"TIFF {dtype} {order}": kept(dtype, byteorder=order)
        for dtype in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "float32", "float64")
        for order in "<>"
    },
    **{f"TIFF {dtype}, negative": tiff(dtype, negative=True, small=True) for dtype in ("int8", "int16", "int32")},
    **{
        f"TIFF {dtype} {order}, {codec}": kept(dtype, compression=codec, byteorder=order)
        for codec in ("lzw", "deflate", "packbits", "zstd", "lzma")
        for dtype in ("uint8", "uint16")
        for order in "<>"
    },
    "TIFF, deflate with a predictor": kept("uint16", compression="deflate", predictor=True),
    "TIFF, webp": colour_tiff(compression="webp"),
    "TIFF, JPEG": tiff_jpeg,
    "TIFF, LZMA of 32 bits": kept("uint32", compression="lzma"),
    "TIFF in tiles": kept("uint16", tile=(32, 48)),
    "TIFF in compressed tiles": kept("uint8", tile=(32, 32), compression="deflate"),
    "TIFF in strips of 7 rows": kept("uint16", rowsperstrip=7, byteorder=">"),
    "TIFF in compressed strips of 7 rows": kept("uint8", rowsperstrip=7, compression="lzw"),
    "BigTIFF": kept("uint8", bigtiff=True),
    "BigTIFF, big endian": kept("uint16", bigtiff=True, byteorder=">"),
    "TIFF, white is zero": tiff("uint8", kept={"photometric": "miniswhite"}),
    "TIFF RGB": colour_tiff(),
    "TIFF RGB, planar": colour_tiff(planarconfig="separate"),
    "TIFF of three pages": pages(),
    "TIFF of three pages, written as one": pages(truncate=True),
    "TIFF with reduced copies": pyramid,
    "OME-TIFF": kept("uint16", ome=True),
    "OME-TIFF of three planes": pages("uint16", ome=True, metadata={"axes": "ZYX"}),
    "ImageJ": kept("uint16", imagej=True),
    "ImageJ hyperstack": pages("uint16", imagej=True, metadata={"axes": "ZYX"}),
    "TIFF, turned": kept("uint8", extratags=[(274, 3, 1, 6, True)]),
    **{f"TIFF of {bits} bits": bare_tiff(bits=bits) for bits in (2, 4, 10, 12, 14)},
    "TIFF of undefined values": bare_tiff(t339=4),
    "TIFF with a strip that was never written": bare_tiff(rows=20),
    "TIFF with a predictor and no compression": bare_tiff(t317=2, refused=True),
    "MetaMorph TIFF of three planes": bare_tiff(planes=3, t33628=0, t33629=0, refused=True),
    "JPEG grey": jpeg,
    **{f"JPEG {mode}": pillow(mode, "JPEG") for mode in ("RGB", "CMYK")},
    "JPEG, turned": rotated,
    "JPEG 2000": jpeg2000("uint8", 8),
    "JPEG 2000 of 16 bits": jpeg2000("uint16", 16),
    "JPEG 2000 of 12 bits": jpeg2000("uint16", 12),
    "JPEG 2000 of 24 bits": jpeg2000_of_24_bits,
    "PGM": pgm(255),
    "PGM to 100": pgm(100),
    "PGM to 4095": pgm(4095),
    "PGM to 65535": pgm(65535),
    "BMP": bmp,
    "SGI of 16 bits": sgi,
    "raw": raw,
}


def expected(pixels: np.ndarray, datatype: str) -> np.ndarray:
    """The part of an image that the tile shows; what it does not have is the fill value."""
    height, width = TILE
    part = pixels[:height, :width]
    tile = np.full(TILE, FILL, object)
    tile[: part.shape[0], : part.shape[1]] = part
    return tile


def got(path: Path, datatype: str, whole: bool) -> np.ndarray:
    """What arrives: the tile decoded by another reader, or the values where no tile can carry them."""
    tile = TileFormat(TILE[1], TILE[0], datatype, fill=FILL)
    window, cache = ImageWindow(str(path), whole=whole), DecodeCache(1 << 24)
    if datatype == "uint64":
        part = images.values(window, tile, cache)
        assert part.dtype == np.uint64
        padded = np.full(TILE, FILL, np.uint64)
        padded[: part.shape[0], : part.shape[1]] = part
        return padded
    return np.asarray(Image.open(io.BytesIO(images.from_window(window, tile, cache)))).astype(np.int64)


def must_be_refused(name: str, truth: np.ndarray, datatype: str) -> bool:
    """Whether values cannot be carried: fractions, negative or too large, two colours, turned."""
    if truth.dtype.kind == "f" or "turned" in name or name == "PNG of 1 bits":
        return True
    shown = truth[: TILE[0], : TILE[1]]
    return int(shown.min()) < 0 or int(shown.max()) > np.iinfo(datatype).max


class Cell(NamedTuple):
    """What became of one file for one channel."""

    format: str
    size: str
    datatype: str
    verdict: Literal["equal", "refused", "wrong"]
    said: str = ""


def judged(name: str, folder: Path) -> list[Cell]:
    """Write one kind of file in every size and read it for every channel."""
    cells = []
    for size, shape in SHAPES.items():
        path = folder / f"{size}.bin"
        truth = FORMATS[name](path, shape)
        for datatype in DATATYPES:
            try:
                made = got(path, datatype, whole=size != "cut")
            except SourceUnreadable as error:
                named = str(path) in str(error) and (truth is None or must_be_refused(name, truth, datatype))
                cells.append(Cell(name, size, datatype, "refused" if named else "wrong", str(error)))
                continue
            equal = truth is not None and np.array_equal(made.astype(object), expected(truth, datatype))
            cells.append(Cell(name, size, datatype, "equal" if equal else "wrong"))
    return cells


def confirmed(name: str, path: Path) -> bool | None:
    """Whether a reader that has nothing to do with ours finds what was written; None where no values are expected."""
    truth = FORMATS[name](path, SHAPES["cut"])
    if truth is None:
        return None
    content = path.read_bytes()
    if "TIFF" in name or "ImageJ" in name:
        read = tifffile.imread(path, key=0)
    elif name.startswith("PNG of"):
        bits = int(name.split()[2])
        read = imagecodecs.png_decode(content) // (255 // (2**bits - 1) if bits < 8 else 1)  # it scales small ones
    elif name.startswith("JPEG 2000"):
        read = imagecodecs.jpeg2k_decode(content)  # Pillow scales 12 bits
    elif name.startswith("PGM"):
        most = int(content.split()[3])
        read = np.frombuffer(content[-truth.size * (2 if most > 255 else 1) :], ">u2" if most > 255 else "u1")
        read = read.reshape(truth.shape)
    else:
        read = np.asarray(imageio.imread(path, plugin="pillow"))
    return np.array_equal(read, truth)


def _family(name: str) -> str:
    return "ImageJ" if name.startswith("ImageJ") else re.split(r" (?!2000)|,", name, maxsplit=1)[0]


def main() -> int:
    """Print how many cells of each family of formats are equal, refused and wrong."""
    table: dict[str, Counter[str]] = {}
    wrong: list[Cell] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        confirmations = Counter(confirmed(name, folder / "file") for name in FORMATS)
        for name in FORMATS:
            cells = judged(name, folder)
            counts = table.setdefault(_family(name), Counter())
            counts["formats"] += 1
            counts.update(cell.verdict for cell in cells)
            wrong += [cell for cell in cells if cell.verdict == "wrong"]
    table["all"] = sum(table.values(), Counter())
    print("| format | kinds | equal | refused by name | wrong |\n|---|---|---|---|---|")
    for family, counts in table.items():
        print(f"| {family} | {counts['formats']} | {counts['equal']} | {counts['refused']} | {counts['wrong']} |")
    print(f"\nOther readers: {confirmations[True]} kinds confirmed, {confirmations[False]} contradicted; ", end="")
    print(f"{confirmations[None]} kinds have no single value in a pixel.")
    for cell in wrong:
        print(*cell)
    return bool(wrong or confirmations[False])


if __name__ == "__main__":
    sys.exit(main())
