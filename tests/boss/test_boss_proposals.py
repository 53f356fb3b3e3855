"""From files to an ingest without a line of JSON: what is proposed reads every pixel, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tensorstore
import tifffile
import zarr
from PIL import Image
from typer.testing import CliRunner

from harness.ingest_lab import volume
from prefect_biomed.cli.commands import app
from prefect_biomed.clients.boss import (
    Database,
    IngestConfig,
    Proposal,
    SourceChoices,
    UploadSettings,
    propose,
    write_configuration,
)
from prefect_biomed.clients.boss.images import pixels as decoded
from prefect_biomed.clients.boss.sources import ChunkSource, TileSource, open_source
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

NAMES = Database(collection="mouse", experiment="em", channel="raw")
SHAPE = (5, 300, 600)


def assembled(proposal: Proposal) -> np.ndarray:
    """All that the configuration reads, placed as the Boss places it; zero where nothing can be read."""
    config, settings = proposal.config, UploadSettings()
    size, extent = config.piece_size, config.ingest_job.extent
    sizes = (size["z"], size["y"], size["x"])
    shape = [-(-high // step) * step for high, step in zip(reversed(proposal.bounds), sizes, strict=True)]
    made = np.zeros(shape, proposal.datatype)
    source = open_source(config, proposal.datatype, settings)
    for at in config.positions():
        where = slice(at.y * size["y"], None), slice(at.x * size["x"], None)
        if isinstance(source, ChunkSource):
            block = source.read(at)
            made[(slice(at.z * size["z"], None), *where)][: block.shape[0], : block.shape[1], : block.shape[2]] = block
            continue
        assert isinstance(source, TileSource)
        try:
            content = decoded(source.read(at), source.format, str(at))
        except SourceUnreadable:
            continue
        tile = np.frombuffer(content, proposal.datatype).reshape(size["y"], size["x"])
        made[(at.z, *where)][: size["y"], : size["x"]] = tile
    return made[: extent.z[1], : extent.y[1], : extent.x[1]]


def slices(name: str, first: int = 0, skip: tuple[int, ...] = (), dtype: str = "uint8", **save: Any) -> Any:
    def write(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
        made = volume(SHAPE, dtype)
        for z, plane in enumerate(made):
            if z in skip:
                made[z] = 0
            else:
                save_as(folder / name.format(first + z), plane, **save)
        return str(folder), made, {}

    return write


def save_as(path: Path, plane: np.ndarray, **save: Any) -> None:
    if path.suffix == ".tif":
        tifffile.imwrite(path, plane, photometric="minisblack", metadata=None, **save)
    else:
        Image.fromarray(plane).save(path)


def tiles(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    made = volume((3, 600, 1100))
    for z, plane in enumerate(made):
        for y in range(2):
            for x in range(3):
                part = plane[512 * y : 512 * y + 512, 512 * x : 512 * x + 512]
                save_as(folder / f"em7_z{z + 9:03}_y{y}_x{x}.png", part)
    return str(folder), made, {}


def catmaid(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    made = volume((20, 300, 700))
    made[:18] = 0
    for z in (18, 19):
        (folder / str(z)).mkdir()
        for x in range(2):
            save_as(folder / str(z) / f"0_{x}_0.png", made[z, :, 512 * x : 512 * x + 512])
    return str(folder), made[16:], {}


def pages(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    made = volume(SHAPE, "uint16")
    tifffile.imwrite(folder / "stack.tif", made, imagej=True, metadata={"axes": "ZYX"})
    return str(folder / "stack.tif"), made, {}


def ome_zarr(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    full = volume((2, *SHAPE), "uint16")
    image = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=2)
    image.create_array("0", data=full[np.newaxis], chunks=(1, 1, 5, 128, 128))
    image.attrs["multiscales"] = [
        {"version": "0.4", "axes": [{"name": axis} for axis in "tczyx"], "datasets": [{"path": "0"}]}
    ]
    return str(folder / "a.zarr"), full[1], {"parameters": {"c": 1}}


def labels(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    made = volume(SHAPE, "uint64")
    zarr.create_array(folder / "labels.zarr", data=made, chunks=(5, 128, 128))
    return str(folder / "labels.zarr"), made, {"kind": "annotation"}


def nifti(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    made = volume((20, 40, 60))
    nibabel.Nifti1Image(made.transpose(2, 1, 0), np.eye(4)).to_filename(folder / "brain.nii.gz")
    return str(folder / "brain.nii.gz"), made, {}


def precomputed(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    made = volume((16, 100, 200))
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": f"file://{folder}/em.precomputed/",
        "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 1},
        "scale_metadata": {
            "size": [200, 100, 16],
            "voxel_offset": [512, 0, 32],
            "resolution": [4, 4, 40],
            "encoding": "raw",
            "chunk_size": [64, 64, 16],
        },
    }
    tensorstore.open(spec, create=True).result()[..., 0].write(made.transpose(2, 1, 0)).result()
    return str(folder / "em.precomputed"), made, {}


def one(folder: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    made = volume((1, 1100, 700))
    save_as(folder / "section.png", made[0])
    return str(folder / "section.png"), made, {}


SOURCES: dict[str, Callable[[Path], tuple[str, np.ndarray, dict[str, Any]]]] = {
    "slices from 0": slices("s_{:03}.png"),
    "slices that are numbered without zeros": slices("scan2-{}.png", first=8),
    "slices that outgrow their zeros": slices("s{:02}.png", first=97),
    "big-endian slices of 16 bits at an offset": slices("z{:04}.tif", first=200, dtype="uint16", byteorder=">"),
    "slices of 32 bits in tiles": slices("z{:04}.tif", dtype="uint32", tile=(64, 64), compression="deflate"),
    "slices with a hole": slices("s_{:03}.png", first=4, skip=(2,)),
    "tiles with columns and rows in their names": tiles,
    "tiles of CATMAID that begin in the middle of a chunk": catmaid,
    "pages of ImageJ": pages,
    "one channel of OME-Zarr": ome_zarr,
    "labels of 64 bits": labels,
    "NIfTI": nifti,
    "precomputed at an offset": precomputed,
    "one image": one,
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_proposed_reads_every_pixel(name: str, tmp_path: Path) -> None:
    source, pixels, chosen = SOURCES[name](tmp_path)
    proposal = propose(source, NAMES, host="api.bossdb.io", choices=SourceChoices.model_validate(chosen))
    made = assembled(proposal)
    (x, _), (y, _), (z, _) = (getattr(proposal.config.ingest_job.extent, axis) for axis in "xyz")
    assert np.array_equal(made[z:, y:, x:], pixels)
    assert proposal.datatype == pixels.dtype
    assert len(proposal.holes) == {"slices with a hole": 1}.get(name, 2 if "CATMAID" in name else 0)
    assert proposal.summary().startswith("mouse/em/raw: ")


@pytest.mark.parametrize(
    ("names", "pixel", "said"),
    [
        (["a.txt"], np.uint8(1), "there are no images"),
        (["a1.png", "a2.png", "b1.png", "b2.png"], np.uint8(1), "several kinds, such as a1.png and b1.png"),
        (["s10.png", "s20.png", "s30.png"], np.uint8(1), "10 apart"),
        (["1_1.png", "1_2.png", "2_1.png"], np.uint8(1), "write x, y and z before them"),
        (["z1x01.png", "z1x02.png", "z2x01.png"], np.uint8(1), "numbered 0, 1, 2"),
        (["s01.png", "s1.png", "s002.png"], np.uint8(1), "padded in several ways"),
        (["s1.tif", "s2.tif"], np.float32(1), "floating point"),
        (["s1.tif", "s2.tif"], np.int16(-1), "allow the conversion shift or clip"),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_to_do(
    names: list[str], pixel: Any, said: str, tmp_path: Path
) -> None:
    for name in names:
        if name.endswith(".txt"):
            (tmp_path / name).touch()
        else:
            save_as(tmp_path / name, np.full((8, 8), pixel))
    with pytest.raises(ConfigurationError, match=said):
        propose(tmp_path, NAMES, host="h")


def test_slices_that_differ_and_places_that_are_not_there_are_refused(tmp_path: Path) -> None:
    save_as(tmp_path / "s1.png", np.zeros((8, 8), "u1"))
    save_as(tmp_path / "s2.png", np.zeros((8, 9), "u1"))
    with pytest.raises(ConfigurationError, match=r"s2.png: is 8 bits deep of 9 x 8 pixels, s1.png is"):
        propose(tmp_path, NAMES, host="h")
    (tmp_path / "s2.png").write_bytes(b"none")
    with pytest.raises(SourceUnreadable, match=r"s2.png: is not an image"):
        propose(tmp_path, NAMES, host="h")
    with pytest.raises(ConfigurationError, match="no such file or folder"):
        propose(tmp_path / "nowhere", NAMES, host="h")
    source, _, _ = ome_zarr(tmp_path)
    with pytest.raises(ConfigurationError, match=r"2 indices on the axis c\. Say in the parameter c which"):
        propose(source, NAMES, host="h")


def test_the_configuration_of_another_ingest_is_not_written_over(tmp_path: Path) -> None:
    source, _, _ = slices("s_{:03}.png")(tmp_path)
    file, proposal = tmp_path / "ingest.json", propose(source, NAMES, host="h")
    assert [write_configuration(proposal, file) for _ in range(2)] == [True, False]
    other = propose(source, NAMES.model_copy(update={"channel": "other"}), host="h")
    with pytest.raises(ConfigurationError, match="is another configuration"):
        write_configuration(other, file)
    assert IngestConfig.load(file) == proposal.config
    assert write_configuration(other, file, replace=True)
    assert IngestConfig.load(file) == other.config


def test_the_command_shows_what_it_inferred_and_takes_what_is_set(tmp_path: Path) -> None:
    """`prefect-biomed boss-init`, which asks no Boss."""
    source, _, _ = slices("s_{:03}.png", first=4, skip=(2,))(tmp_path)
    asked = ["boss-init", source, str(tmp_path / "c.json"), "--channel", "mouse/em/raw"]
    done = CliRunner().invoke(app, [*asked, "-s", "datatype=uint16", "-s", "voxel_size=[4, 4, 40]"])
    assert done.exit_code == 0, done.output
    assert "600 x 300 x 5 voxels of uint16, image, each 4 x 4 x 40 nanometers" in done.output
    assert "Names are s_<o:4p:3>.png" in done.output
    assert "1 sources are missing, such as number 6" in done.output
    assert IngestConfig.load(tmp_path / "c.json").channel_path == "mouse/em/raw"
    for wrong in (["--channel", "mouse"], ["-s", "tile=100"], ["-s", "nothing=1"]):
        assert CliRunner().invoke(app, [*asked, *wrong]).exit_code == 2
