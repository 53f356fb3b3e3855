"""What a user does on each platform, as a child process, and what must have come of it."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote

import numpy as np
from PIL import Image
from pydantic import SecretStr

from chaos.plans import READ_SECONDS, SETTLE_SECONDS
from prefect_biomed.clients import boss, vantage6, vip
from prefect_biomed.clients.errors import JobFailed
from prefect_biomed.clients.http import Timeouts
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.sandbox import Entry, Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL

T = TypeVar("T")
Finished = dict[str, Any]
Step = Callable[[str, Callable[[], Any]], Any]

_QUICK = PollSettings(interval_seconds=0.1, growth=1.2, max_interval_seconds=0.5, deadline_seconds=40.0)


class Journey(ABC):
    """One piece of work on one platform.

    Args:
        sandbox: Serves the platform.
        seed: Contents are made from it.
        folder: Of this rehearsal.
    """

    platform: ClassVar[str]
    creates: ClassVar[str]
    switches: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, sandbox: Sandbox, seed: int, folder: Path) -> None:
        self.sandbox = sandbox
        self.seed = seed
        self.folder = folder
        self.name = f"chaos-{seed}"
        self.token = f"t{seed:09d}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a user knows of the platform: addresses, keys."""
        return dict(self.sandbox.ready()[self.platform])

    @property
    def journal(self) -> list[Entry]:
        """The requests so far."""
        return list(getattr(self.sandbox, self.platform).journal.entries())

    def order(self) -> dict[str, Any]:
        """What the process that does the work is told."""
        return {"facts": self.facts, "seed": self.seed, "folder": self.folder, "name": self.name, "token": self.token}

    @abstractmethod
    def prepare(self) -> None:
        """Write the local files."""

    @abstractmethod
    def expire_keys(self) -> None:
        """Make keys or tokens that were given out stop working."""

    @abstractmethod
    def lost(self) -> Iterator[str]:
        """Tell what was removed from the platform and is not here. Called at any time."""

    @abstractmethod
    def wrong(self, result: Any) -> Iterator[str]:
        """Tell what is wrong at the end, when the work says that it is done."""

    @abstractmethod
    def made(self) -> Mapping[str, int]:
        """How many remote objects each intent has. Called at any time."""

    def secrets(self) -> list[str]:
        """What must be in no log and in no file."""
        return sorted(_secrets_in(self.facts))


def _secrets_in(facts: Any, key: str = "") -> set[str]:
    if isinstance(facts, Mapping):
        found = set()
        for name, value in facts.items():
            found |= _secrets_in(value, f"{key}.{name}")
        return found
    secret = re.search(r"api_key|password|secret|tokens", key) and isinstance(facts, str) and len(facts) > 7
    return {facts} if secret else set()


# -- VIP ---------------------------------------------------------------------------------------------------------------


class VipJourney(Journey):
    """Upload two files, run a pipeline twice on them, download, remove all from the platform."""

    platform = "vip"
    creates = "/executions$"
    runs = 2

    def prepare(self) -> None:
        inputs = self.folder / "inputs"
        inputs.mkdir()
        self.content = Random(self.seed).randbytes(30_000)
        (inputs / "a.bin").write_bytes(self.content)

    def expire_keys(self) -> None:
        self.sandbox.vip.switches.key_generation += 1

    def made(self) -> Mapping[str, int]:
        engine = self.sandbox.vip.engine
        names = [execution.name for execution in engine.of(self.sandbox.vip.users.main)]
        return {name: names.count(name) for name in {_session(self.order()).workflow_name(run) for run in (1, 2)}}

    def lost(self) -> Iterator[str]:
        outputs = "OUTPUTS"
        gone = [entry for entry in self.journal if entry.method == "DELETE" and entry.effect and outputs in entry.path]
        if gone and self._here() != [self.content] * self.runs:
            yield f"{unquote(gone[0].path)} was removed, and {len(self._here())} outputs are here"

    def wrong(self, result: Any) -> Iterator[str]:
        if self._here() != [self.content] * self.runs:
            yield f"{len(self._here())} outputs are here, or they are not what was sent"
        if sorted(result["statuses"]) != ["Removed"] * self.runs:
            yield f"reported: {result}"
        yield from _sent_again(self.journal, r"/rest/path/.*a\.bin$")

    def _here(self) -> list[bytes]:
        outputs = self.folder / "outputs"
        return [path.read_bytes() for path in outputs.rglob("a.bin*") if path.is_file() and path.suffix != ".part"]


def _session(order: Mapping[str, Any]) -> vip.VipSession:
    name, folder = order["name"], order["folder"]
    return vip.VipSession(
        session_name=name,
        pipeline_id="CopyFile/1.0",
        input_settings={"file": "a.bin"},
        input_dir=folder / "inputs",
        output_dir=folder / "outputs",
        vip_input_dir=f"/vip/Home/API/{name}/INPUTS",
        vip_output_dir=f"/vip/Home/API/{name}/OUTPUTS",
        nb_runs=VipJourney.runs,
        token=order["token"],
    )


def work_on_vip(order: Mapping[str, Any], step: Step) -> Any:
    session, facts = _session(order), order["facts"]
    settings: dict[str, Any] = {"read_seconds": READ_SECONDS, "settle_seconds": SETTLE_SECONDS}
    with vip.VipClient(facts["url"], facts["api_key"], **settings) as client:
        step("upload", lambda: vip.upload(client, session, vip.preflight(client, session), settle_seconds=4.0) and None)
        for run in range(1, session.nb_runs + 1):
            step(f"launch {run}", lambda run=run: vip.launch(client, session, run, capacity=_QUICK).identifier)
        *_, workflows = vip.monitor(client, session, _QUICK)
        wanted = {vip.WorkflowStatus.FINISHED, vip.WorkflowStatus.REMOVED}
        if any(workflow.status not in wanted for workflow in workflows):
            raise JobFailed(f"not finished: {workflows}")
        vip.download(client, session, retry_seconds=(0.2, 0.5))
        vip.finish(client, session, timeout_seconds=10.0)
        known = vip.SessionFile(session, client).read().workflows.values()
    return {"statuses": [workflow.status for workflow in known]}


# -- vantage6 ----------------------------------------------------------------------------------------------------------


class Vantage6Journey(Journey):
    """Run an algorithm at two organizations; on generation 5 with a session and a dataframe of its own."""

    platform = "vantage6"
    creates = "/(task|session|dataframe)$"

    def prepare(self) -> None:
        """Nothing is needed."""

    def expire_keys(self) -> None:
        self.sandbox.vantage6.switches.token_generation += 1

    def order(self) -> dict[str, Any]:
        return {**super().order(), "number": self.seed}

    def made(self) -> Mapping[str, int]:
        registry = self.sandbox.vantage6.registry
        tasks = [task for task in registry.tasks if task.parent is None and task.name.startswith(self.name)]
        return {"task": len(tasks)}

    def lost(self) -> Iterator[str]:
        yield from ()

    def wrong(self, result: Any) -> Iterator[str]:
        expected = {name: {"number": self.seed} for name in ("north", "south")}
        if result != expected:
            yield f"{result}, expected {expected}"


def work_on_vantage6(order: Mapping[str, Any], step: Step) -> Any:
    facts, name = order["facts"], order["name"]
    login: dict[str, Any] = {
        "username": "north-researcher",
        "password": SecretStr(facts["users"]["north-researcher"]["password"]),
    }
    if robot := facts.get("service_account"):
        login = {"service_account": robot["username"], "client_secret": SecretStr(robot["client_secret"])}
        login |= {"auth_url": facts["auth_url"], "realm": facts["realm"]}
    settings: dict[str, Any] = {"read_seconds": READ_SECONDS, "settle_seconds": SETTLE_SECONDS}
    with vantage6.connect(facts["url"], **login, **settings) as client:
        data: dict[str, Any] = {"databases": "default"}
        if client.version.major == 5:
            data = step("session", lambda: _dataframe(client, name, order["folder"]))
        request = vantage6.TaskRequest(
            collaboration="plain",
            image=CLINICAL,
            method="echo",
            name=name,
            organizations=["north", "south"],
            arguments={"number": order["number"]},
            **data,
        )
        intents = order["folder"] / "intents"
        task = step("launch", lambda: vantage6.launch(client, request, order["token"], folder=intents).id)
        for _ in vantage6.watch(client, [task], _QUICK):
            pass
        results = vantage6.fetch_results(client, task, output_dir=order["folder"] / "results")
    return {result.organization: result.value for result in results}


def _dataframe(client: vantage6.Vantage6Client, name: str, folder: Path) -> dict[str, Any]:
    session = vantage6.make_session(client, "plain", name)
    frame = vantage6.make_dataframe(client, session.id, name, label="default", image=CLINICAL, method="read_csv")
    vantage6.wait_for_dataframe(client, frame.id, _QUICK)
    return {"session": session.id, "databases": name}


# -- Boss --------------------------------------------------------------------------------------------------------------

_SLICES = 16
_SIDE = 64


class BossJourney(Journey):
    """Make an ingest job, upload its tiles, complete it."""

    platform = "boss"
    creates = "/ingest/$"
    switches: ClassVar[Mapping[str, Any]] = {"prepare_seconds": 0.0, "quiet_seconds": 0.1, "completing_seconds": 0.0}

    def prepare(self) -> None:
        self.pixels = np.random.default_rng(self.seed).integers(1, 255, (_SLICES, _SIDE, _SIDE), "uint8")
        for z, plane in enumerate(self.pixels):
            tile = self.folder / "stack" / str(z) / "0_0_0.png"
            tile.parent.mkdir(parents=True)
            Image.fromarray(plane).save(tile)

    def expire_keys(self) -> None:
        self.sandbox.boss.switches.key_generation += 1

    def made(self) -> Mapping[str, int]:
        return {"job": len(self.sandbox.boss.service.jobs)}

    def lost(self) -> Iterator[str]:
        yield from ()

    def wrong(self, result: Any) -> Iterator[str]:
        facts = self.facts
        with boss.BossClient(facts["host"], facts["tokens"]["alice"], protocol="http") as client:
            block = client.cutout("sandbox/stack/uint8", 0, (0, _SIDE), (0, _SIDE), (0, _SLICES))
        if not np.array_equal(np.frombuffer(block.content, block.datatype).reshape(block.shape), self.pixels):
            yield "the pixels differ"
        job = next(iter(facts["jobs"].values()))
        if job["status"] != "COMPLETE" or job["late_indexed"] or job["distinct_puts"] != _SLICES:
            yield f"the job: {job}"
        told = result["deleted"] + result["deleted_before"] + result["unaccounted"]
        if (told, result["tile_count"], result["holes"], result["failed"]) != (_SLICES, _SLICES, [], {}):
            yield f"reported: {result}"


def work_on_boss(order: Mapping[str, Any], step: Step) -> Any:
    facts, folder = order["facts"], order["folder"]
    stack = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    config = boss.IngestConfig.load(
        {
            "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
            "client": {
                "backend": {"name": "boss", "class": "BossBackend", "host": facts["host"], "protocol": "http"},
                "path_processor": {
                    "class": f"{stack}PathProcessor",
                    "params": {"root_dir": str(folder / "stack"), "filetype": "png"},
                },
                "tile_processor": {"class": f"{stack}TileProcessor", "params": {"filetype": "png"}},
            },
            "database": {"collection": "sandbox", "experiment": "stack", "channel": "uint8"},
            "ingest_job": {
                "resolution": 0,
                "extent": {"x": [0, _SIDE], "y": [0, _SIDE], "z": [0, _SLICES], "t": [0, 1]},
                "tile_size": {"x": _SIDE, "y": _SIDE, "z": 1, "t": 1},
            },
        }
    )
    upload = boss.UploadSettings(threads=2, min_lease_seconds=3, straggler_seconds=10, grace_seconds=5)
    client = boss.BossClient(
        facts["host"],
        facts["tokens"]["alice"],
        protocol="http",
        timeouts=Timeouts(read_seconds=READ_SECONDS),
        aws_endpoint_url=facts["url"],
        settle_seconds=SETTLE_SECONDS,
    )
    with client:
        job = step("launch", lambda: boss.create_once(client, config, order["token"], folder=folder / "intents").id)
        while not client.counts(job).status.is_success:
            boss.wait_until_ready(client, job, _QUICK)
            boss.upload(client, config, job, upload, ledger_folder=folder / "ledgers")
            boss.complete(client, job, _QUICK, ledger_folder=folder / "ledgers")
        report = boss.account(client, config, job, upload, ledger_folder=folder / "ledgers")
    return json.loads(report.model_dump_json())


def _sent_again(journal: list[Entry], path: str) -> Iterator[str]:
    """Files that were sent again although they had arrived and the client was told so."""
    complete: set[str] = set()
    for entry in journal:
        if entry.method == "DELETE" and entry.effect:
            complete = {one for one in complete if not one.startswith(entry.path)}
        if entry.method != "PUT" or not re.search(path, unquote(entry.path)):
            continue
        if entry.path in complete:
            yield f"{unquote(entry.path)} was sent again although it was complete"
        if entry.effect and entry.fault is None and entry.status == entry.answered:
            complete.add(entry.path)


JOURNEYS: dict[str, type[Journey]] = {"vip": VipJourney, "vantage6": Vantage6Journey, "boss": BossJourney}
WORK: dict[str, Callable[[Mapping[str, Any], Step], Any]] = {
    "vip": work_on_vip,
    "vantage6": work_on_vantage6,
    "boss": work_on_boss,
}
