"""What becomes of a launch whose answer is lost: `PYTHONPATH=tests python -m chaos.answers [vip] [vantage6] [boss]`.

Eight kinds of answer on each platform, each for a first call, for its repetition, for a process that is killed while
its request is on the way and started again at once, and for two processes that work on the same intent. The calls are
made by processes of their own. Each cell tells how many remote objects there are in the end; the exit status is the
number of cells with another number than one.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from prefect_biomed.clients.errors import BiomedError
from prefect_biomed.sandbox import Fault, Sandbox

HTML = "<html><body><h1>Oops</h1></body></html>"
ANSWERS: dict[str, dict[str, Any]] = {
    "connection lost": {"drop": "after"},
    "502 page": {"status": 502, "body": HTML},
    "500 page": {"status": 500, "body": HTML},
    "500 empty": {"status": 500, "body": ""},
    "400 page": {"status": 400, "body": HTML},
    "200 page": {"status": 200, "body": HTML},
    "201 empty": {"status": 201, "body": ""},
    "201 {}": {"status": 201, "body": "{}", "content_type": "application/json"},
}
WAYS = ("first", "repeated", "killed", "twins")
PATHS = {"vip": "/executions$", "vantage6": "/task$", "boss": "/ingest/?$"}
SETTLE = 15.0
HOLD = 3.0
TOKEN = "abcdefghij"


def launch_vip(facts: dict[str, Any], folder: Path) -> None:
    """Launch one execution."""
    from prefect_biomed.clients.vip import VipClient, VipSession, launch

    session = VipSession(
        session_name="lost",
        pipeline_id="EveryType/1.0",
        input_settings={"text": "x"},
        output_dir=folder,
        vip_input_dir="/vip/Home/API/lost/INPUTS",
        vip_output_dir="/vip/Home/API/lost/OUTPUTS",
        token=TOKEN,
    )
    with VipClient(facts["url"], facts["api_key"]) as client:
        launch(client, session, 1, settle_seconds=SETTLE)


def launch_vantage6(facts: dict[str, Any], folder: Path) -> None:
    """Create one task."""
    from pydantic import SecretStr

    from prefect_biomed.clients.vantage6 import TaskRequest, connect, launch

    password = SecretStr(facts["users"]["north-researcher"]["password"])
    with connect(facts["url"], username="north-researcher", password=password) as client:
        request = TaskRequest(
            collaboration="plain",
            image="prefect-biomed/clinical:1.0",
            method="echo",
            name="lost",
            organizations=["north"],
            arguments={"a": 1},
            databases="default",
        )
        launch(client, request, TOKEN, settle_seconds=SETTLE, folder=folder)


def launch_boss(facts: dict[str, Any], folder: Path) -> None:
    """Create one ingest job."""
    from prefect_biomed.clients.boss import BossClient, IngestConfig, create_once

    stack = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    tile = folder / "stack" / "0" / "0_0_0.png"
    tile.parent.mkdir(parents=True, exist_ok=True)
    part = tile.with_name(f"{os.getpid()}.png")  # a twin may be reading
    Image.new("L", (64, 64)).save(part)
    part.replace(tile)
    params = {"root_dir": str(folder / "stack"), "filetype": "png"}
    config = {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": facts["host"], "protocol": "http"},
            "path_processor": {"class": f"{stack}PathProcessor", "params": params},
            "tile_processor": {"class": f"{stack}TileProcessor", "params": {"filetype": "png"}},
        },
        "database": {"collection": "sandbox", "experiment": "stack", "channel": "uint8"},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, 64], "y": [0, 64], "z": [0, 16], "t": [0, 1]},
            "tile_size": {"x": 64, "y": 64, "z": 1, "t": 1},
        },
    }
    token = facts["tokens"]["alice"]
    with BossClient(facts["host"], token, protocol="http", aws_endpoint_url=facts["url"]) as client:
        create_once(client, IngestConfig.load(config), TOKEN, settle_seconds=SETTLE, folder=folder)


LAUNCHES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "vip": launch_vip,
    "vantage6": launch_vantage6,
    "boss": launch_boss,
}


def work(name: str, facts: dict[str, Any], folder: Path, pipe: multiprocessing.connection.Connection) -> None:
    """A process that launches whenever it is told to, and says how that ended."""
    # What a call looks for is said in its log; here the table is of interest.
    logging.disable(logging.WARNING)
    while pipe.recv():
        try:
            LAUNCHES[name](facts, folder)
            pipe.send("done")
        except BiomedError as error:
            pipe.send(f"{type(error).__name__}: {error}")


class Worker:
    """One such process."""

    def __init__(self, name: str, facts: dict[str, Any], folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(name, facts, folder, other), daemon=True)
        self.process.start()

    def begin(self) -> None:
        """Launch."""
        self.pipe.send(True)

    def end(self) -> str:
        """Wait for the launch that was begun."""
        return str(self.pipe.recv()) if self.pipe.poll(120) else "no end"

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join(30)


def count(sandbox: Sandbox, name: str) -> int:
    """How many remote objects there are."""
    if name == "vip":
        return sum(one.name.startswith("lost-") for one in sandbox.vip.engine.of(sandbox.vip.users.main))
    if name == "vantage6":
        return sum(task.name.startswith("lost-") for task in sandbox.vantage6.registry.tasks)
    return len(sandbox.boss.service.jobs)


def cell(name: str, answer: str, way: str) -> str:
    """Try one answer in one way; returns the number of objects, and what the last call said unless it is well."""
    switches = {"vantage6": {"key_bits": 2048}} if name == "vantage6" else {}
    with Sandbox(name, **switches) as sandbox, tempfile.TemporaryDirectory() as temporary:
        facts, platform, folder = sandbox.ready()[name], getattr(sandbox, name), Path(temporary)
        lost = ANSWERS[answer]
        if way == "killed":
            platform.faults.add(Fault(method="POST", path=PATHS[name], times=1, hold_seconds=HOLD, **lost))
        else:
            after = {} if "drop" in lost else {"after_effect": True}
            platform.faults.add(Fault(method="POST", path=PATHS[name], times=1, **lost | after))
        said = _tried(name, facts, folder, platform, way)
        platform.journal.settle(30)
        made = count(sandbox, name)
    return str(made) if made == 1 and said == "done" else f"{made} ({said[:60]})"


def _tried(name: str, facts: dict[str, Any], folder: Path, platform: Any, way: str) -> str:
    workers = [Worker(name, facts, folder) for _ in range(2 if way in {"killed", "twins"} else 1)]
    try:
        if way == "killed":
            workers[0].begin()
            while not platform.journal.entries("POST", PATHS[name].strip("$?")):
                time.sleep(0.02)
            time.sleep(0.2)
            workers[0].kill()
            workers[1].begin()
            return workers[1].end()
        for worker in workers:
            worker.begin()
        said = [worker.end() for worker in workers]
        if way == "repeated":
            workers[0].begin()
            said = [workers[0].end()]
        return next((one for one in said if one != "done"), "done")
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.kill()


def main() -> int:
    """Print the table."""
    wrong = 0
    names = sys.argv[1:] or list(LAUNCHES)
    print(f"{'lost answer':16}" + "".join(f"{f'{name}: {way}':20}" for name in names for way in WAYS), flush=True)
    for answer in ANSWERS:
        cells = [cell(name, answer, way) for name in names for way in WAYS]
        wrong += sum(one != "1" for one in cells)
        print(f"{answer:16}" + "".join(f"{one:20}" for one in cells), flush=True)
    print(f"{wrong} of {len(ANSWERS) * len(names) * len(WAYS)} wrong: each intent has to have one remote object")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
