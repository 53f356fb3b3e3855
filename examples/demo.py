"""All platforms once, on real data, through real deployments and a process worker: `make demo`."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.sorting import FlowRunSort
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.lab import HOME, Laboratory
from prefect_biomed.cli.laboratory import block, save_blocks, slice_stack
from prefect_biomed.clients.boss import BossClient

CONSOLE = Console()
PATIENTS_PER_SITE = 3
BLOCKS = "demo"


def run_deployment(laboratory: Laboratory, deployment: str, parameters: dict[str, Any]) -> None:
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


def vip(laboratory: Laboratory, volume: Path) -> None:
    """Run a pipeline three times on a real MRI volume."""
    inputs, outputs = HOME / "vip" / "inputs", HOME / "vip" / "outputs"
    inputs.mkdir(parents=True)
    shutil.copy(volume, inputs)
    run_deployment(
        laboratory,
        "vip-session/vip-session",
        {
            "credentials": block("vip", BLOCKS),
            "pipeline_id": "GreyMatter/1.0",
            "input_settings": {"t1": volume.name},
            "input_dir": str(inputs),
            "output_dir": str(outputs),
            "session_name": "demo",
            "nb_runs": 3,
            "refresh_time": 1,
        },
    )
    session = json.loads((outputs / "session_data.json").read_text())
    table = Table(title=f"VIP: GreyMatter/1.0 on {volume.name}")
    table.add_column("execution")
    table.add_column("started")
    table.add_column("outputs", overflow="fold")
    for identifier, workflow in session["workflows"].items():
        local = [
            outputs / Path(output["path"]).relative_to(session["vip_output_dir"]) for output in workflow["outputs"]
        ]
        files = [file for path in local for file in sorted(path.rglob("*")) if file.is_file()]
        if not files:
            raise RuntimeError(f"{identifier} left no files in {outputs}")
        table.add_row(identifier, workflow["start"], f"{files[0].parent.relative_to(outputs)}: {len(files)} files")
    CONSOLE.print(table)
    CONSOLE.print(f"The outputs are in {outputs}\n")


def vantage6(laboratory: Laboratory) -> None:
    """Fit a federated regression, encrypted, and the pooled one."""
    CONSOLE.print("[bold]python -m examples.federated_regression[/bold]")
    CONSOLE.print(laboratory.run("python", "-m", "examples.federated_regression", str(laboratory.state)))
    CONSOLE.print("[bold]python -m examples.federated_averaging[/bold]")
    CONSOLE.print(laboratory.run("python", "-m", "examples.federated_averaging", str(laboratory.state)))


def boss(laboratory: Laboratory) -> None:
    """A real MRI volume as a stack of slices, ingested and read back."""
    facts = laboratory.sandbox["boss"]
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
            "credentials": block("boss", BLOCKS),
            "config": slice_stack(facts["host"], folder, (depth, height, width), "uint16"),
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


def show(picture: Image.Image) -> None:
    """Draw a grey picture in the terminal, two rows of pixels in a row of text.

    Args:
        picture: As many pixels wide as the terminal has columns at most.
    """
    grey = np.asarray(picture)
    if CONSOLE.color_system is None:
        for line in grey[::2]:
            CONSOLE.print("".join(" .:-=+*#%@"[value * 10 // 256] for value in line.astype(int)), markup=False)
        return
    for upper, lower in zip(grey[::2], grey[1::2], strict=True):
        row = Text()
        for top, bottom in zip(upper, lower, strict=True):
            row.append("\u2580", style=f"rgb({top},{top},{top}) on rgb({bottom},{bottom},{bottom})")
        CONSOLE.print(row)


def research_pipeline(laboratory: Laboratory, volume: Path) -> None:
    """Go through all three platforms with one flow."""
    patients = HOME / "research" / "patients"
    patients.mkdir(parents=True)
    image: Any = nibabel.load(volume)
    voxels = np.asarray(image.dataobj)
    sites = laboratory.sandbox["vantage6"]["tables"]
    for number, name in enumerate(f"{site}-{patient}" for site in sites for patient in range(PATIENTS_PER_SITE)):
        nifti: Any = nibabel.Nifti1Image(voxels[:, number : number + 16, :], image.affine)
        nifti.to_filename(patients / f"{name}.nii")
    run_deployment(
        laboratory,
        "research-pipeline/research-pipeline",
        {
            "output_dir": str(HOME / "research" / "outputs"),
            "images": {
                "pipeline_id": "GreyMatter/1.0",
                "input_dir": str(patients),
                "images": sorted(path.name for path in patients.iterdir()),
                "parameter": "t1",
                "refresh_time": 1,
            },
            "vip": block("vip", BLOCKS),
            "table": {
                "collaboration": "encrypted",
                "image": "prefect-biomed/clinical:1.0",
                "method": "central_average",
                "arguments": {"column": "volume"},
                "organizations": ["north"],
                "databases": "measures",
                "central": True,
                "tables": {site: labels["measures"] for site, labels in sites.items()},
                "sites": {site: [f"{site}-*"] for site in sites},
            },
            "vantage6": block("vantage6", BLOCKS),
            "ingest": {"collection": "demo", "experiment": "patients", "channel": "mask", "volume": "mask.nii.gz"},
            "boss": block("boss", BLOCKS),
        },
    )
    table = Table("patient", "hospital", "grey matter, mm³", title="What the nodes analysed")
    for site, labels in sites.items():
        with Path(labels["measures"]).open(newline="") as file:
            for row in csv.DictReader(file):
                table.add_row(row["image"], site, row["volume"])
    CONSOLE.print(table)
    table = Table("stage of research-pipeline", "seconds")
    with SyncPrefectClient(laboratory.api_url) as client:
        [run] = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["research-pipeline"])))
        stages = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id])),
            sort=FlowRunSort.START_TIME_ASC,
        )
        for stage in stages:
            table.add_row(client.read_flow(stage.flow_id).name, f"{stage.total_run_time.total_seconds():.1f}")
    CONSOLE.print(table)


def main() -> None:
    """Run the demonstration and leave nothing running."""
    began = time.monotonic()
    volume = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    CONSOLE.print("Starting the sandbox, a Prefect server and a worker ...")
    seconds: dict[str, float] = {}
    with Laboratory(platforms=("vip", "vantage6", "boss")) as laboratory:
        save_blocks(laboratory, BLOCKS)
        CONSOLE.print(f"ready after {time.monotonic() - began:.0f} s\n")
        stages: dict[str, Any] = {
            "VIP, three runs": lambda: vip(laboratory, volume),
            "vantage6, encrypted regression": lambda: vantage6(laboratory),
            "Boss, a stack of slices": lambda: boss(laboratory),
            "all three in one flow": lambda: research_pipeline(laboratory, volume),
        }
        for name, stage in stages.items():
            CONSOLE.rule(name)
            started = time.monotonic()
            stage()
            seconds[name] = time.monotonic() - started
    table = Table("stage", "seconds", title="Time")
    for name, taken in seconds.items():
        table.add_row(name, f"{taken:.0f}")
    CONSOLE.print(table)
    CONSOLE.print(f"Done in {time.monotonic() - began:.0f} s; everything is stopped. Look around in {HOME}")


if __name__ == "__main__":
    main()
