"""Volumes on a server like Google Cloud Storage that is not ours."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import requests

from harness.ingest_lab import Lab, lab, make_lab, volume
from harness.postgresql import free_port
from prefect_biomed.clients.boss import IngestConfig, StorageOptions, VerifySettings, VolumeTarget, publish
from prefect_biomed.clients.boss._keys import Position
from prefect_biomed.clients.boss.sources import ChunkSource
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["lab", "make_lab"]

pytestmark = pytest.mark.conformance
PLUGIN = "prefect_biomed.clients.boss.plugins.volume.Volume"
PIXELS = volume((16, 512, 600), "uint16")
EXTENT = {"x": [0, 600], "y": [0, 512], "z": [0, 16], "t": [0, 1]}


@pytest.fixture(scope="module")
def google(official_environment: Any) -> Iterator[str]:
    """A bucket named lab; yields the address of its server, which is also that of TensorStore."""
    interpreter = official_environment("gcp-storage-emulator", ["gcp-storage-emulator==2026.7.19"])
    port = free_port()
    program = str(interpreter.parent / "gcp-storage-emulator")
    command = [program, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "lab"]
    url, silent = f"http://127.0.0.1:{port}", subprocess.DEVNULL
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stdout=silent, stderr=silent) as server:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        try:
            _wait_until_it_answers(url)
            yield url
        finally:
            server.terminate()


def _wait_until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            requests.get(url, timeout=5)
        except requests.ConnectionError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(url)


def _config(lab: Lab, plugin: str, params: dict[str, Any]) -> IngestConfig:
    return IngestConfig.load(
        lab.volumetric(plugin, params, EXTENT, channel="uint16", chunk_size={"x": 512, "y": 512, "z": 16})
    )


@pytest.mark.parametrize(("kind", "first_file"), [("precomputed", "info"), ("ome-zarr", "zarr.json")])
def test_a_volume_is_published_there_and_proved(
    kind: Literal["precomputed", "ome-zarr"], first_file: str, google: str, lab: Lab, tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", PIXELS)
    config = _config(lab, "prefect_biomed.clients.boss.plugins.arrays.Array", {"filename": str(tmp_path / "v.npy")})
    target = VolumeTarget(location=f"gs://lab/{kind}", format=kind, datatype="uint16", levels=2)
    report = publish(config, target, verification=VerifySettings(share=1), ledger_folder=tmp_path)
    assert report.verification
    assert (report.verification.compared, len(report.verification.wrong)) == (2, 0)
    assert requests.get(f"{google}/lab/{kind}/{first_file}", timeout=10).json()
    if kind == "precomputed":
        _is_read_back(lab, google, f"gs://lab/{kind}")
    elsewhere = StorageOptions(location="gs://lab", endpoint_url="http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="TENSORSTORE_GCS_HTTP_URL of the worker only"):
        publish(config, target, storage=elsewhere, ledger_folder=tmp_path)
    nobody = StorageOptions(location="gs://lab", anonymous=True)
    with pytest.raises(ConfigurationError, match="nobody writes to GCS"):
        publish(config, target, storage=nobody, ledger_folder=tmp_path)


def _is_read_back(lab: Lab, google: str, source: str) -> None:
    """By the worker's own keys, of which there are none, and as nobody."""
    for options in ({}, {"anon": True, "endpoint_url": google}):
        params = {"source": source, "kind": "precomputed", "c": 0, "storage_options": options}
        chunks = ChunkSource(_config(lab, PLUGIN, params), "uint16")
        assert np.array_equal(chunks.read(Position(1, 0, 0, 0)), PIXELS[:, :, 512:])
