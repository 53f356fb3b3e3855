"""Objects are put as boto3 would put them: it is left out of that path because it takes more than twice the time."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.httpsession import URLLib3Session
from pydantic import SecretStr

from prefect_biomed.clients.boss._aws import JobQueues
from prefect_biomed.clients.boss.models import JoinedJob

BUCKET = "tiles.theboss.example"
ETAG = '"0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a"'
KEY = "0a1b&2&3&4&0&17&5&6&0"
METADATA = {"message_id": "m-1", "metadata": '{"x_size":512}'}


class _Sent(Exception):
    """Ends boto3's request where it would leave the machine."""


def boto3_request(region: str) -> Any:
    session = boto3.Session("AKIA", "secret", "token", region_name=region)
    s3, sent = session.client("s3"), []

    def keep(request: Any, **_: Any) -> None:
        sent.append(request)
        raise _Sent

    s3.meta.events.register("before-send.s3.PutObject", keep)
    with pytest.raises(_Sent):
        s3.put_object(Bucket=BUCKET, Key=KEY, Body=b"pixels", ACL="private", StorageClass="STANDARD", Metadata=METADATA)
    return sent[0]


@pytest.mark.parametrize("region", ["us-east-1", "us-west-2", "eu-central-1"])
def test_an_object_goes_where_boto3_sends_it_with_the_same_headers(
    region: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(
        URLLib3Session,
        "send",
        lambda _, request: sent.append(request) or SimpleNamespace(status_code=200, headers={"ETag": ETAG}),
    )
    client: Any = SimpleNamespace(aws_region=region, aws_endpoint_url=None, aws_verify_tls=True, settle_seconds=120.0)
    keys = {name: SecretStr(value) for name, value in (("access_key", "AKIA"), ("secret_key", "secret"))}
    queue = f"https://sqs.{region}.amazonaws.com/1/tiles"
    joined = JoinedJob.model_construct(
        **keys, session_token=SecretStr("token"), bucket=BUCKET, upload_queue=queue, tile_index_queue=queue
    )
    queues = JobQueues(client, joined, connections=1)
    queues.put(KEY, b"pixels", METADATA, time.monotonic() + 1)
    monkeypatch.undo()

    ours, theirs = sent[0], boto3_request(region)
    assert ours.url == theirs.url
    assert ours.body == b"pixels"
    for name, value in theirs.headers.items():
        if name.lower().startswith(("x-amz-meta-", "x-amz-acl", "x-amz-storage-class", "x-amz-security-token")):
            assert ours.headers[name] == (value.decode() if isinstance(value, bytes) else value)
    # The digest of the content is signed, so that S3 refuses what was damaged on the way.
    assert len(ours.headers["X-Amz-Content-SHA256"]) == 64
    assert "x-amz-content-sha256" in ours.headers["Authorization"]
