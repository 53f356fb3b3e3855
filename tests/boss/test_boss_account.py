"""What the reports say of each tile: delivered, skipped, filled, put aside; once each, and for the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.ingest_lab import QUICK, Lab, volume
from harness.shell import typed
from prefect_biomed.clients.boss import (
    REPORT,
    IngestConfig,
    UploadReport,
    UploadSettings,
    account,
    keep_report,
    report_folder,
    upload,
    write_ingest_crate,
)
from prefect_biomed.clients.crates import check_crate
from prefect_biomed.clients.files import digest

ONE = {"x": 64, "y": 64, "z": 1, "t": 1}


class Killed(BaseException):
    """As SIGKILL, as far as a thread can be killed."""


def with_policy(policy: str, **more: Any) -> UploadSettings:
    return QUICK.model_copy(update={"on_bad_source": policy, **more})


def stack(lab: Lab, depth: int, missing: range) -> tuple[IngestConfig, int, Path]:
    root = lab.write_stack(volume((depth, 64, 64)), tile=64)
    for z in missing:
        (root / str(z) / "0_0_0.png").rename(root / f"away-{z}.png")
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, depth], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size=ONE))
    return config, job.id, root


def final(lab: Lab, config: IngestConfig, job_id: int) -> UploadReport:
    return account(lab.client, config, job_id, ledger_folder=lab.folder / "ledgers")


def test_a_tile_that_was_skipped_stays_so_after_a_kill_before_its_message_was_deleted(lab: Lab) -> None:
    config, job_id, _ = stack(lab, 32, range(16))
    uploader = lab.uploader(config, job_id, with_policy("skip", threads=1))

    def killed(message: object) -> None:
        raise Killed

    uploader._line.pieces._take_off = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        uploader.run()
    uploader.close()
    lab.boss.job(job_id).upload_queue.expire_leases()  # type: ignore[union-attr]
    lab.upload(config, job_id, with_policy("skip"))
    assert lab.complete(job_id).outcome == "COMPLETE"
    report = final(lab, config, job_id)
    assert (report.deleted, len(report.skipped), report.holes) == (16, 16, ())


def test_a_tile_whose_source_is_mended_after_it_was_skipped_is_delivered(lab: Lab) -> None:
    config, job_id, root = stack(lab, 16, range(5, 6))
    lab.upload(config, job_id, with_policy("skip"))
    assert lab.complete(job_id).outcome == "RESUME"
    (root / "away-5.png").rename(root / "5" / "0_0_0.png")
    lab.upload(config, job_id, with_policy("skip"))
    assert lab.complete(job_id).outcome == "COMPLETE"
    report = final(lab, config, job_id)
    assert (report.deleted, report.skipped) == (16, ())
    assert np.array_equal(lab.read((16, 64, 64)), volume((16, 64, 64)))


def test_a_mended_tile_that_the_boss_has_asked_for_is_done_once(lab: Lab) -> None:
    config, job_id, root = stack(lab, 16, range(3, 4))
    lab.upload(config, job_id, with_policy("quarantine"))
    assert lab.complete(job_id).outcome == "RESUME"
    (root / "away-3.png").rename(root / "3" / "0_0_0.png")
    report = lab.upload(config, job_id, with_policy("quarantine"))
    assert (report.deleted, report.deleted_before, report.requeued, report.quarantined) == (1, 15, 0, ())
    assert lab.complete(job_id).outcome == "COMPLETE"
    observed = lab.boss.job(job_id).observed
    assert set(observed.puts.values()) == set(observed.indexed.values()) == {1}
    whole = final(lab, config, job_id)
    assert (whole.deleted, whole.quarantined) == (16, ())


@pytest.mark.slow
def test_several_processes_try_again_what_was_put_aside(lab: Lab) -> None:
    config, job_id, root = stack(lab, 16, range(3, 4))
    folder = lab.folder / "ledgers"
    lab.upload(config, job_id, with_policy("quarantine"))
    (root / "away-3.png").rename(root / "3" / "0_0_0.png")
    report = upload(lab.client, config, job_id, with_policy("quarantine"), processes=2, ledger_folder=folder)
    assert (report.deleted, report.quarantined) == (1, ())
    assert lab.complete(job_id).outcome == "COMPLETE"


def test_a_tile_that_is_put_aside_twice_counts_once(lab: Lab) -> None:
    config, job_id, _ = stack(lab, 16, range(3, 4))
    lab.upload(config, job_id, with_policy("quarantine"))
    assert lab.complete(job_id).outcome == "RESUME"
    report = lab.upload(config, job_id, with_policy("quarantine"))
    assert len(report.quarantined) == 1
    assert report.unaccounted == 0
    assert len(final(lab, config, job_id).quarantined) == 1


def test_a_filled_tile_is_named_until_its_source_is_sent(lab: Lab) -> None:
    config, job_id, root = stack(lab, 16, range(3, 4))
    lab.upload(config, job_id, with_policy("blank"))
    assert final(lab, config, job_id).blank == ("x=0 y=0 z=3 t=0",)
    (root / "away-3.png").rename(root / "3" / "0_0_0.png")
    job = lab.boss.job(job_id)
    job.upload_queue.send(job.tile_message(*_keys_of(job, 3)))  # type: ignore[union-attr]
    lab.upload(config, job_id, with_policy("blank"))
    assert final(lab, config, job_id).blank == ()


def _keys_of(job: Any, z: int) -> tuple[str, str]:
    tile = next(key for key in job.objects if key.split("&")[7] == str(z))
    chunk = next(iter([*job.entries, *job.ingested_chunks]))
    return chunk, tile


def test_the_report_of_the_whole_job_tells_what_all_runs_did(lab: Lab) -> None:
    config, job_id, _ = stack(lab, 48, range(0))
    first = lab.upload(config, job_id, QUICK.model_copy(update={"max_tiles": 20}))
    second = lab.upload(config, job_id)
    assert lab.complete(job_id).outcome == "COMPLETE"
    report = final(lab, config, job_id)
    for name in ("received", "put", "put_bytes", "indexed", "joins"):
        assert getattr(report, name) == getattr(first, name) + getattr(second, name) > 0
    assert report.deleted == 48
    assert 0 < report.seconds <= first.seconds + second.seconds + 2
    assert f"{report.tiles_per_second:.1f}/s" in report.summary()


def test_a_job_that_still_runs_has_no_holes_and_is_not_done(lab: Lab) -> None:
    lab.write_stack(volume((32, 64, 64)), tile=64)
    size = {"x": 64, "y": 64, "z": 1, "t": 1}
    config, job = lab.create(lab.config(extent={"x": [0, 64], "y": [0, 64], "z": [0, 32], "t": [0, 1]}, tile_size=size))
    lab.upload(config, job.id, UploadSettings(min_lease_seconds=20, max_tiles=20, threads=1))
    early = account(lab.client, config, job.id, ledger_folder=lab.folder / "ledgers")
    assert (early.holes, early.by_others, early.unaccounted, early.balanced) == ((), 0, 12, False)
    assert not early.exhausted
    assert "stopped: the job is UPLOADING, not complete" in early.summary()
    lab.boss.job(job.id).upload_queue.expire_leases()
    lab.upload(config, job.id)
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert account(lab.client, config, job.id, ledger_folder=lab.folder / "ledgers").balanced


def test_what_a_killed_run_did_is_in_the_report_too(lab: Lab) -> None:
    config, job_id, _ = stack(lab, 48, range(0))
    uploader = lab.uploader(config, job_id, QUICK.model_copy(update={"max_tiles": 20}))
    uploader.run()
    uploader._ledger.close()  # nothing more is written down
    lab.upload(config, job_id)
    assert lab.complete(job_id).outcome == "COMPLETE"
    assert final(lab, config, job_id).put == 48


def test_the_report_is_kept_with_its_provenance_and_is_the_same_once_more(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_BIOMED_HOME", str(lab.folder / "home"))
    config, job_id, root = stack(lab, 16, range(0))
    lab.upload(config, job_id)
    assert lab.complete(job_id).outcome == "COMPLETE"
    told = []
    for _ in range(2):
        keep_report(final(lab, config, job_id), lab.client.host)
        told.append(write_ingest_crate(lab.client, config, job_id, QUICK).read_bytes())
    assert told[0] == told[1]
    entities = json.loads(told[0])["@graph"]
    sources = {one["sha256"] for one in entities if one["@id"].startswith("#input-")}
    assert sources == {digest(path) for path in root.rglob("*.png")}
    folder = report_folder(lab.client.host, job_id)
    assert check_crate(folder) == ()
    status, said = typed("prefect-biomed", "report", "--ingest", str(job_id))
    assert status == 0, said
    assert said == typed("prefect-biomed", "report", str(folder))[1]
    assert f"Ingest job {job_id}: 16 of 16 tiles" in said
    holey = final(lab, config, job_id).model_copy(update={"holes": ("x0y0z3t0",)})
    keep_report(holey, lab.client.host)
    status, said = typed("prefect-biomed", "report", "--ingest", str(job_id))
    assert (status, "not in the Boss: x0y0z3t0" in said) == (1, True)
    assert [one.path for one in check_crate(folder)] == [REPORT]
    assert typed("prefect-biomed", "report", "--ingest", "999999")[0] == 2
