"""Single tasks of this package in a flow of your own: one upload, a sweep over a threshold, results in one table.

    python -m examples.own_flow           # tasks in threads
    python -m examples.own_flow --dask    # tasks on a Dask cluster; needs the extra `dask` and a Prefect server

It runs against the sandbox, so no account is needed.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
from pathlib import Path

import nibabel
from prefect import flow, task
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic import SecretStr

from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.vip import VipSession
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.tasks.vip import (
    download_outputs,
    finish,
    get_inputs,
    launch_pipeline,
    monitor_workflows,
    upload_inputs,
)

THRESHOLDS = (0.2, 0.35, 0.5)


@task
def read_measures(files: list[Path], threshold: float) -> dict[str, str]:
    """Read what a run has measured: somebody else's task, between ours.

    Args:
        files: Local files of the run.
        threshold: Threshold of the run.

    Returns:
        The measures by name.
    """
    (table,) = (path for path in files if path.name == "measures.csv")
    with table.open(newline="") as file:
        measures = {row["measure"]: row["value"] for row in csv.DictReader(file)}
    return {"threshold": str(threshold), **measures}


@flow(name="threshold-sweep")
def sweep(credentials: VipCredentials, input_dir: Path, output_dir: Path) -> list[dict[str, str]]:
    """Run one pipeline with several thresholds, all at once.

    Args:
        credentials: The account.
        input_dir: Folder with `anatomical.nii`.
        output_dir: Folder for the outputs.

    Returns:
        One row of measures for each threshold.
    """
    owner = new_session(input_dir=input_dir, output_dir=output_dir)
    upload_inputs(credentials, owner)
    sessions = [_session(credentials, owner, threshold) for threshold in THRESHOLDS]
    launched = [launch_pipeline.submit(credentials, session) for session in sessions]
    watched = [
        monitor_workflows.submit(credentials, session, refresh_time=0.5, wait_for=[launch])
        for session, launch in zip(sessions, launched, strict=True)
    ]
    fetched = [
        download_outputs.submit(credentials, session, wait_for=[watch])
        for session, watch in zip(sessions, watched, strict=True)
    ]
    rows = []
    for session, fetch, threshold in zip(sessions, fetched, THRESHOLDS, strict=True):
        (files,) = fetch.result().files.values()
        rows.append(read_measures(list(files), threshold))
        finish(credentials, session)
    finish(credentials, owner)
    return rows


def _session(credentials: VipCredentials, owner: VipSession, threshold: float) -> VipSession:
    session = new_session(
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": "anatomical.nii", "threshold": threshold},
        output_dir=owner.output_dir / str(threshold),
    )
    return get_inputs(credentials, session, owner)


def task_runner(*, dask: bool) -> TaskRunner:
    """Choose where tasks run.

    Args:
        dask: Whether on a Dask cluster, made for the run.

    Returns:
        The task runner.
    """
    if not dask:
        return ThreadPoolTaskRunner(max_workers=4)
    from prefect_dask import DaskTaskRunner

    return DaskTaskRunner(cluster_kwargs={"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None})


def main() -> None:
    """Run the sweep against the sandbox and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dask", action="store_true", help="run tasks on a Dask cluster")
    options = parser.parse_args()
    if options.dask and not PREFECT_API_URL.value():
        parser.error("Dask workers are processes of their own: set PREFECT_API_URL to a server they can all reach.")
    with Sandbox("vip") as sandbox, tempfile.TemporaryDirectory() as temporary:
        facts = sandbox.ready()["vip"]
        inputs = Path(temporary, "inputs")
        inputs.mkdir()
        shutil.copy(Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii", inputs)
        credentials = VipCredentials(api_key=SecretStr(facts["api_key"]), url=facts["url"])
        with_runner = sweep.with_options(task_runner=task_runner(dask=options.dask))
        for row in with_runner(credentials, inputs, Path(temporary, "outputs")):
            print(row)


if __name__ == "__main__":
    main()
