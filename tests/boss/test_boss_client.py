"""The REST client: answers as the Boss gives them, errors as a person needs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.ingest_lab import SOON, Lab, volume
from prefect_biomed.clients.boss import (
    BossClient,
    IngestConfig,
    JobStatus,
    complete,
    create_resources,
    wait_until_ready,
)
from prefect_biomed.clients.errors import (
    AuthenticationError,
    DeadlineExceeded,
    JobFailed,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    PreflightFailed,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.sandbox import Fault


@pytest.fixture
def config(lab: Lab) -> IngestConfig:
    return IngestConfig.load(lab.config())


def uploaded(lab: Lab) -> int:
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    lab.upload(config, job.id)
    return job.id


def test_a_bad_token_is_refused_once_and_never_shown(lab: Lab, config: IngestConfig) -> None:
    wrong = "f" * 40
    client = BossClient(lab.client.host, wrong, protocol="http")
    with pytest.raises(AuthenticationError, match=r"Invalid token.*refused the token") as caught:
        client.create(config)
    assert len(lab.boss.journal) == 1
    assert wrong not in f"{caught.value!r} {client!r}"


def test_a_job_of_somebody_else_is_refused(lab: Lab, config: IngestConfig) -> None:
    job = lab.client.create(config)
    other = BossClient(lab.client.host, lab.boss.ready()["tokens"]["bob"], protocol="http")
    with pytest.raises(PermissionDeniedError, match="3003"):
        other.join(job.id)


def test_two_bad_gateways_are_bridged(lab: Lab, config: IngestConfig) -> None:
    job = lab.client.create(config)
    lab.boss.faults.add(
        Fault(method="GET", path=f"/ingest/{job.id}$", calls=[1, 2], status=502, body="<html>Bad Gateway</html>")
    )
    assert wait_until_ready(lab.client, job.id, SOON).job.id == job.id


def test_a_long_outage_is_transient(lab: Lab, config: IngestConfig) -> None:
    job = lab.client.create(config)
    lab.boss.faults.add(Fault(path="/ingest/", status=503, body="<html>no</html>"))
    with pytest.raises(ServerUnavailable):
        lab.client.join(job.id)


@pytest.mark.parametrize("wait", [wait_until_ready, complete])
def test_a_deadline_during_an_outage_says_so_and_is_not_transient(
    lab: Lab, config: IngestConfig, wait: Callable[..., object]
) -> None:
    job = lab.client.create(config)
    lab.boss.faults.add(Fault(path="/ingest/", status=503, body="<html>no</html>"))
    with pytest.raises(DeadlineExceeded, match=r"could not be asked then.*503") as caught:
        wait(lab.client, job.id, PollSettings(0.2, deadline_seconds=0.5, error_budget=100))
    assert not is_transient(caught.value)


def test_an_outage_at_the_first_look_is_bridged(lab: Lab, config: IngestConfig) -> None:
    job = lab.client.create(config)
    lab.boss.faults.add(Fault(path="/status$", status=429, times=2))
    assert wait_until_ready(lab.client, job.id, SOON).job.id == job.id


def test_waiting_asks_by_joins_not_by_status(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(unready_joins=3)
    job = lab.client.create(IngestConfig.load(lab.config()))
    lab.boss.journal.clear()
    joined = wait_until_ready(lab.client, job.id, SOON)
    assert joined.job.status == JobStatus.UPLOADING
    assert joined.access_key.get_secret_value() not in repr(joined)
    paths = [entry.path.rsplit("/", 1)[-1] for entry in lab.boss.journal]
    assert paths.count("status") == 1
    assert paths.count(str(job.id)) >= 4


def test_a_join_without_keys_is_repeated(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(null_credentials_joins=2)
    job = lab.client.create(IngestConfig.load(lab.config()))
    assert wait_until_ready(lab.client, job.id, SOON).access_key.get_secret_value()
    assert lab.boss.job(job.id).observed.joins >= 3


def test_a_complete_tile_job_is_reported_and_not_joined_again(lab: Lab) -> None:
    number = uploaded(lab)
    lab.complete(number)
    lab.boss.journal.clear()
    with pytest.raises(JobFailed, match="complete: there is nothing left"):
        wait_until_ready(lab.client, number)
    assert [entry.path.rsplit("/", 1)[-1] for entry in lab.boss.journal] == ["status"]
    with pytest.raises(JobFailed, match="complete"):
        lab.client.join(number)


def test_a_complete_volumetric_job_is_reported(lab: Lab) -> None:
    extent = {"x": [0, 512], "y": [0, 512], "z": [0, 16], "t": [0, 1]}
    config = IngestConfig.load(lab.volumetric("a.b", {}, extent))
    job = lab.client.create(config)
    wait_until_ready(lab.client, job.id, SOON)
    lab.boss.service._close(lab.boss.job(job.id), type(lab.boss.job(job.id).status)(2))
    with pytest.raises(JobFailed, match="is complete"):
        lab.client.join(job.id)


def test_waits_that_the_server_asks_for_are_honoured(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(quiet_seconds=1.2, completing_seconds=0.3)
    number = uploaded(lab)
    lab.boss.journal.clear()
    completion = complete(lab.client, number, SOON)
    assert (completion.outcome, completion.status) == ("COMPLETE", JobStatus.COMPLETE)
    posts = [entry for entry in lab.boss.journal if entry.method == "POST"]
    assert posts[0].status == posts[-1].status == 202
    assert posts[1].time - posts[0].time >= 1.1
    assert len(posts) <= 4
    assert complete(lab.client, number, SOON).outcome == "COMPLETE"


@pytest.mark.parametrize("body", ["", "<html><h1>Internal Server Error</h1></html>"], ids=["empty", "page"])
def test_a_server_that_fails_for_a_moment_does_not_end_a_wait(lab: Lab, body: str) -> None:
    number = uploaded(lab)
    lab.boss.faults.add(Fault(path="/ingest/", status=500, body=body, times=4))
    assert complete(lab.client, number, SOON).outcome == "COMPLETE"


def test_a_queue_that_is_not_empty_means_resume(lab: Lab) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    wait_until_ready(lab.client, job.id, SOON)
    completion = lab.complete(job.id)
    assert (completion.outcome, completion.missing) == ("RESUME", 16)
    lab.upload(config, job.id)
    assert lab.complete(job.id).outcome == "COMPLETE"


@pytest.mark.parametrize("state", ["PREPARING", "DELETED", "FAILED"])
def test_a_job_that_cannot_be_completed_is_an_error_not_a_loop(lab: Lab, config: IngestConfig, state: str) -> None:
    job = lab.client.create(config)
    theirs = lab.boss.job(job.id)
    theirs.status = type(theirs.status)[state]
    with pytest.raises((JobFailed, NotFoundError)):
        complete(lab.client, job.id, SOON)


def test_a_job_whose_queue_cannot_be_filled_is_given_up(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(fail_population=True)
    job = lab.client.create(IngestConfig.load(lab.config()))
    with pytest.raises(JobFailed, match="never will"):
        wait_until_ready(lab.client, job.id, SOON)
    assert "was cancelled" in lab.client.cancel(job.id)


def test_a_server_failure_at_creation_warns_of_the_half_made_job(lab: Lab, config: IngestConfig) -> None:
    bad = config.body()
    bad["ingest_job"]["tile_size"]["t"] = 0
    broken = config.model_copy(update={"ingest_job": config.ingest_job.model_copy()})
    object.__setattr__(broken, "body", lambda: bad)
    with pytest.raises(PlatformError, match=r"half-made job"):
        lab.client.create(broken)
    assert [job.status for job in lab.client.list_jobs()] == [JobStatus.PREPARING]


def test_an_unknown_state_is_kept_and_not_terminal() -> None:
    status = JobStatus(42)
    assert (int(status), status.is_terminal, status.is_success) == (42, False, False)
    assert JobStatus(42).name == "42"


def test_a_cutout_that_is_none_is_refused(lab: Lab) -> None:
    lab.boss.faults.add(Fault(path="/cutout/", status=200, body="garbage", content_type="application/npygz"))
    with pytest.raises(UnexpectedResponse, match="cutout cannot be read"):
        lab.client.cutout("sandbox/stack/uint8", 0, (0, 4), (0, 4), (0, 1))


def test_resources_are_made_once(lab: Lab) -> None:
    changed = lab.config()
    changed["database"] = {"collection": "c", "experiment": "e", "channel": "ch"}
    config = IngestConfig.load(changed)
    assert len(create_resources(lab.client, config, datatype="uint16")) == 4
    assert create_resources(lab.client, config, datatype="uint16") == []
    assert lab.client.channel("c", "e", "ch").datatype == "uint16"
    assert lab.client.channel("c", "e", "ch").bounds["z"] == (0, 16)
    with pytest.raises(PreflightFailed, match="its datatype is 'uint16', not 'uint8'"):
        create_resources(lab.client, config, datatype="uint8")
    with pytest.raises(PreflightFailed, match="its type is 'image', not 'annotation'"):
        create_resources(lab.client, config, datatype="uint16", kind="annotation")
    # The name of a frame is free, and what lies in it would be cut off by another's bounds.
    changed["database"] |= {"collection": "d"}
    wide = {"x": (0, 6000), "y": (0, 512), "z": (0, 16)}
    with pytest.raises(PreflightFailed, match=r"e-frame exists, and its x_stop is 512, not 6000"):
        create_resources(lab.client, IngestConfig.load(changed), datatype="uint8", bounds=wide)
    assert not lab.client.exists("d", "e")
    changed["database"] |= {"experiment": "f"}
    create_resources(lab.client, IngestConfig.load(changed), datatype="uint8", bounds=wide, voxel_size=(4.0, 4.0, 40.0))
    made = lab.boss.service.resources.experiment("d", "f")
    assert (made["num_hierarchy_levels"], made["hierarchy_method"]) == (5, "anisotropic")
