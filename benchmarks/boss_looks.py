"""What a look at pixels that arrived finds, and what it costs: by the share of cuboids that is compared.

    python -m benchmarks.boss_looks [--side 1024] [--depth 320]

A job is finished in which the service turned three chunks black, lost two tiles and cut the values of one. Then the
same faults are looked for at several shares, and once with the window of every chunk compared.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.ingest_lab import FAST, Lab, volume
from prefect_biomed.clients.boss import BossClient, IngestConfig, UploadSettings, VerifySettings, verify
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.boss import IngestFault

_TILE, _CHUNK = 512, 16
LOOKS: dict[str, dict[str, Any]] = {
    "windows only": {"share": 0},
    "1 %": {"share": 0.01},
    "10 %": {"share": 0.1},
    "100 %": {"share": 1},
    "1 %, windows compared": {"share": 0.01, "compare_windows": True},
}


def main() -> None:
    """Finish the job, look at it, and print what was found at which cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="pixels, a multiple of 512")
    parser.add_argument("--depth", type=int, default=320, help="slices, a multiple of 16")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Sandbox("boss", boss=FAST) as sandbox:
        os.environ["PREFECT_BIOMED_HOME"] = folder
        facts = sandbox.ready()["boss"]
        client = BossClient(facts["host"], facts["tokens"]["alice"], protocol="http", aws_endpoint_url=facts["url"])
        Console(width=140).print(_table(Lab(sandbox.boss, Path(folder), client), given.side, given.depth))


def _faults(columns: int, depth: int) -> tuple[list[IngestFault], set[tuple[int, int, int]]]:
    """Six faults in six chunks, and the tiles that they spoil."""
    chunks = [(x, y, z) for z in range(0, depth, _CHUNK) for y in range(columns) for x in range(columns)]
    chosen = random.Random(0).sample(chunks, 6)
    kinds = ["black"] * 3 + ["lost"] * 2 + ["clipped"]
    faults = [
        IngestFault(kind=kind, x=x, y=y, z=z + (0 if kind == "black" else 5))
        for kind, (x, y, z) in zip(kinds, chosen, strict=True)
    ]
    spoilt = {
        (fault.x, fault.y, z)
        for fault in faults
        for z in (range(fault.z, fault.z + _CHUNK) if fault.kind == "black" else (fault.z,))
    }
    return faults, spoilt


def _table(lab: Lab, side: int, depth: int) -> Table:
    lab.write_stack(volume((side, side), seed=z) for z in range(depth))
    faults, spoilt = _faults(side // _TILE, depth)
    lab.boss.switches.ingest_faults = faults
    extent = {"x": [0, side], "y": [0, side], "z": [0, depth], "t": [0, 1]}
    config = lab.config(extent=extent)
    lab.ingest(config, UploadSettings(threads=8))
    title = (
        f"{side} x {side} x {depth} voxels, {len(spoilt)} of {depth * (side // _TILE) ** 2} tiles spoilt by 6 faults"
    )
    columns = (
        "compared",
        "faults found",
        "tiles named",
        "named wrongly",
        "cuboids",
        "requests",
        "MB",
        "seconds",
        "bound",
    )
    table = Table(*columns, title=title)
    for name, settings in LOOKS.items():
        look = verify(lab.client, IngestConfig.load(config), VerifySettings(least=0, **settings))
        named = {(tile.x, tile.y, tile.z) for tile in look.wrong}
        found = sum((fault.x, fault.y, fault.z) in named for fault in faults)
        table.add_row(
            name,
            f"{found} of 6",
            f"{len(named & spoilt)} of {len(spoilt)}",
            str(len(named - spoilt)),
            f"{look.compared} of {look.cuboids}",
            str(look.requests),
            f"{look.bytes_read / 1e6:.0f}",
            f"{look.seconds:.1f}",
            f"{100 * look.bound:.3g} %",
        )
    return table


if __name__ == "__main__":
    main()
