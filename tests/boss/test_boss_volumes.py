"""Volumes of every format: voxels arrive as the files hold them, and what cannot be told is refused by name."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import zarr
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from harness.ingest_lab import Lab, lab, make_lab, volume
from prefect_biomed.clients.boss import IngestConfig, images, preflight
from prefect_biomed.clients.boss._keys import Position
from prefect_biomed.clients.boss.errors import SourceTooSmall
from prefect_biomed.clients.boss.images import TileFormat
from prefect_biomed.clients.boss.plugins import base
from prefect_biomed.clients.boss.sources import ChunkSource, TileSource
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["lab", "make_lab"]

PLUGIN = "prefect_biomed.clients.boss.plugins.volume.Volume"
SHAPE = (20, 40, 48)
JOB = {"chunk_size": {"x": 32, "y": 32, "z": 16}, "tile_size": {"x": 32, "y": 32, "z": 1, "t": 1}}
Write = Callable[[Path, np.ndarray], dict[str, Any]]


def write_zarr(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    zarr.save_array(folder / "a.zarr", pixels)
    return {"source": str(folder / "a.zarr")}


def write_n5(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    """By the specification: x first, blocks with a header, big endian."""
    root, block = folder / "a.n5" / "setup0" / "timepoint0" / "s0", (16, 16, 16)
    root.mkdir(parents=True)
    about = {"dimensions": pixels.shape[::-1], "blockSize": block, "dataType": "uint16", "compression": {"type": "raw"}}
    (root / "attributes.json").write_text(json.dumps(about))
    (root.parent / "attributes.json").write_text(json.dumps({"resolution": [1, 1, 1]}))
    for z, y, x in itertools.product(*(range(0, size, 16) for size in pixels.shape)):
        part = pixels[z : z + 16, y : y + 16, x : x + 16]
        path = root / str(x // 16) / str(y // 16) / str(z // 16)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(struct.pack(">HH3I", 0, 3, *part.shape[::-1]) + part.astype(">u2").tobytes())
    return {"source": str(folder / "a.n5")}


def write_precomputed(folder: Path, pixels: np.ndarray, offset: tuple[int, int, int] = (0, 0, 0)) -> dict[str, Any]:
    """By the specification: raw chunks named by their ranges, x first, little endian."""
    root = folder / "a.precomputed"
    (root / "1").mkdir(parents=True)
    scale = {"key": "1", "size": pixels.shape[::-1], "resolution": [1, 1, 1], "voxel_offset": offset}
    scale |= {"chunk_sizes": [[16, 16, 16]], "encoding": "raw"}
    info = {"@type": "neuroglancer_multiscale_volume", "type": "image", "data_type": "uint16", "num_channels": 1}
    (root / "info").write_text(json.dumps(info | {"scales": [scale]}))
    for z, y, x in itertools.product(*(range(0, size, 16) for size in pixels.shape)):
        part = pixels[z : z + 16, y : y + 16, x : x + 16]
        lows = [low + first for low, first in zip((x, y, z), offset, strict=True)]
        spans = [f"{low}-{low + size}" for low, size in zip(lows, part.shape[::-1], strict=True)]
        (root / "1" / "_".join(spans)).write_bytes(part.astype("<u2").tobytes())
    return {"source": str(root)}


def write_bigdataviewer(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    with h5py.File(folder / "a.h5", "w") as file:
        file["t00000/s00/0/cells"] = pixels.view("int16")
        file["t00001/s00/0/cells"] = pixels[::-1].view("int16")
        file["s00/resolutions"] = np.ones((1, 3))
    return {"source": str(folder / "a.h5")}


def write_hdf5(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    with h5py.File(folder / "b.HDF5", "w") as file:
        file.create_dataset("deep/raw", data=pixels.astype(">u2"), chunks=(8, 8, 8), compression="gzip")
    return {"source": str(folder / "b.HDF5")}


def write_pages(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    tifffile.imwrite(folder / "a.TIF", pixels, byteorder=">", photometric="minisblack")
    return {"source": str(folder / "a.TIF")}


def write_ome_tiff(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    both = np.stack([pixels[::-1], pixels])
    tifffile.imwrite(folder / "a.ome.tif", both, metadata={"axes": "CZYX"}, photometric="minisblack")
    return {"source": str(folder / "a.ome.tif"), "c": 1}


def write_nifti(folder: Path, pixels: np.ndarray, name: str = "a.nii.gz") -> dict[str, Any]:
    nibabel.save(nibabel.Nifti1Image(pixels.T.astype(">u2"), np.eye(4), dtype="uint16"), folder / name)
    return {"source": str(folder / name)}


def write_dicom(folder: Path, pixels: np.ndarray, uid: str = "1.2.3", **changes: Any) -> dict[str, Any]:
    """Slices whose names and numbers say another order than their positions, beside what lies in folders."""
    root = folder / "dicom"
    root.mkdir(exist_ok=True)
    for z, plane in enumerate(pixels):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.4"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        one = pydicom.Dataset()
        one.file_meta, one.SeriesInstanceUID, one.InstanceNumber = meta, uid, (z * 7) % 20
        one.Rows, one.Columns = plane.shape
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * z - 30]
        one.PixelData = plane.astype("<u2").tobytes()
        for name, value in changes.items():
            setattr(one, name, value)
        one.save_as(root / f"{uid}-{(z * 7) % 20:03}.DCM", enforce_file_format=True)
    (root / ".DS_Store").write_bytes(b"\0")
    (root / "Thumbs.db").write_bytes(b"\0")
    (root / "notes.txt").write_text("by hand")
    return {"source": str(root)}


def load(params: dict[str, Any], kind: str = "ChunkProcessor", **more: Any) -> Any:
    return base.load(PLUGIN + kind, params | more | {"ingest_job": JOB})


def assembled(plugin: Any) -> np.ndarray:
    """All chunks, put together as the Boss does."""
    made = np.zeros((32, 64, 64), "uint16")
    for z, y, x in itertools.product(range(2), repeat=3):
        (block, before), order = plugin.process("", x, y, z)
        assert order == base.ZYX_ORDER
        first = [16 * z + before[0], 32 * y + before[1], 32 * x + before[2]]
        made[tuple(slice(low, low + length) for low, length in zip(first, block.shape, strict=True))] = block
    return made


@pytest.mark.parametrize(
    "write",
    [
        write_zarr,
        write_n5,
        write_precomputed,
        write_bigdataviewer,
        write_hdf5,
        write_pages,
        write_ome_tiff,
        write_nifti,
        lambda folder, pixels: write_nifti(folder, pixels, "a.nii"),
        write_dicom,
    ],
)
def test_chunks_and_tiles_hold_what_the_files_hold(write: Write, tmp_path: Path) -> None:
    pixels = volume(SHAPE, "uint16")
    params = write(tmp_path, pixels)
    made = assembled(load(params))
    assert np.array_equal(made[:20, :40, :48], pixels)
    assert not made[20:].any()
    assert np.array_equal(load(params, "TileProcessor").process("", 1, 1, 19).values, pixels[19, 32:, 32:])
    with pytest.raises(SourceUnreadable, match="nothing at z 32 to 48"):
        load(params).process("", 0, 0, 2)


def test_a_volume_lies_where_it_says_or_where_one_says(tmp_path: Path) -> None:
    pixels = volume(SHAPE, "uint16")
    told = write_precomputed(tmp_path, pixels, offset=(8, 4, 2))
    assert np.array_equal(assembled(load(told))[2:22, 4:44, 8:56], pixels)
    given = write_pages(tmp_path, pixels) | {"origin": {"z": 3}}
    assert np.array_equal(assembled(load(given))[3:23, :40, :48], pixels)


@pytest.mark.parametrize("axis", "xyz")
def test_a_volume_that_begins_behind_the_extent_is_refused_unless_padding_is_allowed(axis: str, lab: Lab) -> None:
    pixels = volume((16, 512, 512))
    written = write_pages(lab.folder, pixels) | {"origin": {axis: 3}}
    config = IngestConfig.load(
        lab.volumetric(PLUGIN, written, {"x": [0, 512], "y": [0, 512], "z": [0, 16], "t": [0, 1]})
    )
    number = "zyx".index(axis)
    with pytest.raises(SourceTooSmall, match=r"begins late, at .*3.* of which \(16, 512, 512\) lie .* 'pad'"):
        ChunkSource(config, "uint8").read(Position(0, 0, 0, 0))
    source = ChunkSource(config, "uint8", convert={"pad"})
    content, made = source.piece(Position(0, 0, 0, 0))
    read = np.moveaxis(content, number, 0)
    assert made == "padded"
    assert np.array_equal(read[3:], np.moveaxis(pixels, number, 0)[: len(read) - 3])
    assert not read[:3].any()


def test_tiles_of_a_volume_that_begins_late_are_filled_in_front_and_samples_it_lacks_are_refused(lab: Lab) -> None:
    pixels = volume((1, 512, 512))
    written = write_pages(lab.folder, pixels) | {"origin": {"x": 100}}
    config = lab.config(extent={"x": [0, 512], "y": [0, 512], "z": [0, 1], "t": [0, 2]})
    for kind in ("path", "tile"):
        config["client"][f"{kind}_processor"] = {"class": f"{PLUGIN}{kind.title()}Processor", "params": written}
    form = TileFormat(512, 512, "uint8", fill=7, convert=frozenset({"pad"}))
    source = TileSource(IngestConfig.load(config), form, 1 << 20)
    content, made = source.piece(Position(0, 0, 0, 0))
    read = np.frombuffer(images.pixels(content, form, "tile"), "uint8").reshape(512, 512)
    assert made == "padded"
    assert np.array_equal(read[:, 100:], pixels[0, :, :412])
    assert (read[:, :100] == 7).all()
    with pytest.raises(SourceTooSmall, match=r"begins late, at \(100, 0\)"):
        TileSource(IngestConfig.load(config), TileFormat(512, 512, "uint8"), 1 << 20).read(Position(0, 0, 0, 0))
    with pytest.raises(SourceUnreadable, match="has no sample 1"):
        source.read(Position(0, 0, 0, 1))


def test_a_chunk_that_is_missing_is_no_black_one(tmp_path: Path) -> None:
    params = write_precomputed(tmp_path, volume(SHAPE, "uint16"))
    (tmp_path / "a.precomputed" / "1" / "32-48_32-40_16-20").unlink()
    with pytest.raises(SourceUnreadable, match="cannot be read at x 32, y 32, z 16"):
        load(params).process("", 1, 1, 1)
    assert not load(params, missing_chunks="fill").process("", 1, 1, 1)[0].values.any()


@pytest.mark.parametrize(("kind", "said"), [("hdf5", "refuse"), ("zarr", "refuse"), ("n5", "fil")])
def test_what_becomes_of_missing_chunks_is_not_said_in_vain(kind: str, said: str, tmp_path: Path) -> None:
    """Readers of Zarr and HDF5 take the fill value for them without a word."""
    write = {"hdf5": write_hdf5, "zarr": write_zarr, "n5": write_n5}[kind]
    with pytest.raises(ConfigurationError, match=f"missing_chunks is '{said}'"):
        load(write(tmp_path, volume(SHAPE, "uint16")), missing_chunks=said)


@pytest.mark.parametrize("lacking", [None, "file", "dataset"])
def test_a_virtual_dataset_is_read_when_all_its_parts_are_there(lacking: str | None, tmp_path: Path) -> None:
    pixels = volume(SHAPE, "uint16")
    layout = h5py.VirtualLayout(SHAPE, "uint16")
    for z in (0, 10):
        with h5py.File(tmp_path / f"part{z}.h5", "w") as file:
            file["other" if lacking == "dataset" and z else "a"] = pixels[z : z + 10]
        layout[z : z + 10] = h5py.VirtualSource(f"part{z}.h5", "a", shape=(10, *SHAPE[1:]))
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("a", layout)
    if lacking == "file":
        (tmp_path / "part10.h5").unlink()
    if lacking:
        with pytest.raises(ConfigurationError, match=r"lie in part10\.h5:a, which is not there"):
            load({"source": str(tmp_path / "all.h5")})
    else:
        assert np.array_equal(assembled(load({"source": str(tmp_path / "all.h5")}))[:20, :40, :48], pixels)


@pytest.mark.parametrize("nbytes", [0, -1, None])
def test_values_of_hdf5_in_a_file_beside_it_are_read_when_they_are_all_there(
    nbytes: int | None, tmp_path: Path
) -> None:
    pixels, raw = volume(SHAPE, "uint16"), tmp_path / "a.raw"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", SHAPE, "uint16", external=[(raw, 0, h5py.h5f.UNLIMITED)])
    if nbytes is not None:
        raw.write_bytes(pixels.tobytes()[: nbytes or None])
    if nbytes == 0:
        assert np.array_equal(assembled(load({"source": str(tmp_path / "a.h5")}))[:20, :40, :48], pixels)
    else:
        with pytest.raises(ConfigurationError, match=r"lie in .*a\.raw, which is not there or too short"):
            load({"source": str(tmp_path / "a.h5")})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, r"values are PALETTE COLOR, not grey.*stored=true"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, r"white is zero.*stored=true"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, r"looked up in a table.*stored=true"),
        ({"RescaleSlope": "2", "RescaleIntercept": ""}, r"times 2 and plus 0.*stored=true"),
        ({"BitsStored": 12}, r"12 bits end at bit 15"),
        pytest.param(
            {"ImagePositionPatient": ["nan", 0, 0]},
            r"position .* is none",
            marks=pytest.mark.filterwarnings("ignore:Invalid value for VR"),
        ),
    ],
)
def test_slices_whose_values_or_places_are_not_what_they_seem_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load(write_dicom(tmp_path, volume(SHAPE, "uint16"), **changes))


def test_a_slope_that_is_empty_is_none(tmp_path: Path) -> None:
    pixels = volume(SHAPE, "uint16")
    params = write_dicom(tmp_path, pixels, RescaleSlope="", RescaleIntercept="")
    assert np.array_equal(assembled(load(params))[:20, :40, :48], pixels)


def test_slices_that_make_no_volume_are_refused_by_name(tmp_path: Path) -> None:
    pixels = volume(SHAPE, "uint16")
    params = write_dicom(tmp_path, pixels)
    write_dicom(tmp_path, pixels[::-1], uid="4.5.6")
    with pytest.raises(ConfigurationError, match=r"2 series.*1\.2\.3 \(20 slices.*4\.5\.6"):
        load(params)
    assert np.array_equal(assembled(load(params, series="4.5.6"))[:20, :40, :48], pixels[::-1])
    write_dicom(tmp_path, pixels[::-1], uid="4.5.6", RescaleIntercept=-1024, RescaleSlope=1)
    with pytest.raises(ConfigurationError, match=r"plus -1024.*stored=true"):
        load(params, series="4.5.6")
    assert np.array_equal(assembled(load(params, series="4.5.6", stored=True))[:20, :40, :48], pixels[::-1])
    (tmp_path / "dicom" / "1.2.3-014.DCM").unlink()
    with pytest.raises(ConfigurationError, match=r"1\.2\.3-007\.DCM and .*1\.2\.3-001\.DCM.*slices are missing"):
        load(params, series="1.2.3")
    (tmp_path / "dicom" / "4.5.6-003.DCM").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"4\.5\.6-003\.DCM: is no readable DICOM"):
        load(params, series="4.5.6")


def test_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    pixels = volume(SHAPE, "uint16")
    colours = np.stack([pixels[..., :40], pixels[..., 8:], pixels[..., 4:44]], axis=-1).astype("uint8")
    tifffile.imwrite(tmp_path / "rgb.tif", colours, photometric="rgb")
    with pytest.raises(ConfigurationError, match="3 indices on the axis s"):
        load({"source": str(tmp_path / "rgb.tif")})
    scaled = nibabel.Nifti1Image(pixels.T, np.eye(4), dtype="uint16")
    scaled.header.set_slope_inter(2, 1)
    scaled.to_filename(tmp_path / "scaled.nii")
    with pytest.raises(ConfigurationError, match=r"multiplied by 2.*stored=true"):
        load({"source": str(tmp_path / "scaled.nii")})
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"], file["b"] = pixels, pixels
    with pytest.raises(ConfigurationError, match="there are: a, b"):
        load({"source": str(tmp_path / "two.h5")})
    pages, nifti = write_pages(tmp_path, pixels), write_nifti(tmp_path, pixels)
    for params, name in ((pages, "t"), (nifti, "level"), (nifti, "c")):
        with pytest.raises(ConfigurationError, match=f"nothing to choose by {name}, which is 1"):
            load(params, **{name: 1})
    moved = write_bigdataviewer(tmp_path, pixels)
    assert np.array_equal(assembled(load(moved, t=1))[:20, :40, :48], pixels[::-1])
    with pytest.raises(ConfigurationError, match="which kind it is cannot be told"):
        load({"source": str(tmp_path)})
    for name in ("none.n5", "none.precomputed", "none.tif", "none.nii", "none.h5", "none.zarr"):
        with pytest.raises(ConfigurationError, match=name):
            load({"source": str(tmp_path / name)})


def test_files_are_read_through_fsspec(tmp_path: Path) -> None:
    pixels = volume(SHAPE, "uint16")
    memory = fsspec.filesystem("memory")
    for write in (write_hdf5, write_pages, write_nifti, write_dicom):
        params = write(tmp_path, pixels)
        name = f"/volumes/{Path(params['source']).name}"
        memory.put(params["source"], name, recursive=True)
        params |= (
            {"source": f"memory:/{name}", "kind": "dicom"} if write is write_dicom else {"source": f"memory:/{name}"}
        )
        assert np.array_equal(assembled(load(params))[:20, :40, :48], pixels)


def test_a_series_of_dicom_slices_arrives_in_every_voxel(lab: Lab) -> None:
    pixels = volume(SHAPE, "uint16")
    extent = {"x": [0, 48], "y": [0, 40], "z": [0, 20], "t": [0, 1]}
    config = lab.volumetric(PLUGIN, write_dicom(lab.folder, pixels), extent, channel="uint16")
    preflight(lab.client, IngestConfig.load(config))
    lab.ingest(config)
    assert np.array_equal(lab.read(SHAPE, "uint16"), pixels)
