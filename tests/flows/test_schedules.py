"""Schedules and automations on a real server: what is to happen by itself does happen."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from examples.lab import Laboratory
from harness.laboratory import FlowRun, Remote, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CREDENTIALS = {"$ref": {"block_document_slug": "vip-credentials/lab"}}
COLLECT = "vip-collect/vip-collect"
DEPLOY = ("prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml")
WEEKLY = "repeatability-experiment/repeatability-weekly"


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    home = tmp_path_factory.mktemp("laboratory")
    # The scheduler looks once a minute by default.
    with Laboratory(home, PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="5") as laboratory:
        facts = laboratory.sandbox["vip"]
        laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=lab",
            PREFECT_BIOMED_VIP_API_KEY=facts["api_key"],
            PREFECT_BIOMED_VIP_URL=facts["url"],
        )
        yield laboratory


def api(laboratory: Laboratory, method: str, path: str, body: Any = None) -> Any:
    """Ask the server; SQLite may be locked by another request."""
    for _ in range(10):
        answer = requests.request(method, laboratory.api_url + path, json=body, timeout=30)
        if answer.status_code != requests.codes.unavailable:
            break
    assert answer.ok, f"{path}: {answer.text}"
    return answer.json() if answer.content else None


def turn_on(laboratory: Laboratory, deployment: str, slug: str, every: timedelta, parameters: dict[str, Any]) -> None:
    """Give a deployment default parameters and switch its schedule on as documented; it first fires in a moment."""
    found = api(laboratory, "GET", f"/deployments/name/{deployment}")
    (schedule,) = [schedule for schedule in found["schedules"] if schedule["slug"] == slug]
    api(laboratory, "PATCH", f"/deployments/{found['id']}", {"parameters": parameters})
    laboratory.run("prefect", "deployment", "schedule", "resume", deployment, schedule["id"])
    # Afterwards, because the command may take longer on a busy machine than the first run is ahead.
    begin = (datetime.now(UTC) + timedelta(seconds=15)).isoformat()
    soon = {"schedule": {"interval": every.total_seconds(), "anchor_date": begin}}
    api(laboratory, "PATCH", f"/deployments/{found['id']}/schedules/{schedule['id']}", soon)


def scheduled_runs(laboratory: Laboratory, deployment: str) -> list[dict[str, Any]]:
    """Runs that a schedule has made, the next one first."""
    found = api(laboratory, "GET", f"/deployments/name/{deployment}")
    body = {"deployments": {"id": {"any_": [found["id"]]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 100}
    return [run for run in api(laboratory, "POST", "/flow_runs/filter", body) if run["auto_scheduled"]]


def set_by_users(laboratory: Laboratory, deployment: str) -> dict[str, Any]:
    """What people change in a deployment."""
    found = api(laboratory, "GET", f"/deployments/name/{deployment}")
    schedules = [(s["slug"], s["active"], s["schedule"], s["parameters"]) for s in found["schedules"]]
    return {name: found[name] for name in ("id", "parameters")} | {"schedules": sorted(schedules, key=repr)}


def session(input_dir: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "credentials": CREDENTIALS,
        "pipeline_id": "GreyMatter/1.0",
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": str(input_dir),
        "output_dir": str(output_dir),
        "session_name": output_dir.name,
        "refresh_time": 0.5,
        **changes,
    }


def test_deploying_again_keeps_what_users_have_set(laboratory: Laboratory) -> None:
    monthly = "repeatability-experiment/repeatability-monthly"
    (new,) = set_by_users(laboratory, monthly)["schedules"]
    assert new[:2] == ("first-of-the-month", False)
    path = f"/deployments/{set_by_users(laboratory, monthly)['id']}"
    text = "{{ as it is }} and {{ prefect.variables.none }}"
    parameters = {
        "credentials": CREDENTIALS,
        "repetitions": 7,
        "assessment": {"title": text},
        "pipelines": ["GreyMatter/1.0"],
    }
    api(laboratory, "PATCH", path, {"parameters": parameters})
    api(laboratory, "PATCH", path, {"paused": True})
    (schedule,) = api(laboratory, "GET", path)["schedules"]
    laboratory.run("prefect", "deployment", "schedule", "resume", monthly, schedule["id"])
    changed = {"schedule": {"cron": "0 5 2 * *", "timezone": "Europe/Paris"}, "active": True}
    api(laboratory, "PATCH", f"{path}/schedules/{schedule['id']}", changed)
    # As the user interface adds one: without a slug.
    api(laboratory, "POST", f"{path}/schedules", [{"schedule": {"interval": 86400}, "active": True}])
    before = {name: set_by_users(laboratory, name) for name in (monthly, WEEKLY, COLLECT)}
    assert before[monthly]["parameters"] == parameters
    assert [active for _, active, _, _ in before[monthly]["schedules"]] == [True, True]
    printed = laboratory.run(*DEPLOY, "--name", "repeatability-*", "--name", "vip-collect")
    assert printed.count("is paused. `prefect deploy` lets it go on") == 1
    assert {name: set_by_users(laboratory, name) for name in before} == before
    form = api(laboratory, "GET", path)
    assert form["parameter_openapi_schema"]["properties"]["repetitions"]["maximum"] == 100
    assert form["work_queue_name"] == "vip"
    assert form["pull_steps"] == []


def test_default_parameters_that_the_flow_does_not_know_are_named(laboratory: Laboratory) -> None:
    found = api(laboratory, "GET", "/deployments/name/vip-resume/vip-resume")
    path = f"/deployments/{found['id']}"
    api(laboratory, "PATCH", path, {"parameters": {"renamed": 1}})
    with pytest.raises(RuntimeError, match=r"vip-resume/vip-resume has\s.*renamed\. Rename or remove them"):
        laboratory.run(*DEPLOY, "--name", "vip-resume", COLUMNS="300")
    assert api(laboratory, "GET", path)["parameters"] == {"renamed": 1}
    api(laboratory, "PATCH", path, {"parameters": {}})
    laboratory.run(*DEPLOY, "--name", "vip-resume")


def test_the_weekly_experiment_runs_at_its_hour(laboratory: Laboratory, input_dir: Path, tmp_path: Path) -> None:
    defaults = {
        "credentials": CREDENTIALS,
        "pipelines": ["SkullStripNoisy/1.0"],
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": str(input_dir),
        "experiment_dir": str(tmp_path / "experiment"),
        "refresh_time": 0.5,
    }
    turn_on(laboratory, WEEKLY, "mondays", timedelta(weeks=1), defaults)
    hour = datetime.now(UTC) + timedelta(minutes=1)

    def at_its_hour() -> list[dict[str, Any]]:
        runs = scheduled_runs(laboratory, WEEKLY)
        return [run for run in runs if datetime.fromisoformat(run["expected_start_time"]) < hour]

    wait_until(lambda: bool(at_its_hour()), 60, "a scheduled run")
    (first,) = at_its_hour()
    assert first["parameters"] == defaults

    def state() -> str:
        return str(api(laboratory, "GET", f"/flow_runs/{first['id']}")["state_type"])

    wait_until(lambda: state() not in ("SCHEDULED", "PENDING", "RUNNING"), 180, "the end of the scheduled run")
    assert state() == "COMPLETED"
    assert len(list((tmp_path / "experiment").rglob("report.html"))) == 1
    launches = Remote(laboratory, "vip").journal("POST", "/executions")
    assert [entry["status"] for entry in launches] == [200] * 5


def test_a_suspended_session_is_collected_by_the_schedule(
    laboratory: Laboratory, input_dir: Path, tmp_path: Path
) -> None:
    remote = Remote(laboratory, "vip")
    remote.reset()
    remote.switch(job_seconds=20.0)
    folder = tmp_path / "sessions"
    run = FlowRun(
        laboratory, "vip-session/vip-session", session(input_dir, folder / "slept", waiting={"wait": "suspend"})
    )
    assert run.wait("PAUSED", "FAILED", "CRASHED", "COMPLETED") == "PAUSED", run.logs()
    assert not list(folder.rglob("measures.csv"))
    turn_on(
        laboratory,
        COLLECT,
        "every-5-minutes",
        timedelta(seconds=30),
        {"credentials": CREDENTIALS, "folder": str(folder)},
    )
    assert run.wait("COMPLETED", "FAILED", "CRASHED", "CANCELLED", seconds=180) == "COMPLETED", run.logs()
    assert "COMPLETED" in {run["state_type"] for run in scheduled_runs(laboratory, COLLECT)}
    assert len(list(folder.rglob("measures.csv"))) == 1
    assert len([entry for entry in remote.journal("POST", "/executions") if entry["status"] < 300]) == 1


def test_an_automation_brings_a_killed_run_back(laboratory: Laboratory, input_dir: Path, tmp_path: Path) -> None:
    laboratory.run("python", "deployments/automations.py", "--quiet-seconds=15")
    remote = Remote(laboratory, "vip")
    remote.reset()
    remote.switch(job_seconds=7200.0)
    run = FlowRun(laboratory, "vip-session/vip-session", session(input_dir, tmp_path / "killed"))
    wait_until(lambda: len(remote.journal("GET", "/executions")) > 5, 120, "some looks at the execution")
    run.kill()
    run.wait("CRASHED")
    remote.switch(job_seconds=0.0)
    assert run.wait("COMPLETED", "FAILED", seconds=180) == "COMPLETED", run.logs()
    assert run.began == 2
    assert len([entry for entry in remote.journal("POST", "/executions") if entry["status"] < 300]) == 1


def test_a_run_cancelled_while_its_worker_is_dead_ends_and_so_does_its_execution(
    laboratory: Laboratory, input_dir: Path, tmp_path: Path
) -> None:
    laboratory.run("python", "deployments/automations.py", "--cancel-seconds=20")
    remote = Remote(laboratory, "vip")
    remote.reset()
    remote.switch(job_seconds=7200.0)
    parameters = session(input_dir, tmp_path / "cancelled", waiting={"cancel_remote": True})
    run = FlowRun(laboratory, "vip-session/vip-session", parameters)
    wait_until(lambda: len(remote.journal("GET", "/executions")) > 5, 120, "some looks at the execution")
    laboratory.kill("worker")
    run.kill()
    laboratory.run("prefect", "flow-run", "cancel", run.id)
    laboratory.start_worker("second")
    run.wait("CANCELLED", seconds=180)
    assert [entry["status"] for entry in remote.journal("PUT", "/kill")] == [204]
