"""All platforms once, on real data, through real deployments and a process worker: `make demo`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.lab import HOME, Laboratory
from prefect_biomed.clients.boss import BossClient

CONSOLE = Console()


def run_deployment(laboratory: Laboratory, deployment: str, parameters: dict[str, object]) -> None:
    """Run a deployment as a user would, and wait for it.

    Args:
        laboratory: Where it runs.
        deployment: `flow/deployment`.
        parameters: Parameters of the flow.

    Raises:
        RuntimeError: The run did not complete; with its log.
    """
    CONSOLE.print(f"[bold]prefect deployment run[/bold] '{deployment}'")
    began = time.monotonic()
    laboratory.run("prefect", "deployment", "run", deployment, "--params", json.dumps(parameters), "--watch")
    CONSOLE.print(f"completed in {time.monotonic() - began:.0f} s\n")


def vip(laboratory: Laboratory) -> None:
    """Three runs of a pipeline on a real MRI volume."""
    facts = laboratory.sandbox["vip"]
    laboratory.run(
        "python",
        "deployments/setup.py",
        "--name=demo",
        PREFECT_BIOMED_VIP_API_KEY=facts["api_key"],
        PREFECT_BIOMED_VIP_URL=facts["url"],
    )
    inputs, outputs = HOME / "vip" / "inputs", HOME / "vip" / "outputs"
    inputs.mkdir(parents=True)
    shutil.copy(Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii", inputs)
    run_deployment(
        laboratory,
        "vip-session/vip-session",
        {
            "credentials": {"$ref": {"block_document_slug": "vip-credentials/demo"}},
            "pipeline_id": "GreyMatter/1.0",
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(inputs),
            "output_dir": str(outputs),
            "session_name": "demo",
            "nb_runs": 3,
            "refresh_time": 1,
        },
    )
    session = json.loads((outputs / "session_data.json").read_text())
    table = Table("execution", "status", "started", "local files", title="VIP: GreyMatter/1.0 on anatomical.nii")
    for identifier, workflow in session["workflows"].items():
        local = [
            outputs / Path(output["path"]).relative_to(session["vip_output_dir"]) for output in workflow["outputs"]
        ]
        files = [file for path in local for file in sorted(path.rglob("*")) if file.is_file()]
        if not files:
            raise RuntimeError(f"{identifier} left no files in {outputs}")
        table.add_row(
            identifier, workflow["status"], workflow["start"], "\n".join(str(f.relative_to(outputs)) for f in files)
        )
    CONSOLE.print(table)
    CONSOLE.print(f"The outputs are in {outputs}\n")


def boss(laboratory: Laboratory) -> None:
    """A real MRI volume as a stack of slices, ingested and read back."""
    facts = laboratory.sandbox["boss"]
    laboratory.run(
        "python",
        "deployments/setup.py",
        "--name=demo",
        PREFECT_BIOMED_BOSS_HOST=facts["host"],
        PREFECT_BIOMED_BOSS_PROTOCOL="http",
        PREFECT_BIOMED_BOSS_TOKEN=facts["tokens"]["alice"],
        PREFECT_BIOMED_BOSS_AWS_ENDPOINT_URL=facts["aws_endpoint_url"],
    )
    folder = HOME / "boss" / "slices"
    folder.mkdir(parents=True)
    scan = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz")
    pixels = np.asarray(scan.dataobj)[..., 0].astype("uint16").transpose(2, 1, 0)[:, ::-1]
    for z, plane in enumerate(pixels):
        Image.fromarray(np.ascontiguousarray(plane)).save(folder / f"slice_{z:03d}.png")
    depth, height, width = pixels.shape
    run_deployment(
        laboratory,
        "boss-ingest/boss-ingest",
        {
            "credentials": {"$ref": {"block_document_slug": "boss-credentials/demo"}},
            "config": slice_stack(facts["host"], folder, depth, height, width),
        },
    )
    with BossClient(facts["host"], facts["tokens"]["alice"], protocol="http") as client:
        back = client.cutout("sandbox/stack/uint16", 0, (0, width), (0, height), (0, depth))
    equal = back.content == pixels.astype("<u2").tobytes()
    if not equal:
        raise RuntimeError("the Boss does not give back what was sent")
    CONSOLE.print(
        f"Boss: {depth} slices of {width} x {height} pixels, equal to the source in every pixel. In the middle:"
    )
    preview = HOME / "boss" / "middle_slice.png"
    middle = np.frombuffer(back.content, "<u2").reshape(pixels.shape)[depth // 2]
    picture = Image.fromarray((middle / middle.max() * 255).astype("uint8"))
    picture.resize((4 * width, 4 * height)).save(preview)
    show(picture.resize((64, 48)))
    CONSOLE.print(f"The slice as it was read back is in {preview}\n")


def slice_stack(host: str, folder: Path, depth: int, height: int, width: int) -> dict[str, object]:
    """Write the ingest configuration of a folder of slices, as boss-ingest takes it.

    Args:
        host: Server.
        folder: Holds `slice_000.png` and so on.
        depth: Number of slices.
        height: Pixels of a slice in y.
        width: Pixels of a slice in x.

    Returns:
        The configuration.
    """
    params = {
        "root_dir": str(folder),
        "base_filename": "slice_<p:3>",
        "extension": "png",
        "filesystem": "local",
        "bucket": "",
    }
    plugin = "ingestclient.plugins.stack.ZindexStack"
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": host, "protocol": "http"},
            "path_processor": {"class": f"{plugin}PathProcessor", "params": params},
            "tile_processor": {"class": f"{plugin}TileProcessor", "params": params},
        },
        "database": {"collection": "sandbox", "experiment": "stack", "channel": "uint16"},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, width], "y": [0, height], "z": [0, depth], "t": [0, 1]},
            "tile_size": {"x": width, "y": height, "z": 1, "t": 1},
        },
    }


def show(picture: Image.Image) -> None:
    """Draw a grey picture in the terminal, two rows of pixels in a row of text.

    Args:
        picture: As many pixels wide as the terminal has columns at most.
    """
    grey = np.asarray(picture)
    for upper, lower in zip(grey[::2], grey[1::2], strict=True):
        row = Text()
        for top, bottom in zip(upper, lower, strict=True):
            row.append("\u2580", style=f"rgb({top},{top},{top}) on rgb({bottom},{bottom},{bottom})")
        CONSOLE.print(row)


def main() -> None:
    """Run the demonstration and leave nothing running."""
    began = time.monotonic()
    CONSOLE.print("Starting the sandbox, a Prefect server and a worker ...")
    with Laboratory(platforms=("vip", "boss")) as laboratory:
        CONSOLE.print(f"ready after {time.monotonic() - began:.0f} s\n")
        vip(laboratory)
        boss(laboratory)
    CONSOLE.print(f"Done in {time.monotonic() - began:.0f} s; everything is stopped.")


if __name__ == "__main__":
    main()
