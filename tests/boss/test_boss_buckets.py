"""Volumes in a bucket as sources and as targets, on a server like S3 that is not ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import zarr
from moto.server import ThreadedMotoServer

from harness.ingest_lab import Lab, lab, make_lab, volume
from prefect_biomed.clients.boss import IngestConfig, VerifySettings, VolumeTarget, publish, verify
from prefect_biomed.clients.boss.plugins import base
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["lab", "make_lab"]

ALL = VerifySettings(share=1)
PIXELS = volume((20, 300, 600), "uint16")
EXTENT = {"x": [0, 600], "y": [0, 300], "z": [0, 20], "t": [0, 1]}
ZARR = "ingestclient.plugins.zarr.Zarr"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket named lab; yields the address of its server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-machine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-machine")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="lab")
    yield url
    server.stop()


def write_image(path: Path) -> None:
    image = zarr.open_group(path, mode="w", zarr_format=2)
    image.create_array("0", data=PIXELS[np.newaxis, np.newaxis], chunks=(1, 1, 16, 256, 256))
    axes = [{"name": axis} for axis in "tczyx"]
    image.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}]


def put(folder: Path, url: str, prefix: str) -> None:
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "lab", f"{prefix}/{file.relative_to(folder)}")


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_an_image_goes_into_the_boss_and_into_a_volume_with_every_voxel(lab: Lab, bucket: str, place: str) -> None:
    write_image(lab.folder / "image.zarr")
    params: dict[str, Any] = {"cloud_path": str(lab.folder / "image.zarr")}
    if place == "bucket":
        put(lab.folder / "image.zarr", bucket, "sources/image.zarr")
        params = {"cloud_path": "s3://lab/sources/image.zarr", "storage_options": {"endpoint_url": bucket}}
    chunk = {"x": 512, "y": 512, "z": 16}
    config = lab.volumetric(ZARR, params, EXTENT, channel="uint16", chunk_size=chunk)
    lab.ingest(config)
    assert np.array_equal(lab.read(PIXELS.shape, "uint16"), PIXELS)
    loaded = IngestConfig.load(config)
    look = verify(lab.client, loaded, ALL)
    assert (look.is_right, look.is_complete, look.unreadable) == (True, True, {})
    target = VolumeTarget(
        location=f"s3://lab/published/{place}",
        datatype="uint16",
        endpoint_url=bucket,
        region="us-east-1",
        chunk=(256, 256, 16),
    )
    report = publish(loaded, target, verification=ALL, ledger_folder=lab.folder / "ledgers")
    assert report.verification is not None
    assert (report.verification.is_right, report.verification.is_complete) == (True, True)


def test_what_is_not_there_and_what_may_not_be_read_are_told_apart_from_black(bucket: str, tmp_path: Path) -> None:
    job = {"extent": EXTENT, "chunk_size": {"x": 512, "y": 512, "z": 16}}

    def load(path: str, **options: Any) -> Any:
        given = {"cloud_path": path, "ingest_job": job, "storage_options": {"endpoint_url": bucket} | options}
        return base.load(f"{ZARR}ChunkProcessor", given)

    with pytest.raises(ConfigurationError, match="cannot be opened"):
        load("s3://lab/nothing.zarr")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        load("s3://no-such-bucket/image.zarr")
    with pytest.raises(ConfigurationError, match="requester_pays is none of anon, endpoint_url, region"):
        load("s3://lab/image.zarr", requester_pays=True)
