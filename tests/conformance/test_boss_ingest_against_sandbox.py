"""The official ingest client, unmodified from PyPI, works against the sandbox, and shares jobs with ours."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.boss import BOSS_INGEST
from harness.ingest_lab import QUICK, Lab, lab, make_lab, volume
from prefect_biomed.clients.boss import IngestConfig, JobStatus, UploadReport
from prefect_biomed.sandbox.boss import Job

__all__ = ["lab", "make_lab"]

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]

EXTENT = {"x": [0, 1024], "y": [0, 512], "z": [0, 20], "t": [0, 1]}
SHAPE = (20, 512, 1024)


@pytest.fixture(scope="session")
def boss_ingest(official_environment: Callable[..., Path]) -> Path:
    return official_environment(*BOSS_INGEST).parent / "boss-ingest"


@pytest.fixture
def stack(lab: Lab) -> np.ndarray:
    pixels = volume(SHAPE)
    lab.write_stack(pixels)
    return pixels


class Official:
    """A run of the official client."""

    def __init__(self, program: Path, lab: Lab, config: dict[str, Any], *options: str) -> None:
        file = lab.folder / "official.json"
        file.write_text(json.dumps(config))
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(lab.folder),
            "PYTHONPATH": str(lab.folder),
            "INTERN_TOKEN": lab.boss.ready()["tokens"]["alice"],
            "AWS_ENDPOINT_URL": lab.boss.url,
        }
        self.log = lab.folder / "official.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(program), str(file), "-f", *options],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float = 300.0) -> str:
        """Wait for its end."""
        assert self.process.wait(seconds) == 0, self.log.read_text()
        return self.log.read_text()

    def kill(self) -> None:
        """Kill it with its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def official(boss_ingest: Path, lab: Lab) -> Iterator[Callable[..., Official]]:
    started: list[Official] = []

    def start(config: dict[str, Any], *options: str) -> Official:
        started.append(Official(boss_ingest, lab, config, *options))
        return started[-1]

    yield start
    for run in started:
        run.kill()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_exact(job: Job) -> None:
    assert job.status == JobStatus.COMPLETE
    assert set(job.observed.indexed.values()) == {1}
    assert not job.observed.late_indexed
    assert not job.observed.denied
    assert not job.errors


def test_the_official_client_completes_a_catmaid_job(
    lab: Lab, stack: np.ndarray, official: Callable[..., Official]
) -> None:
    log = official(lab.config(extent=EXTENT)).wait()
    assert "Successfully Created Ingest Job ID: 1" in log
    assert np.array_equal(lab.read(SHAPE), stack)
    assert_exact(lab.boss.job(1))
    assert sum(lab.boss.job(1).observed.puts.values()) == 40


def test_a_job_begun_by_the_official_client_is_finished_by_ours(
    lab: Lab, stack: np.ndarray, official: Callable[..., Official]
) -> None:
    config = lab.config(extent=EXTENT)
    run = official(config)
    wait_for(lambda: 1 in lab.boss.service.jobs and lab.boss.job(1).observed.deleted >= 7)
    run.kill()
    theirs = lab.boss.job(1).observed.deleted
    lab.boss.job(1).upload_queue.expire_leases()
    report = lab.upload(IngestConfig.load(config), 1)
    assert lab.complete(1).outcome == "COMPLETE"
    assert theirs + report.deleted == 40
    assert np.array_equal(lab.read(SHAPE), stack)
    assert lab.boss.job(1).status == JobStatus.COMPLETE


def test_a_job_begun_by_ours_is_finished_by_the_official_client(
    lab: Lab, stack: np.ndarray, official: Callable[..., Official]
) -> None:
    config, job = lab.create(lab.config(extent=EXTENT))
    report = lab.upload(config, job.id, QUICK.model_copy(update={"max_tiles": 10}))
    lab.boss.job(job.id).upload_queue.expire_leases()
    official(lab.config(extent=EXTENT), "-j", str(job.id)).wait()
    assert 0 < report.deleted < 40
    assert np.array_equal(lab.read(SHAPE), stack)
    assert_exact(lab.boss.job(job.id))


def test_both_work_on_one_job_at_once(lab: Lab, stack: np.ndarray, official: Callable[..., Official]) -> None:
    lab.boss.switches.latency_ms = 60.0  # slow enough for both to get a share
    run = official(lab.config(extent=EXTENT))
    wait_for(lambda: 1 in lab.boss.service.jobs and len(lab.boss.job(1).observed.puts) > 0)
    reports: list[UploadReport] = []
    slow = QUICK.model_copy(update={"threads": 1, "max_tiles": 20})
    ours = threading.Thread(
        target=lambda: reports.append(lab.upload(IngestConfig.load(lab.config(extent=EXTENT)), 1, slow))
    )
    ours.start()
    ours.join(60)
    lab.boss.job(1).upload_queue.expire_leases()
    run.wait()
    assert 0 < reports[0].deleted < 40
    assert np.array_equal(lab.read(SHAPE), stack)
    assert_exact(lab.boss.job(1))
    assert len(lab.boss.job(1).observed.puts) == 40


PLUGIN = """
import numpy as np
from ingestclient.plugins.path import PathProcessor
from ingestclient.plugins.chunk import ChunkProcessor, XYZ_ORDER, ZYX_ORDER


class LabPathProcessor(PathProcessor):
    def setup(self, parameters):
        self.parameters = parameters

    def process(self, x_index, y_index, z_index, t_index=None):
        return self.parameters["file"]


class LabChunkProcessor(ChunkProcessor):
    def setup(self, parameters):
        self.parameters = parameters

    def process(self, file_path, x_index, y_index, z_index):
        size = self.parameters["ingest_job"]["chunk_size"]
        cut = [slice(i * size[a], (i + 1) * size[a]) for a, i in (("z", z_index), ("y", y_index), ("x", x_index))]
        block = np.load(file_path)[tuple(cut)]
        if self.parameters["order"] == "xyz":
            return block.transpose(2, 1, 0), XYZ_ORDER
        return block, ZYX_ORDER
"""


@pytest.mark.parametrize("order", ["xyz", "zyx"])
def test_one_plugin_class_serves_both_clients_and_gives_equal_cuboids(
    lab: Lab, official: Callable[..., Official], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    (lab.folder / "lab_plugin.py").write_text(PLUGIN)
    pixels = volume((20, 512, 700), "uint16")
    np.save(lab.folder / "source.npy", pixels)
    extent = {"x": [0, 700], "y": [0, 512], "z": [0, 20], "t": [0, 1]}
    params = {"file": str(lab.folder / "source.npy"), "order": order}
    config = lab.volumetric("lab_plugin.Lab", params, extent, channel="uint16")
    official(config).wait()
    theirs = {key: lab.boss.service._blobs.get(stored.blob) for key, stored in lab.boss.job(1).objects.items()}
    assert np.array_equal(lab.read((20, 512, 700), "uint16"), pixels)
    monkeypatch.syspath_prepend(str(lab.folder))
    monkeypatch.setenv("PREFECT_BIOMED_BOSS_PLUGINS", "lab_plugin")
    report, job = lab.ingest(config)
    assert set(job.objects) == set(theirs)
    assert len(theirs) == 4
    assert (report.put, report.deleted) == (4, 1)
    assert np.array_equal(lab.read((20, 512, 700), "uint16"), pixels)


def run_official_plugins(python: Path, folder: Path, code: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", textwrap.dedent(code), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


RENDER = """
import importlib, io, json, sys
import numpy as np
from PIL import Image
config, tiles, target = json.load(open(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3]
made = []
for part in ("path_processor", "tile_processor"):
    module, _, name = config["client"][part]["class"].rpartition(".")
    plugin = getattr(importlib.import_module(module), name)()
    plugin.setup(dict(config["client"][part]["params"], ingest_job=config["ingest_job"]))
    made.append(plugin)
arrays = {}
for x, y, z, t in tiles:
    handle = made[1].process(made[0].process(x, y, z, t), x, y, z, t)
    handle.seek(0)
    arrays["_".join(map(str, (x, y, z, t)))] = np.asarray(Image.open(io.BytesIO(handle.read())))
np.savez(target, **arrays)
"""


def official_pixels(boss_ingest: Path, lab: Lab, config: dict[str, Any], tiles: Sequence[Sequence[int]]) -> Any:
    """What the official plugins make of some tiles."""
    file = lab.folder / "render.json"
    file.write_text(json.dumps(config))
    target = lab.folder / "official.npz"
    run_official_plugins(boss_ingest.with_name("python"), lab.folder, RENDER, str(file), json.dumps(tiles), str(target))
    return np.load(target)


def cases(lab: Lab) -> Iterator[tuple[str, dict[str, Any], list[list[int]]]]:
    import h5py
    from PIL import Image

    whole = {"x": [0, 1024], "y": [0, 512], "z": [0, 4], "t": [0, 1]}
    tiles = [[x, 0, z, 0] for x in (0, 1) for z in (0, 3)]
    pixels = volume((4, 512, 1024), "uint16")
    lab.write_stack(pixels)
    yield "CATMAID type 1", lab.config(extent=whole, channel="uint16"), tiles
    with h5py.File(lab.folder / "v.h5", "w") as file:
        file["img"] = pixels
        file["series"] = pixels.transpose(0, 2, 1)[..., None]
    single = {
        "path_processor": {
            "class": "ingestclient.plugins.hdf5.Hdf5SingleFilePathProcessor",
            "params": {"filename": str(lab.folder / "v.h5")},
        },
        "tile_processor": {
            "class": "ingestclient.plugins.hdf5.Hdf5SingleFileTileProcessor",
            "params": {
                "filesystem": "local",
                "bucket": "",
                "upload_format": "tiff",
                "offset_x": 0,
                "offset_y": 0,
                "offset_z": 0,
                "data_name": "img",
                "datatype": "uint16",
            },
        },
    }
    yield "HDF5 in one file", lab.config(extent=whole, channel="uint16", **single), tiles
    with h5py.File(lab.folder / "t0.h5", "w") as file:
        file["aligned"] = pixels.transpose(0, 2, 1)[..., None]
    series = {
        "path_processor": {
            "class": "ingestclient.plugins.hdf5.Hdf5TimeSeriesPathProcessor",
            "params": {"root_dir": str(lab.folder), "extension": "h5", "base_filename": "t<>"},
        },
        "tile_processor": {
            "class": "ingestclient.plugins.hdf5.Hdf5TimeSeriesTileProcessor",
            "params": {
                "filesystem": "local",
                "bucket": "",
                "upload_format": "tiff",
                "channel_index": 0,
                "scale_factor": 0.5,
                "dataset": "aligned",
            },
        },
    }
    in_time = {"x": [0, 1024], "y": [0, 512], "z": [0, 1], "t": [0, 4]}
    yield "HDF5 time series", lab.config(extent=in_time, channel="uint16", **series), [[1, 0, 0, 2], [0, 0, 0, 3]]
    pages = [Image.fromarray(page[:, :512]) for page in pixels]
    pages[0].save(lab.folder / "z0.tif", save_all=True, append_images=pages[1:])
    multipage = {
        "path_processor": {
            "class": "ingestclient.plugins.multipage_tiff.SingleTimeTiffPathProcessor",
            "params": {"z_0": str(lab.folder / "z0.tif")},
        },
        "tile_processor": {
            "class": "ingestclient.plugins.multipage_tiff.SingleTimeTiffTileProcessor",
            "params": {"datatype": "uint16"},
        },
    }
    one = {"x": [0, 512], "y": [0, 512], "z": [0, 1], "t": [0, 4]}
    yield "multipage TIFF", lab.config(extent=one, channel="uint16", **multipage), [[0, 0, 0, t] for t in range(4)]


def test_our_plugins_give_the_pixels_of_the_official_ones(lab: Lab, boss_ingest: Path) -> None:
    import io

    from PIL import Image

    from prefect_biomed.clients.boss._keys import Position
    from prefect_biomed.clients.boss.images import TileFormat
    from prefect_biomed.clients.boss.sources import TileSource

    names = []
    for name, config, tiles in cases(lab):
        names.append(name)
        expected = official_pixels(boss_ingest, lab, config, tiles)
        source = TileSource(IngestConfig.load(config), TileFormat(512, 512, "uint16"), 1 << 28)
        for tile in tiles:
            ours = np.asarray(Image.open(io.BytesIO(source.read(Position(*tile)))))
            theirs = expected["_".join(map(str, tile))]
            assert np.array_equal(ours, theirs), (name, tile)
    assert len(names) == 4


def test_every_example_configuration_of_the_official_client_is_read_unchanged(boss_ingest: Path) -> None:
    [folder] = boss_ingest.parent.parent.glob("lib/python*/site-packages/ingestclient/configs")
    files = sorted(folder.glob("*.json"))
    assert len(files) >= 10
    for file in files:
        content = json.loads(file.read_text())
        assert IngestConfig.load(file).body() == content
        old = json.loads(re.sub(r"ingestclient\.plugins", "ingest.plugins", file.read_text()))
        assert IngestConfig.load(old).client.path_processor.class_.startswith("ingest.plugins")


CLOUDVOLUME = """
import sys
import numpy as np
from cloudvolume import CloudVolume
from prefect_biomed.clients.boss.plugins import base
from prefect_biomed.clients.errors import SourceUnreadable

pixels = (np.arange(40 * 600 * 700) % 251 + 1).astype("uint8").reshape(40, 600, 700)
path = "file://" + sys.argv[1] + "/volume"
CloudVolume.from_numpy(pixels.transpose(2, 1, 0), path, chunk_size=(64, 64, 16), progress=False)
job = {"chunk_size": {"x": 512, "y": 512, "z": 32}}
plugin = base.load("ingestclient.plugins.cloudvolume.CloudVolumeChunkProcessor",
    {"cloudpath": path, "progress": False, "ingest_job": job})
for x in (0, 1):
    for z in (0, 1):
        block, order = plugin.process("", x, 1, z)
        assert order == base.XYZT_ORDER, order
        expected = pixels[32 * z : 32 * z + 32, 512:1024, 512 * x : 512 * x + 512]
        assert np.array_equal(block.values[..., 0].transpose(2, 1, 0), expected), (x, z)
        assert not any(block.before), (x, z)
try:
    plugin.process("", 9, 9, 9)
except SourceUnreadable:
    pass
else:
    raise AssertionError("a chunk outside of the volume was read")
"""


def test_a_cloudvolume_is_read(official_environment: Callable[..., Path], tmp_path: Path) -> None:
    needed = ["cloud-volume", "boto3", "filelock", "fsspec", "pillow", "pydantic", "requests", "rocrate"]
    python = official_environment("cloud-volume", needed)
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", CLOUDVOLUME, str(tmp_path)],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(Path("typings").resolve())},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
