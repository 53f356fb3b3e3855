"""Every kind of image file: its values arrive as they are, or it is refused by name; nothing else can happen."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from harness.image_formats import (
    DATATYPES,
    FORMATS,
    SHAPES,
    TILE,
    bare_tiff,
    confirmed,
    expected,
    got,
    judged,
    png,
    rotated,
)
from harness.ingest_lab import volume
from prefect_biomed.clients.boss import decoding, images
from prefect_biomed.clients.boss.images import DecodeCache, ImageWindow, TileFormat
from prefect_biomed.clients.errors import SourceUnreadable


@pytest.mark.parametrize("name", FORMATS)
def test_values_arrive_as_they_are_or_are_refused(name: str, tmp_path: Path) -> None:
    cells = judged(name, tmp_path)
    assert len(cells) == len(SHAPES) * len(DATATYPES)
    assert [cell for cell in cells if cell.verdict == "wrong"] == []


def test_other_readers_agree_on_what_the_files_hold(tmp_path: Path) -> None:
    """Otherwise what is expected would be ours alone."""
    agreed = [name for name in FORMATS if confirmed(name, tmp_path / "file") is not None]
    assert [name for name in agreed if not confirmed(name, tmp_path / "file")] == []
    assert len(agreed) > 60


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


@pytest.mark.parametrize("layout", ["strips", "one strip", "png"])
def test_sections_of_a_chunk_are_decoded_once_in_less_memory_than_they_need(layout: str, tmp_path: Path) -> None:
    """In the order of the queue, sixteen slices of a column after those of the one before, by several threads."""
    pixels = volume((16, 256, 512))
    for z, plane in enumerate(pixels):
        if layout == "png":
            Image.fromarray(plane).save(tmp_path / f"{z}.png")
        else:
            rows = 16 if layout == "strips" else 256
            tifffile.imwrite(
                tmp_path / f"{z}.tif", plane, photometric="minisblack", rowsperstrip=rows, compression="deflate"
            )
    ending, tile = "png" if layout == "png" else "tif", TileFormat(128, 128, "uint8", encoding="tiff")
    cache = DecodeCache(1 << 19, 1 << 23, tmp_path / "kept")  # the slices have 2 MiB

    def read(where: tuple[int, int, int]) -> bool:
        top, left, z = where
        made = images.from_window(ImageWindow(str(tmp_path / f"{z}.{ending}"), left=left, top=top), tile, cache)
        part = pixels[z, top : top + 128, left : left + 128]
        with cache._changed:  # not while another thread puts something in and makes room for it
            fits = cache._bytes <= cache.max_bytes
        return fits and np.array_equal(np.asarray(Image.open(io.BytesIO(made))), part)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, itertools.product(range(0, 256, 128), range(0, 512, 128), range(16))))
    assert cache.decoded_bytes == pixels.nbytes
    assert {key[-1] for key in cache._entries} == {"header"}, "what is used up is not held"
    assert list((tmp_path / "kept").iterdir()) == [], "a kill leaves nothing behind"


def test_a_disk_that_is_full_costs_decodings_and_no_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def parts(cache: DecodeCache) -> list[bytes]:
        cut = (slice(0, 4), slice(0, 8))
        return [cache.part(n, (8, 8), 1, lambda n=n: np.full((8, 8), n, "u1"), cut)[0].tobytes() for n in (1, 2, 1, 2)]

    whole = [bytes([n]) * 8 for n in (1, 2, 1, 2)]
    assert (parts(small := DecodeCache(64, 1, tmp_path)), small.decoded) == (whole, 4)
    assert "cache_disk_bytes is 1" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    assert (parts(full := DecodeCache(64, 1 << 30, tmp_path)), full.decoded) == (whole, 4)
    assert "the disk is nearly full" in caplog.text
    monkeypatch.undo()
    (tmp_path / "file").touch()
    assert (parts(none := DecodeCache(64, 1 << 30, tmp_path / "file")), none.decoded) == (whole, 4)
    assert (parts(kept := DecodeCache(64, 1 << 30, tmp_path)), kept.decoded) == (whole, 2)


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


@pytest.mark.parametrize(("most", "stored"), [(1, [0, 1, 7, 255]), (100, [3, 101, 200, 255]), (4095, [1, 4096, 65535])])
def test_values_above_the_maximum_that_a_pgm_states_are_read_as_they_are(most: int, stored: list[int]) -> None:
    values = np.array([stored], "u1" if most < 256 else ">u2")
    binary = f"P5 {len(stored)} 1 {most}\n".encode() + values.tobytes()
    tile = TileFormat(len(stored), 1, "uint16")
    made = np.asarray(Image.open(io.BytesIO(images.from_bytes(binary, tile, "a.pgm"))))
    assert made.tolist() == [stored]
    with pytest.raises(SourceUnreadable, match=r"a\.pgm"):
        images.from_bytes(binary[:-1], tile, "a.pgm")
    plain, tile = f"P2 2 1 {most}\n{most} ", TileFormat(2, 1, "uint16")
    made = np.asarray(Image.open(io.BytesIO(images.from_bytes(f"{plain}0\n".encode(), tile, "a"))))
    assert made.tolist() == [[most, 0]]
    with pytest.raises(SourceUnreadable, match="too large"):
        images.from_bytes(f"{plain}{most + 1}\n".encode(), tile, "a")


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


@pytest.mark.parametrize("kind", ["PNG LA", "PNG RGB", "PPM", "PPM to 100"])
def test_colours_of_which_a_part_would_be_lost_do_not_become_grey(kind: str, tmp_path: Path) -> None:
    """Pillow gives the upper 8 bits of the 16 of a colour, and stretches those of a PPM."""
    path, (height, width) = tmp_path / "a", TILE
    if kind.startswith("PNG"):
        channels = 2 if kind == "PNG LA" else 3
        path.write_bytes(imagecodecs.png_encode(volume((height, width, channels), "uint16")))
    else:
        most, dtype = (100, "u1") if "100" in kind else (65535, ">u2")
        values = (volume((height, width, 3), "uint16").astype(int) % (most + 1)).astype(dtype)
        path.write_bytes(f"P6 {width} {height} {most}\n".encode() + values.tobytes())
    tile = TileFormat(width, height, "uint16", convert=frozenset(["grey"]))
    with pytest.raises(SourceUnreadable, match=f"{path}: colours of other than 8 bits"):
        images.from_window(ImageWindow(str(path)), tile, DecodeCache(1 << 20))


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("compression", [None, "group4"])
def test_black_and_white_tiff_becomes_grey_when_asked_for(
    photometric: int, compression: str | None, tmp_path: Path
) -> None:
    light = volume(SHAPES["cut"]) % 3 == 0
    path = tmp_path / "a.tif"
    Image.fromarray(light).save(path, tiffinfo={262: photometric}, compression=compression)
    truth = np.asarray(Image.open(path)).astype(np.uint8) * 255
    tile = TileFormat(TILE[1], TILE[0], "uint8", convert=frozenset(["grey"]))
    made = images.from_window(ImageWindow(str(path)), tile, DecodeCache(1 << 20))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made))), truth[: TILE[0], : TILE[1]])


@pytest.mark.parametrize("shape", [TILE, SHAPES["cut"]])
def test_a_thumbnail_in_front_is_not_the_image(shape: tuple[int, int], tmp_path: Path) -> None:
    pixels, path = volume(shape), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels[::4, ::4], photometric="minisblack", subfiletype=1, metadata=None)
        file.write(pixels, photometric="minisblack", metadata=None)
    tile = TileFormat(TILE[1], TILE[0], "uint8")
    made = images.from_window(ImageWindow(str(path), whole=shape == TILE), tile, DecodeCache(1 << 20))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made))), pixels[: TILE[0], : TILE[1]])


@pytest.mark.parametrize("more", [{}, {"t262": None}, {"t32997": 3}])
def test_what_pillow_reads_otherwise_is_left_to_tifffile(
    more: dict[str, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding.tiff, "is_there", lambda: False)
    bare_tiff(rows=None if more else 20, **more)(tmp_path / "a.tif", SHAPES["cut"])
    with pytest.raises(SourceUnreadable, match="by tifffile only"):
        images.from_window(ImageWindow(str(tmp_path / "a.tif")), TileFormat(64, 48, "uint8"), DecodeCache(1 << 20))
