"""Plans of ingests and federated analyses, compared with what is then done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prefect import flow, tags

from harness.federation import CLINICAL, FAST, HOSPITALS, Federation, federations, here, wait
from harness.ingest_lab import Lab, lab, make_lab
from prefect_biomed.blocks import BossCredentials
from prefect_biomed.cli.planning import plan_flow
from prefect_biomed.clients.boss import IngestConfig, create_once
from prefect_biomed.clients.once import Deed
from prefect_biomed.clients.vantage6 import (
    DataframeSpec,
    Function,
    NameConflict,
    TaskRequest,
    launch,
    make_dataframe,
    make_session,
    wait_for_dataframe,
)
from prefect_biomed.tasks.policies import intent_token, key_tag, planned_child, planned_run

__all__ = ["federations", "here", "lab", "make_lab"]


def test_an_ingest_is_planned_and_then_known(lab: Lab) -> None:
    facts = lab.boss.ready()
    credentials = BossCredentials(
        token=facts["tokens"]["alice"], host=facts["host"], protocol="http", aws_endpoint_url=facts["url"]
    )
    lab.write_stack(np.zeros((16, 512, 512), "uint8"))
    config = IngestConfig.load(lab.config())
    given = {"credentials": credentials, "config": config}
    plan = plan_flow("boss-ingest", given, key="stack")
    assert [one.deed for one in plan.launches] == [Deed.LAUNCH]
    assert (plan.jobs, plan.files_to_send, plan.makes, plan.bytes_to_send) == (16, 16, (), None)
    assert {one.method for one in lab.boss.journal.entries()} == {"GET"}
    with planned_run("boss-ingest/stack"):
        job = create_once(lab.client, config, intent_token("boss-ingest"))
    (known,) = plan_flow("boss-ingest", given, key="stack").launches
    assert (known.deed, known.id) == (Deed.GO_ON, str(job.id))
    assert plan_flow("boss-cancel-ingest", {"credentials": credentials, "job_id": job.id}).ends == (
        f"ingest job {job.id}",
    )
    new = lab.config()
    new["database"] |= {"experiment": "other", "channel": "new"}
    resources = {"datatype": "uint8"}
    plan = plan_flow("boss-ingest", {**given, "config": IngestConfig.load(new), "new_resources": resources})
    assert plan.makes == ("experiment other", "channel new")


def test_an_analysis_is_planned_and_then_known(here: Federation) -> None:
    given: dict[str, Any] = {
        "credentials": here.credentials(),
        "collaboration": "plain",
        "image": CLINICAL,
        "method": "echo",
        "arguments": {"a": 1},
        "databases": "default",
    }
    plan = plan_flow("federated-analysis", given, key="study")
    assert ([one.deed for one in plan.launches], plan.jobs) == ([Deed.LAUNCH], len(HOSPITALS))
    assert "send     0 files, bytes known once they are sent; 0 are there already" in plan.lines()
    assert not [call for call in here.calls("POST") if "token" not in call]
    with planned_run("federated-analysis/study"), here.client() as client:
        name = intent_token("vantage6-analysis")
        request = TaskRequest(
            collaboration="plain", image=CLINICAL, method="echo", arguments={"a": 1}, databases="default"
        )
        task = launch(client, request, name)
        wait(client, task)
    plan = plan_flow("federated-analysis", given, key="study")
    assert ([one.deed for one in plan.launches], plan.jobs, plan.bytes_to_send) == ([Deed.DONE], 0, 0)
    assert [one.id for one in plan.launches] == [str(task.id)]
    assert plan_flow("federated-analysis", given).launches[0].deed is Deed.LAUNCH


def test_dataframes_are_planned_step_by_step(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    keep = Function(image=CLINICAL, method="keep_above", arguments={"column": "age", "limit": 30})
    spec = DataframeSpec(name="planned", extraction=Function(image=CLINICAL, method="read_csv"), preprocessing=[keep])
    given: dict[str, Any] = {
        "credentials": here.credentials(),
        "collaboration": "plain",
        "session_name": "planned",
        "dataframes": [spec],
        "image": CLINICAL,
        "method": "echo",
    }
    plan = plan_flow("federated-session", given, key="frames")
    assert plan.makes == ("session 'planned'",)
    assert [one.deed for one in plan.launches] == [Deed.LAUNCH, Deed.LAUNCH]
    assert not [call for call in here.calls("POST") if "token" not in call]
    with here.client() as client:
        session = make_session(client, "plain", "planned")
        both = plan_flow("federated-session", given, key="frames")
        assert both.jobs == 2 * len(HOSPITALS)
        frame = make_dataframe(
            client, session.id, "planned", label="default", image=CLINICAL, method="read_csv", preprocessing=[keep]
        )
        wait_for_dataframe(client, frame.id, FAST)
        plan = plan_flow("federated-session", given, key="frames")
        assert (plan.launches[0].deed, plan.jobs) == (Deed.ADOPT, len(HOSPITALS))
        assert plan.makes == ("1 further steps of dataframe 'planned'",)
        other = spec.model_copy(update={"preprocessing": [], "label": "other"})
        with pytest.raises(NameConflict):
            plan_flow("federated-session", {**given, "dataframes": [other]}, key="frames")
        anew = plan_flow(
            "federated-session", {**given, "dataframes": [spec.model_copy(update={"replace": True, "label": "other"})]}
        )
        assert anew.removes == (f"dataframe {frame.id}, which is made anew",)


@pytest.mark.usefixtures("prefect_api")
def test_tokens_of_a_plan_are_those_of_the_run() -> None:
    @flow
    def child() -> str:
        return intent_token("kind")

    @flow
    def parent() -> list[str]:
        return [intent_token("kind"), intent_token("kind", explicit="name"), child()]

    with tags(key_tag("parent/key")):
        run = parent()
    with planned_run("parent/key"):
        planned = [intent_token("kind"), intent_token("kind", explicit="name")]
        with planned_child(child):
            planned.append(intent_token("kind"))
    assert planned == run
    with planned_run(None):
        assert intent_token("kind") not in planned
