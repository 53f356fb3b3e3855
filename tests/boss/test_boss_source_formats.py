"""Every kind of image file: its values arrive as they are, or it is refused by name; nothing else can happen."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
from PIL import Image

from harness.ingest_lab import volume
from prefect_biomed.clients.boss import decoding, images
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
    "JPEG grey": jpeg,
    **{f"JPEG {mode}": pillow(mode, "JPEG") for mode in ("RGB", "CMYK")},
    "JPEG, turned": rotated,
    "JPEG 2000": jpeg2000("uint8", 8),
    "JPEG 2000 of 16 bits": jpeg2000("uint16", 16),
    "JPEG 2000 of 12 bits": jpeg2000("uint16", 12),
    "PGM": pgm(255),
    "PGM to 100": pgm(100),
    "PGM to 4095": pgm(4095),
    "PGM to 65535": pgm(65535),
    "BMP": bmp,
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


@pytest.mark.parametrize("name", FORMATS)
def test_values_arrive_as_they_are_or_are_refused(name: str, tmp_path: Path) -> None:
    for size, shape in SHAPES.items():
        path = tmp_path / f"{size}.bin"
        truth = FORMATS[name](path, shape)
        for datatype in DATATYPES:
            try:
                made = got(path, datatype, whole=size != "cut")
            except SourceUnreadable as error:
                assert str(path) in str(error)
                # A picture that can be carried may not be refused.
                assert truth is None or must_be_refused(name, truth, datatype), f"{size} {datatype}: {error}"
                continue
            assert truth is not None, f"{size} {datatype}: a picture without one value in each pixel was sent"
            assert np.array_equal(made.astype(object), expected(truth, datatype)), f"{size} {datatype}"


def must_be_refused(name: str, truth: np.ndarray, datatype: str) -> bool:
    """Whether values cannot be carried: fractions, negative or too large, two colours, turned."""
    if truth.dtype.kind == "f" or "turned" in name or name == "PNG of 1 bits":
        return True
    shown = truth[: TILE[0], : TILE[1]]
    return int(shown.min()) < 0 or int(shown.max()) > np.iinfo(datatype).max


def test_other_readers_agree_on_what_the_files_hold(tmp_path: Path) -> None:
    """Otherwise the truth above would be ours alone."""
    for name, make in FORMATS.items():
        path = tmp_path / "file.tif"
        truth = make(path, SHAPES["cut"])
        if truth is None or name.startswith(("PNG of 1", "PNG of 2", "PNG of 4", "PGM", "JPEG 2000", "BMP", "JPEG")):
            continue
        read = tifffile.imread(path, key=0) if "TIFF" in name or "ImageJ" in name else imagecodecs.imread(path)
        assert np.array_equal(read, truth), name


@pytest.mark.parametrize(
    ("convert", "dtype", "sign", "expect"),
    [
        ("scale", "uint16", 1, lambda pixels: pixels >> 8),
        ("clip", "uint16", 1, lambda pixels: np.minimum(pixels, 255)),
        ("clip", "int16", -1, lambda pixels: np.clip(pixels, 0, 255)),
        ("shift", "int8", -1, lambda pixels: pixels.astype(int) + 128),
    ],
)
def test_values_change_only_as_a_setting_says(
    convert: Any, dtype: str, sign: int, expect: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    pixels = volume(TILE, dtype) * np.array(sign, dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    window = ImageWindow(str(tmp_path / "a.tif"), whole=True)
    tile = TileFormat(TILE[1], TILE[0], "uint8")
    with pytest.raises(SourceUnreadable, match=convert):
        images.from_window(window, tile, DecodeCache(1 << 20))
    tile = TileFormat(TILE[1], TILE[0], "uint8", convert=frozenset([convert]))
    made = np.asarray(Image.open(io.BytesIO(images.from_window(window, tile, DecodeCache(1 << 20)))))
    assert np.array_equal(made, expect(pixels))


def test_the_first_page_and_the_stored_order_are_taken_when_asked_for(tmp_path: Path) -> None:
    stack = volume((3, *TILE))
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    rotated(tmp_path / "b.jpg", TILE)
    tile = TileFormat(TILE[1], TILE[0], "uint8", convert=frozenset(["first_page", "stored"]))
    made = images.from_window(ImageWindow(str(tmp_path / "a.tif")), tile, DecodeCache(1 << 20))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made))), stack[0])
    turned = images.from_window(ImageWindow(str(tmp_path / "b.jpg")), tile, DecodeCache(1 << 20))
    assert np.asarray(Image.open(io.BytesIO(turned))).shape == TILE


@pytest.mark.parametrize("page", [0, 1, 2])
@pytest.mark.parametrize("truncate", [False, True])
def test_a_page_that_is_chosen_is_the_one_that_is_read(page: int, truncate: bool, tmp_path: Path) -> None:
    stack = volume((3, *SHAPES["cut"]), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", truncate=truncate)
    tile = TileFormat(TILE[1], TILE[0], "uint16")
    window = ImageWindow(str(tmp_path / "a.tif"), page=page, left=64, top=48)
    made = np.asarray(Image.open(io.BytesIO(images.from_window(window, tile, DecodeCache(1 << 20)))))
    assert np.array_equal(made, stack[page, 48:96, 64:128])
    with pytest.raises(SourceUnreadable, match="fewer pages"):
        images.from_window(ImageWindow(str(tmp_path / "a.tif"), page=3), tile, DecodeCache(1 << 20))


@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 16, "compression": "deflate"}, {"tile": (64, 64)}])
def test_a_large_section_is_decoded_piece_by_piece_and_once(options: dict[str, Any], tmp_path: Path) -> None:
    pixels = volume((1024, 1536))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", **options)
    cache, tile = DecodeCache(1 << 20), TileFormat(256, 256, "uint8")  # the image has 1.5 MiB
    for top in range(0, 1024, 256):
        for left in range(0, 1536, 256):
            made = images.from_window(ImageWindow(str(tmp_path / "a.tif"), left=left, top=top), tile, cache)
            read = np.asarray(Image.open(io.BytesIO(made)))
            assert np.array_equal(read, pixels[top : top + 256, left : left + 256])
            assert cache._bytes <= cache.max_bytes
    assert cache.decoded_bytes == pixels.nbytes


@pytest.mark.parametrize(
    "kind", ["TIFF uint16 >", "TIFF uint8 <, deflate", "TIFF in tiles", "PNG of 8 bits", "PGM", "BMP"]
)
def test_whatever_is_wrong_with_a_header_costs_this_source_alone(kind: str, tmp_path: Path) -> None:
    FORMATS[kind](tmp_path / "good", SHAPES["cut"])
    good, random = (tmp_path / "good").read_bytes(), np.random.default_rng(1)
    tile = TileFormat(TILE[1], TILE[0], "uint16", max_pixels=1 << 24)
    refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        header = [*range(min(64, len(good))), *range(max(len(good) - 200, 0), len(good)), *range(min(400, len(good)))]
        for place in random.choice(header, 3):
            damaged[place] = random.integers(256)
        try:
            images.from_bytes(bytes(damaged), tile, "file", whole=False)
        except SourceUnreadable:
            refused += 1
    assert refused


def test_a_header_that_speaks_of_too_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    tile = TileFormat(TILE[1], TILE[0], "uint8")
    bomb = b"P5 60000 60000 255\n" + bytes(100)
    with pytest.raises(SourceUnreadable, match="in 119 bytes"):
        images.from_bytes(bomb, tile, "file", whole=False)
    png(tmp_path / "a.png", volume((100, 100)), 8)
    with pytest.raises(SourceUnreadable, match="max_pixels"):
        images.from_bytes((tmp_path / "a.png").read_bytes(), TileFormat(64, 48, "uint8", max_pixels=9999), "file")


def test_without_tifffile_tiff_is_read_exactly_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.tiff, "is_there", lambda: False)
    read = 0
    for name, make in FORMATS.items():
        if "TIFF" not in name and "ImageJ" not in name:
            continue
        truth = make(tmp_path / "a.tif", SHAPES["cut"])
        try:
            made = got(tmp_path / "a.tif", "uint16", whole=False)
        except SourceUnreadable:
            continue
        assert truth is not None, name
        assert np.array_equal(made.astype(object), expected(truth, "uint16")), name
        read += 1
    assert read > 10
