"""Chunks out of Zarr arrays and OME-Zarr images: axes by their names, one sample, one channel, one level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.local import LocalFileSystem

from harness.ingest_lab import Lab, lab, make_lab, volume
from prefect_biomed.clients.boss import IngestConfig, VerifySettings, preflight, verify
from prefect_biomed.clients.boss.plugins import base
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["lab", "make_lab"]

JOB = {"extent": {"x": [0, 48], "y": [0, 40], "z": [0, 20]}, "chunk_size": {"x": 32, "y": 32, "z": 16}}
SHAPE = {"t": 3, "c": 2, "z": 20, "y": 40, "x": 48}


def write_image(path: Path, axes: str, version: str = "0.4", group: str = "", levels: int = 2) -> np.ndarray:
    """Write an image as its specification has it; its values are those of (t, c, z, y, x)."""
    full = volume((6, 20, 40, 48), "uint16").reshape(tuple(SHAPE.values()))
    keep = tuple(slice(None) if axis in axes else 0 for axis in SHAPE)
    order = [axis for axis in SHAPE if axis in axes]
    pixels = full[keep].transpose([order.index(axis) for axis in axes])
    image = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3, path=group)
    for level in range(levels):
        part = tuple(slice(None, None, 1 if axis in "tc" else 2**level) for axis in axes)
        image.create_array(str(level), data=pixels[part], chunks=tuple(min(16, size) for size in pixels[part].shape))
    described = {
        "axes": [{"name": axis} for axis in axes],
        "datasets": [{"path": str(level)} for level in range(levels)],
    }
    if version == "0.4":
        image.attrs["multiscales"] = [described | {"version": version}]
    else:
        image.attrs["ome"] = {"version": version, "multiscales": [described]}
    return full


def load(path: Path | str, **params: Any) -> Any:
    return base.load(
        "ingestclient.plugins.zarr.ZarrChunkProcessor", {"cloud_path": str(path), "ingest_job": JOB} | params
    )


def assembled(plugin: Any) -> np.ndarray:
    """All chunks of the job, put together as the Boss does."""
    made = np.zeros((32, 64, 64), "uint16")
    for z in range(2):
        for y in range(2):
            for x in range(2):
                block, order = plugin.process("", x, y, z)
                assert order == base.ZYX_ORDER
                depth, height, width = block.shape
                made[16 * z : 16 * z + depth, 32 * y : 32 * y + height, 32 * x : 32 * x + width] = block
    return made[:20, :40, :48]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["tczyx", "czyx", "zyx", "xyzct", "yxztc"])
@pytest.mark.parametrize(
    ("group", "cloud_path", "params"),
    [
        ("", "a.zarr", {}),
        ("", "a.zarr", {"volume_name": "0"}),
        ("", "a.zarr/0/", {}),
        ("image", "a.zarr", {"volume_name": "image"}),
        ("image", "a.zarr", {"volume_name": "image/0"}),
    ],
)
def test_axes_are_taken_by_their_names(
    version: str, axes: str, group: str, cloud_path: str, params: dict[str, str], tmp_path: Path
) -> None:
    full = write_image(tmp_path / "a.zarr", axes, version, group)
    chosen = {axis: index for axis, index in (("t", 2), ("c", 1)) if axis in axes}
    plugin = load(f"{tmp_path}/{cloud_path}", **params, **chosen)
    assert np.array_equal(assembled(plugin), full[chosen.get("t", 0), chosen.get("c", 0)])


def test_a_level_is_chosen(tmp_path: Path) -> None:
    full = write_image(tmp_path / "a.zarr", "tczyx")
    block, _ = load(tmp_path / "a.zarr", t=0, c=0, level=1).process("", 0, 0, 0)
    assert np.array_equal(block, full[0, 0, ::2, ::2, ::2])
    with pytest.raises(ConfigurationError, match="levels 0 to 1, not 2"):
        load(tmp_path / "a.zarr", t=0, c=0, level=2)


def test_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    write_image(tmp_path / "a.zarr", "tczyx", group="0")
    with pytest.raises(ConfigurationError, match=r"0 images of OME-Zarr, not one.*there are: 0\."):
        load(tmp_path / "a.zarr")
    with pytest.raises(ConfigurationError, match=r"3 indices on the axis t\. Say in the parameter t"):
        load(tmp_path / "a.zarr", volume_name="0", c=0)
    with pytest.raises(ConfigurationError, match="2 indices on the axis c, not one of 2"):
        load(tmp_path / "a.zarr", volume_name="0", c=2, t=0)
    data = volume((2, 20, 40, 48), "uint16")
    zarr.open_group(tmp_path / "plain.zarr", mode="w").create_array("raw", data=data)
    with pytest.raises(ConfigurationError, match="axes are not told"):
        load(tmp_path / "plain.zarr", volume_name="raw")
    assert np.array_equal(assembled(load(tmp_path / "plain.zarr", volume_name="raw", axes="czyx", c=1)), data[1])


def test_names_of_zarr_3_are_followed_and_a_flat_image_is_one_slice(tmp_path: Path) -> None:
    data = volume((48, 40), "uint16")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("flat", data=data, dimension_names=["x", "y"])
    plugin = load(tmp_path / "a.zarr", volume_name="flat")
    assert np.array_equal(plugin.process("", 0, 0, 0)[0], data.T[np.newaxis, :32, :32])
    with pytest.raises(SourceUnreadable, match="outside the array"):
        plugin.process("", 0, 0, 1)


class Bucket(LocalFileSystem):
    """Storage that is readable for whoever says that he is nobody."""

    protocol = "bucket"

    def __init__(self, anon: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if not anon:
            raise PermissionError("no credentials")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("bucket://")


def test_storage_options_reach_the_driver(tmp_path: Path) -> None:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    full = write_image(tmp_path / "a.zarr", "zyx")
    url = f"bucket://{tmp_path / 'a.zarr'}"
    assert np.array_equal(assembled(load(url, storage_options={"anon": True})), full[0, 0])
    with pytest.raises(ConfigurationError, match="no credentials"):
        load(url)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_one_sample_and_channel_of_an_image_arrive_in_every_voxel(version: str, lab: Lab) -> None:
    full = write_image(lab.folder / "a.zarr", "tczyx", version)
    params = {"cloud_path": str(lab.folder / "a.zarr"), "t": 1, "c": 1}
    extent = {"x": [0, 48], "y": [0, 40], "z": [0, 20], "t": [0, 1]}
    config = lab.volumetric("ingestclient.plugins.zarr.Zarr", params, extent, channel="uint16")
    preflight(lab.client, IngestConfig.load(config))
    lab.ingest(config)
    assert np.array_equal(lab.read((20, 40, 48), "uint16"), full[1, 1])
    look = verify(lab.client, IngestConfig.load(config), VerifySettings(share=1))
    assert (look.wrong, look.unreadable, look.compared) == ((), {}, look.cuboids)
