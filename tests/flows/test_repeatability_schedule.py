"""The repeatability experiment as people run it: its deployment, a worker, and an automation that tells of drift."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from examples.lab import Laboratory
from harness.laboratory import FlowRun, Remote, wait_until
from prefect_biomed.analysis import Experiment, Report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WEEKLY = "repeatability-experiment/repeatability-weekly"


class _Mailbox(BaseHTTPRequestHandler):
    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *values: object) -> None:
        pass


@pytest.fixture(scope="module")
def mailbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Where notifications arrive."""
    received: list[dict[str, Any]] = []
    handler = type("Mailbox", (_Mailbox,), {"received": received})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", received
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def laboratory(
    tmp_path_factory: pytest.TempPathFactory, mailbox: tuple[str, list[dict[str, Any]]]
) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("laboratory")) as laboratory:
        facts = laboratory.sandbox["vip"]
        laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=lab",
            PREFECT_BIOMED_VIP_API_KEY=facts["api_key"],
            PREFECT_BIOMED_VIP_URL=facts["url"],
        )
        block = (
            "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Webhook; "
            f"Webhook(name='lab', url='{mailbox[0]}', json_data={{'subject': '{{{{subject}}}}', "
            "'text': '{{body}}'}).save('lab')"
        )
        laboratory.run("python", "-c", block)
        printed = laboratory.run("python", "deployments/automations.py", "--notify=custom-webhook/lab")
        assert "biomed: tell when results have changed" in printed
        yield laboratory


@pytest.fixture
def parameters(input_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "credentials": {"$ref": {"block_document_slug": "vip-credentials/lab"}},
        "pipelines": ["SkullStripNoisy/1.0", "GreyMatter/1.0"],
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": str(input_dir),
        "experiment_dir": str(tmp_path / "experiment"),
        "refresh_time": 0.5,
        "repetitions": 5,
    }


def run_weekly(laboratory: Laboratory, parameters: dict[str, Any]) -> None:
    laboratory.run("prefect", "deployment", "run", WEEKLY, "--params", json.dumps(parameters), "--watch")


def last_report(parameters: dict[str, Any]) -> Report:
    experiment = Experiment(Path(parameters["experiment_dir"]))
    series = experiment.records()[-1].series
    return Report.model_validate_json((experiment.report_dir(series) / "report.json").read_text())


@pytest.mark.parametrize(
    ("deployment", "slug", "cron", "repetitions"),
    [
        ("repeatability-weekly", "mondays", "0 3 * * 1", 5),
        ("repeatability-monthly", "first-of-the-month", "0 4 1 * *", 20),
    ],
)
def test_the_schedule_is_off_and_runs_wait_for_each_other(
    laboratory: Laboratory, deployment: str, slug: str, cron: str, repetitions: int
) -> None:
    url = f"{laboratory.api_url}/deployments/name/repeatability-experiment/{deployment}"
    found = requests.get(url, timeout=30).json()
    (schedule,) = found["schedules"]
    assert (schedule["slug"], schedule["active"]) == (slug, False)
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (cron, "UTC")
    # Not of the schedule: Prefect empties parameters of a schedule when somebody turns it on.
    assert (schedule["parameters"], found["parameters"]) == ({}, {"repetitions": repetitions})
    assert found["global_concurrency_limit"]["limit"] == 1
    assert found["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    fields = found["parameter_openapi_schema"]["properties"]
    assert all(field.get("description") for field in fields.values())
    assert fields["repetitions"]["maximum"] == 100


def test_the_week_in_which_a_library_changed(
    laboratory: Laboratory, parameters: dict[str, Any], mailbox: tuple[str, list[dict[str, Any]]]
) -> None:
    remote = Remote(laboratory, "vip")
    run_weekly(laboratory, parameters)
    first = last_report(parameters)
    noisy, exact = first.pipelines
    assert noisy.comparison.differing == ("anatomical_brain.nii.gz", "anatomical_volumes.csv")
    assert noisy.comparison.files[0].measures[0].digits == pytest.approx(6.0, abs=0.1)
    assert exact.comparison.differing == ()
    archives = list(Path(parameters["experiment_dir"]).rglob("*.tar.gz"))
    assert len({path.read_bytes() for path in archives}) == 5
    _, received = mailbox
    assert received == []

    remote.switch(math_library="alternative")
    run_weekly(laboratory, parameters)
    remote.switch(math_library="reference")
    second = last_report(parameters)
    noisy, exact = second.pipelines
    assert exact.against_baseline is not None
    assert not exact.against_baseline.changed
    assert noisy.evidence is not None
    since = noisy.evidence.since
    assert since is not None
    assert since == noisy.timeline[-1].began
    wait_until(lambda: len(received) == 1, 60, "a notification")
    assert received[0]["subject"] == "SkullStripNoisy/1.0 has changed"
    assert "changed: " in received[0]["text"]
    assert str(since.year) in received[0]["text"]
    html = Path(parameters["experiment_dir"], "reports", second.series, "report.html").read_text()
    assert f"The change began with the series of {since:%Y-%m-%d %H:%M} (95 %: " in html
    body = {"filter": {"event": {"name": ["biomed.repeatability.drift"]}}, "limit": 10}

    def told() -> list[str]:
        found = requests.post(f"{laboratory.api_url}/events/filter", json=body, timeout=30).json()["events"]
        return [event["payload"]["pipeline"] for event in found]

    # An automation acts on an event before the server has stored it.
    wait_until(lambda: len(told()) > 0, 60, "the event in the store")
    assert told() == ["SkullStripNoisy/1.0"]


def test_two_versions_through_their_deployment(laboratory: Laboratory, parameters: dict[str, Any]) -> None:
    run = FlowRun(
        laboratory,
        "repeatability-experiment/repeatability-versions",
        parameters | {"pipelines": ["GreyMatter/1.0", "GreyMatter/1.1"], "repetitions": 4},
    )
    assert run.wait() == "COMPLETED", run.logs()
    report = last_report(parameters)
    assert report.title == "Comparison of versions"
    assert report.pipelines[1].against_version is not None
    assert report.pipelines[1].against_version.changed


def test_people_are_told_of_a_suspended_run_that_nobody_resumes(
    laboratory: Laboratory, parameters: dict[str, Any], mailbox: tuple[str, list[dict[str, Any]]]
) -> None:
    _, received = mailbox
    received.clear()
    # Fifteen seconds, and at least ten.
    notify = ("--notify=custom-webhook/lab", "--suspended-hours=0.0042")
    laboratory.run("python", "deployments/automations.py", *notify)
    found = requests.get(f"{laboratory.api_url}/deployments/name/{WEEKLY}", timeout=30).json()
    later = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}}
    url = f"{laboratory.api_url}/deployments/{found['id']}/create_flow_run"
    run = requests.post(url, json={"parameters": parameters} | later, timeout=30).json()
    suspended = {"state": {"type": "PAUSED", "name": "Suspended"}, "force": True}
    url = f"{laboratory.api_url}/flow_runs/{run['id']}/set_state"
    requests.post(url, json=suspended, timeout=30).raise_for_status()
    wait_until(lambda: len(received) == 1, 120, "a notification")
    assert received[0]["subject"] == f"{run['name']} is suspended, and nobody resumes it"
    assert f"/runs/flow-run/{run['id']}" in received[0]["text"]
    assert "vip-collect" in received[0]["text"]
