"""Flow runs of a real worker, and killing them at chosen moments."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import requests

from examples.lab import Laboratory

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class FlowRun:
    """One run of a deployment in a laboratory.

    Args:
        laboratory: Where it runs.
        deployment: `flow/deployment`.
        parameters: Parameters of the flow.
    """

    def __init__(self, laboratory: Laboratory, deployment: str, parameters: dict[str, Any]) -> None:
        self.laboratory = laboratory
        found = self._api("GET", f"/deployments/name/{deployment}")
        self.id: str = self._api("POST", f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})[
            "id"
        ]
        self._reports = 0

    @property
    def state(self) -> str:
        """Type of the run's state."""
        return str(self._api("GET", f"/flow_runs/{self.id}")["state_type"])

    @property
    def began(self) -> int:
        """How often the run has begun."""
        return int(self._api("GET", f"/flow_runs/{self.id}")["run_count"])

    @property
    def message(self) -> str:
        """Message of the run's state."""
        return str(self._api("GET", f"/flow_runs/{self.id}")["state"]["message"] or "")

    def wait(self, *states: str, seconds: float = 120.0) -> str:
        """Wait for one of the states; any final one when none is given."""
        wait_until(lambda: self.state in (states or FINAL), seconds, f"{self.id} in {states or FINAL}, is {self.state}")
        return self.state

    def kill(self) -> None:
        """Kill the process of the run, and wait until the worker has noticed."""
        victims = [process for process in psutil.process_iter() if _flow_run_of(process) == self.id]
        assert victims, "the run has no process"
        self._reports = self._reports_of_workers()
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)

    def retry(self) -> None:
        """Retry the same run after a kill, as an operator would."""
        # The runner reports a crash first and the worker some seconds later, which would undo a retry in between.
        wait_until(lambda: self._reports_of_workers() > self._reports, 60, "the worker's own report of the kill")
        self.laboratory.run("prefect", "flow-run", "retry", self.id)
        self.wait("RUNNING", *FINAL)

    def artifacts(self) -> list[dict[str, Any]]:
        """The artifacts the run and its tasks have left."""
        body = {"artifacts": {"flow_run_id": {"any_": [self.id]}}, "limit": 200}
        return list(self._api("POST", "/artifacts/filter", body))

    def logs(self) -> str:
        """The run's log."""
        body = {"logs": {"flow_run_id": {"any_": [self.id]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self._api("POST", "/logs/filter", body))

    def _reports_of_workers(self) -> int:
        logs = (self.laboratory.home / "logs").glob("*.log")
        return sum(log.read_text().count("flow_runs.worker - Check whether") for log in logs)

    def _api(self, method: str, path: str, body: Any = None) -> Any:
        for _ in range(10):
            response = requests.request(method, self.laboratory.api_url + path, json=body, timeout=30)
            if response.status_code != requests.codes.unavailable:  # SQLite is locked by another request
                break
            time.sleep(1.0)
        assert response.ok, f"{path}: {response.text}"
        return response.json()


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Remote:
    """A platform of the laboratory's sandbox.

    Args:
        laboratory: The laboratory.
        platform: Name of the platform.
    """

    def __init__(self, laboratory: Laboratory, platform: str) -> None:
        self.facts: dict[str, Any] = laboratory.sandbox[platform]
        self.url: str = self.facts["url"]

    def journal(self, method: str = "", path: str = "") -> list[dict[str, Any]]:
        """Requests so far, of one verb and with a part of a path."""
        entries = requests.get(f"{self.url}/_sandbox/journal", timeout=10).json()
        return [e for e in entries if method in ("", e["method"]) and path in e["path"]]

    def reset(self) -> None:
        """Empty the journal and the fault plan."""
        requests.delete(f"{self.url}/_sandbox/journal", timeout=10)
        requests.delete(f"{self.url}/_sandbox/faults", timeout=10)

    def fail(self, **fault: Any) -> None:
        """Add a fault."""
        answer = requests.post(f"{self.url}/_sandbox/faults", json=fault, timeout=10)
        assert answer.ok, answer.text

    def switch(self, **changes: Any) -> None:
        """Change switches."""
        answer = requests.patch(f"{self.url}/_sandbox/switches", json=changes, timeout=10)
        assert answer.ok, answer.text


def _flow_run_of(process: psutil.Process) -> str | None:
    try:
        if "engine" not in " ".join(process.cmdline()):
            return None
        environment = process.environ()
    except psutil.Error:
        return None
    return environment.get("PREFECT__FLOW_RUN_ID")
