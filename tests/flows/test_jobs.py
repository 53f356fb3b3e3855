"""Blocks that are triggered, and runs that are waited for and read, as in Prefect's own collections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.blocks.abstract import JobBlock, JobRun
from pydantic import SecretStr

from harness.federation import CLINICAL, HOSPITALS, Federation, federations, here
from harness.ingest_lab import QUICK, Lab, lab, make_lab, volume
from prefect_biomed.blocks import BossCredentials, VipCredentials
from prefect_biomed.clients.boss import IngestIncomplete
from prefect_biomed.flows import jobs
from prefect_biomed.flows.jobs import BossIngest, Vantage6Algorithm, VipPipeline
from prefect_biomed.sandbox import Sandbox

__all__ = ["federations", "here", "lab", "make_lab"]

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.mark.slow
def test_a_pipeline_is_saved_triggered_and_read_and_a_retry_launches_nothing_twice(
    vip: Sandbox, input_dir: Path, tmp_path: Path
) -> None:
    ready = vip.vip.ready()
    credentials = VipCredentials(api_key=SecretStr(ready["api_key"]), url=ready["url"])
    credentials.save("jobs", overwrite=True)
    pipeline = VipPipeline(
        credentials=VipCredentials.load("jobs"),
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": "anatomical.nii"},
        input_dir=input_dir,
        output_dir=tmp_path / "out",
        nb_runs=2,
        refresh_time=0.1,
    )
    pipeline.save("grey-matter", overwrite=True)
    attempts: list[int] = []

    @flow(retries=1, retry_delay_seconds=0)
    def mine() -> Any:
        execution = VipPipeline.load("grey-matter").trigger()
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise RuntimeError("something else")
        execution.wait_for_completion()
        return execution.fetch_result()

    result = mine()
    assert len(attempts) == 2
    assert len(vip.vip.journal.entries("POST", "/rest/executions$")) == 2
    assert result.is_finished and len(result.files) == 2
    assert all(path.is_file() for paths in result.files.values() for path in paths)


def test_a_task_is_triggered_and_read(here: Federation) -> None:
    algorithm = Vantage6Algorithm(
        credentials=here.credentials(),
        collaboration="plain",
        image=CLINICAL,
        method="echo",
        arguments={"a": 1},
        databases="default",
        refresh_time=0.1,
    )
    created = here.tasks_created()
    run = algorithm.trigger()
    run.wait_for_completion()
    analysis = run.fetch_result()
    assert {one.organization: one.value for one in analysis.results} == {name: {"a": 1} for name in HOSPITALS}
    assert analysis.task.id == run.task.id and here.tasks_created() == created + 1


@pytest.mark.slow
def test_an_ingest_is_triggered_and_read(lab: Lab, tmp_path: Path) -> None:
    facts = lab.boss.ready()
    lab.write_stack(volume((16, 512, 512)))
    (tmp_path / "ingest.json").write_text(json.dumps(lab.config()))
    ingest = BossIngest(
        credentials=BossCredentials(
            token=SecretStr(facts["tokens"]["alice"]),
            host=facts["host"],
            protocol="http",
            aws_endpoint_url=facts["url"],
        ),
        config=tmp_path / "ingest.json",
        upload=QUICK,
    )
    run = ingest.trigger()
    with pytest.raises(IngestIncomplete, match="wait_for_completion"):
        run.fetch_result()
    run.wait_for_completion()
    report = run.fetch_result()
    assert report.deleted == 16 and not report.holes
    run.wait_for_completion()
    assert run.fetch_result().deleted == 16


def test_each_job_is_one_of_the_engine() -> None:
    blocks = [getattr(jobs, name) for name in jobs.__all__]
    assert [kind.__name__ for kind in blocks if issubclass(kind, JobBlock)] == [
        "BossIngest",
        "Vantage6Algorithm",
        "VipPipeline",
    ]
    assert sum(issubclass(kind, JobRun) for kind in blocks) == 3


def test_a_block_is_saved_and_loaded_with_what_prefect_adds_to_its_fields() -> None:
    VipCredentials(api_key="key", url="https://example.org").save("known-fields")
    loaded = VipCredentials.load("known-fields")
    assert isinstance(loaded, VipCredentials)
    again = VipCredentials.model_validate({**loaded.model_dump(), "block_type_slug": "vip-credentials"})
    assert again.url == loaded.url
