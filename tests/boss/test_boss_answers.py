"""Every answer of the Boss passes a model: what has another shape is a typed error, what is not needed may be odd."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness.ingest_lab import FAST, SOON, Lab
from prefect_biomed.clients.boss import (
    BossClient,
    IngestConfig,
    JobStatus,
    complete,
    create_resources,
    preflight,
    wait_until_ready,
)
from prefect_biomed.clients.boss._aws import JobQueues
from prefect_biomed.clients.boss.models import IngestType
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    JobFailed,
    NotFoundError,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.sandbox import Fault, Sandbox
from prefect_biomed.sandbox.boss import BossSandbox

HTML = "<html><body>Welcome</body></html>"
SHAPES = {
    "empty": "",
    "null": "null",
    "list": "[]",
    "object": "{}",
    "text": '"x"',
    "list of null": "[null]",
    "list of objects": "[{}]",
    "page": HTML,
    "deep list": "[" * 10_000 + "]" * 10_000,
    "deep object": '{"ingest_jobs":' * 10_000 + "1" + "}" * 10_000,
    "not text": '{"ingest_jobs": [{"id": "a"}], "status": {}, "name": 5, "ingest_job": [], "datatype": null}',
}
CALLS: dict[str, Callable[[Lab, IngestConfig], object]] = {
    "create": lambda lab, config: lab.client.create(config),
    "list": lambda lab, config: lab.client.list_jobs(),
    "counts": lambda lab, config: lab.client.counts(1),
    "join": lambda lab, config: lab.client.join(1),
    "wait_until_ready": lambda lab, config: wait_until_ready(lab.client, 1, SOON),
    "complete": lambda lab, config: complete(lab.client, 1, SOON),
    "cancel": lambda lab, config: lab.client.cancel(1),
    "channel": lambda lab, config: lab.client.channel("sandbox", "stack", "uint8"),
    "exists": lambda lab, config: lab.client.exists("sandbox", "stack"),
    "children": lambda lab, config: lab.client.children("sandbox"),
    "preflight": lambda lab, config: preflight(lab.client, config),
    "create_resources": lambda lab, config: create_resources(lab.client, config, datatype="uint8"),
    "cutout": lambda lab, config: lab.client.cutout("sandbox/stack/uint8", 0, (0, 4), (0, 4), (0, 1)),
}


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Sandbox("boss", boss=FAST) as sandbox:
        facts = sandbox.boss.ready()
        client = BossClient(facts["host"], facts["tokens"]["alice"], protocol="http", aws_endpoint_url=sandbox.boss.url)
        assert isinstance(sandbox.boss, BossSandbox)
        lab = Lab(sandbox.boss, tmp_path_factory.mktemp("boss"), client)
        lab.client.create(IngestConfig.load(lab.config()))
        wait_until_ready(lab.client, 1, SOON)
        yield lab


@pytest.fixture(autouse=True)
def without_faults(shared_lab: Lab) -> None:
    shared_lab.boss.faults.clear()


def answered(lab: Lab, status: int, body: str) -> None:
    lab.boss.faults.add(Fault(status=status, body=body, content_type="application/json"))


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("body", SHAPES.values(), ids=list(SHAPES))
def test_success_in_another_shape_is_an_unexpected_response(
    shared_lab: Lab, call: Callable[[Lab, IngestConfig], object], body: str
) -> None:
    answered(shared_lab, 200, body)
    with pytest.raises(UnexpectedResponse):
        call(shared_lab, IngestConfig.load(shared_lab.config()))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("body", ["", "null", HTML, '{"message": "Too many"}', "[" * 10_000])
def test_out_of_order_is_transient_whatever_the_body_is(shared_lab: Lab, status: int, body: str) -> None:
    answered(shared_lab, status, body)
    with pytest.raises(ServerUnavailable):
        shared_lab.client.create(IngestConfig.load(shared_lab.config()))


@pytest.mark.parametrize("status", [400, 404, 409])
@pytest.mark.parametrize("body", ["", "null", "{}", HTML, '{"message": "no"}', '{"code": "4000", "message": "no"}'])
def test_an_error_in_another_language_tells_nothing(shared_lab: Lab, status: int, body: str) -> None:
    answered(shared_lab, status, body)
    with pytest.raises(UnexpectedResponse) as caught:
        shared_lab.client.exists("sandbox")
    assert caught.value.status == status
    assert not caught.value.spoken


def test_a_page_that_says_not_found_is_no_proof_of_absence(shared_lab: Lab) -> None:
    answered(shared_lab, 404, HTML)
    config = IngestConfig.load(shared_lab.config())
    before = len(shared_lab.boss.journal.entries("POST", "/collection/"))
    with pytest.raises(UnexpectedResponse):
        create_resources(shared_lab.client, config, datatype="uint8")
    with pytest.raises(UnexpectedResponse):
        shared_lab.client.cancel(1)
    assert len(shared_lab.boss.journal.entries("POST", "/collection/")) == before


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"detail": "Invalid token."}, AuthenticationError),
        (401, None, AuthenticationError),
        (404, {"status": 404, "code": 4004, "message": "gone"}, NotFoundError),
        (400, {"status": 400, "code": 9001, "message": "Rate exceeded"}, ServerUnavailable),
        (403, {"status": 403, "code": 3003, "message": "not yours"}, BiomedError),
    ],
)
def test_errors_of_the_boss_have_their_kind(
    shared_lab: Lab, status: int, body: dict[str, Any] | None, kind: type[BiomedError]
) -> None:
    answered(shared_lab, status, "" if body is None else json.dumps(body))
    with pytest.raises(kind):
        shared_lab.client.counts(1)


def listed(**changes: Any) -> str:
    job = {"id": 7, "collection": "c", "experiment": "e", "channel": "ch", "status": 1, "ingest_type": 0}
    return json.dumps({"ingest_jobs": [job | changes]})


def test_unknown_states_and_kinds_are_kept_and_logged(shared_lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    answered(shared_lab, 200, listed(status=4711, ingest_type=4712))
    [job] = shared_lab.client.list_jobs()
    assert (int(job.status), job.status.is_terminal, job.ingest_type.value) == (4711, False, "4712")
    assert "4711" in caplog.text
    assert "4712" in caplog.text


def test_numbers_may_come_as_text(shared_lab: Lab) -> None:
    answered(shared_lab, 200, listed(id="7", status="1", ingest_type="1", tile_count="9"))
    [job] = shared_lab.client.list_jobs()
    assert (job.id, job.status, job.ingest_type, job.tile_count) == (7, JobStatus.UPLOADING, IngestType.VOLUMETRIC, 9)


@pytest.mark.parametrize("odd", [{}, {"created_on": "yesterday"}, {"created_on": None}, {"created_on": []}])
def test_what_is_not_needed_may_be_odd(shared_lab: Lab, odd: dict[str, Any]) -> None:
    answered(shared_lab, 200, listed(**odd, tile_count=None, ingest_type=None, completed_on=5, new={"a": 1}))
    [job] = shared_lab.client.list_jobs()
    assert (job.created_on, job.tile_count, job.ingest_type) == (None, 0, IngestType.TILE)


def test_a_time_without_a_zone_is_universal_time(shared_lab: Lab) -> None:
    answered(shared_lab, 200, listed(created_on="2026-01-01T00:00:00"))
    [job] = shared_lab.client.list_jobs()
    assert job.created_on is not None
    assert job.created_on.isoformat() == "2026-01-01T00:00:00+00:00"


def joined(**changes: Any) -> str:
    job = {"id": 1, "collection": "c", "experiment": "e", "channel": "ch", "status": 1, "ingest_type": 0}
    queues = {"upload_queue": "https://sqs/u", "ingest_queue": None, "tile_index_queue": "https://sqs/i"}
    resource = {"lookup_key": "1&2&3", "channel": {"datatype": "uint8", "more": 1.5}, "boss_key": "c&e&ch"}
    whole = {
        "ingest_job": job | queues,
        "credentials": {"access_key": "AK", "secret_key": "SK", "security_token": None},
        "tile_bucket_name": "tiles",
        "ingest_bucket_name": "cuboids",
        "KVIO_SETTINGS": {"a": 1},
        "resource": resource,
    }
    return json.dumps(whole | changes)


def test_what_the_lambdas_want_back_is_kept_as_it_came(shared_lab: Lab) -> None:
    answered(shared_lab, 200, joined())
    ready = shared_lab.client.join(1)
    assert ready is not None
    assert ready.parameters == {
        "upload_queue": "https://sqs/u",
        "ingest_queue": None,
        "KVIO_SETTINGS": {"a": 1},
        "STATEIO_CONFIG": {},
        "OBJECTIO_CONFIG": {},
        "resource": {"lookup_key": "1&2&3", "channel": {"datatype": "uint8", "more": 1.5}, "boss_key": "c&e&ch"},
    }
    assert ready.base_resolution == 0


@pytest.mark.parametrize(
    "lack",
    [{"resource": None}, {"tile_bucket_name": None}, {"credentials": {"access_key": "SECRET"}}, {"resource": {}}],
)
def test_a_join_that_lacks_what_an_upload_needs_is_refused(shared_lab: Lab, lack: dict[str, Any]) -> None:
    answered(shared_lab, 200, joined(**lack))
    with pytest.raises(UnexpectedResponse) as caught:
        shared_lab.client.join(1)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", '"soon"', "null", "[]"])
def test_a_completion_that_cannot_be_waited_for_is_refused(shared_lab: Lab, seconds: str) -> None:
    path = r"/complete$"
    for status in (202, 400):
        shared_lab.boss.faults.clear()
        shared_lab.boss.faults.add(Fault(path=path, status=status, body=f'{{"wait_secs": {seconds}}}'))
        with pytest.raises(UnexpectedResponse):
            shared_lab.client.request_completion(1)


def test_a_completion_that_goes_on_says_when_to_ask_again(shared_lab: Lab) -> None:
    for status, body in ((202, '{"job_status": 5}'), (400, '{"wait_secs": 2.5, "info": "not empty yet"}')):
        shared_lab.boss.faults.clear()
        shared_lab.boss.faults.add(Fault(path=r"/complete$", status=status, body=body))
        assert shared_lab.client.request_completion(1) == (0.0 if status == 202 else 2.5)


def test_an_unknown_state_is_waited_through(shared_lab: Lab) -> None:
    strange = json.dumps({"id": 1, "status": 42, "total_message_count": 16, "current_message_count": 0})
    shared_lab.boss.faults.add(Fault(path="/status$", status=200, body=strange, times=1))
    assert wait_until_ready(shared_lab.client, 1, SOON).job.status == JobStatus.UPLOADING
    failed = json.dumps({"id": 1, "status": 4, "total_message_count": 16, "current_message_count": 0})
    shared_lab.boss.faults.add(Fault(path="/status$", status=200, body=failed, times=1))
    with pytest.raises(JobFailed, match="FAILED"):
        wait_until_ready(shared_lab.client, 1, SOON)


@pytest.mark.parametrize(
    "form",
    [
        {"tile_bucket_name": "../other"},
        {"tile_bucket_name": "tiles/../../x"},
        {"tile_bucket_name": "tiles\n"},
        {"ingest_bucket_name": "?x=1#"},
        {"ingest_job": {"upload_queue": "file:///etc/passwd"}},
        {"ingest_job": {"upload_queue": "https://user:password@sqs/u"}},
        {"ingest_job": {"upload_queue": "https://sqs/u?Action=x"}},
        {"ingest_job": {"tile_index_queue": "https://sqs/u\r\nHost: evil"}},
    ],
)
def test_queues_and_buckets_have_the_form_of_such(shared_lab: Lab, form: dict[str, Any]) -> None:
    whole = json.loads(joined())
    job = whole["ingest_job"] | form.get("ingest_job", {})
    answered(shared_lab, 200, json.dumps(whole | form | {"ingest_job": job}))
    with pytest.raises(UnexpectedResponse, match="another shape"):
        shared_lab.client.join(1)


@pytest.mark.parametrize(
    ("queue", "region", "endpoint", "right"),
    [
        ("https://sqs.us-east-1.amazonaws.com/1/q", "us-east-1", None, True),
        ("https://queue.amazonaws.com/1/q", "us-east-1", None, True),
        ("https://eu-west-1.queue.amazonaws.com/1/q", "eu-west-1", None, True),
        ("http://127.0.0.1:99/1/q", "us-east-1", "http://localhost:98", True),
        ("http://sqs.us-east-1.aws.lab:99/1/q", "us-east-1", "http://aws.lab:99", True),
        ("https://sqs.eu-west-1.amazonaws.com/1/q", "us-east-1", None, False),
        ("https://sqs.us-east-1.amazonaws.com.evil.org/1/q", "us-east-1", None, False),
        ("http://169.254.169.254/1/q", "us-east-1", None, False),
        ("https://sqs.us-east-1.amazonaws.com/1/q", "us-east-1", "http://localhost:98", False),
        ("http://evilaws.lab/1/q", "us-east-1", "http://aws.lab:99", False),
    ],
)
def test_nothing_is_signed_for_a_queue_that_lies_elsewhere(
    shared_lab: Lab, queue: str, region: str, endpoint: str | None, right: bool
) -> None:
    whole = json.loads(joined())
    whole["ingest_job"] |= {"upload_queue": queue, "tile_index_queue": queue}
    answered(shared_lab, 200, json.dumps(whole))
    ready = shared_lab.client.join(1)
    assert ready is not None
    with BossClient("h", "t", aws_region=region, aws_endpoint_url=endpoint) as client:
        if right:
            JobQueues(client, ready, connections=1).close()
            return
        with pytest.raises(UnexpectedResponse, match="names a queue on"):
            JobQueues(client, ready, connections=1)
