"""What becomes of remote jobs when a run is cancelled and something is dead: `python -m harness.cancels`.

In each of four circumstances a run on each platform is cancelled. The clock begins when a worker is there (again).
Arguments choose some of them: `python -m harness.cancels "server restarted"`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from PIL import Image
from pydantic import SecretStr

from examples.lab import Laboratory
from harness.laboratory import FlowRun, Remote, wait_until
from prefect_biomed.clients.vantage6 import Task, connect
from prefect_biomed.sandbox.vantage6 import CLINICAL

PLATFORMS = ("vip", "vantage6", "boss")
CIRCUMSTANCES = ("worker alive", "worker dead", "worker and process dead", "server restarted")
WITHIN_SECONDS = 60.0
_TILES = 400
_PATIENCE_SECONDS = 180.0


class Ending(NamedTuple):
    """How the remote job of a cancelled run has ended.

    Attributes:
        platform: Where it ran.
        circumstance: What was dead when it was cancelled.
        remote: State of the remote job.
        seconds: After the return of a worker, until the remote job had ended; infinite when it did not.
        run: State of the flow run.
    """

    platform: str
    circumstance: str
    remote: str
    seconds: float
    run: str

    @property
    def is_good(self) -> bool:
        """Whether the job ended in time, and the run with it."""
        return self.seconds <= WITHIN_SECONDS and self.run == "CANCELLED"


@contextmanager
def laboratory(home: Path) -> Iterator[Laboratory]:
    """A laboratory of all platforms with the automations, as documented.

    Args:
        home: Its folder.
    """
    with Laboratory(home, platforms=PLATFORMS) as lab:
        vip, vantage6, boss = (lab.sandbox[platform] for platform in PLATFORMS)
        lab.run(
            "python",
            "deployments/setup.py",
            "--name=lab",
            PREFECT_BIOMED_VIP_API_KEY=vip["api_key"],
            PREFECT_BIOMED_VIP_URL=vip["url"],
            PREFECT_BIOMED_VANTAGE6_URL=vantage6["url"],
            PREFECT_BIOMED_VANTAGE6_USERNAME="north-admin",
            PREFECT_BIOMED_VANTAGE6_PASSWORD=vantage6["users"]["north-admin"]["password"],
            PREFECT_BIOMED_BOSS_TOKEN=boss["tokens"]["alice"],
            PREFECT_BIOMED_BOSS_HOST=boss["host"],
            PREFECT_BIOMED_BOSS_PROTOCOL="http",
            PREFECT_BIOMED_BOSS_AWS_ENDPOINT_URL=boss["url"],
        )
        lab.run("python", "deployments/automations.py", "--sweep-seconds=30")
        Remote(lab, "vip").switch(job_seconds=7200.0)
        # So that an ingest takes minutes.
        Remote(lab, "boss").switch(latency_ms=300, prepare_seconds=0.2)
        yield lab


def endings(lab: Laboratory, folder: Path, circumstance: str) -> list[Ending]:
    """Cancel a run on each platform, and see how their remote jobs end.

    Args:
        lab: The laboratory; a worker is at work there before and after.
        folder: For inputs and outputs.
        circumstance: One of `CIRCUMSTANCES`.
    """
    folder.mkdir()
    runs = {"vip": _session(lab, folder), "vantage6": _analysis(lab), "boss": _ingest(lab, folder)}
    before = {platform: _state(lab, platform) for platform in runs}
    wait_until(
        lambda: all(_state(lab, platform) in _AT_WORK[platform] for platform in runs),
        _PATIENCE_SECONDS,
        f"jobs at work everywhere, before that they were {before}",
    )
    if "dead" in circumstance:
        lab.kill("worker")
    if "process dead" in circumstance:
        for run in runs.values():
            run.kill()
    cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": True}
    for run in runs.values():
        requests.post(f"{lab.api_url}/flow_runs/{run.id}/set_state", json=cancelling, timeout=60).raise_for_status()
    if circumstance == "server restarted":
        lab.kill("server")
        lab.start_server()
    elif "dead" in circumstance:
        lab.start_worker()
    began = time.monotonic()
    ended: dict[str, float] = {}
    while time.monotonic() < began + _PATIENCE_SECONDS:
        for platform in runs.keys() - ended.keys():
            if _state(lab, platform) not in _AT_WORK[platform]:
                ended[platform] = time.monotonic() - began
        if len(ended) == len(runs) and all(run.state == "CANCELLED" for run in runs.values()):
            break
        time.sleep(0.5)
    return [
        Ending(platform, circumstance, _state(lab, platform), ended.get(platform, float("inf")), run.state)
        for platform, run in runs.items()
    ]


def _session(lab: Laboratory, folder: Path) -> FlowRun:
    (folder / "inputs").mkdir()
    (folder / "inputs" / "a.txt").write_text("x")
    parameters = {
        "pipeline_id": "SlowSegmentation/1.0",
        "input_settings": {"image": "a.txt", "duration": 7200},
        "input_dir": str(folder / "inputs"),
        "output_dir": str(folder / "outputs"),
        "session_name": folder.name,
    }
    return _started(lab, "vip", "vip-session", parameters)


def _analysis(lab: Laboratory) -> FlowRun:
    parameters = {
        "collaboration": "plain",
        "image": CLINICAL,
        "method": "sleep",
        "arguments": {"seconds": 7200},
        "databases": "default",
    }
    return _started(lab, "vantage6", "federated-analysis", parameters)


def _ingest(lab: Laboratory, folder: Path) -> FlowRun:
    for z in range(_TILES):
        (folder / "stack" / str(z)).mkdir(parents=True)
        Image.fromarray(np.full((64, 64), z % 255, np.uint8)).save(folder / "stack" / str(z) / "0_0_0.png")
    plugin = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    config = {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": "h", "protocol": "http"},
            "path_processor": {
                "class": f"{plugin}PathProcessor",
                "params": {"root_dir": str(folder / "stack"), "filetype": "png"},
            },
            "tile_processor": {"class": f"{plugin}TileProcessor", "params": {"filetype": "png"}},
        },
        "database": {"collection": "sandbox", "experiment": "stack", "channel": "uint8"},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, 64], "y": [0, 64], "z": [0, _TILES], "t": [0, 1]},
            "tile_size": {"x": 64, "y": 64, "z": 1, "t": 1},
        },
    }
    return _started(lab, "boss", "boss-ingest", {"config": config, "upload": {"threads": 1}})


def _started(lab: Laboratory, platform: str, deployment: str, parameters: dict[str, Any]) -> FlowRun:
    common = {
        "credentials": {"$ref": {"block_document_slug": f"{platform}-credentials/lab"}},
        "waiting": {"cancel_remote": True},
    }
    return FlowRun(lab, f"{deployment}/{deployment}", parameters | common)


def _of_vip(lab: Laboratory) -> str:
    facts = lab.sandbox["vip"]
    listed = requests.get(f"{facts['url']}/rest/executions", headers={"apikey": facts["api_key"]}, timeout=60).json()
    return str(max(listed, key=lambda one: one["startDate"] or 0)["status"]) if listed else "none"


def _of_vantage6(lab: Laboratory) -> str:
    facts = lab.sandbox["vantage6"]
    password = SecretStr(facts["users"]["north-admin"]["password"])
    with connect(facts["url"], username="north-admin", password=password) as client:
        newest = max(client.records(Task), key=lambda task: task.id, default=None)
        return client.task_status(newest.id).value if newest else "none"


def _of_boss(lab: Laboratory) -> str:
    jobs = requests.get(f"{lab.sandbox['boss']['url']}/_sandbox/ready", timeout=60).json()["jobs"]
    return str(jobs[max(jobs, key=int)]["status"]) if jobs else "none"


_STATES: dict[str, Callable[[Laboratory], str]] = {"vip": _of_vip, "vantage6": _of_vantage6, "boss": _of_boss}
_AT_WORK = {"vip": {"Running"}, "vantage6": {"active"}, "boss": {"UPLOADING"}}


def _state(lab: Laboratory, platform: str) -> str:
    return _STATES[platform](lab)


def main() -> None:
    """Print the table; exit with 1 when something did not end in time."""
    with tempfile.TemporaryDirectory() as folder, laboratory(Path(folder) / "lab") as lab:
        rows = []
        print(f"{'platform':10}{'when it was cancelled':26}{'remote job':18}{'after':>8}  flow run", flush=True)
        for number, circumstance in enumerate(sys.argv[1:] or CIRCUMSTANCES):
            for row in endings(lab, Path(folder) / f"cancels{number}", circumstance):
                rows.append(row)
                print(
                    f"{row.platform:10}{row.circumstance:26}{row.remote:18}{row.seconds:6.1f} s  {row.run}", flush=True
                )
    late = sum(not row.is_good for row in rows)
    print(f"{len(rows)} cancelled, {late} of them not ended within {WITHIN_SECONDS:.0f} s of a worker's return")
    sys.exit(1 if late else 0)


if __name__ == "__main__":
    main()
