"""All platforms once, on real data, through real deployments and a process worker: `make demo`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import nibabel
from rich.console import Console
from rich.table import Table

from examples.lab import HOME, Laboratory

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


def main() -> None:
    """Run the demonstration and leave nothing running."""
    began = time.monotonic()
    CONSOLE.print("Starting the sandbox, a Prefect server and a worker ...")
    with Laboratory() as laboratory:
        CONSOLE.print(f"ready after {time.monotonic() - began:.0f} s\n")
        vip(laboratory)
    CONSOLE.print(f"Done in {time.monotonic() - began:.0f} s; everything is stopped.")


if __name__ == "__main__":
    main()
