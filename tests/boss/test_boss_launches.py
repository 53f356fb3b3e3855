"""Creating a job once: lost answers, kills in flight, twin processes, records of this machine and of others."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.ingest_lab import Lab
from prefect_biomed.clients.boss import (
    BossClient,
    IngestConfig,
    IngestJob,
    JobStatus,
    create_once,
    job_of_intent,
    settled_job,
    wait_until_ready,
)
from prefect_biomed.clients.errors import (
    JobFailed,
    LaunchInDoubt,
    LedgerError,
    LocalStorageError,
    NotFoundError,
    PlatformError,
    PreflightFailed,
    is_transient,
)
from prefect_biomed.clients.once import Circumstances, Intent, IntentFolder
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.sandbox import Fault

POST = {"method": "POST", "path": r"/ingest/$", "times": 1}
HTML = "<html><body><h1>Oops</h1></body></html>"
LOST: dict[str, dict[str, Any]] = {
    "connection lost": {"drop": "after"},
    "502 page": {"status": 502, "body": HTML, "after_effect": True},
    "500 page": {"status": 500, "body": HTML, "after_effect": True},
    "500 empty": {"status": 500, "after_effect": True},
    "400 page": {"status": 400, "body": HTML, "after_effect": True},
    "200 page": {"status": 200, "body": HTML, "after_effect": True},
    "201 empty": {"status": 201, "after_effect": True},
    "201 {}": {"status": 201, "body": "{}", "content_type": "application/json", "after_effect": True},
}
HOLD_SECONDS = 1.0

lost_answers = pytest.mark.parametrize("answer", LOST.values(), ids=list(LOST))


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def config(lab: Lab) -> IngestConfig:
    return IngestConfig.load(lab.config())


@pytest.fixture
def folder(lab: Lab) -> Path:
    return lab.folder / "intents"


@pytest.fixture
def create(lab: Lab, config: IngestConfig, folder: Path) -> Callable[..., IngestJob]:
    def once(token: str = "abcdefghij", *, client: BossClient | None = None, **changes: Any) -> IngestJob:
        changes = {"settle_seconds": 10.0, "folder": folder} | changes
        return create_once(client or lab.client, changes.pop("config", config), token, **changes)

    return once


def another_client(lab: Lab) -> BossClient:
    facts = lab.boss.ready()
    return BossClient(facts["host"], facts["tokens"]["alice"], protocol="http", aws_endpoint_url=lab.boss.url)


def die_in_flight(lab: Lab, create: Callable[..., IngestJob], monkeypatch: pytest.MonkeyPatch) -> threading.Thread:
    """Leave what a kill leaves while the request is held on its way: a record without a job, and no process."""
    client = another_client(lab)
    send, sent = client.create, []

    def held(config: IngestConfig) -> IngestJob:
        def quietly() -> None:
            try:
                send(config)
            except PlatformError:
                pass
            except Exception as error:
                assert "connection" in str(error)

        sent.append(threading.Thread(target=quietly))
        sent[0].start()
        raise Killed

    monkeypatch.setattr(client, "create", held)
    with pytest.raises(Killed):
        create(client=client)
    return sent[0]


@lost_answers
def test_a_lost_answer_is_settled_by_looking(
    lab: Lab, create: Callable[..., IngestJob], answer: dict[str, Any], folder: Path
) -> None:
    lab.boss.faults.add(Fault(**POST, **answer))
    made = create()
    assert (made.id, list(lab.boss.service.jobs)) == (1, [1])
    assert job_of_intent("abcdefghij", folder) == 1


@lost_answers
def test_a_lost_answer_that_looking_cannot_settle_is_settled_by_the_next_call(
    lab: Lab, create: Callable[..., IngestJob], answer: dict[str, Any]
) -> None:
    lab.boss.faults.add(Fault(**POST, **answer))
    # The list fails as well, from the moment of the request until the first call has ended.
    lab.boss.faults.add(Fault(method="GET", path=r"/ingest/$", skip=1, status=503, body=HTML))
    with pytest.raises(LaunchInDoubt, match="cannot be looked for now") as caught:
        create(settle_seconds=0.2)
    assert is_transient(caught.value)
    lab.boss.faults.clear()
    assert create().id == 1
    assert list(lab.boss.service.jobs) == [1]
    assert create().id == 1


@lost_answers
def test_a_call_that_is_killed_in_flight_and_repeated_at_once_makes_one_job(
    lab: Lab, create: Callable[..., IngestJob], answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.boss.faults.add(Fault(**POST, hold_seconds=HOLD_SECONDS, **answer))
    request = die_in_flight(lab, create, monkeypatch)
    assert not lab.boss.service.jobs
    assert create().id == 1
    request.join()
    assert list(lab.boss.service.jobs) == [1]


@lost_answers
def test_two_calls_at_once_make_one_job(lab: Lab, create: Callable[..., IngestJob], answer: dict[str, Any]) -> None:
    lab.boss.faults.add(Fault(**POST, hold_seconds=HOLD_SECONDS, **answer))
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda client: create(client=client), [lab.client, another_client(lab)]))
    assert [job.id for job in made] == [1, 1]
    assert list(lab.boss.service.jobs) == [1]


def work(host: str, token: str, url: str, config: dict[str, Any], folder: str) -> None:
    """What a second process does."""
    with BossClient(host, token, protocol="http", aws_endpoint_url=url) as client:
        create_once(client, IngestConfig.load(config), "abcdefghij", folder=Path(folder))


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_in_flight_make_one_job(lab: Lab, folder: Path) -> None:
    facts = lab.boss.ready()
    arguments = (facts["host"], facts["tokens"]["alice"], lab.boss.url, lab.config(), str(folder))
    context = multiprocessing.get_context("spawn")
    first, second = (context.Process(target=work, args=arguments) for _ in range(2))
    lab.boss.faults.add(Fault(**POST, hold_seconds=8.0))
    first.start()
    try:
        wait_for_record(folder)
        second.start()
        first.kill()
        first.join()
        second.join(60)
        assert second.exitcode == 0
    finally:
        first.kill()
        second.kill()
    assert list(lab.boss.service.jobs) == [1]
    assert job_of_intent("abcdefghij", folder) == 1


def wait_for_record(folder: Path) -> None:
    for _ in range(600):
        intent = IntentFolder(folder).read("abcdefghij")
        if intent is not None and intent.is_in_doubt:
            return
        threading.Event().wait(0.1)
    raise AssertionError("the first process has sent nothing")


def test_a_request_that_never_arrived_is_sent_again_when_it_cannot_take_effect_any_more(
    lab: Lab, create: Callable[..., IngestJob]
) -> None:
    lab.boss.faults.add(Fault(**POST, drop="before"))
    with pytest.raises(LaunchInDoubt, match="did not appear within"):
        create(settle_seconds=0.5)
    assert not lab.boss.service.jobs
    assert create(settle_seconds=0.5).id == 1
    assert list(lab.boss.service.jobs) == [1]


@pytest.mark.parametrize(
    ("status", "code"), [(400, 1004), (400, 1006), (403, 3003), (404, 4000), (404, 5002), (400, 9003)]
)
def test_a_refusal_leaves_no_doubt(lab: Lab, create: Callable[..., IngestJob], status: int, code: int) -> None:
    body = json.dumps({"status": status, "code": code, "message": "no"})
    lab.boss.faults.add(Fault(**POST, status=status, body=body, content_type="application/json"))
    with pytest.raises(PlatformError) as caught:
        create(settle_seconds=60.0)
    assert caught.value.code == code
    assert create(settle_seconds=60.0).id == 1
    assert len(lab.boss.journal.entries("POST", r"/ingest/$")) == 2


@pytest.mark.parametrize("code", [9001, 9999])
def test_an_error_of_the_boss_itself_leaves_a_doubt(lab: Lab, create: Callable[..., IngestJob], code: int) -> None:
    body = json.dumps({"status": 400, "code": code, "message": "Unable to create the upload and ingest queue."})
    lab.boss.faults.add(Fault(**POST, status=400, body=body, content_type="application/json", after_effect=True))
    assert create().id == 1
    lab.boss.faults.add(Fault(**POST, status=400, body=body, content_type="application/json"))
    with pytest.raises(PlatformError, match="Unable to create") as caught:
        create("another", settle_seconds=0.5)
    assert caught.value.code == code
    assert create("another", settle_seconds=0.5).id == 2
    assert list(lab.boss.service.jobs) == [1, 2]


def test_a_job_that_the_boss_half_made_is_not_waited_for_to_the_deadline(
    lab: Lab, create: Callable[..., IngestJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = lab.boss.service
    monkeypatch.setattr(service, "_open_queues", lambda job: None)
    monkeypatch.setattr(service, "_begin_to_fill", lambda job: None)
    body = json.dumps({"status": 400, "code": 9001, "message": "Unable to create the upload and ingest queue."})
    lab.boss.faults.add(Fault(**POST, status=400, body=body, content_type="application/json", after_effect=True))
    job = create()
    lab.client.settle_seconds = 0.3
    with pytest.raises(JobFailed, match=f"Ingest job {job.id} has no upload queue.*Cancel it"):
        wait_until_ready(lab.client, job.id, PollSettings(0.05, deadline_seconds=20))


def test_a_job_that_takes_long_to_prepare_is_waited_for(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(prepare_seconds=1.0)
    lab.client.settle_seconds = 0.1
    _, job = lab.create(lab.config())
    joined = wait_until_ready(lab.client, job.id, PollSettings(0.05, deadline_seconds=20))
    assert joined.job.status == JobStatus.UPLOADING


def test_what_does_not_fit_is_refused_before_anything_is_written_or_sent(
    lab: Lab, create: Callable[..., IngestJob]
) -> None:
    with pytest.raises(PreflightFailed, match=r"no channel 'uint61'.*uint16"):
        create(config=IngestConfig.load(lab.config(channel="uint61")))
    assert not lab.boss.journal.entries("POST", "/ingest/")


def test_a_job_that_was_cancelled_is_not_made_again(lab: Lab, create: Callable[..., IngestJob]) -> None:
    lab.client.cancel(create().id)
    with pytest.raises(NotFoundError, match=r"made for the intent abcdefghij.*another idempotency_key"):
        create()
    assert list(lab.boss.service.jobs) == [1]


def test_jobs_of_other_intents_and_of_earlier_times_are_not_taken(lab: Lab, create: Callable[..., IngestJob]) -> None:
    earlier = lab.client.create(IngestConfig.load(lab.config()))
    others = create("other")
    lab.boss.faults.add(Fault(**POST, drop="after"))
    assert create().id not in (earlier.id, others.id)
    assert len(lab.boss.service.jobs) == 3


def test_two_jobs_that_could_be_meant_are_named_and_left_alone(
    lab: Lab, create: Callable[..., IngestJob], config: IngestConfig
) -> None:
    lab.boss.faults.add(Fault(**POST, drop="after"))
    lab.boss.faults.add(Fault(method="GET", path=r"/ingest/$", skip=1, status=503, body=HTML))
    with pytest.raises(LaunchInDoubt):
        create(settle_seconds=0.2)
    lab.boss.faults.clear()
    lab.client.create(config)
    with pytest.raises(LaunchInDoubt, match="1, 2 on sandbox/stack/uint8 could be the one"):
        create(settle_seconds=0.2)
    assert [job.status.name for job in lab.client.list_jobs()] == ["PREPARING", "PREPARING"]


def test_the_job_of_an_intent_for_another_part_of_the_channel_is_not_taken(
    lab: Lab, create: Callable[..., IngestJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.boss.faults.add(Fault(**POST, hold_seconds=HOLD_SECONDS))
    request = die_in_flight(lab, create, monkeypatch)
    request.join()
    lab.write_stack(np.zeros((1, 512, 1024), "uint8"))
    beside = IngestConfig.load(lab.config(extent={"x": [512, 1024], "y": [0, 512], "z": [0, 16], "t": [0, 1]}))
    lab.boss.faults.add(Fault(**POST, drop="before"))
    with pytest.raises(LaunchInDoubt):
        create("beside", config=beside, settle_seconds=0.2)
    assert create().id == 1
    assert create("beside", config=beside, settle_seconds=0.2).id == 2


@pytest.mark.parametrize("made_since", [True, False])
def test_an_attempt_on_another_machine_is_looked_for_by_the_time_of_the_job(
    lab: Lab, create: Callable[..., IngestJob], config: IngestConfig, *, made_since: bool
) -> None:
    theirs = lab.client.create(config)
    since = datetime.now(UTC) + timedelta(seconds=-60 if made_since else 60)
    made = create(circumstances=Circumstances(attempted_since=since), settle_seconds=0.5)
    assert (made.id == theirs.id) is made_since


def test_what_another_machine_has_made_after_a_refusal_here_is_taken(
    lab: Lab, create: Callable[..., IngestJob], config: IngestConfig
) -> None:
    lab.boss.faults.add(Fault(method="GET", path="/channel/", status=400, body='{"code": 1, "message": "no"}', times=1))
    since = datetime.now(UTC)
    with pytest.raises(PlatformError):
        create(circumstances=Circumstances())
    theirs = lab.client.create(config)
    assert create(circumstances=Circumstances(attempted_since=since)).id == theirs.id


def test_a_record_of_the_first_release_is_read(lab: Lab, create: Callable[..., IngestJob], folder: Path) -> None:
    host = lab.client.host
    known = lab.client.create(IngestConfig.load(lab.config()))
    old = {"host": host, "channel": "sandbox/stack/uint8", "tile_count": 16, "known": [known.id]}
    folder.mkdir()
    (folder / "done.json").write_text(json.dumps(old | {"token": "done", "job_id": known.id}))
    (folder / "doubt.json").write_text(json.dumps(old | {"token": "doubt", "job_id": None}))
    assert job_of_intent("done", folder) == known.id
    assert job_of_intent("doubt", folder) is None
    assert create("done").id == known.id
    lost = lab.client.create(IngestConfig.load(lab.config()))
    assert create("doubt").id == lost.id
    assert len(lab.boss.service.jobs) == 2


@pytest.mark.parametrize(
    "content",
    [
        '{"token": "oth',
        "[]",
        "null",
        '{"version": 2, "token": "other"}',
        '{"version": 1, "token": "other", "id": "seven", "asked": {"host": 5}}',
        '{"token": "other", "host": "h", "channel": "x", "tile_count": 1, "known": [], "job_id": 3, "region": "eu"}',
        '{"token": "other", "host": "h", "channel": "x", "tile_count": 1, "known": [], "job_id": "3"}',
    ],
)
def test_a_record_that_cannot_be_read_concerns_its_own_intent_only(
    lab: Lab, create: Callable[..., IngestJob], folder: Path, content: str
) -> None:
    folder.mkdir()
    (folder / "other.json").write_text(content)
    lab.boss.faults.add(Fault(**POST, drop="after"))  # so that the claims of others are asked for
    assert create().id == 1
    assert (folder / "other.json").read_text() == content


def test_a_damaged_record_is_left_untouched_and_named(create: Callable[..., IngestJob], folder: Path) -> None:
    folder.mkdir()
    (folder / "abcdefghij.json").write_text('{"token": "abc')
    with pytest.raises(LedgerError, match=r"abcdefghij\.json is damaged.*left as it is"):
        create()
    assert (folder / "abcdefghij.json").read_text() == '{"token": "abc'


def test_a_record_of_a_later_version_asks_for_the_newer_package(create: Callable[..., IngestJob], folder: Path) -> None:
    folder.mkdir()
    (folder / "abcdefghij.json").write_text(json.dumps({"version": 2, "token": "abcdefghij", "what": {}}))
    with pytest.raises(LedgerError, match=r"later version of prefect-biomed\. Update the package") as caught:
        create()
    assert "damaged" not in str(caught.value)


def test_a_record_of_another_job_is_refused(lab: Lab, create: Callable[..., IngestJob]) -> None:
    create()
    other = IngestConfig.load(lab.config(extent={"x": [0, 512], "y": [0, 512], "z": [0, 32], "t": [0, 1]}))
    with pytest.raises(LedgerError, match=r"about another job, on sandbox/stack/uint8"):
        create(config=other)


def test_records_are_readable_for_their_owner_only_and_left_overs_are_swept(
    create: Callable[..., IngestJob], folder: Path
) -> None:
    folder.mkdir()
    (folder / f".{'0' * 32}.part").write_bytes(b"half")
    create()
    assert [path.name for path in folder.glob("*.part")] == []
    assert oct((folder / "abcdefghij.json").stat().st_mode & 0o777) == oct(0o600)


def test_a_folder_that_cannot_be_written_is_a_typed_error(lab: Lab, create: Callable[..., IngestJob]) -> None:
    (lab.folder / "file").write_bytes(b"")
    with pytest.raises(LocalStorageError, match="file"):
        create(folder=lab.folder / "file")
    assert not lab.boss.service.jobs


def test_the_client_waits_a_minute_longer_than_it_reads(lab: Lab) -> None:
    assert lab.client.settle_seconds == 150.0
    again = BossClient.from_arguments(BossClient("h", "t", settle_seconds=3.0).arguments())
    assert again.settle_seconds == 3.0


def test_an_intent_of_this_release_keeps_what_its_job_is_known_by(
    lab: Lab, create: Callable[..., IngestJob], folder: Path
) -> None:
    earlier = lab.client.create(IngestConfig.load(lab.config()))
    create()
    intent = IntentFolder(folder).read("abcdefghij")
    assert isinstance(intent, Intent)
    assert intent.asked == {
        "host": lab.client.host,
        "channel": "sandbox/stack/uint8",
        "ingest_type": "tile",
        "tile_count": 16,
        "extent": {"x": [0, 512], "y": [0, 512], "z": [0, 16], "t": [0, 1]},
        "known": [earlier.id],
    }


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_in_place_of_a_record_concerns_its_own_intent_only(
    lab: Lab, create: Callable[..., IngestJob], folder: Path, kind: str
) -> None:
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / "other.json")
    else:
        (folder / "other.json").symlink_to("/dev/zero")
    lab.boss.faults.add(Fault(**POST, drop="after"))
    assert create().id == 1


def test_a_job_in_doubt_is_looked_for_by_whoever_wants_to_end_it(
    lab: Lab, create: Callable[..., IngestJob], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.boss.faults.add(Fault(**POST, hold_seconds=HOLD_SECONDS))
    sent = die_in_flight(lab, create, monkeypatch)
    assert not lab.boss.service.jobs
    assert settled_job(lab.client, "abcdefghij", settle_seconds=10.0, folder=folder) == 1
    sent.join()
    assert job_of_intent("abcdefghij", folder) == 1
    assert settled_job(lab.client, "neverasked", settle_seconds=10.0, folder=folder) is None


def test_a_request_that_never_arrived_has_made_no_job_to_end(
    lab: Lab, create: Callable[..., IngestJob], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = another_client(lab)

    def killed(config: IngestConfig) -> IngestJob:
        raise Killed

    monkeypatch.setattr(client, "create", killed)
    with pytest.raises(Killed):
        create(client=client)
    assert settled_job(lab.client, "abcdefghij", settle_seconds=0.5, folder=folder) is None
