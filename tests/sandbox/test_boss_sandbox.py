"""The emulated Boss, asked by plain requests and boto3: no code of ours is in between."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import boto3
import numpy as np
import pytest
import requests
from botocore.exceptions import ClientError
from PIL import Image

from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.boss import AwsFault, BossSandbox, Status
from prefect_biomed.sandbox.boss._jobs import hashed, morton, unmorton

CHANNEL = {"collection": "sandbox", "experiment": "stack", "channel": "uint8"}


@pytest.fixture
def boss() -> Iterator[BossSandbox]:
    with Sandbox("boss", boss={"prepare_seconds": 0.0, "quiet_seconds": 0.1, "completing_seconds": 0.0}) as sandbox:
        assert isinstance(sandbox.boss, BossSandbox)
        yield sandbox.boss


def config(**job: Any) -> dict[str, Any]:
    plugin = {"class": "x.Y", "params": {}}
    backend = {"name": "boss", "class": "BossBackend", "host": "h", "protocol": "http"}
    extent = {"x": [0, 512], "y": [0, 512], "z": [0, 16], "t": [0, 1]}
    size = {"x": 512, "y": 512, "z": 1, "t": 1}
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {"backend": backend, "path_processor": plugin, "tile_processor": plugin},
        "database": CHANNEL,
        "ingest_job": {"resolution": 0, "extent": extent, "tile_size": size} | job,
    }


class Client:
    """The smallest client that can do an ingest."""

    def __init__(self, boss: BossSandbox, user: str = "alice") -> None:
        self.boss, self.url = boss, boss.url + "/latest"
        self.headers = {"Authorization": "Token " + boss.ready()["tokens"][user]}

    def ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        return requests.request(method, self.url + path, headers=self.headers, json=body, timeout=10)

    def create(self, **job: Any) -> int:
        answer = self.ask("POST", "/ingest/", config(**job))
        assert answer.status_code == 201, answer.text
        return int(answer.json()["id"])

    def join(self, number: int) -> dict[str, Any]:
        for _ in range(100):
            answer = self.ask("GET", f"/ingest/{number}").json()
            if answer["credentials"]:
                self.answer = answer
                keys = answer["credentials"]
                aws = {
                    "region_name": "us-east-1",
                    "aws_access_key_id": keys["access_key"],
                    "aws_secret_access_key": keys["secret_key"],
                    "endpoint_url": self.boss.url,
                }
                self.sqs, self.s3 = boto3.client("sqs", **aws), boto3.client("s3", **aws)
                return dict(answer)
            time.sleep(0.01)
        raise AssertionError("never ready")

    def receive(self, **arguments: Any) -> list[Any]:
        upload = self.answer["ingest_job"]["upload_queue"]
        got = self.sqs.receive_message(QueueUrl=upload, MaxNumberOfMessages=10, **arguments)
        return list(got.get("Messages", []))

    def upload_all(self, encoded: Any, *, index: bool = True) -> int:
        done = 0
        while messages := self.receive():
            for message in messages:
                done += 1
                self.upload(message, encoded(json.loads(message["Body"])["tile_key"]), index=index)
        return done

    def upload(self, message: Any, content: bytes, *, index: bool = True) -> None:
        job, body = self.answer["ingest_job"], json.loads(message["Body"])
        keys = ("KVIO_SETTINGS", "STATEIO_CONFIG", "OBJECTIO_CONFIG", "resource")
        metadata = {"chunk_key": body["chunk_key"], "tile_key": body["tile_key"], "ingest_job": job["id"]}
        full = json.dumps(metadata | {"parameters": {key: self.answer[key] for key in keys}})
        self.s3.put_object(
            Bucket=self.answer["tile_bucket_name"],
            Key=body["tile_key"],
            Body=content,
            Metadata={
                "message_id": message["MessageId"],
                "receipt_handle": message["ReceiptHandle"],
                "metadata": json.dumps(metadata | {"x_size": 512, "y_size": 512}),
            },
        )
        if index:
            self.sqs.send_message(QueueUrl=job["tile_index_queue"], MessageBody=full)
        self.sqs.delete_message(QueueUrl=job["upload_queue"], ReceiptHandle=message["ReceiptHandle"])

    def complete(self, number: int, until: str = "COMPLETE") -> None:
        for _ in range(200):
            self.ask("POST", f"/ingest/{number}/complete")
            if self.boss.job(number).status == Status[until]:
                return
            time.sleep(0.02)
        raise AssertionError(f"still {self.boss.job(number).status.name}")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def z_of(tile_key: str) -> int:
    return int(tile_key.split("&")[7])


def test_keys_are_those_of_the_boss() -> None:
    assert hashed(1, 2, 3, 0, 5, 6, 1, 0) == "03ca58a12ec662954ac12e06517d4269&1&2&3&0&5&6&1&0"
    assert hashed(16, 1, 2, 3, 0, 5, 6, 1, 0) == "77ff984241a0d6aa443d8724a816866d&16&1&2&3&0&5&6&1&0"
    assert unmorton(morton(5, 1027, 99)) == (5, 1027, 99)


def test_a_job_goes_through_all_states_and_its_pixels_come_back(boss: BossSandbox) -> None:
    client = Client(boss)
    number = client.create()
    assert client.ask("GET", f"/ingest/{number}/status").json()["status"] == 0
    client.join(number)
    assert client.upload_all(lambda key: png(np.full((512, 512), z_of(key), "u1"))) == 16
    client.complete(number)
    read = boss.cutout("sandbox/stack/uint8", x=(0, 512), y=(0, 512), z=(0, 16))
    assert [int(plane.min()) for plane in read[0]] == [int(plane.max()) for plane in read[0]] == list(range(16))
    assert client.ask("POST", f"/ingest/{number}/complete").status_code == 204
    again = client.ask("GET", f"/ingest/{number}")
    assert (again.status_code, again.json()["code"]) == (400, 9001)
    cancelled = client.ask("DELETE", f"/ingest/{number}")
    assert (cancelled.status_code, cancelled.json()["code"]) == (400, 9001)


def test_a_key_may_do_nothing_but_what_an_ingest_needs(boss: BossSandbox) -> None:
    client = Client(boss)
    answer = client.join(client.create())
    upload = answer["ingest_job"]["upload_queue"]
    message = client.receive()[0]
    forbidden = [
        lambda: client.sqs.change_message_visibility(
            QueueUrl=upload, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=9
        ),
        lambda: client.sqs.send_message(QueueUrl=upload, MessageBody="x"),
        lambda: client.sqs.get_queue_url(QueueName="sandbox-boss-upload-1"),
        lambda: client.s3.get_object(Bucket=answer["tile_bucket_name"], Key="x"),
        lambda: client.s3.put_object(Bucket=answer["ingest_bucket_name"], Key="x", Body=b""),
        lambda: client.s3.list_objects_v2(Bucket=answer["tile_bucket_name"]),
    ]
    for attempt in forbidden:
        with pytest.raises(ClientError, match=r"Denied|does not exist"):
            attempt()
    with pytest.raises(ClientError, match="MetadataTooLarge"):
        client.s3.put_object(Bucket=answer["tile_bucket_name"], Key="x", Body=b"", Metadata={"a": "b" * 2048})


def test_leases_run_out_and_batches_fail_in_part(boss: BossSandbox) -> None:
    client = Client(boss)
    client.join(client.create())
    first = client.receive(VisibilityTimeout=1)
    assert len(first) == 10
    assert len(client.receive()) == 6
    time.sleep(1.05)
    again = client.receive(MessageSystemAttributeNames=["ApproximateReceiveCount"])
    assert {message["Attributes"]["ApproximateReceiveCount"] for message in again} == {"2"}
    boss.switches.aws_faults = [AwsFault(operation="DeleteMessageBatch", entries=[1])]
    entries = [{"Id": str(n), "ReceiptHandle": message["ReceiptHandle"]} for n, message in enumerate(again)]
    answer = client.sqs.delete_message_batch(QueueUrl=client.answer["ingest_job"]["upload_queue"], Entries=entries)
    assert [bad["Id"] for bad in answer["Failed"]] == ["1"]
    assert boss.job(1).observed.deleted == 9


def test_what_the_boss_misplaces_is_misplaced(boss: BossSandbox) -> None:
    client = Client(boss)
    extent = {"x": [0, 1400], "y": [0, 700], "z": [0, 1], "t": [0, 1]}
    number = client.create(extent=extent, tile_size={"x": 700, "y": 700, "z": 1, "t": 1})
    client.join(number)
    client.upload_all(lambda key: png(np.full((700, 700), 1 + int(key.split("&")[5]), "u1")))
    client.complete(number)
    row = boss.cutout("sandbox/stack/uint8", x=(0, 1800), y=(0, 1), z=(0, 1))[0, 0, 0]
    assert row[:700].tolist() == [1] * 700
    assert row[700:1024].tolist() == [0] * 324  # the second tile was pushed to the next cuboid
    assert row[1024:1724].tolist() == [2] * 700


def test_an_unreadable_tile_turns_black_and_a_colour_tile_blocks_its_chunk(boss: BossSandbox) -> None:
    client = Client(boss)
    number = client.create()
    client.join(number)
    broken = png(np.ones((512, 512), "u1"))[:-700]
    client.upload_all(lambda key: broken if z_of(key) == 3 else png(np.full((512, 512), 7, "u1")))
    client.complete(number)
    read = boss.cutout("sandbox/stack/uint8", x=(0, 512), y=(0, 512), z=(0, 16))[0]
    assert [int(plane[0, 0]) for plane in read] == [7] * 3 + [0] + [7] * 12
    assert len(boss.job(number).errors) == 1
    number = client.create()
    client.join(number)
    client.upload_all(lambda key: png(np.ones((512, 512, 3), "u1")))
    with pytest.raises(AssertionError, match="still"):
        client.complete(number)


def test_completion_queues_missing_tiles_again_but_never_sees_a_lost_chunk(boss: BossSandbox) -> None:
    client = Client(boss)
    extent = {"x": [0, 1024], "y": [0, 512], "z": [0, 16], "t": [0, 1]}
    number = client.create(extent=extent)
    client.join(number)
    tile = png(np.ones((512, 512), "u1"))
    for _ in range(4):
        for message in client.receive():
            key = json.loads(message["Body"])["tile_key"].split("&")
            # Column 0 loses one index message, column 1 loses all of them.
            client.upload(message, tile, index=key[5] == "0" and key[7] != "9")
    client.complete(number, until="UPLOADING")
    for _ in range(100):
        client.ask("POST", f"/ingest/{number}/complete")
        if boss.job(number).upload_queue.counts()[0]:
            break
        time.sleep(0.02)
    assert client.upload_all(lambda key: tile) == 1
    client.complete(number)
    read = boss.cutout("sandbox/stack/uint8", x=(0, 1024), y=(0, 512), z=(0, 16))[0]
    assert read[:, :, :512].all()
    assert not read[:, :, 512:].any()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/ingest/77", 404, 4004),
        ("GET", "/collection/nowhere/", 404, 4000),
        ("GET", "/ingest/1", 403, 3003),
        ("DELETE", "/ingest/1", 403, 3003),
        ("POST", "/ingest/1/complete", 403, 3003),
    ],
)
def test_errors_have_the_codes_of_the_boss(boss: BossSandbox, method: str, path: str, status: int, code: int) -> None:
    Client(boss).create()
    answer = Client(boss, "bob").ask(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_tile_size_of_zero_in_time_leaves_an_orphan(boss: BossSandbox) -> None:
    client = Client(boss)
    answer = client.ask("POST", "/ingest/", config(tile_size={"x": 512, "y": 512, "z": 1, "t": 0}))
    assert (answer.status_code, answer.json()["code"]) == (400, 9001)
    assert "division by zero" in answer.json()["message"]
    assert [job["status"] for job in client.ask("GET", "/ingest/").json()["ingest_jobs"]] == [0]


def test_tokens_and_versions(boss: BossSandbox) -> None:
    client = Client(boss)
    client.headers = {"Authorization": "Token " + "0" * 40}
    assert client.ask("GET", "/ingest/1").json() == {"detail": "Invalid token."}
    assert requests.get(boss.url + "/v0.8/ingest/", timeout=10).json()["code"] == 9003
    assert requests.get(boss.url + "/latest/ingest/1", timeout=10).json()["code"] in (3003, 4004)


def test_issued_keys_expire_when_asked_to(boss: BossSandbox) -> None:
    client = Client(boss)
    number = client.create()
    client.join(number)
    assert client.receive()
    boss.switches.key_generation += 1
    with pytest.raises(ClientError, match="InvalidClientTokenId"):
        client.receive()
    client.join(number)
    assert client.receive()


def test_jobs_queues_and_keys_are_there_after_a_restart() -> None:
    with Sandbox("boss", boss={"prepare_seconds": 0.0, "quiet_seconds": 0.1, "completing_seconds": 0.0}) as sandbox:
        assert isinstance(sandbox.boss, BossSandbox)
        client = Client(sandbox.boss)
        number = client.create()
        client.join(number)
        first, *_ = client.receive()
        client.upload(first, png(np.full((512, 512), 7, "u1")))
        sandbox.boss.job(number).upload_queue.expire_leases()  # type: ignore[union-attr]  # there is one
        sandbox.restart("boss", down_seconds=0.1)
        assert client.upload_all(lambda key: png(np.full((512, 512), 7, "u1"))) == 15
        client.complete(number)
        assert sandbox.boss.cutout("sandbox/stack/uint8", x=(0, 512), y=(0, 512), z=(0, 16)).min() == 7
