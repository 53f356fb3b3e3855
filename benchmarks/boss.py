"""Boss: a thousand tiles beside boss-ingest 0.12.0, and a hundred thousand in flat memory."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.measure import measure, sandbox
from benchmarks.official import official_environment

# blosc and h5py are missing from its requirements; a newer setuptools lacks what it imports, and a newer Pillow refuses
# how its plugins for 16 bits make images.
BOSS_INGEST = ("boss-ingest", ["boss-ingest==0.12.0", "setuptools<81", "blosc", "h5py", "pillow<11"])
TILES = 1000
SMALL_TILES = 100_000
LATENCIES_MS = (0, 20)
THREADS = {0: 8, 20: 16}
_QUIET_SECONDS = 2
_SWITCHES = ("--set", f"boss.quiet_seconds={_QUIET_SECONDS}", "--set", "boss.prepare_seconds=0")

OURS = """
import tempfile
from pathlib import Path
from prefect_biomed.clients.boss import BossClient, IngestConfig, UploadSettings, complete, preflight, upload
config = IngestConfig.load(arguments["config"])
client = BossClient(arguments["host"], arguments["token"], protocol="http", aws_endpoint_url=arguments["url"])
def work():
    began = time.monotonic()
    preflight(client, config)
    job = client.create(config)
    ledgers = Path(tempfile.mkdtemp(dir="."))
    settings = UploadSettings(threads=arguments["threads"])
    peaks = []
    def watch(progress):
        peaks.append(_resident())
    report = upload(client, config, job.id, settings, ledger_folder=ledgers, on_progress=watch)
    assert complete(client, job.id).outcome == "COMPLETE"
    half = len(peaks) // 2
    growth = max(peaks[half:], default=0) - max(peaks[:half], default=0)
    return {
        "deleted": report.deleted,
        "cpu": time.process_time(),
        "peak_mib": _peak / 2**20,
        "growth_mib": growth / 2**20,
    }
measured(work)
"""


def main() -> None:
    """Measure and print both clients side by side."""
    official = official_environment(*BOSS_INGEST).parent / "boss-ingest"
    table = Table("", "boss-ingest 0.12.0 -p 2", "prefect-biomed", "ratio", title="Boss")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stack = _stack(folder / "stack", TILES, 512)
        for latency in LATENCIES_MS:
            _beside(official, folder, stack, latency, table)
        Console().print(table)
        Console().print(_many(folder))


def _stack(root: Path, tiles: int, size: int) -> Path:
    """Write a CATMAID stack with the texture of an electron micrograph: about 170 kB for a tile of 512 x 512."""
    rng = np.random.default_rng(0)
    smooth = rng.normal(128, 12, (16, size, size))
    for z in range(tiles):
        (root / str(z)).mkdir(parents=True)
        plane = np.clip(np.roll(smooth[z % 16], z, axis=1), 0, 255).astype("uint8")
        Image.fromarray(plane).save(root / str(z) / "0_0_0.png", compress_level=1)
    return root


def _config(facts: dict[str, Any], stack: Path, tiles: int, size: int) -> dict[str, Any]:
    plugin = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    params = {"root_dir": str(stack), "filetype": "png"}
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": facts["host"], "protocol": "http"},
            "path_processor": {"class": f"{plugin}PathProcessor", "params": params},
            "tile_processor": {"class": f"{plugin}TileProcessor", "params": {"filetype": "png"}},
        },
        "database": {"collection": "sandbox", "experiment": "stack", "channel": "uint8"},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, size], "y": [0, size], "z": [0, tiles], "t": [0, 1]},
            "tile_size": {"x": size, "y": size, "z": 1, "t": 1},
        },
    }


def _job(url: str, number: int) -> dict[str, Any]:
    """What the server has seen of a job; `seconds` is from the first PUT to the last."""
    jobs: dict[str, Any] = requests.get(f"{url}/_sandbox/ready", timeout=60).json()["jobs"]
    return dict(jobs[str(number)])


def _beside(official: Path, folder: Path, stack: Path, latency: int, table: Table) -> None:
    with sandbox("boss", "--latency", str(latency), *_SWITCHES) as ready:
        facts = ready["boss"]
        config = _config(facts, stack, TILES, 512)
        account = {"url": facts["url"], "host": facts["host"], "token": facts["tokens"]["alice"]}
        ours = _ours(folder, config=config, threads=THREADS[latency], **account)
        theirs = _official(official, folder, config, facts)
        jobs = [_job(facts["url"], number) for number in (1, 2)]
    if any(job["status"] != "COMPLETE" or job["deleted"] != TILES for job in jobs):
        raise RuntimeError(f"not everything arrived: {jobs}")
    rates = [TILES / job["seconds"] for job in jobs]
    name = f"{TILES} tiles, {latency} ms per request"
    table.add_row(f"{name}: rate", f"{rates[1]:.1f}/s", f"{rates[0]:.1f}/s", f"{rates[0] / rates[1]:.1f}x")
    cpu = theirs["cpu"] / ours["cpu"]
    table.add_row(f"{name}: CPU", f"{theirs['cpu']:.1f} s", f"{ours['cpu']:.1f} s", f"{cpu:.1f}x")
    whole = theirs["seconds"] / ours["seconds"]
    table.add_row(f"{name}: whole job", f"{theirs['seconds']:.1f} s", f"{ours['seconds']:.1f} s", f"{whole:.1f}x")
    memory = theirs["peak_mib"] / ours["peak_mib"]
    table.add_row(
        f"{name}: peak memory", f"{theirs['peak_mib']:.0f} MiB", f"{ours['peak_mib']:.0f} MiB", f"{memory:.1f}x"
    )


def _ours(folder: Path, **arguments: Any) -> dict[str, Any]:
    """Run our client; like those of the official one, all its figures include the start of the program."""
    began = time.monotonic()
    result: dict[str, Any] = measure(sys.executable, OURS, folder, **arguments)["result"]
    return result | {"seconds": time.monotonic() - began}


def _official(program: Path, folder: Path, config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Run the official client; its CPU and memory are those of all its processes."""
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "INTERN_TOKEN": facts["tokens"]["alice"],
        "AWS_ENDPOINT_URL": facts["url"],
    }
    began = time.monotonic()
    with (folder / "official.log").open("wb") as log:
        process = psutil.Popen([str(program), str(file), "-f", "-p", "2"], stdout=log, stderr=log, env=environment)
        peak, cpu = 0.0, {}
        while process.poll() is None:
            for one in [process, *process.children()]:
                try:
                    cpu[one.pid] = sum(one.cpu_times()[:2])
                except psutil.Error:
                    continue
            with contextlib.suppress(psutil.Error):  # one of them has just ended
                peak = max(peak, sum(one.memory_info().rss for one in [process, *process.children()]) / 2**20)
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError((folder / "official.log").read_text()[-3000:])
    return {"seconds": time.monotonic() - began, "cpu": sum(cpu.values()), "peak_mib": peak}


def _many(folder: Path) -> str:
    stack = _stack(folder / "small", SMALL_TILES, 64)
    with sandbox("boss", *_SWITCHES) as ready:
        facts = ready["boss"]
        config = _config(facts, stack, SMALL_TILES, 64)
        account = {"url": facts["url"], "host": facts["host"], "token": facts["tokens"]["alice"]}
        ours = _ours(folder, config=config, threads=8, **account)
        job = _job(facts["url"], 1)
    if job["status"] != "COMPLETE" or job["deleted"] != SMALL_TILES:
        raise RuntimeError(f"not everything arrived: {job}")
    return (
        f"{SMALL_TILES} tiles of 64 x 64: {SMALL_TILES / job['seconds']:.0f}/s, peak {ours['peak_mib']:.0f} MiB, "
        f"{ours['growth_mib']:+.0f} MiB in the second half"
    )


if __name__ == "__main__":
    main()
