"""What a platform knows survives its process, also one that is killed."""

import gzip
import io
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import requests
from PIL import Image

from harness.vantage6_account import Account, until
from prefect_biomed.sandbox import Sandbox


class Served:
    """A sandbox in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "prefect_biomed.sandbox", *arguments, "--state-dir", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.facts: dict[str, Any] = json.loads(self.process.stdout.readline())

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=20)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start sandboxes that keep their state in one folder; what still runs is killed at the end."""
    served: list[Served] = []

    def start(*arguments: str) -> Served:
        served.append(Served(tmp_path / "state", *arguments))
        return served[-1]

    yield start
    for one in served:
        one.end(signal.SIGKILL)


class Portal:
    """VIP, asked with the key of the main user."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.prefix = facts["url"] + ("/rest" if facts["profile"] == "vip" else "")
        self.key = facts["api_key"]

    def ask(self, method: str, path: str, **options: Any) -> Any:
        answer = requests.request(method, self.prefix + path, headers={"apikey": self.key}, timeout=20, **options)
        answer.raise_for_status()
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.content

    def launch(self, pipeline: str, values: dict[str, Any], name: str) -> str:
        body = {"name": name, "pipelineIdentifier": pipeline, "inputValues": values}
        return str(self.ask("POST", "/executions", json=body)["identifier"])

    def status(self, identifier: str) -> str:
        return str(self.ask("GET", f"/executions/{identifier}")["status"])

    def exists(self, path: str) -> bool:
        return bool(self.ask("GET", f"/path{path}?action=exists")["exists"])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_executions_files_and_keys_of_vip_survive(serve: Callable[..., Served], end: signal.Signals) -> None:
    first = serve("vip", "--set", "vip.delete_seconds=1")
    facts = first.facts["vip"]
    requests.patch(facts["url"] + "/_sandbox/switches", json={"key_generation": 3}, timeout=5).raise_for_status()
    facts = requests.get(facts["url"] + "/_sandbox/ready", timeout=5).json()
    portal = Portal(facts)
    for name in ("kept", "deleted"):
        portal.ask("PUT", f"/path/vip/Home/{name}.txt", data=name.encode())
    key = {"storageIdentifier": facts["girder"]["storage_id"], "apiKey": facts["girder"]["api_key"]}
    portal.ask("PUT", "/user/externalKeys", json=key)
    done = portal.launch("CopyFile/1.0", {"file": "/vip/Home/kept.txt"}, "done")
    until(lambda: portal.status(done) == "Finished")
    killed = portal.launch("SlowSegmentation/1.0", {"image": "/vip/Home/kept.txt", "duration": 60}, "killed")
    portal.ask("PUT", f"/executions/{killed}/kill")
    running = portal.launch("SlowSegmentation/1.0", {"image": "/vip/Home/kept.txt", "duration": 2}, "running")
    before = portal.ask("GET", f"/executions/{done}")
    portal.ask("DELETE", "/path/vip/Home/deleted.txt")
    first.end(end)
    with pytest.raises(requests.ConnectionError):
        portal.status(done)

    again = serve("vip").facts["vip"]
    assert again == facts
    assert portal.ask("GET", f"/executions/{done}") == before
    (result,) = before["returnedFiles"]["copy"]
    assert portal.ask("GET", f"/path{result}?action=content") == b"kept"
    assert portal.ask("GET", "/user/externalKeys")[0]["apiKey"] == key["apiKey"]
    assert portal.status(running) == "Running"
    until(lambda: portal.status(killed) == "Killed")
    until(lambda: not portal.exists("/vip/Home/deleted.txt"))
    until(lambda: portal.status(running) == "Finished")
    names = [one["name"] for one in portal.ask("GET", "/executions")]
    assert names == ["running", "killed", "done"]
    assert len(portal.ask("GET", "/executions/examples")) == 1
    new = portal.launch("CopyFile/1.0", {"file": "/vip/Home/kept.txt"}, "new")
    assert new not in (done, killed, running)


def test_transfers_that_the_storage_has_accepted_arrive_after_a_kill(serve: Callable[..., Served]) -> None:
    settings = ["vip.reschedule_uploads=1", "vip.reschedule_seconds=1"]
    first = serve("vip", *(text for setting in settings for text in ("--set", setting)))
    portal = Portal(first.facts["vip"])
    with pytest.raises(requests.HTTPError, match="400"):
        portal.ask("PUT", "/path/vip/Home/late.txt", data=b"late")
    first.end(signal.SIGKILL)
    serve("vip")
    assert not portal.exists("/vip/Home/late.txt")
    until(lambda: portal.exists("/vip/Home/late.txt"))
    assert portal.ask("GET", "/path/vip/Home/late.txt?action=content") == b"late"


def test_girder_survives(serve: Callable[..., Served]) -> None:
    first = serve("vip")
    girder = first.facts["vip"]["girder"]

    def ask(method: str, route: str, content: bytes = b"", **query: Any) -> Any:
        answer = requests.request(
            method, girder["api_url"] + route, params=query, data=content, headers={"Girder-Token": token}, timeout=10
        )
        answer.raise_for_status()
        return answer.json() if "json" in answer.headers["content-type"] else answer.content

    token = ""
    token = ask("POST", "/api_key/token", key=girder["api_key"])["authToken"]["token"]
    top = ask("GET", "/resource/lookup", path="/collection/Sandbox/Inputs")["_id"]
    folder = ask("POST", "/folder", parentId=top, name="mine")["_id"]
    file = ask("POST", "/file", b"bytes", parentType="folder", parentId=folder, name="a.txt", size=5)["_id"]
    first.end(signal.SIGKILL)
    serve("vip")
    assert ask("GET", "/resource/lookup", path="/collection/Sandbox/Inputs/mine/a.txt/a.txt")["_id"] == file
    assert ask("GET", f"/file/{file}/download") == b"bytes"


def test_what_ran_on_a_carmin_server_says_running_for_ever(serve: Callable[..., Served]) -> None:
    first = serve("vip", "--set", "vip.profile=carmin")
    portal = Portal(first.facts["vip"])
    portal.ask("PUT", "/path/alice/x.txt", data=b"x")
    (slow,) = [one for one in first.facts["vip"]["pipelines"] if "SlowSegmentation" in one]
    (copy,) = [one for one in first.facts["vip"]["pipelines"] if "CopyFile" in one]
    file = portal.prefix + "/path/alice/x.txt"
    done = portal.launch(copy, {"file": file}, "done")
    running = portal.launch(slow, {"image": file, "duration": 1.0}, "running")
    for one in (done, running):
        portal.ask("PUT", f"/executions/{one}/play")
    until(lambda: portal.status(done) == "Finished")
    first.end(signal.SIGKILL)
    serve("vip")
    assert portal.ask("GET", "/path/alice/x.txt?action=content") == b"x"
    assert portal.status(done) == "Finished"
    time.sleep(1.5)
    assert portal.status(running) == "Running"
    portal.ask("PUT", f"/executions/{running}/kill")
    assert portal.status(running) == "Killed"


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "end"), [(3, signal.SIGTERM), (4, signal.SIGKILL), (5, signal.SIGKILL)])
def test_tasks_users_and_tokens_of_vantage6_survive(
    serve: Callable[..., Served], generation: int, end: signal.Signals
) -> None:
    arguments = ["vantage6", "--v6", str(generation), "--set", "vantage6.key_bits=2048"]
    first = serve(*arguments)
    facts = first.facts["vantage6"]
    account, root = Account(facts), Account(facts, "root")
    done = account.create("partial_average", column="bmi", collaboration="encrypted")["id"]
    assert account.wait(done) == "completed"
    outputs = account.outputs(done)
    organization = {"name": "fourth", "address1": "a", "address2": "b", "zipcode": "1", "country": "NL", "domain": "x"}
    made = root.post("/organization", organization)["id"]
    running = account.create("sleep", "north", seconds=2)["id"]
    until(lambda: account.runs(running)[0]["status"] == "active")
    first.end(end)

    again = serve("vantage6", *arguments[1:]).facts["vantage6"]
    assert again == facts
    # The tokens of before: nobody logs in anew.
    assert account.outputs(done) == outputs
    assert account.get(f"/task/{done}")["status"] == "completed"
    assert root.get(f"/organization/{made}")["name"] == "fourth"
    assert account.wait(running, 20) == "completed"
    if generation == 5:
        for frame in account._frames.values():
            assert account.get(f"/session/dataframe/{frame['id']}")["ready"]
        assert len(account.items("/session")) == 2
    another = account.create("partial_average", column="bmi", collaboration="encrypted")["id"]
    assert another > running
    assert account.wait(another, 20) == "completed"


class Ingest:
    """The Boss, asked as its first user."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.url = facts["url"]
        self.headers = {"Authorization": "Token " + facts["tokens"]["alice"]}

    def ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        return requests.request(method, f"{self.url}/latest{path}", headers=self.headers, json=body, timeout=10)

    def join(self, number: int) -> None:
        until(lambda: self.ask("GET", f"/ingest/{number}").json()["credentials"])
        self.joined = self.ask("GET", f"/ingest/{number}").json()
        keys = self.joined["credentials"]
        aws = {"region_name": "us-east-1", "endpoint_url": self.url}
        aws |= {"aws_access_key_id": keys["access_key"], "aws_secret_access_key": keys["secret_key"]}
        self.sqs, self.s3 = boto3.client("sqs", **aws), boto3.client("s3", **aws)

    def receive(self, count: int) -> list[Any]:
        queue = self.joined["ingest_job"]["upload_queue"]
        return list(self.sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=count).get("Messages", []))

    def upload(self, message: Any) -> None:
        job, body = self.joined["ingest_job"], json.loads(message["Body"])
        buffer = io.BytesIO()
        z = int(body["tile_key"].split("&")[7])
        Image.fromarray(np.full((512, 512), 10 + z, "u1")).save(buffer, "PNG")
        about = {"chunk_key": body["chunk_key"], "tile_key": body["tile_key"], "ingest_job": job["id"]}
        keys = ("KVIO_SETTINGS", "STATEIO_CONFIG", "OBJECTIO_CONFIG", "resource")
        self.s3.put_object(
            Bucket=self.joined["tile_bucket_name"],
            Key=body["tile_key"],
            Body=buffer.getvalue(),
            Metadata={
                "message_id": message["MessageId"],
                "receipt_handle": message["ReceiptHandle"],
                "metadata": json.dumps(about | {"x_size": 512, "y_size": 512}),
            },
        )
        whole = json.dumps(about | {"parameters": {key: self.joined[key] for key in keys}})
        self.sqs.send_message(QueueUrl=job["tile_index_queue"], MessageBody=whole)
        self.sqs.delete_message(QueueUrl=job["upload_queue"], ReceiptHandle=message["ReceiptHandle"])

    def complete(self, number: int) -> None:
        until(lambda: self.ask("POST", f"/ingest/{number}/complete").status_code == 204, 20)


def _config() -> dict[str, Any]:
    plugin = {"class": "x.Y", "params": {}}
    backend = {"name": "boss", "class": "BossBackend", "host": "h", "protocol": "http"}
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {"backend": backend, "path_processor": plugin, "tile_processor": plugin},
        "database": {"collection": "sandbox", "experiment": "stack", "channel": "uint8"},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, 512], "y": [0, 512], "z": [0, 16], "t": [0, 1]},
            "tile_size": {"x": 512, "y": 512, "z": 1, "t": 1},
        },
    }


@pytest.mark.slow
def test_jobs_queues_tiles_and_resources_of_the_boss_survive(serve: Callable[..., Served]) -> None:
    settings = ["boss.quiet_seconds=0.2", "boss.completing_seconds=0.1", "boss.visibility_seconds=2"]
    first = serve("boss", *(text for setting in settings for text in ("--set", setting)))
    ingest = Ingest(first.facts["boss"])
    assert ingest.ask("POST", "/collection/mine", {"description": "d"}).status_code == 201
    number = ingest.ask("POST", "/ingest", _config()).json()["id"]
    ingest.join(number)
    messages = ingest.receive(10)
    for message in messages[:-1]:
        ingest.upload(message)
    first.end(signal.SIGKILL)

    serve("boss")
    assert ingest.ask("GET", "/collection/mine").json()["description"] == "d"
    status = ingest.ask("GET", f"/ingest/{number}/status").json()
    # The message that was leased when the process ended is visible again once its lease has run out.
    assert status.pop("current_message_count") in (6, 7)
    assert status == {"id": number, "status": 1, "total_message_count": 16}
    # With the keys of before.
    seen: list[Any] = []

    def all_received() -> bool:
        for message in ingest.receive(10):
            ingest.upload(message)
            seen.append(message["MessageId"])
        return len(seen) == 7

    until(all_received, 20)
    assert messages[-1]["MessageId"] in seen
    ingest.complete(number)
    answer = requests.get(
        f"{ingest.url}/latest/cutout/sandbox/stack/uint8/0/0:1/0:1/0:16", headers=ingest.headers, timeout=10
    )
    pixels = np.load(io.BytesIO(gzip.decompress(answer.content)))
    assert pixels.ravel().tolist() == list(range(10, 26))
    assert ingest.ask("POST", "/ingest", _config()).json()["id"] == number + 1


@contextmanager
def _state(folder: Path, **options: Any) -> Iterator[Sandbox]:
    with Sandbox("vip", state_dir=folder, **options) as sandbox:
        yield sandbox


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    with _state(folder, seed=5) as sandbox:
        url = sandbox.vip.url
        assert folder.stat().st_mode & 0o77 == 0
        with pytest.raises(OSError, match="another sandbox uses"):
            Sandbox("vip", state_dir=folder, seed=5)
    with pytest.raises(ValueError, match="made with seed 5, not 6"):
        Sandbox("vip", state_dir=folder, seed=6)
    with pytest.raises(ValueError, match=r"made with vip\.profile=vip, not carmin"):
        Sandbox("vip", state_dir=folder, seed=5, vip={"profile": "carmin"})
    with _state(folder, seed=5, vip={"job_seconds": 1}) as sandbox:
        assert (sandbox.vip.url, sandbox.vip.switches.job_seconds) == (url, 1)
    with _state(folder, seed=5, latency_ms=1) as sandbox:
        assert (sandbox.vip.switches.job_seconds, sandbox.vip.switches.latency_ms) == (1, 1)
    for content, message in [(b"text", "holds no state"), (pickle.dumps((0,)), "written by another version")]:
        (folder / "vip.state").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Sandbox("vip", state_dir=folder, seed=5)


def test_command_line_says_why_a_folder_is_refused(serve: Callable[..., Served], tmp_path: Path) -> None:
    serve("vip")
    command = [sys.executable, "-m", "prefect_biomed.sandbox", "vip", "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "another sandbox uses" in done.stderr


def test_nothing_is_left_without_a_folder() -> None:
    with Sandbox("vip") as sandbox:
        directory = sandbox.vip.directory
    assert not directory.exists()
    assert not directory.parent.exists()
