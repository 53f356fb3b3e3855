"""Index messages whose answer was lost: they may still arrive, and must not do so after the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.ingest_lab import QUICK, Lab, volume
from prefect_biomed.clients.boss import Uploader, UploadReport
from prefect_biomed.clients.boss import ledger as ledgers
from prefect_biomed.clients.boss.ledger import Ledger
from prefect_biomed.sandbox import Fault

HOLD_SECONDS = 1.5
SETTLE_SECONDS = 2.5
SHORT = QUICK.model_copy(update={"min_lease_seconds": 3, "straggler_seconds": 20})
HELD: dict[str, Any] = {"method": "POST", "query": "^index$", "hold_seconds": HOLD_SECONDS}


def named_by_query(request: Any, **about: Any) -> None:
    """Let a fault tell index messages from what else is asked of SQS: all of it has one path."""
    request.url += "?index"


def upload(lab: Lab, uploader: Uploader) -> UploadReport:
    uploader._queues._sqs.meta.events.register("before-sign.sqs.SendMessageBatch", named_by_query)
    try:
        return uploader.run()
    finally:
        uploader.close()


@pytest.mark.parametrize("answer", [{"status": 504}, {"drop": "before"}], ids=["gateway timeout", "no answer"])
def test_what_a_proxy_holds_arrives_before_its_chunk_is_finished(make_lab: Callable[..., Lab], answer: Any) -> None:
    lab = make_lab()
    lab.client.settle_seconds = SETTLE_SECONDS
    pixels = volume((16, 64, 64))
    lab.write_stack(pixels, tile=64)
    one = {"x": 64, "y": 64, "z": 1, "t": 1}
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 16], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size=one))
    lab.boss.faults.add(Fault(**HELD, **answer, calls=[1]))
    report = upload(lab, lab.uploader(config, job.id, SHORT))
    observed = lab.boss.job(job.id).observed
    assert [fault["hit"] for fault in lab.boss.faults.describe()] == [1]
    assert (report.deleted, report.unaccounted) == (16, 0)
    assert lab.complete(job.id).outcome == "COMPLETE"
    lab.boss.journal.settle(10)
    assert not observed.late_indexed
    assert np.array_equal(lab.read((16, 64, 64)), pixels)


def test_the_end_waits_for_index_messages_in_doubt_and_no_longer(lab: Lab) -> None:
    lab.client.settle_seconds = SETTLE_SECONDS
    pixels = volume((16, 512, 512))
    lab.write_stack(pixels)
    config, job = lab.create(lab.config())
    lab.boss.faults.add(Fault(**HELD, status=504, calls=[2]))  # of a chunk that the first has told of
    held = time.monotonic()
    upload(lab, lab.uploader(config, job.id, SHORT))
    assert [fault["hit"] for fault in lab.boss.faults.describe()] == [1]
    lab.boss.job(job.id).upload_queue.expire_leases()
    begun = time.monotonic()
    while lab.complete(job.id).outcome != "COMPLETE":
        lab.upload(config, job.id, SHORT)
    assert time.monotonic() - begun < 3 * SETTLE_SECONDS
    assert time.monotonic() - held > HOLD_SECONDS
    assert np.array_equal(lab.read((16, 512, 512)), pixels)
    lab.boss.journal.settle(10)
    assert not lab.boss.job(job.id).observed.late_indexed


def test_a_ledger_tells_what_is_in_doubt_and_for_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path, {"host": "h", "job": 1}) as ledger:
        assert ledger.doubtful_seconds(10) == 0
        ledger.ask("answered", ["a"])
        ledger.answered("answered")
        assert ledger.doubtful_seconds(10) == 0
        ledger.ask("on its way", ["a"])
        assert 9 < ledger.doubtful_seconds(10) <= 10
        assert ledger.doubtful_seconds(10, "a") == 0
        ledger.ask("lost", ["b", "b", "c"])
        ledger.lost("lost")
        assert [chunk for chunk in "abcd" if ledger.doubtful_seconds(10, chunk) > 9] == ["b", "c"]
        monkeypatch.setattr(ledgers, "_ON_ITS_WAY_SECONDS", -1.0)  # as that of a process that was killed long ago
        assert ledger.doubtful_seconds(10, "a") > 9
        assert ledger.doubtful_seconds(0) == 0
