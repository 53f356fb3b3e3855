"""SQS and S3: clocks, keys that are refused for good, messages that come twice or are given back, odd answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from botocore.awsrequest import AWSResponse

from harness.ingest_lab import QUICK, Lab, volume
from prefect_biomed.clients.boss import IngestConfig, IngestJob, wait_until_ready
from prefect_biomed.clients.boss import _aws as aws
from prefect_biomed.clients.errors import AuthenticationError, BiomedError, ConfigurationError, NetworkError
from prefect_biomed.sandbox.boss import AwsFault

ONE = {"x": 64, "y": 64, "z": 1, "t": 1}


def small_job(lab: Lab, depth: int = 16) -> tuple[IngestConfig, IngestJob]:
    lab.write_stack(volume((depth, 64, 64)), tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, depth], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size=ONE))
    wait_until_ready(lab.client, job.id)
    return config, job


@pytest.mark.parametrize("ahead", [1000.0, -1000.0])
def test_a_clock_that_is_wrong_is_one_error_that_names_it(lab: Lab, ahead: float) -> None:
    config, job = small_job(lab)
    lab.boss.switches.clock_ahead_seconds = ahead
    begun = time.monotonic()
    with pytest.raises(ConfigurationError, match="clock of this machine is wrong"):
        lab.upload(config, job.id)
    assert time.monotonic() - begun < 5
    lab.boss.switches.clock_ahead_seconds = 0.0
    report = lab.upload(config, job.id)
    assert (report.deleted, report.failed) == (16, {})


def test_a_clock_that_goes_wrong_meanwhile_does_not_fail_tiles(lab: Lab) -> None:
    config, job = small_job(lab)
    uploader = lab.uploader(config, job.id)
    put = uploader._queues.put

    def put_late(*arguments: Any) -> None:
        lab.boss.switches.clock_ahead_seconds = 1000.0
        put(*arguments)

    uploader._queues.put = put_late  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="clock"):
        uploader.run()
    assert uploader._ledger.failed() == {}
    uploader.close()


def test_the_clock_of_aws_tells_by_how_much_ours_is_wrong() -> None:
    clock = aws._Clock()
    assert clock.time() is None
    clock.see({"ResponseMetadata": {"HTTPHeaders": {"date": "no date"}}})
    clock.see({})
    assert clock.time() is None

    def tell(seconds: float) -> None:
        told = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))
        clock.see({"ResponseMetadata": {"HTTPHeaders": {"date": told}}})

    tell(1380.0)
    refusal = aws.ClientError({"Error": {"Code": "AccessDenied", "Message": ""}}, "PutObject")
    with pytest.raises(ConfigurationError, match=r"wrong by 23 minutes \(slow\)"):
        clock.check("AccessDenied", refusal)
    clock.see(
        {"ResponseMetadata": {"HTTPHeaders": {"date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())}}}
    )
    clock.check("AccessDenied", refusal)


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_keys_that_s3_refuses_for_good_end_the_upload(lab: Lab, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """New keys do not help, and that SQS takes them tells nothing."""
    monkeypatch.setattr(aws, "_GIVE_UP_SECONDS", 2.0)
    monkeypatch.setattr(aws, "_SPREADING_SECONDS", 0.3)
    config, job = small_job(lab)
    lab.boss.switches.aws_faults = [AwsFault(operation="PutObject", code=code, status=403, times=None)]
    begun = time.monotonic()
    with pytest.raises(AuthenticationError, match=r"refused PutObject.*also with new ones"):
        lab.upload(config, job.id, QUICK.model_copy(update={"attempts": 100, "min_lease_seconds": 1}))
    assert time.monotonic() - begun < 15
    assert lab.boss.job(job.id).observed.joins < 20


def test_keys_that_are_never_known_end_the_upload(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "_GIVE_UP_SECONDS", 2.0)
    monkeypatch.setattr(aws, "_SPREADING_SECONDS", 0.3)
    config, job = small_job(lab)
    lab.boss.switches.key_delay_seconds = 1000.0
    begun = time.monotonic()
    with pytest.raises(AuthenticationError, match=r"refused \w+ with"):
        lab.upload(config, job.id)
    assert time.monotonic() - begun < 15


def test_two_messages_of_one_tile_are_one_tile(lab: Lab) -> None:
    """A job may be filled twice, and a queue delivers twice."""
    config, job = small_job(lab, depth=32)
    queue = lab.boss.job(job.id).upload_queue
    assert queue is not None
    for body in queue.bodies()[:20]:
        queue.send(body)
    for message in queue._messages.values():
        message.sent -= 60.0  # answers tell whole seconds only
    lab.upload(config, job.id, QUICK.model_copy(update={"max_tiles": 40, "threads": 2}))
    report = lab.upload(config, job.id)
    observed = lab.boss.job(job.id).observed
    assert report.deleted + report.deleted_before == 32
    assert report.requeued == 0
    assert set(observed.puts.values()) == set(observed.indexed.values()) == {1}
    assert queue.counts() == (0, 0)
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read((32, 64, 64)), volume((32, 64, 64)))


def test_what_was_received_is_finished_when_a_slice_ends(lab: Lab) -> None:
    config, job = small_job(lab, depth=128)
    report = lab.upload(config, job.id, QUICK.model_copy(update={"max_tiles": 47, "threads": 4}))
    assert report.deleted == report.received == 47
    assert lab.boss.job(job.id).upload_queue.counts() == (81, 0)  # type: ignore[union-attr]
    assert not lab.boss.job(job.id).observed.denied


@pytest.mark.parametrize("allowed", [True, False])
def test_what_no_time_is_left_for_is_given_back_at_once(make_lab: Callable[..., Lab], allowed: bool) -> None:
    lab = make_lab(keys_may_give_back=allowed)
    config, job = small_job(lab, depth=64)
    uploader = lab.uploader(config, job.id, QUICK.model_copy(update={"threads": 4}))
    put = uploader._queues.put

    def put_slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        put(*arguments)
        uploader._course.end("enough", at_once=True)

    uploader._queues.put = put_slowly  # type: ignore[method-assign]
    report = uploader.run()
    uploader.close()
    assert 0 < report.deleted < report.received
    assert report.abandoned == report.received - report.deleted
    _, leased = lab.boss.job(job.id).upload_queue.counts()  # type: ignore[union-attr]
    assert leased == (0 if allowed else report.abandoned)


def test_a_list_of_cuboids_that_was_cut_short_is_noticed(lab: Lab) -> None:
    array = lab.folder / "array.npy"
    np.save(array, np.ones((32, 512, 2048), np.uint8))
    config, job = lab.create(
        lab.volumetric(
            "prefect_biomed.clients.boss.plugins.arrays.Array",
            {"filename": str(array), "order": "zyx"},
            {"x": [0, 2048], "y": [0, 512], "z": [0, 32], "t": [0, 1]},
        )
    )
    wait_until_ready(lab.client, job.id)
    queue = lab.boss.job(job.id).upload_queue
    assert queue is not None
    first, second = (json.loads(message.body) for message in queue.receive(10, 0))
    queue.clear()
    first["cuboids"].pop()
    for body in (first, second):
        queue.send(json.dumps(body))
    report = lab.upload(config, job.id)
    assert report.deleted == 1
    assert len(report.quarantined) == 1
    assert "its list of cuboids lacks 1" in report.quarantined[0]


@pytest.mark.parametrize("headers", [{}, {"ETag": '"5f3e1c2a-264"'}, {"ETag": ""}])
def test_a_put_without_a_sign_of_s3_has_not_happened(lab: Lab, headers: dict[str, str]) -> None:
    config, job = small_job(lab)
    uploader = lab.uploader(config, job.id)

    class Raw:
        def stream(self) -> Any:
            yield b"<html>Welcome</html>"

    uploader._queues._bucket.send = lambda request: AWSResponse("http://proxy", 200, headers, Raw())
    with pytest.raises(NetworkError, match="not S3"):
        uploader._queues.put("key", b"content", {}, time.monotonic())
    uploader.close()


def test_a_refusal_in_other_words_than_those_of_aws_is_doubtful(lab: Lab) -> None:
    config, job = small_job(lab)
    uploader = lab.uploader(config, job.id)

    class Raw:
        def stream(self) -> Any:
            yield b"<html><body>Blocked by your organization</body></html>"

    uploader._queues._bucket.send = lambda request: AWSResponse("http://proxy", 403, {}, Raw())
    with pytest.raises(BiomedError, match=r"not AWS|broke") as caught:
        uploader._queues.put("key", b"content", {}, time.monotonic())
    assert isinstance(caught.value, NetworkError)
    uploader.close()
