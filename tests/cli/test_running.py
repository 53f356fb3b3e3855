"""`prefect-biomed run` and its relatives: flows from the shell and from other engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prefect import Flow, flow
from prefect.states import Paused

from harness.shell import typed
from prefect_biomed.cli import running
from prefect_biomed.cli.commands import app
from prefect_biomed.cli.running import (
    FAILED,
    REFUSED,
    TRY_AGAIN,
    Outcome,
    find_flow,
    flow_names,
    read_parameters,
    run_flow,
)
from prefect_biomed.clients.errors import ConfigurationError, JobFailed, LaunchInDoubt, ServerUnavailable
from prefect_biomed.sandbox import Fault, Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip") as sandbox:
        yield sandbox


@pytest.fixture
def account(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> str:
    """Credentials in the environment; the address of the list of executions."""
    facts = sandbox.ready()["vip"]
    monkeypatch.setenv("PREFECT_BIOMED_VIP_URL", facts["url"])
    monkeypatch.setenv("PREFECT_BIOMED_VIP_API_KEY", facts["api_key"])
    return f"{facts['url']}/rest/executions"


def launched(sandbox: Sandbox) -> int:
    facts = sandbox.ready()["vip"]
    answer = requests.get(f"{facts['url']}/rest/executions", headers={"apikey": facts["api_key"]}, timeout=30)
    return len(answer.json())


def parameter_file(folder: Path) -> Path:
    file = folder / "session.yaml"
    output = {"pipeline_id": "EveryType/1.0", "input_settings": {"text": "x"}, "output_dir": str(folder / "out")}
    file.write_text(json.dumps(output | {"refresh_time": 0.2}))
    return file


@pytest.mark.usefixtures("prefect_api", "account")
def test_the_same_key_again_adopts_and_another_one_launches(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = launched(sandbox)
    written = tmp_path / "outputs.json"
    words = (
        "prefect-biomed",
        "run",
        "vip-session",
        "-f",
        str(parameter_file(tmp_path)),
        "--outputs-json",
        str(written),
    )
    status, _ = typed(*words, "--key", "sample-1")
    assert status == 0
    first = json.loads(written.read_text())
    assert first["state"] == "Completed"
    assert first["files"]
    assert all(Path(file).is_file() for file in first["files"])
    status, _ = typed(*words, "--key", "sample-1")
    assert status == 0
    assert json.loads(written.read_text())["files"] == first["files"]
    assert launched(sandbox) == before + 1
    status, said = typed("prefect-biomed", "resume", str(tmp_path / "out"))
    assert status == 0, said
    # A name that is a number in YAML.
    (tmp_path / "out").rename(tmp_path / "2026")
    monkeypatch.chdir(tmp_path)
    status, said = typed("prefect-biomed", "resume", "2026")
    assert status == 0, said
    (tmp_path / "2026").rename(tmp_path / "out")
    status, said = typed("prefect-biomed", "running")
    assert (status, "\n" + "what-is-running: Completed" in "\n" + said) == (0, True), said
    assert launched(sandbox) == before + 1
    status, _ = typed(*words, "--key", "sample-2", "--set", f"output_dir={tmp_path / 'other'}")
    assert status == 0
    assert launched(sandbox) == before + 2


@pytest.mark.usefixtures("prefect_api", "account")
def test_a_failure_has_an_exit_code(sandbox: Sandbox, tmp_path: Path) -> None:
    words = ("prefect-biomed", "run", "vip-session", "-f", str(parameter_file(tmp_path)))
    status, said = typed(*words, "-s", "pipeline_id=AlwaysFails/1.0", "-s", "input_settings={}")
    assert status == 1, said
    status, said = typed("prefect-biomed", "running")
    assert status == 0 and "vip session folder /vip/Home/API/" in said and "    remove: " in said, said
    refused = Fault(method="GET", path="/pipelines", status=403, body="{}", calls=range(1, 100))
    sandbox.vip.faults.add(refused)
    try:
        status, said = typed("prefect-biomed", "show-pipeline")
    finally:
        sandbox.vip.faults.clear()
    assert status == 1, said


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ServerUnavailable("in a while"), TRY_AGAIN),
        (LaunchInDoubt("perhaps"), TRY_AGAIN),
        (ConfigurationError("no such folder"), REFUSED),
        (JobFailed("tool exited with 3"), FAILED),
        (ZeroDivisionError("a bug"), FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_code_says_whether_the_same_again_may_help(
    monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int
) -> None:
    @flow
    def fails() -> None:
        raise error

    monkeypatch.setattr(running, "find_flow", lambda name: fails)
    outcome = run_flow("fails", {})
    assert (outcome.exit_code, outcome.state) == (exit_code, "Failed")
    assert str(error) in outcome.message


class Waiting(Flow[[], Any]):
    """A flow whose run is paused."""

    def __call__(self, **_: Any) -> Any:
        return Paused()


def test_a_run_that_has_not_ended_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "find_flow", lambda name: Waiting(lambda: None, name="waiting"))
    outcome = run_flow("waiting", {})
    assert (outcome.exit_code, outcome.state) == (TRY_AGAIN, "Paused")


def test_what_is_wrong_is_said_before_anything_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_BIOMED_VIP_API_KEY", raising=False)
    file = parameter_file(tmp_path)
    for words, part in (
        (("prefect-biomed", "run", "no-such-flow"), "There is no flow no-such-flow"),
        (("prefect-biomed", "run", "vip-session", "-f", str(tmp_path / "none.yaml")), "none.yaml cannot be read"),
        (("prefect-biomed", "run", "vip-session", "-f", str(file), "-s", "nb_runs"), "nb_runs is no setting"),
        (("prefect-biomed", "run", "vip-session", "-f", str(file)), "--credentials vip-credentials/NAME"),
        (("prefect-biomed", "kill"), "Name a session"),
        (("prefect-biomed", "kill", "study", "--task", "3"), "not both"),
    ):
        status, said = typed(*words)
        assert status == REFUSED
        assert part in said


def test_an_error_about_a_parameter_names_it_and_no_secret() -> None:
    credentials = {"api_key": "CANARY-77", "url": "no address"}
    outcome = run_flow("vip-show-pipeline", {"credentials": credentials})
    assert outcome.exit_code == REFUSED
    assert "url" in outcome.message
    assert "CANARY" not in outcome.message
    outcome = run_flow("vip-show-pipeline", {"credentials": {"api_key": "CANARY-77"}, "pipeline": 1})
    assert outcome.exit_code == REFUSED
    assert "pipeline" in outcome.message
    assert "CANARY" not in outcome.message


def test_settings_go_before_the_file_and_into_groups(tmp_path: Path) -> None:
    file = tmp_path / "parameters.yaml"
    file.write_text("nb_runs: 1\nwaiting: {timeout_seconds: 5}\n")
    given = read_parameters(file, ["nb_runs=3", "waiting.cancel_remote=true", "outputs.unzip=false"])
    assert given == {
        "nb_runs": 3,
        "waiting": {"timeout_seconds": 5, "cancel_remote": True},
        "outputs": {"unzip": False},
    }
    with pytest.raises(ConfigurationError, match="nb_runs is 1"):
        read_parameters(file, ["nb_runs.x=3"])


@pytest.mark.usefixtures("prefect_api", "account")
def test_pipelines_are_shown_for_people_and_for_machines() -> None:
    status, said = typed("prefect-biomed", "show-pipeline")
    assert (status, "\nGreyMatter/1.0  " in said) == (0, True), said
    status, said = typed("prefect-biomed", "show-pipeline", "GreyMatter/1.0", "--json")
    assert status == 0
    (pipeline,) = json.loads(said[said.index("{") :])["result"]
    assert pipeline["identifier"] == "GreyMatter/1.0"


def test_help_names_every_command_without_importing_prefect() -> None:
    status, said = typed("prefect-biomed", "--help")
    assert status == 0
    assert all(f" {command.name or command.callback.__name__} " in said for command in app.registered_commands)
    code = "import sys; import prefect_biomed.cli.commands; sys.exit('prefect' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_deployed_flow_can_be_run_by_its_name() -> None:
    status, said = typed("prefect-biomed", "flows")
    assert status == 0
    assert said.split() == list(flow_names())
    for name in flow_names():
        assert find_flow(name).name == name


def test_a_configuration_of_an_ingest_is_checked_without_a_server(tmp_path: Path) -> None:
    file = tmp_path / "ingest.json"
    file.write_text("{}")
    status, said = typed("prefect-biomed", "validate", str(file), "--json")
    assert status == REFUSED
    assert json.loads(said)["problems"]


def test_kill_finds_a_session_by_folder_or_name_and_jobs_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def run_flow(name: str, parameters: dict[str, Any], **_: Any) -> Outcome:
        asked.append((name, parameters))
        return Outcome(flow=name, state="Completed")

    monkeypatch.setattr(running, "run_flow", run_flow)
    for words in ((str(tmp_path),), ("study",), ("--task", "3", "--task", "4", "--ingest", "5")):
        status, said = typed("prefect-biomed", "kill", *words)
        assert status == 0, said
    assert asked == [
        ("vip-kill", {"output_dir": tmp_path}),
        ("vip-kill", {"session_name": "study"}),
        ("remove-leftovers", {"tasks": [3, 4], "ingest_jobs": [5]}),
    ]
