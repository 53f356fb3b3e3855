"""Volumes in a bucket as sources and as targets, on a server like S3 that is not ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import boto3
import nibabel
import numpy as np
import pytest
import requests
import tensorstore
import tifffile
import zarr
from moto.server import ThreadedMotoServer

from harness.ingest_lab import Lab, lab, make_lab, volume
from prefect_biomed.blocks import StorageCredentials
from prefect_biomed.clients.boss import (
    IngestConfig,
    StorageOptions,
    VerifySettings,
    VolumeTarget,
    propose,
    publish,
    verify,
)
from prefect_biomed.clients.boss.config import Database
from prefect_biomed.clients.boss.plugins import base
from prefect_biomed.clients.boss.storage import key_value_store
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["lab", "make_lab"]

ALL = VerifySettings(share=1)
PIXELS = volume((20, 300, 600), "uint16")
SMALL = PIXELS[:18, :60, :70]
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


def write_image(path: Path, pixels: np.ndarray = PIXELS) -> None:
    image = zarr.open_group(path, mode="w", zarr_format=2)
    image.create_array("0", data=pixels[np.newaxis, np.newaxis], chunks=(1, 1, 16, 256, 256))
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


POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
VOLUME = "prefect_biomed.clients.boss.plugins.volume.Volume"


@pytest.fixture
def locked(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageCredentials]:
    """A bucket that only one user may read and write; the machine has the keys of nobody."""
    iam = boto3.client("iam", endpoint_url=bucket, region_name="us-east-1")
    name = uuid4().hex
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=json.dumps(POLICY))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    pixels = SMALL.transpose(2, 1, 0)
    write_image(tmp_path / "sources" / "image.zarr", SMALL)
    tifffile.imwrite(tmp_path / "sources" / "stack.tif", SMALL, metadata={"axes": "ZYX"}, imagej=True)
    nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4), dtype="uint16"), tmp_path / "sources" / "volume.nii")
    precomputed = {
        "driver": "neuroglancer_precomputed",
        "kvstore": f"file://{tmp_path / 'sources' / 'volume.precomputed'}/",
        "multiscale_metadata": {"type": "image", "data_type": "uint16", "num_channels": 1},
        "scale_metadata": {
            "size": pixels.shape,
            "encoding": "raw",
            "chunk_size": [256, 256, 16],
            "resolution": [1, 1, 1],
        },
    }
    tensorstore.open(precomputed, create=True).result()[..., 0].write(pixels).result()
    put(tmp_path / "sources", bucket, "sources")
    requests.post(f"{bucket}/moto-api/reset-auth", data=b"0", timeout=10)
    monkeypatch.setenv("SECRET_OF_THE_LAB", key["SecretAccessKey"])
    yield StorageCredentials(
        location="s3://lab",
        endpoint_url=bucket,
        access_key_id=key["AccessKeyId"],
        secret_access_key="env:SECRET_OF_THE_LAB",
    )
    requests.post(f"{bucket}/moto-api/reset-auth", data=b"inf", timeout=10)


def test_keys_of_a_block_open_every_kind_of_source_and_the_target(locked: StorageCredentials, tmp_path: Path) -> None:
    storage = locked.get_client()
    names = Database(collection="c", experiment="e", channel="ch")
    sources = ("image.zarr", "stack.tif", "volume.nii", "volume.precomputed")
    target = VolumeTarget(location="s3://lab/published", datatype="uint16", levels=1)
    for name in sources:
        proposal = propose(f"s3://lab/sources/{name}", names, host="nowhere.invalid", storage=storage)
        assert proposal.bounds == (70, 60, 18), name
        config = proposal.config.with_storage(storage)
        place = target.model_copy(update={"location": f"s3://lab/published/{name}"})
        report = publish(config, place, verification=ALL, storage=storage, ledger_folder=tmp_path)
        assert report.verification
        assert (report.verification.is_right, report.verification.is_complete) == (True, True), name
        assert "key" not in json.dumps(config.body()).lower()
        assert storage.secret_access_key
        assert StorageOptions(**storage.as_order()) == storage
        for text in (repr(config), repr(storage), config.model_dump_json(), report.model_dump_json()):
            assert storage.secret_access_key.get_secret_value() not in text


def test_keys_go_to_no_other_place_and_refusals_are_typed(locked: StorageCredentials, tmp_path: Path) -> None:
    names = Database(collection="c", experiment="e", channel="ch")
    ask = partial(propose, database=names, host="nowhere.invalid")
    storage = locked.get_client()
    with pytest.raises(ConfigurationError, match="does not lie there; nothing was sent"):
        ask("s3://laboratory/sources/image.zarr", storage=storage)
    wrong = storage.model_copy(update={"secret_access_key": StorageOptions(location="s3://x").secret_access_key})
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        ask("s3://lab/sources/image.zarr", storage=wrong)
    config = ask("s3://lab/sources/image.zarr", storage=storage).config.with_storage(storage)
    elsewhere = VolumeTarget(location="s3://lab/v", datatype="uint16", endpoint_url="http://127.0.0.1:9", region="x")
    with pytest.raises(ConfigurationError, match="endpoint_url and region of the target"):
        publish(config, elsewhere, storage=storage, ledger_folder=tmp_path)
    google = StorageOptions(location="gs://lab", service_account="{}")
    with pytest.raises(ConfigurationError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        publish(config, VolumeTarget(location="gs://lab/v"), storage=google, ledger_folder=tmp_path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"location": "gs://lab", "access_key_id": "k", "secret_access_key": "s"},
            "access_key_id.*of no use for gs://",
        ),
        ({"location": "s3://lab", "authorization": "Bearer x"}, "authorization: of no use for s3://"),
        ({"location": "https://lab", "endpoint_url": "http://x"}, "endpoint_url: of no use for https://"),
        ({"location": "s3://lab", "access_key_id": "k"}, "in part"),
    ],
)
def test_what_a_place_has_no_use_for_is_refused_and_not_left_aside(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        StorageCredentials(**given).get_client()


def test_options_of_google_storage_reach_each_of_its_readers_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)
    options = StorageOptions(location="gs://lab", endpoint_url="http://127.0.0.1:9", anonymous=True)
    told = options.obstore_arguments("gs")
    assert told["config"] == {"skip_signature": True, "base_url": "http://127.0.0.1:9"}
    read = key_value_store("gs://lab/v", {"storage": options})
    assert read == {"driver": "http", "base_url": "http://127.0.0.1:9", "path": "/lab/v/"}
    asked = {"storage_options": {"endpoint_url": "http://127.0.0.1:9"}}
    with pytest.raises(ConfigurationError, match="TENSORSTORE_GCS_HTTP_URL"):
        key_value_store("gs://lab/v", asked)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    assert key_value_store("gs://lab/v", asked)["driver"] == "gcs"
    with pytest.raises(ConfigurationError, match="region is of no use for gs://"):
        key_value_store("gs://lab/v", {"storage_options": {"region": "r"}})


class Guarded(SimpleHTTPRequestHandler):
    """Files for whoever says the word."""

    def send_head(self) -> Any:
        if self.headers.get("Authorization") != "Bearer of-the-lab":
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def test_a_web_server_gets_the_authorization_that_was_saved_for_it(locked: StorageCredentials, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(tmp_path / "sources")))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    names = Database(collection="c", experiment="e", channel="ch")
    storage = StorageOptions(location=url, authorization="Bearer of-the-lab")
    try:
        for name in ("volume.precomputed", "volume.nii"):
            found = propose(f"{url}/{name}", names, host="nowhere.invalid", storage=storage)
            assert found.bounds == (70, 60, 18), name
            with pytest.raises(ConfigurationError, match="cannot be opened"):
                propose(f"{url}/{name}", names, host="nowhere.invalid")
    finally:
        server.shutdown()
        server.server_close()
