"""OME-Zarr from a server like S3 and from disk, into the Boss and into published volumes, compared in every voxel.

    PYTHONPATH=tests python -m benchmarks.boss_volumes [--side 1024] [--depth 64]

The server is moto's, not ours; the Boss is the sandbox. Seconds are those of writing and of comparing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import boto3
import numpy as np
import zarr
from moto.server import ThreadedMotoServer
from rich.console import Console
from rich.table import Table

from harness.ingest_lab import FAST, Lab, volume
from prefect_biomed.clients.boss import (
    BossClient,
    IngestConfig,
    StorageOptions,
    Verification,
    VerifySettings,
    VolumeTarget,
    publish,
    verify,
    write_cutouts,
)
from prefect_biomed.sandbox import Sandbox

_ALL = VerifySettings(share=1)
_PLUGIN = "ingestclient.plugins.zarr.Zarr"
_TARGETS = ("ingest job", "cutout service", "precomputed", "ome-zarr")


def main() -> None:
    """Write each source to each destination, and print what was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="voxels in x and y")
    parser.add_argument("--depth", type=int, default=64, help="voxels in z")
    given = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nobody"}
    with tempfile.TemporaryDirectory() as name:
        os.environ["PREFECT_BIOMED_HOME"] = name
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            url = "http://{}:{}".format(*server.get_host_and_port())
            Console(width=140).print(_table(Path(name), url, (given.depth, given.side, given.side)))
        finally:
            server.stop()


def _table(folder: Path, url: str, shape: tuple[int, int, int]) -> Table:
    pixels = volume(shape, "uint16")
    group = zarr.open_group(folder / "image.zarr", mode="w", zarr_format=3)
    group.create_array("0", data=pixels, chunks=(16, 256, 256))
    described = {"axes": [{"name": axis} for axis in "zyx"], "datasets": [{"path": "0"}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [described]}
    bucket = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    bucket.create_bucket(Bucket="lab")
    for file in (folder / "image.zarr").rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), "lab", str(file.relative_to(folder)))
    storage = StorageOptions(location="s3://lab", endpoint_url=url)
    table = Table(
        "from", "to", "cuboids compared", "wrong", "seconds", title=f"{' x '.join(map(str, shape))} of uint16"
    )
    for source, place in (("bucket", "s3://lab/image.zarr"), ("disk", str(folder / "image.zarr"))):
        for target in _TARGETS:
            begun = time.monotonic()
            with Sandbox("boss", boss=FAST) as sandbox:
                facts = sandbox.ready()["boss"]
                client = BossClient(
                    facts["host"], facts["tokens"]["alice"], protocol="http", aws_endpoint_url=facts["url"]
                )
                lab = Lab(sandbox.boss, folder, client)
                look = _written(lab, place, target, pixels, storage, f"s3://lab/{source}-{target}")
                client.close()
            seconds = f"{time.monotonic() - begun:.1f}"
            table.add_row(source, target, f"{look.compared} of {look.cuboids}", str(look.wrong_cuboids), seconds)
    return table


def _written(
    lab: Lab, place: str, target: str, pixels: np.ndarray, storage: StorageOptions, location: str
) -> Verification:
    extent: dict[str, Any] = dict(zip("zyx", ([0, length] for length in pixels.shape), strict=True)) | {"t": [0, 1]}
    sizes = {"x": 512, "y": 512, "z": 16}
    made = lab.volumetric(_PLUGIN, {"cloud_path": place}, extent, channel="uint16", chunk_size=sizes)
    config = IngestConfig.load(made).with_storage(storage)
    if target == "ingest job":
        job = lab.client.create(config)
        lab.upload(config, job.id)
        lab.complete(job.id)
        return verify(lab.client, config, _ALL)
    if target == "cutout service":
        found = write_cutouts(lab.client, config, verification=_ALL).verification
    else:
        form: Literal["precomputed", "ome-zarr"] = "precomputed" if target == "precomputed" else "ome-zarr"
        there = VolumeTarget(location=location, format=form, datatype="uint16", levels=2)
        found = publish(config, there, verification=_ALL, storage=storage).verification
    assert found is not None
    return found


if __name__ == "__main__":
    main()
