"""A Boss on loopback, real image stacks, and a client of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prefect_biomed.clients.boss import (
    BossClient,
    Completion,
    IngestConfig,
    IngestJob,
    Uploader,
    UploadReport,
    UploadSettings,
    complete,
    wait_until_ready,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.boss import BossSandbox, Job

FAST = {"prepare_seconds": 0.0, "quiet_seconds": 0.1, "completing_seconds": 0.0}
SOON = PollSettings(0.05, deadline_seconds=30)
QUICK = UploadSettings(threads=8, min_lease_seconds=20)


def volume(shape: tuple[int, ...], dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """Structured pixels that differ everywhere: a mistake in placement cannot go unseen."""
    weights = (40503, 2654435, 97, 31)[-len(shape) :]
    axes = np.ogrid[tuple(slice(length) for length in shape)]
    values = sum(axis * weight for axis, weight in zip(axes, weights, strict=True)) + 7 * seed
    return (values % (min(np.iinfo(dtype).max, 2**62) - 1) + 1).astype(dtype)


@dataclass
class Lab:
    """Everything a test needs to ingest something and look at the result."""

    boss: BossSandbox
    folder: Path
    client: BossClient
    created: list[int] = field(default_factory=list)

    def config(self, **changes: Any) -> dict[str, Any]:
        """A CATMAID configuration of version 0.1; keywords replace parts of `ingest_job` and of the rest."""
        stack = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
        params = {"root_dir": str(self.folder / "stack"), "filetype": "png"}
        config = {
            "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
            "client": {
                "backend": {
                    "name": "boss",
                    "class": "BossBackend",
                    "host": self.boss.ready()["host"],
                    "protocol": "http",
                },
                "path_processor": {"class": f"{stack}PathProcessor", "params": params},
                "tile_processor": {"class": f"{stack}TileProcessor", "params": {"filetype": "png"}},
            },
            "database": {"collection": "sandbox", "experiment": "stack", "channel": changes.pop("channel", "uint8")},
            "ingest_job": {
                "resolution": 0,
                "extent": {"x": [0, 512], "y": [0, 512], "z": [0, 16], "t": [0, 1]},
                "tile_size": {"x": 512, "y": 512, "z": 1, "t": 1},
            },
        }
        for key in ("path_processor", "tile_processor"):
            if key in changes:
                config["client"][key] = changes.pop(key)
        config["ingest_job"].update(changes)
        return config

    def volumetric(self, plugin: str, params: dict[str, Any], extent: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """A volumetric configuration of version 0.2."""
        config = self.config(channel=changes.pop("channel", "uint8"))
        del config["client"]["tile_processor"], config["ingest_job"]["tile_size"]
        config["schema"] = {"name": "boss-v0.2-schema", "validator": "BossValidatorV02"}
        module, _, name = plugin.rpartition(".")
        config["client"]["path_processor"] = {"class": f"{module}.{name}PathProcessor", "params": params}
        config["client"]["chunk_processor"] = {"class": f"{module}.{name}ChunkProcessor", "params": params}
        config["ingest_job"] |= {"ingest_type": "volumetric", "extent": extent}
        config["ingest_job"]["chunk_size"] = changes.pop("chunk_size", {"x": 1024, "y": 512, "z": 32})
        return config

    def write_stack(self, pixels: Iterable[np.ndarray], tile: int = 512, **save: Any) -> Path:
        """Write (z, y, x) as a CATMAID stack of type 1; tiles at the edges are as small as the data."""
        root = self.folder / "stack"
        for z, plane in enumerate(pixels):
            (root / str(z)).mkdir(parents=True, exist_ok=True)
            for y in range(0, plane.shape[0], tile):
                for x in range(0, plane.shape[1], tile):
                    part = Image.fromarray(plane[y : y + tile, x : x + tile])
                    part.save(root / str(z) / f"{y // tile}_{x // tile}_0.png", compress_level=1, **save)
        return root

    def create(self, config: dict[str, Any]) -> tuple[IngestConfig, IngestJob]:
        """Make a job."""
        loaded = IngestConfig.load(config)
        job = self.client.create(loaded)
        self.created.append(job.id)
        return loaded, job

    def uploader(self, config: IngestConfig, job_id: int, settings: UploadSettings = QUICK, **more: Any) -> Uploader:
        """An uploader with a ledger in the test's folder, on a job that is ready."""
        joined = wait_until_ready(self.client, job_id, SOON)
        more = {"ledger_folder": self.folder / "ledgers"} | more
        return Uploader(self.client, config, job_id, settings, joined=joined, **more)

    def upload(self, config: IngestConfig, job_id: int, settings: UploadSettings = QUICK, **more: Any) -> UploadReport:
        """Upload all that the queue has."""
        uploader = self.uploader(config, job_id, settings, **more)
        try:
            return uploader.run()
        finally:
            uploader.close()

    def complete(self, job_id: int) -> Completion:
        """Complete a job."""
        return complete(self.client, job_id, SOON, ledger_folder=self.folder / "ledgers")

    def ingest(self, config: dict[str, Any], settings: UploadSettings = QUICK) -> tuple[UploadReport, Job]:
        """All of it: create, upload, complete."""
        loaded, job = self.create(config)
        report = self.upload(loaded, job.id, settings)
        assert self.complete(job.id).outcome == "COMPLETE"
        return report, self.boss.job(job.id)

    def read(self, shape: tuple[int, int, int], channel: str = "uint8", t: tuple[int, int] = (0, 1)) -> np.ndarray:
        """Read (z, y, x) from the origin back, or (t, z, y, x) for more than one sample."""
        depth, height, width = shape
        block = self.boss.cutout(f"sandbox/stack/{channel}", x=(0, width), y=(0, height), z=(0, depth), t=t)
        return block[0] if t == (0, 1) else block


@pytest.fixture
def make_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lab]]:
    monkeypatch.setenv("PREFECT_BIOMED_HOME", str(tmp_path / "home"))
    running: list[Sandbox] = []

    def make(user: str = "alice", **switches: Any) -> Lab:
        sandbox = Sandbox("boss", boss=FAST | switches)
        sandbox.start()
        running.append(sandbox)
        boss = sandbox.boss
        assert isinstance(boss, BossSandbox)
        facts = boss.ready()
        client = BossClient(facts["host"], facts["tokens"][user], protocol="http", aws_endpoint_url=boss.url)
        made = Lab(boss, tmp_path, client)
        made.write_stack(np.zeros((1, 512, 512), "uint8"))  # no job is made of sources of which none can be read
        return made

    yield make
    for sandbox in running:
        sandbox.stop()


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()
