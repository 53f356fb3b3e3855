"""The flows of the Boss against the sandbox, with a Prefect API."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import zarr
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact, FlowRun, State
from prefect.settings import get_current_settings
from pydantic import SecretStr

from harness.ingest_lab import QUICK, Lab, lab, make_lab, volume
from prefect_biomed.blocks import BossCredentials, StorageCredentials
from prefect_biomed.clients.boss import (
    IngestConfig,
    IngestIncomplete,
    JobStatus,
    UploadSettings,
    VerificationFailed,
    VerifySettings,
    wait_until_ready,
)
from prefect_biomed.clients.errors import (
    DeadlineExceeded,
    JobFailed,
    LaunchInDoubt,
    NotFoundError,
    PermissionDeniedError,
    PreflightFailed,
)
from prefect_biomed.flows.boss import (
    boss_cancel_ingest,
    boss_downsample,
    boss_ingest,
    boss_init,
    boss_join_ingest,
    boss_verify,
    boss_write_cutouts,
    cancel_remote_job,
)
from prefect_biomed.flows.boss_parameters import IngestJobWaiting
from prefect_biomed.sandbox import Fault
from prefect_biomed.sandbox.boss import IngestFault
from prefect_biomed.tasks import boss as steps
from prefect_biomed.tasks.policies import intent_token

__all__ = ["lab", "make_lab"]

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def credentials(lab: Lab) -> BossCredentials:
    return credentials_for(lab)


def credentials_for(lab: Lab, user: str = "alice") -> BossCredentials:
    facts = lab.boss.ready()
    return BossCredentials(
        token=SecretStr(facts["tokens"][user]), host=facts["host"], protocol="http", aws_endpoint_url=facts["url"]
    )


def artifacts(key: str) -> list[Artifact]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def posts(lab: Lab) -> int:
    return len(lab.boss.journal.entries("POST", r"/ingest/$"))


def test_ingest_from_check_to_report(lab: Lab, credentials: BossCredentials, tmp_path: Path) -> None:
    pixels = volume((20, 1024, 1024))
    lab.write_stack(pixels)
    extent = {"x": [0, 1024], "y": [0, 1024], "z": [0, 20], "t": [0, 1]}
    file = tmp_path / "ingest.json"
    file.write_text(json.dumps(lab.config(extent=extent)))
    report = boss_ingest(credentials, file, upload=QUICK)
    assert np.array_equal(lab.read(pixels.shape), pixels)
    assert report.balanced
    assert (report.tile_count, report.deleted, report.holes) == (80, 80, ())
    assert lab.boss.job(1).status == JobStatus.COMPLETE
    picture = str(artifacts("boss-preview-1")[-1].data)
    shown = Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,"))))
    assert shown.size == (512, 512)
    assert abs(float(np.asarray(shown).mean()) - float(pixels[10].mean())) < 2
    assert artifacts("boss-upload-1")[-1].data == 100.0
    assert "tiles/s" in str(artifacts("boss-upload-1")[-1].description)
    assert "80 of 80" in str(artifacts("boss-report-1")[-1].data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("upload", "slice_seconds"), [(QUICK, 900.0), (QUICK.model_copy(update={"max_seconds": 120.0}), 120.0)]
)
def test_an_upload_is_done_in_slices_of_the_wanted_length(
    lab: Lab,
    credentials: BossCredentials,
    monkeypatch: pytest.MonkeyPatch,
    upload: UploadSettings,
    slice_seconds: float,
) -> None:
    lab.write_stack(volume((16, 512, 512)))
    join, lengths = steps.join_ingest_job, []

    def noted(*given: Any) -> Any:
        lengths.append(given[4])
        return join(*given)

    monkeypatch.setattr(steps, "join_ingest_job", noted)
    report = boss_ingest(credentials, IngestConfig.load(lab.config()), upload=upload)
    assert report.holes == ()
    assert lengths == [slice_seconds]


def test_the_boss_gets_no_longer_than_it_is_waited_for(lab: Lab, credentials: BossCredentials) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.switches.prepare_seconds = 8.0
    waiting = {"ready_timeout_seconds": 1.0}
    config = IngestConfig.load(lab.config())
    with pytest.raises(DeadlineExceeded):
        boss_ingest(credentials, config, upload=QUICK, waiting=waiting)
    assert lab.boss.job(1).status == JobStatus.PREPARING


@pytest.mark.slow
def test_ingest_makes_what_it_lies_in(lab: Lab, credentials: BossCredentials) -> None:
    lab.write_stack(volume((16, 512, 512), "uint16"))
    config = lab.config()
    config["database"] = {"collection": "mouse", "experiment": "em", "channel": "raw"}
    with pytest.raises(PreflightFailed, match="no collection 'mouse'"):
        boss_ingest(credentials, IngestConfig.load(config))
    assert posts(lab) == 0
    new = steps.NewResources(datatype="uint16", voxel_size=(4.0, 4.0, 40.0))
    boss_ingest(credentials, IngestConfig.load(config), upload=QUICK, new_resources=new)
    read = lab.boss.cutout("mouse/em/raw", x=(0, 512), y=(0, 512), z=(0, 16))[0]
    assert np.array_equal(read, volume((16, 512, 512), "uint16"))


@pytest.mark.slow
def test_a_folder_becomes_a_channel_with_its_pixels(lab: Lab, credentials: BossCredentials) -> None:
    """What is there is left as it is, and has to be what is needed."""
    pixels, folder = volume((5, 300, 600), "uint16"), lab.folder / "slices"
    folder.mkdir()
    for z, plane in enumerate(pixels, 200):
        Image.fromarray(plane).save(folder / f"z{z}.png")
    given = (credentials, str(folder), lab.folder / "ingest.json", "mouse", "em", "raw")
    proposal = boss_init(*given)
    made = len(lab.boss.journal.entries("POST"))
    assert boss_init(*given) == proposal
    assert len(lab.boss.journal.entries("POST")) == made
    lab.ingest(json.loads((lab.folder / "ingest.json").read_text()))
    assert np.array_equal(lab.boss.cutout("mouse/em/raw", x=(0, 600), y=(0, 300), z=(0, 5))[0], pixels)
    with pytest.raises(PreflightFailed, match="its datatype is 'uint16', not 'uint32'"):
        boss_init(*given, choices={"datatype": "uint32"})


@pytest.mark.slow
def test_a_small_volume_of_a_web_server_goes_into_a_channel_without_a_job(
    lab: Lab, credentials: BossCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = volume((16, 40, 50))
    served = lab.folder / "served"
    group = zarr.open_group(served / "image.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=pixels, chunks=(16, 32, 32))
    axes = [{"name": axis} for axis in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(served)))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    storage = StorageCredentials(location=url, authorization=SecretStr("Bearer of-the-lab"))
    extent = {"x": [0, 50], "y": [0, 40], "z": [0, 16], "t": [0, 1]}
    size = {"x": 512, "y": 512, "z": 16}
    params = {"cloud_path": f"{url}/image.zarr"}
    config = IngestConfig.load(
        lab.volumetric("ingestclient.plugins.zarr.Zarr", params, extent, channel="uint8", chunk_size=size)
    )
    try:
        report = boss_write_cutouts(credentials, config, verification=VerifySettings(share=1), storage=storage)
    finally:
        server.shutdown()
        server.server_close()
    assert report.verification
    assert report.verification.is_complete
    assert np.array_equal(lab.read(pixels.shape), pixels)
    assert posts(lab) == 0
    assert "of-the-lab" not in caplog.text
    assert boss_downsample(credentials, config.channel_path) == lab.client.downsampling(config.channel_path)[1]


@pytest.mark.slow
def test_a_damaged_file_leaves_the_job_open_and_the_same_job_is_finished_later(
    lab: Lab, credentials: BossCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = volume((16, 512, 512))
    root = lab.write_stack(pixels)
    path = root / "7" / "0_0_0.png"
    whole = path.read_bytes()
    # The look at the sources before the job is made finds nothing yet.
    create = lab.boss.service.create

    def damaging(user: str, config: Any) -> Any:
        path.write_bytes(whole[:-900])
        return create(user, config)

    monkeypatch.setattr(lab.boss.service, "create", damaging)
    config = IngestConfig.load(lab.config())
    with pytest.raises(IngestIncomplete, match="z=7") as caught:
        boss_ingest(credentials, config, upload=QUICK)
    assert (caught.value.report.deleted, len(caught.value.report.failed)) == (15, 1)
    assert lab.boss.job(1).status == JobStatus.UPLOADING
    path.write_bytes(whole)
    lab.boss.job(1).upload_queue.expire_leases()
    report = boss_join_ingest(credentials, config, 1, upload=QUICK, complete=True)
    assert report.balanced
    assert np.array_equal(lab.read(pixels.shape), pixels)


@pytest.mark.slow
def test_missing_tiles_are_uploaded_again_until_the_boss_is_content(lab: Lab, credentials: BossCredentials) -> None:
    pixels = volume((16, 512, 512))
    lab.write_stack(pixels)
    # The index lambda loses one message: the chunk's entry stays without that tile.
    index, lost = lab.boss.service._index, []

    def forgetful(job: Any, body: str) -> bool:
        if not lost and "&0&4&0" in json.loads(body)["tile_key"]:
            lost.append(body)
            return True
        return index(job, body)

    lab.boss.service._index = forgetful  # type: ignore[method-assign]
    report = boss_ingest(credentials, IngestConfig.load(lab.config()), upload=QUICK)
    assert lost
    assert np.array_equal(lab.read(pixels.shape), pixels)
    assert report.balanced
    assert sum(lab.boss.job(1).observed.puts.values()) == 17


@pytest.mark.slow
def test_nothing_is_in_flight_when_the_job_is_completed(lab: Lab, credentials: BossCredentials) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.faults.add(Fault(method="PUT", calls=[14, 15, 16], delay_seconds=1.5))
    boss_ingest(credentials, IngestConfig.load(lab.config()), upload=QUICK)
    completions = lab.boss.journal.entries("POST", "/complete$")
    puts = lab.boss.journal.entries("PUT")
    assert len(puts) == 16
    assert min(entry.time for entry in completions) > max(entry.time + (entry.seconds or 0) for entry in puts)
    assert lab.boss.job(1).observed.deleted == 16


def test_no_job_is_made_of_sources_that_are_missing(lab: Lab, credentials: BossCredentials) -> None:
    root = lab.write_stack(volume((16, 512, 512)))
    (root / "5" / "0_0_0.png").unlink()
    with pytest.raises(PreflightFailed, match=r"1 source files are not there: .*stack/5/0_0_0\.png"):
        boss_ingest(credentials, IngestConfig.load(lab.config()))
    assert posts(lab) == 0


@pytest.mark.slow
def test_skipped_slices_of_a_chunk_end_with_an_explanation(lab: Lab, credentials: BossCredentials) -> None:
    root = lab.write_stack(volume((16, 512, 512)))
    (root / "7" / "0_0_0.png").unlink()
    settings = QUICK.model_copy(update={"on_bad_source": "skip"})
    with pytest.raises(IngestIncomplete, match="sixteen slices"):
        boss_ingest(credentials, IngestConfig.load(lab.config()), upload=settings)


@pytest.mark.slow
def test_a_chunk_that_others_lost_is_named_although_the_boss_says_complete(
    lab: Lab, credentials: BossCredentials
) -> None:
    lab.write_stack(volume((32, 512, 512)))
    config, job = lab.create(lab.config(extent={"x": [0, 512], "y": [0, 512], "z": [0, 32], "t": [0, 1]}))
    wait_until_ready(lab.client, job.id)
    queue = lab.boss.job(job.id).upload_queue
    kept = []
    for _ in range(4):
        for message in queue.receive(10):
            z = int(json.loads(message.body)["tile_key"].split("&")[7])
            if z >= 16:
                queue.delete(queue.handle(message))  # somebody deletes without indexing
            else:
                kept.append(message.body)
    queue.expire_leases()
    with pytest.raises(IngestIncomplete, match="complete, but not everything") as caught:
        boss_join_ingest(credentials, config, job.id, upload=QUICK, complete=True)
    report = caught.value.report
    assert lab.boss.job(job.id).status == JobStatus.COMPLETE
    assert (report.deleted, report.unaccounted, len(report.holes)) == (16, 16, 16)
    assert report.holes[0] == "x=0 y=0 z=16 t=0"


@pytest.mark.slow
def test_a_lost_chunk_of_a_volumetric_job_is_named(lab: Lab, credentials: BossCredentials) -> None:
    np.save(lab.folder / "v.npy", volume((32, 512, 2048)))
    extent = {"x": [0, 2048], "y": [0, 512], "z": [0, 32], "t": [0, 1]}
    plugin = "prefect_biomed.clients.boss.plugins.arrays.Array"
    config, job = lab.create(lab.volumetric(plugin, {"filename": str(lab.folder / "v.npy")}, extent))
    wait_until_ready(lab.client, job.id)
    queue = lab.boss.job(job.id).upload_queue
    [lost] = queue.receive(1)
    queue.delete(queue.handle(lost))
    with pytest.raises(IngestIncomplete, match="complete, but not everything") as caught:
        boss_join_ingest(credentials, config, job.id, upload=QUICK, complete=True)
    assert caught.value.report.holes == ("x=0 y=0 z=0 t=0",)
    assert (caught.value.report.deleted, caught.value.report.unaccounted) == (1, 1)


@pytest.mark.slow
def test_no_secret_is_left_anywhere(lab: Lab, credentials: BossCredentials, caplog: pytest.LogCaptureFixture) -> None:
    lab.write_stack(volume((16, 512, 512)))
    (lab.folder / "stack" / "3" / "0_0_0.png").write_bytes(b"damaged")
    secrets = [lab.boss.ready()["tokens"]["alice"]]
    settings = QUICK.model_copy(update={"on_bad_source": "blank"})
    with caplog.at_level("DEBUG", logger="prefect_biomed"):
        boss_ingest(credentials, IngestConfig.load(lab.config()), upload=settings)
    secrets += [f"secret-{number:033d}" for number in range(1, 4)]
    kept = [path for path in lab.folder.glob("home/**/*") if path.is_file()]
    results = get_current_settings().results.local_storage_path
    kept += [path for path in Path(results).glob("**/*") if path.is_file()]
    assert len(kept) > 2
    with get_client(sync_client=True) as client:
        texts = [str(artifact.data) for artifact in client.read_artifacts()]
        texts += [log.message for log in client.read_logs()]
    texts += [caplog.text, *(path.read_bytes().decode("latin-1") for path in kept)]
    assert not [secret for secret in secrets if any(secret in text for text in texts)]


@pytest.mark.slow
def test_work_of_others_is_counted_as_theirs_and_found_to_be_there(
    lab: Lab, credentials: BossCredentials, tmp_path: Path
) -> None:
    pixels = volume((32, 512, 512))
    lab.write_stack(pixels)
    config, job = lab.create(lab.config(extent={"x": [0, 512], "y": [0, 512], "z": [0, 32], "t": [0, 1]}))
    half = QUICK.model_copy(update={"max_tiles": 10})
    theirs = lab.upload(config, job.id, half, ledger_folder=tmp_path / "elsewhere")
    lab.boss.job(job.id).upload_queue.expire_leases()
    report = boss_join_ingest(credentials, config, job.id, upload=QUICK, complete=True)
    assert (report.deleted, report.unaccounted) == (32 - theirs.deleted, theirs.deleted)
    assert report.holes == ()


@pytest.mark.slow
def test_several_processes_share_a_job(lab: Lab, credentials: BossCredentials) -> None:
    pixels = volume((200, 64, 64))
    lab.write_stack(pixels, tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 200], "t": [0, 1]}
    config = IngestConfig.load(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    report = boss_ingest(credentials, config, processes=2, upload=QUICK)
    assert report.balanced
    assert lab.boss.job(1).observed.deleted == 200
    assert set(lab.boss.job(1).observed.indexed.values()) == {1}
    assert np.array_equal(lab.read(pixels.shape), pixels)


@pytest.mark.slow
def test_short_slices_add_up(lab: Lab, credentials: BossCredentials) -> None:
    pixels = volume((120, 64, 64))
    lab.write_stack(pixels, tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 120], "t": [0, 1]}
    config = IngestConfig.load(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    settings = UploadSettings(threads=4, min_lease_seconds=2, max_tiles=50)
    report = boss_ingest(credentials, config, upload=settings)
    assert report.balanced
    assert np.array_equal(lab.read(pixels.shape), pixels)


@pytest.mark.parametrize(("state", "match"), [("complete", "is complete"), ("deleted", "deleted"), ("foreign", "3003")])
def test_joining_a_job_that_is_over_or_foreign_is_told_after_one_request(lab: Lab, state: str, match: str) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    credentials = credentials_for(lab, "bob" if state == "foreign" else "alice")
    if state == "complete":
        lab.upload(config, job.id)
        lab.complete(job.id)
    if state == "deleted":
        lab.client.cancel(job.id)
    lab.boss.journal.clear()
    with pytest.raises((JobFailed, NotFoundError, PermissionDeniedError), match=match):
        boss_join_ingest(credentials, config, job.id)
    assert len(lab.boss.journal) == 1


@pytest.mark.slow
def test_cancelling_is_harmless_whatever_the_state(lab: Lab, credentials: BossCredentials) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config, job = lab.create(lab.config())
    lab.upload(config, job.id)
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert "nothing to cancel" in boss_cancel_ingest(credentials, job.id)
    _, other = lab.create(lab.config())
    assert "was cancelled" in boss_cancel_ingest(credentials, other.id)
    assert "before" in boss_cancel_ingest(credentials, other.id)
    with pytest.raises(NotFoundError):
        boss_cancel_ingest(credentials, 999)


@pytest.mark.slow
def test_a_lost_answer_to_create_makes_no_second_job(lab: Lab, credentials: BossCredentials) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.faults.add(Fault(method="POST", path=r"/ingest/$", drop="after", calls=[1]))
    boss_ingest(credentials, IngestConfig.load(lab.config()), upload=QUICK)
    assert posts(lab) == 1
    assert list(lab.boss.service.jobs) == [1]


def test_a_create_that_never_arrived_is_in_doubt_and_its_retry_makes_one_job(
    lab: Lab, credentials: BossCredentials
) -> None:
    lab.write_stack(volume((16, 512, 512)))
    lab.boss.faults.add(Fault(method="POST", path=r"/ingest/$", drop="before", calls=[1]))
    config = IngestConfig.load(lab.config())

    @flow
    def twice() -> list[int]:
        token = intent_token("boss-ingest")
        create = steps.create_ingest_job.with_options(retries=0)
        with pytest.raises(LaunchInDoubt):
            create(credentials, config, token, settle_seconds=0.5)
        again = [create(credentials, config, token, settle_seconds=0.5) for _ in range(2)]
        return [job.id for job in again]

    assert twice() == [1, 1]
    assert posts(lab) == 2


@pytest.mark.slow
def test_two_identical_ingests_in_one_flow_are_two_jobs(lab: Lab, credentials: BossCredentials) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config = IngestConfig.load(lab.config())

    @flow
    def both() -> list[int]:
        return [boss_ingest(credentials, config, upload=QUICK).job_id for _ in range(2)]

    assert both() == [1, 2]


def test_a_retried_flow_run_goes_on_with_its_job(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()
    credentials = credentials_for(lab)
    root = lab.write_stack(volume((16, 512, 512)))
    path = root / "5" / "0_0_0.png"
    whole = path.read_bytes()
    path.write_bytes(b"damaged, and not one of those that are read beforehand")
    config = IngestConfig.load(lab.config())
    runs = []

    @flow(retries=1)
    def parent() -> None:
        runs.append(1)
        if len(runs) == 2:
            path.write_bytes(whole)
            lab.boss.job(1).upload_queue.expire_leases()
        boss_ingest(credentials, config, upload=QUICK)

    parent()
    assert len(runs) == 2
    assert posts(lab) == 1
    assert lab.boss.job(1).status == JobStatus.COMPLETE


@pytest.mark.slow
def test_a_child_flow_that_is_made_again_under_a_retried_parent_adopts_its_job(
    lab: Lab, credentials: BossCredentials
) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config = IngestConfig.load(lab.config())
    jobs: list[int] = []
    children: list[UUID] = []

    @flow
    def middle() -> None:
        state = boss_ingest(credentials, config, upload=QUICK, complete=False, return_state=True)
        assert state.state_details.flow_run_id is not None
        children.append(state.state_details.flow_run_id)
        jobs.append(state.result().job_id)
        if len(jobs) == 1:
            raise RuntimeError("after the child has ended well")

    @flow(retries=1)
    def root() -> None:
        middle()

    root()
    assert jobs == [1, 1]
    assert len(set(children)) == 2
    assert posts(lab) == 1


@pytest.fixture
def flow_run_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("prefect.flow_runs")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


def stored_run(state: State[Any], credentials: BossCredentials, config: IngestConfig) -> FlowRun:
    assert state.state_details.flow_run_id is not None
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
    # What the server stored of a block that was not saved is masked; a deployment stores a reference.
    run.parameters |= {"credentials": credentials, "config": config}
    return run


@pytest.mark.parametrize("asked", [False, True])
def test_the_cancellation_hook_cancels_only_when_asked(
    lab: Lab, credentials: BossCredentials, asked: bool, flow_run_log: pytest.LogCaptureFixture
) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config = IngestConfig.load(lab.config())
    waiting = IngestJobWaiting(cancel_remote=asked)
    state = boss_ingest(credentials, config, upload=QUICK, complete=False, waiting=waiting, return_state=True)
    assert lab.boss.job(1).status == JobStatus.UPLOADING
    # As in the process of the hook, no flow run is under way here.
    cancel_remote_job(boss_ingest, stored_run(state, credentials, config), state)
    assert (lab.boss.job(1).status == JobStatus.DELETED) == asked
    assert ("was cancelled" in flow_run_log.text) == asked


def test_the_cancellation_hook_says_when_this_machine_knows_no_job(
    lab: Lab, credentials: BossCredentials, flow_run_log: pytest.LogCaptureFixture
) -> None:
    # Refused before there was an intent.
    nowhere = lab.config()
    nowhere["database"]["collection"] = "nowhere"
    config = IngestConfig.load(nowhere)
    waiting = IngestJobWaiting(cancel_remote=True)
    state = boss_ingest(credentials, config, upload=QUICK, waiting=waiting, return_state=True)
    assert state.is_failed()
    cancel_remote_job(boss_ingest, stored_run(state, credentials, config), state)
    assert "knows of no job" in flow_run_log.text
    assert posts(lab) == 0


def test_a_configuration_with_five_mistakes_sends_nothing(lab: Lab, credentials: BossCredentials) -> None:
    bad = lab.config()
    bad["database"]["channel"] = "no spaces please"
    bad["client"]["tile_processor"]["params"]["api_token"] = "0123"
    bad["ingest_job"]["extent"]["x"] = [100, 612]
    bad["ingest_job"]["extent"]["z"] = [8, 24]
    bad["ingest_job"]["tile_size"]["t"] = 0
    with pytest.raises(PreflightFailed) as caught:
        IngestConfig.load(bad)
    assert len(caught.value.problems) == 5
    file = lab.folder / "bad.json"
    file.write_text(json.dumps(bad))
    with pytest.raises(PreflightFailed, match="5 problems"):
        boss_ingest(credentials, file)
    assert len(lab.boss.journal) == 0


@pytest.mark.slow
def test_what_the_service_spoilt_is_named_then_healed_and_proved(lab: Lab, credentials: BossCredentials) -> None:
    pixels = volume((32, 64, 64))
    lab.write_stack(pixels, tile=64)
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 32], "t": [0, 1]}
    config = lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1})
    lab.boss.switches.ingest_faults = [IngestFault(kind="lost", z=3), IngestFault(kind="clipped", z=9)]
    with pytest.raises(IngestIncomplete, match="z=3") as incomplete:
        boss_ingest(credentials, config, verification=VerifySettings(share=1))
    assert incomplete.value.report is not None
    assert incomplete.value.report.holes == ("x=0 y=0 z=3 t=0", "x=0 y=0 z=9 t=0")
    with pytest.raises(VerificationFailed, match="z=3 t=0: missing") as failed:
        boss_verify(credentials, config, verification=VerifySettings(share=1))
    assert failed.value.verification is not None
    lab.boss.switches.ingest_faults = []
    manifest = lab.folder / "proof.jsonl"
    proof = VerifySettings(share=1, manifest=manifest)
    look = boss_verify(credentials, config, verification=proof, heal=True)
    assert look.is_right
    assert look.verified_tiles == 32
    assert all(json.loads(line)["equal"] for line in manifest.read_text().splitlines()[1:])
    assert np.array_equal(lab.read(pixels.shape), pixels)
    assert [job.tile_count for job in lab.boss.service.jobs.values()] == [32, 16]
    [artifact, *_] = artifacts("boss-verification-sandbox-stack-uint8")
    assert "All 2 cuboids" in str(artifact.data)
