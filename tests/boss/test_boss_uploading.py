"""Uploading tiles: exact when all goes well, and exact when it does not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.ingest_lab import QUICK, SOON, Lab, volume
from prefect_biomed.clients.boss import IngestConfig, JobStatus, UploadSettings, account, wait_until_ready
from prefect_biomed.clients.boss import _aws as aws
from prefect_biomed.clients.errors import BiomedError, ConfigurationError, JobFailed, PreflightFailed
from prefect_biomed.sandbox import Fault
from prefect_biomed.sandbox.boss import AwsFault
from prefect_biomed.sandbox.boss._jobs import hashed


def with_policy(policy: str, **more: Any) -> UploadSettings:
    return QUICK.model_copy(update={"on_bad_source": policy, **more})


def test_a_thousand_tiles_are_put_indexed_and_deleted_once(lab: Lab) -> None:
    pixels = volume((1000, 64, 64))
    lab.write_stack(pixels, tile=64)
    config = lab.config(
        extent={"x": [0, 64], "y": [0, 64], "z": [0, 1000], "t": [0, 1]},
        tile_size={"x": 64, "y": 64, "z": 1, "t": 1},
    )
    report, job = lab.ingest(config, QUICK.model_copy(update={"threads": 16}))
    assert np.array_equal(lab.read(pixels.shape), pixels)
    assert set(job.observed.puts.values()) == set(job.observed.indexed.values()) == {1}
    assert len(job.observed.puts) == len(job.observed.indexed) == job.observed.deleted == 1000
    assert (report.received, report.put, report.indexed, report.deleted) == (1000, 1000, 1000, 1000)
    assert report.balanced
    assert report.exhausted
    assert report.joins == 1
    for stored in job.objects.values():
        assert {"message_id", "receipt_handle", "metadata"} == set(stored.metadata)
        metadata = json.loads(stored.metadata["metadata"])
        assert (metadata["x_size"], metadata["y_size"], metadata["ingest_job"]) == (64, 64, job.id)


def test_a_tampered_message_is_quarantined_and_not_put(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    wait_until_ready(lab.client, job.id, SOON)
    upload_queue = lab.boss.job(job.id).upload_queue
    assert upload_queue is not None
    ids = [int(part) for part in lab.boss.job(job.id).lookup_key.split("&")]
    good_chunk, good_tile = hashed(16, *ids, 0, 0, 0, 0, 0), hashed(*ids, 0, 0, 0, 3, 0)
    for chunk, tile in (
        (good_chunk, "0" * 32 + good_tile[32:]),  # hash
        (good_chunk, hashed(ids[0], ids[1], ids[2] + 1, 0, 0, 0, 3, 0)),  # another channel
        (good_chunk, hashed(*ids, 0, 0, 0, 99, 0)),  # not of this chunk
        (hashed(16, *ids, 0, 7, 0, 0, 0), hashed(*ids, 0, 7, 0, 3, 0)),  # outside the extent
        (good_chunk, hashed(*ids, 0, 0, 0, "9" * 5000, 0)),  # no number that python reads
    ):
        upload_queue.send(json.dumps({"job_id": job.id, "chunk_key": chunk, "tile_key": tile}))
    for text in ("no JSON at all", "null", "[" * 10_000):
        upload_queue.send(text)
    report = lab.upload(config, job.id)
    assert len(report.quarantined) == 8
    assert len(lab.boss.job(job.id).observed.puts) == 16
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read((16, 512, 512)), volume((16, 512, 512)))


def test_a_duplicate_delivery_after_indexing_is_only_deleted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "_GIVE_UP_SECONDS", 1.0)
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    wait_until_ready(lab.client, job.id, SOON)
    lab.boss.switches.aws_faults = [
        AwsFault(operation="DeleteMessageBatch", code="AccessDenied", status=403, times=None)
    ]
    # The first run can index but not delete; its messages come back.
    with pytest.raises(BiomedError, match=r"denies|refused"):
        lab.upload(config, job.id, QUICK.model_copy(update={"grace_seconds": 5.0}))
    observed = lab.boss.job(job.id).observed
    assert sum(observed.indexed.values()) > 0
    lab.boss.switches.aws_faults = []
    lab.boss.job(job.id).upload_queue.expire_leases()
    report = lab.upload(config, job.id)
    assert report.duplicates == 16 - report.put
    assert set(observed.indexed.values()) == {1}
    assert not observed.late_indexed
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert report.deleted + report.deleted_before == 16


def test_a_crash_between_put_and_index_puts_again_and_indexes_once(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    uploader = lab.uploader(config, job.id)
    uploader._line.indexing.deal_with = lambda batch: (_ for _ in ()).throw(RuntimeError("crash"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="crash"):
        uploader.run()
    uploader.close()
    observed = lab.boss.job(job.id).observed
    assert len(observed.puts) > 0
    assert not observed.indexed
    lab.boss.job(job.id).upload_queue.expire_leases()
    report = lab.upload(config, job.id)
    assert report.put == 16
    assert set(observed.indexed.values()) == {1}
    assert lab.complete(job.id).outcome == "COMPLETE"


def test_a_busy_bucket_loses_nothing(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.switches.aws_faults = [AwsFault(operation="PutObject", code="SlowDown", times=3)]
    report, _ = lab.ingest(lab.config())
    assert report.put == 16
    assert np.array_equal(lab.read((16, 512, 512)), volume((16, 512, 512)))


def test_a_bucket_in_another_region_ends_the_upload_at_once(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.switches.aws_faults = [AwsFault(operation="PutObject", code="PermanentRedirect", status=301, times=None)]
    with pytest.raises(ConfigurationError, match="aws_region"):
        lab.ingest(lab.config())


def test_a_put_whose_answer_is_lost_is_repeated_and_counted_once(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.faults.add(Fault(method="PUT", drop="after", calls=[2, 5]))
    report, job = lab.ingest(lab.config())
    assert sum(job.observed.puts.values()) == 18
    assert report.put == report.deleted == 16
    assert set(job.observed.indexed.values()) == {1}


def test_only_the_failed_entries_of_an_index_batch_are_sent_again(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.switches.aws_faults = [AwsFault(operation="SendMessageBatch", entries=[0, 1, 2])]
    report, job = lab.ingest(lab.config())
    assert set(job.observed.indexed.values()) == {1}
    assert len(job.observed.indexed) == 16
    assert report.indexed == report.deleted == 16


def test_a_delete_that_failed_in_part_is_repeated(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.switches.aws_faults = [AwsFault(operation="DeleteMessageBatch", entries=[0, 2])]
    report, job = lab.ingest(lab.config())
    assert job.observed.deleted == report.deleted == 16
    assert set(job.observed.indexed.values()) == {1}


def test_keys_that_expire_are_renewed_once_for_all_threads(lab: Lab) -> None:
    lab.write_stack(volume((64, 64, 64)), tile=64)
    one = {"x": 64, "y": 64, "z": 1, "t": 1}
    config = lab.config(extent={"x": [0, 64], "y": [0, 64], "z": [0, 64], "t": [0, 1]}, tile_size=one)
    loaded, job = lab.create(config)
    uploader = lab.uploader(loaded, job.id)
    joins = lab.boss.job(job.id).observed.joins
    killed = threading.Event()

    def expire(progress: object) -> None:
        killed.set()

    put = uploader._queues.put

    def put_and_expire(*arguments: Any) -> None:
        put(*arguments)
        if not killed.is_set():
            killed.set()
            lab.boss.service.keys.clear()  # InvalidAccessKeyId from S3, InvalidClientTokenId from SQS

    uploader._queues.put = put_and_expire  # type: ignore[method-assign]
    begun = time.monotonic()
    report = uploader.run()
    uploader.close()
    assert time.monotonic() - begun < 30
    assert lab.boss.job(job.id).observed.joins == joins + 1
    assert report.joins == 2
    assert report.deleted == 64
    assert lab.complete(job.id).outcome == "COMPLETE"


def test_new_keys_that_are_not_known_yet_are_waited_for(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(key_delay_seconds=1.5)
    lab.write_stack(volume((16, 512, 512)))
    report, _ = lab.ingest(lab.config())
    assert report.joins == 1
    assert report.deleted == 16


def test_nothing_that_the_keys_forbid_is_ever_tried(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    _, job = lab.ingest(lab.config())
    assert not job.observed.denied


def test_no_tile_outlives_its_lease_and_slow_sources_get_longer_ones(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.write_stack(volume((32, 64, 64)), tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 32], "t": [0, 1]}
    loaded, job = lab.create(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    settings = UploadSettings(threads=2, min_lease_seconds=4)
    uploader = lab.uploader(loaded, job.id, settings)
    putting = uploader._line.pieces.putting
    read = putting.source.piece
    begun_with: list[float] = []

    def slow(position: Any, path: Any = None) -> Any:
        time.sleep(1.1 if len(begun_with) < 6 else 0.0)
        return read(position, path)

    put_tile = putting.put

    def watched(item: Any, content: bytes) -> None:
        begun_with.append(item.message.left_seconds)
        put_tile(item, content)

    monkeypatch.setattr(putting.source, "piece", slow)
    monkeypatch.setattr(putting, "put", watched)
    report = uploader.run()
    uploader.close()
    assert min(begun_with) > -1.2  # begun within the lease; one slow read may end after it
    assert report.deleted == 32
    assert report.abandoned > 0
    assert lab.boss.job(job.id).observed.longest_lease > 30
    assert set(lab.boss.job(job.id).observed.indexed.values()) == {1}


def test_a_missing_file_under_the_policy_fail_keeps_the_job_open(lab: Lab) -> None:
    root = lab.write_stack(volume((16, 512, 512)))
    (root / "5" / "0_0_0.png").unlink()
    config, job = lab.create(lab.config())
    report = lab.upload(config, job.id, with_policy("fail"))
    assert list(report.failed) == ["x=0 y=0 z=5 t=0"]
    assert "no such file" in report.failed["x=0 y=0 z=5 t=0"]
    assert report.deleted == 15
    assert not report.balanced
    lab.boss.job(job.id).upload_queue.expire_leases()
    assert lab.complete(job.id).outcome == "RESUME"
    Image.fromarray(volume((16, 512, 512))[5]).save(root / "5" / "0_0_0.png")
    again = lab.upload(config, job.id)
    assert (again.deleted, again.deleted_before, again.failed) == (1, 15, {})
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read((16, 512, 512)), volume((16, 512, 512)))


@pytest.mark.parametrize(("channel", "mode"), [("uint8", "L"), ("uint16", "I;16")])
def test_a_missing_file_under_the_policy_blank_is_filled(lab: Lab, channel: str, mode: str) -> None:
    pixels = volume((16, 512, 512), channel)
    root = lab.write_stack(pixels)
    (root / "5" / "0_0_0.png").unlink()
    report, _ = lab.ingest(lab.config(channel=channel), with_policy("blank", fill=9))
    assert report.blank == ("x=0 y=0 z=5 t=0",)
    read = lab.read((16, 512, 512), channel)
    assert read[5].min() == read[5].max() == 9
    assert np.array_equal(np.delete(read, 5, 0), np.delete(pixels, 5, 0))


def test_missing_files_under_the_policy_skip_are_left_out(lab: Lab) -> None:
    root = lab.write_stack(volume((32, 512, 512)))
    for z in range(16, 32):
        (root / str(z) / "0_0_0.png").unlink()
    config = lab.config(extent={"x": [0, 512], "y": [0, 512], "z": [0, 32], "t": [0, 1]})
    report, _ = lab.ingest(config, with_policy("skip"))
    assert len(report.skipped) == 16
    read = lab.read((32, 512, 512))
    assert np.array_equal(read[:16], volume((32, 512, 512))[:16])
    assert not read[16:].any()


def test_a_damaged_file_under_the_policy_quarantine_is_tried_again_later(lab: Lab) -> None:
    pixels = volume((16, 512, 512))
    root = lab.write_stack(pixels)
    path = root / "5" / "0_0_0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    config, job = lab.create(lab.config())
    report = lab.upload(config, job.id, with_policy("quarantine"))
    assert len(report.quarantined) == 1
    assert "damaged" in report.quarantined[0]
    assert report.exhausted
    path.write_bytes(whole)
    again = lab.upload(config, job.id, with_policy("quarantine"))
    assert (again.deleted, again.deleted_before, again.quarantined) == (1, 15, ())
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read(pixels.shape), pixels)


def test_metadata_that_does_not_fit_is_sent_slim(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(long_settings=1500)
    lab.write_stack(volume((16, 512, 512)))
    _, job = lab.ingest(lab.config())
    assert "parameters" not in json.loads(next(iter(job.objects.values())).metadata["metadata"])
    assert np.array_equal(lab.read((16, 512, 512)), volume((16, 512, 512)))


def test_a_stop_finishes_what_is_in_flight_and_leaves_the_rest(lab: Lab) -> None:
    pixels = volume((400, 64, 64))
    lab.write_stack(pixels, tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 400], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    stop = threading.Event()
    uploader = lab.uploader(config, job.id, stop=stop)
    put = uploader._queues.put

    def put_slowly(*arguments: Any) -> None:
        put(*arguments)
        if len(lab.boss.job(job.id).observed.puts) > 30:
            stop.set()
            time.sleep(0.3)

    uploader._queues.put = put_slowly  # type: ignore[method-assign]
    report = uploader.run()
    uploader.close()
    observed = lab.boss.job(job.id).observed
    assert report.stopped == "stopped on request"
    assert not report.exhausted
    assert 30 < report.deleted < 200
    assert observed.deleted == report.deleted == len(observed.puts)
    lab.boss.job(job.id).upload_queue.expire_leases()
    again = lab.upload(config, job.id)
    assert again.deleted + again.deleted_before == 400
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert len(observed.indexed) == 400
    assert set(observed.indexed.values()) == {1}
    assert np.array_equal(lab.read(pixels.shape), pixels)


def test_limits_make_a_bounded_slice(lab: Lab) -> None:
    lab.write_stack(volume((100, 64, 64)), tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 100], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    report = lab.upload(config, job.id, QUICK.model_copy(update={"max_tiles": 40}))
    assert report.stopped.startswith("max_tiles")
    assert 0 < report.deleted <= 40
    begun = time.monotonic()
    report = lab.upload(config, job.id, QUICK.model_copy(update={"max_seconds": 0.01}))
    assert time.monotonic() - begun < 10
    assert report.stopped.startswith("max_seconds")


@pytest.mark.parametrize("end", ["cancelled", "completed"])
def test_a_queue_deleted_under_us_ends_the_upload_cleanly(lab: Lab, end: str) -> None:
    lab.write_stack(volume((64, 64, 64)), tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 64], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    uploader = lab.uploader(config, job.id)
    put = uploader._queues.put
    status = JobStatus.DELETED if end == "cancelled" else JobStatus.COMPLETE

    def put_and_end(*arguments: Any) -> None:
        put(*arguments)
        service, theirs = lab.boss.service, lab.boss.job(job.id)
        if theirs.status == 1:
            service._close(theirs, type(theirs.status)(int(status)))

    uploader._queues.put = put_and_end  # type: ignore[method-assign]
    if end == "cancelled":
        with pytest.raises(JobFailed, match="DELETED"):
            uploader.run()
    else:
        assert "COMPLETE" in uploader.run().stopped
    uploader.close()


def test_two_clients_on_one_job_share_the_work(lab: Lab, tmp_path: Path) -> None:
    pixels = volume((300, 64, 64))
    lab.write_stack(pixels, tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 300], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    uploaders = [lab.uploader(config, job.id, ledger_folder=tmp_path / name) for name in ("here", "there")]
    reports = []
    threads = [threading.Thread(target=lambda u=u: reports.append(u.run())) for u in uploaders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for uploader in uploaders:
        uploader.close()
    assert sum(report.deleted for report in reports) == 300
    assert all(report.deleted > 0 for report in reports)
    assert [report.unaccounted + report.deleted for report in reports] == [300, 300]
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read(pixels.shape), pixels)


def test_a_configuration_of_another_job_is_refused(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    _, job = lab.create(lab.config())
    other = IngestConfig.load(lab.config(extent={"x": [0, 512], "y": [0, 512], "z": [0, 8], "t": [0, 1]}))
    with pytest.raises(PreflightFailed, match=r"16 tiles.*8"):
        lab.upload(other, job.id)


def test_what_a_killed_run_had_deleted_is_counted_by_the_next(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    uploader = lab.uploader(config, job.id)

    def crash(items: Any) -> None:
        raise RuntimeError("crash")

    monkeypatch.setattr(uploader._line.deleting, "finish", crash)  # after the deletion, before it is written down
    with pytest.raises(RuntimeError, match="crash"):
        uploader.run()
    uploader.close()
    gone = lab.boss.job(job.id).observed.deleted
    assert gone > 0
    lab.boss.job(job.id).upload_queue.expire_leases()
    report = lab.upload(config, job.id)
    assert report.deleted + report.deleted_before == 16
    assert report.unaccounted == 0
    assert lab.complete(job.id).outcome == "COMPLETE"
    final = account(lab.client, config, job.id, ledger_folder=lab.folder / "ledgers")
    assert (final.deleted, final.unaccounted, final.holes) == (16, 0, ())
    assert not lab.boss.job(job.id).observed.late_indexed


@pytest.mark.parametrize("body", ["", "<html>Welcome</html>", "null", "[]", "{}", "[" * 10_000, '{"Messages": [{}]}'])
def test_success_that_something_between_pretends_is_no_success(lab: Lab, body: str) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.client.settle_seconds = 0.5
    config, job = lab.create(lab.config())
    uploader = lab.uploader(config, job.id, QUICK.model_copy(update={"min_lease_seconds": 3}))
    pretended = {"status": 200, "body": body, "content_type": "application/x-amz-json-1.0"}
    lab.boss.faults.add(Fault(method="PUT", calls=[1, 4], **pretended))
    lab.boss.faults.add(Fault(method="POST", path="^/$", calls=[1, 3, 4, 6, 9], **pretended))
    report = uploader.run()
    uploader.close()
    assert (report.deleted, report.failed, report.unaccounted) == (16, {}, 0)
    assert [fault["hit"] for fault in lab.boss.faults.describe()] == [2, 5]
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read((16, 512, 512)), volume((16, 512, 512)))
    assert not lab.boss.job(job.id).observed.late_indexed
