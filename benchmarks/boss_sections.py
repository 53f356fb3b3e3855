"""Large sections: how often each is decoded while it is cut into tiles, in which memory, how fast.

    python -m benchmarks.boss_sections [--slices 16] [--side 20000] [--tile 1024] [--layout strips] [--cache-mib 512]

A stack of TIFF files is made on the spot, four that differ and links to them, and ingested into the sandbox. Layouts:
`strips` (deflate, 16 rows each), `tiles` (deflate, 256 x 256), `one-strip` (deflate, the whole section), `plain` (not
compressed), and `png`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from benchmarks.measure import measure, sandbox

_DIFFERENT = 4
_LAYOUTS: dict[str, dict[str, Any]] = {
    "strips": {"compression": "zlib", "rowsperstrip": 16},
    "tiles": {"compression": "zlib", "tile": (256, 256)},
    "one-strip": {"compression": "zlib", "rowsperstrip": 2**31 - 1},
    "plain": {},
    "png": {},
}

INGEST = """
import tempfile
from pathlib import Path
from prefect_biomed.clients.boss import (
    BossClient, IngestConfig, Uploader, UploadSettings, complete, create_resources, wait_until_ready
)
config = IngestConfig.load(arguments["config"])
client = BossClient(arguments["host"], arguments["token"], protocol="http", aws_endpoint_url=arguments["url"])
create_resources(client, config, datatype="uint8")
def work():
    job = client.create(config)
    joined = wait_until_ready(client, job.id)
    settings = UploadSettings(threads=arguments["threads"], cache_bytes=arguments["cache_bytes"])
    uploader = Uploader(client, config, job.id, settings, joined=joined, ledger_folder=Path(tempfile.mkdtemp(dir=".")))
    report = uploader.run()
    cache = uploader._line.pieces.putting.source.cache
    decoded = cache.decoded_bytes
    uploader.close()
    assert complete(client, job.id).outcome == "COMPLETE"
    return {"deleted": report.deleted, "seconds": report.seconds, "decoded_bytes": decoded}
measured(work)
"""


def main() -> None:
    """Make the sections, ingest them, and print how often they were decoded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--side", type=int, default=20_000, help="pixels")
    parser.add_argument("--tile", type=int, default=1024, help="pixels, a multiple of 512")
    parser.add_argument("--layout", choices=sorted(_LAYOUTS), default="strips")
    parser.add_argument("--cache-mib", type=int, default=512)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where all of it goes for the time being")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        os.environ["TMPDIR"] = str(folder)
        print(_line(folder, given))


def write_sections(folder: Path, slices: int, side: int, layout: str) -> str:
    """Write sections with the texture of tissue between empty margins; returns the ending of their names."""
    rng = np.random.default_rng(0)
    margin = side // 8
    texture = np.clip(rng.normal(128, 30, (256, side - 2 * margin)), 1, 255).astype("uint8")
    ending = "png" if layout == "png" else "tif"
    for z in range(min(slices, _DIFFERENT)):
        section = np.zeros((side, side), "uint8")
        for top in range(margin, side - margin, 256):
            part = texture[: min(256, side - margin - top)]
            section[top : top + len(part), margin : side - margin] = np.roll(part, top + 31 * z, axis=1)
        path = folder / f"section_{z:04}.{ending}"
        if layout == "png":
            Image.fromarray(section).save(path, compress_level=1)
        else:
            tifffile.imwrite(path, section, photometric="minisblack", metadata=None, **_LAYOUTS[layout])
    for z in range(_DIFFERENT, slices):
        (folder / f"section_{z:04}.{ending}").hardlink_to(folder / f"section_{z % _DIFFERENT:04}.{ending}")
    return ending


def _line(folder: Path, given: argparse.Namespace) -> str:
    ending = write_sections(folder, given.slices, given.side, given.layout)
    switches = ("--set", "boss.quiet_seconds=1", "--set", "boss.prepare_seconds=0")
    with sandbox("boss", *switches) as ready:
        facts = ready["boss"]
        account = {"url": facts["url"], "host": facts["host"], "token": facts["tokens"]["alice"]}
        config = _config(facts["host"], folder, ending, given)
        limits = {"threads": given.threads, "cache_bytes": given.cache_mib << 20}
        found = measure(sys.executable, INGEST, folder, config=config, **account, **limits)
    done = found["result"]
    times = done["decoded_bytes"] / (given.slices * given.side**2)
    return (
        f"{given.slices} sections of {given.side:,} x {given.side:,} ({given.layout}): each decoded {times:.2f} times, "
        f"{done['deleted']:,} tiles of {given.tile} x {given.tile}, {done['deleted'] / done['seconds']:.0f} tiles/s, "
        f"{found['cpu'] / done['deleted'] * 1000:.0f} ms of one core for each, memory {found['peak_mib']:.0f} MiB "
        f"(cache {given.cache_mib} MiB)"
    )


def _config(host: str, folder: Path, ending: str, given: argparse.Namespace) -> dict[str, Any]:
    plugin = "ingestclient.plugins.stack.ZindexStack"
    params = {"root_dir": str(folder), "base_filename": "section_<p:4>", "extension": ending, "filesystem": "local"}
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": host, "protocol": "http"},
            "path_processor": {"class": f"{plugin}PathProcessor", "params": params},
            "tile_processor": {"class": f"{plugin}TileProcessor", "params": params},
        },
        "database": {"collection": "sections", "experiment": "stack", "channel": "uint8"},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, given.side], "y": [0, given.side], "z": [0, given.slices], "t": [0, 1]},
            "tile_size": {"x": given.tile, "y": given.tile, "z": 1, "t": 1},
        },
    }


if __name__ == "__main__":
    main()
