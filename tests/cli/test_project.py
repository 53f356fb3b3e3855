"""A lab's project from the shell: `init`, `deploy`, and `compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse

from harness.shell import typed

WEEKLY = "repeatability-experiment/repeatability-weekly"


def deployment(name: str) -> DeploymentResponse:
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(name)


def set_by_users(name: str) -> tuple[object, ...]:
    found = deployment(name)
    limit = found.global_concurrency_limit
    schedules = [(one.slug, one.active, str(one.schedule)) for one in found.schedules]
    return found.parameters, limit.limit if limit else None, found.paused, schedules


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
@pytest.mark.timeout(300)
def test_deploying_a_project_twice_keeps_what_users_have_set(tmp_path: Path) -> None:
    status, _ = typed("prefect-biomed", "init", str(tmp_path), "--deployment", "repeatability-weekly")
    assert status == 0
    words = ("prefect-biomed", "deploy", "--prefect-file", str(tmp_path / "prefect.yaml"))
    status, said = typed(*words, "--dry-run")
    assert (status, said) == (0, f"{WEEKLY}: new\n")
    status, said = typed(*words)
    assert (status, said) == (0, f"{WEEKLY}: new\n")
    with get_client(sync_client=True) as client:
        found = deployment(WEEKLY)
        changes = DeploymentUpdate(parameters={"pipelines": ["A/1"]}, concurrency_limit=3, paused=True)
        client.update_deployment(found.id, changes)
        (schedule,) = found.schedules
        client.update_deployment_schedule(found.id, schedule.id, active=True)
    before = set_by_users(WEEKLY)
    status, said = typed(*words)
    assert status == 0
    assert said == f"{WEEKLY}: same; kept: concurrency limit 3, paused\n"
    assert set_by_users(WEEKLY) == before
    with get_client(sync_client=True) as client:
        client.update_deployment(deployment(WEEKLY).id, DeploymentUpdate(concurrency_limit=None))
    assert typed(*words)[0] == 0
    assert set_by_users(WEEKLY)[1] is None


def test_a_project_has_what_its_deployments_need_and_is_never_overwritten(tmp_path: Path) -> None:
    names = ("vip-session", "boss-ingest")
    words = ("prefect-biomed", "init", str(tmp_path / "study"), *(f"--deployment={name}" for name in names), "--json")
    status, said = typed(*words)
    assert status == 0
    written = {".env.example", "README.md", "boss-ingest.yaml", "prefect.yaml", "vip-session.yaml"}
    assert set(json.loads(said)["written"]) == written
    folder = tmp_path / "study"
    deployed = yaml.safe_load((folder / "prefect.yaml").read_text())["deployments"]
    assert [one["name"] for one in deployed] == list(names)
    assert "&" not in (folder / "prefect.yaml").read_text()
    assert set(yaml.safe_load((folder / "vip-session.yaml").read_text())) == {
        "credentials",
        "pipeline_id",
        "input_settings",
    }
    variables = (folder / ".env.example").read_text()
    assert "\nPREFECT_BIOMED_VIP_API_KEY=\n" in variables
    assert "\nPREFECT_BIOMED_BOSS_HOST=\n" in variables
    assert "VANTAGE6" not in variables
    (folder / "README.md").write_text("ours")
    status, said = typed(*words)
    assert set(json.loads(said)["kept"]) == written
    assert (folder / "README.md").read_text() == "ours"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    status, said = typed("prefect-biomed", "init", str(tmp_path), "--deployment", "vip-sesion")
    assert status == 2
    assert "There are no deployments vip-sesion. There are vip-session" in said
    assert not list(tmp_path.iterdir())
    status, said = typed("prefect-biomed", "deploy", "--prefect-file", str(tmp_path / "prefect.yaml"))
    assert status == 2
    assert "is no file of deployments" in said


@pytest.mark.usefixtures("prefect_api")
def test_folders_of_runs_are_compared(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "measure.csv").write_text("volume\n1.25\n")
    status, said = typed("prefect-biomed", "compare", str(tmp_path / "runs"), str(tmp_path / "report"))
    assert status == 0, said
    assert list((tmp_path / "report").glob("*.html"))
