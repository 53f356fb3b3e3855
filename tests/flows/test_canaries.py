"""Secrets of all platforms are in no place that a run leaves behind, whatever went wrong; the table is printed."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter
from prefect.context import get_settings_context
from pydantic import SecretStr
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from harness.federation import CLINICAL, Federation
from harness.ingest_lab import Lab, lab, make_lab, volume
from harness.postgresql import dump, prefect_api_on_postgresql
from prefect_biomed.blocks import BossCredentials, Vantage6Credentials, VipCredentials
from prefect_biomed.cli.commands import app
from prefect_biomed.cli.running import as_json
from prefect_biomed.clients.boss import wait_until_ready
from prefect_biomed.clients.boss._aws import JobQueues
from prefect_biomed.flows.boss import boss_ingest
from prefect_biomed.flows.operations import what_is_running
from prefect_biomed.flows.vantage6 import federated_analysis
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.sandbox import Fault, Sandbox

__all__ = ["lab", "make_lab"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SESSION_TOKEN = "canary-session-token-" + "x" * 40
PLACES = (
    "database",
    "results",
    "artifacts",
    "events",
    "logs at DEBUG",
    "errors and tracebacks",
    "what flows return, as JSON",
    "crates",
    "reports and doctor",
    "files",
    "process arguments",
    "environment of children",
)


class Search:
    """What was left where, and which secrets are in it.

    Args:
        secrets: By name.
    """

    def __init__(self, secrets: dict[str, str]) -> None:
        self.secrets = secrets
        self.begun = time.time() - 1
        self.left: dict[str, list[str]] = {place: [] for place in PLACES}

    def table(self) -> dict[tuple[str, str], int]:
        """How often each secret is in each place."""
        return {
            (name, place): sum(secret in text for text in self.left[place])
            for name, secret in self.secrets.items()
            for place in PLACES
        }

    def show(self) -> None:
        """Print the table."""
        found = self.table()
        print(f"\n{'':28}" + "".join(f"{name:>22}" for name in self.secrets))
        for place in PLACES:
            size = sum(map(len, self.left[place]))
            cells = "".join(f"{found[name, place] or 'clean':>22}" for name in self.secrets)
            print(f"{place:28}{cells}   ({len(self.left[place])} texts, {size} characters)")

    def files_below(self, place: str, folder: Path) -> None:
        for file in folder.rglob("*"):
            # The results of other runs may be there, too.
            if file.is_file() and file.stat().st_mtime >= self.begun:
                self.left[place].append(f"{file}\n{file.read_bytes().decode('latin-1')}")

    @contextmanager
    def of_children(self) -> Iterator[None]:
        """Look at the processes that are started meanwhile."""
        over = threading.Event()

        def look() -> None:
            known: set[int] = set()
            while not over.wait(0.02):
                for process in psutil.Process().children(recursive=True):
                    if process.pid in known:
                        continue
                    known.add(process.pid)
                    try:
                        self.left["process arguments"].append(" ".join(process.cmdline()))
                        self.left["environment of children"].append(json.dumps(process.environ()))
                    except psutil.Error:
                        continue

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Keep the error with which the block ends, in every form in which it is shown."""
        try:
            yield
        except Exception as error:
            shown = "".join(traceback.TracebackException.from_exception(error).format())
            self.left["errors and tracebacks"] += [shown, repr(error), repr(vars(error))]
        else:
            pytest.fail("it did not fail")


def _vip(search: Search, vip: Sandbox, credentials: VipCredentials, folder: Path) -> None:
    def run(name: str, pipeline: str, settings: dict[str, Any]) -> object:
        return vip_session(
            credentials, pipeline, settings, folder / "inputs", folder / name, session_name=name, refresh_time=0.1
        )

    search.left["what flows return, as JSON"].append(as_json(run("good", "GreyMatter/1.0", {"t1": "anatomical.nii"})))
    vip.vip.faults.add(Fault(method="GET", path="/executions$", status=403, body="<html>no</html>"))
    with search.failing():
        run("refused", "GreyMatter/1.0", {"t1": "anatomical.nii"})
    vip.vip.faults.clear()
    with search.failing():
        run("broken", "CardioFlow/2.0", {})
    wrong = {"credentials": {"api_key": credentials.api_key.get_secret_value(), "url": "no url"}}
    with search.failing():
        vip_session.validate_parameters(wrong | {"pipeline_id": "A/1", "input_settings": {}})


def _vantage6(search: Search, credentials: Vantage6Credentials, folder: Path) -> None:
    def run(method: str) -> object:
        return federated_analysis(
            credentials, "encrypted", CLINICAL, method, databases="default", refresh_time=0.1,
            outputs={"output_dir": folder / "results"},
        )  # fmt: skip

    search.left["what flows return, as JSON"].append(as_json(run("echo")))
    with search.failing():
        run("fail")


def _boss(search: Search, lab: Lab, credentials: BossCredentials) -> None:
    lab.write_stack(volume((16, 512, 512)))
    search.left["what flows return, as JSON"].append(as_json(boss_ingest(credentials, lab.config(), processes=2)))
    with search.failing():
        boss_ingest(credentials, lab.config(channel="absent"))


def _session_token(search: Search, lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Keys with a session token, which botocore writes into its log at DEBUG."""
    _, job = lab.create(lab.config())
    joined = wait_until_ready(lab.client, job.id).model_copy(update={"session_token": SecretStr(SESSION_TOKEN)})
    search.secrets["AWS secret"] = joined.secret_key.get_secret_value()
    queues = JobQueues(lab.client, joined, connections=1)
    queues.receive(20, 0)
    queues.close()
    assert any("x-amz-security-token" in record.getMessage().lower() for record in caplog.records)


def _reports(search: Search) -> None:
    """What the shell shows of ingests, accounts and the installation."""
    for words in (["report", "--ingest", "1"], ["report", "--ingest", "1", "--json"], ["doctor", "--seconds", "1"]):
        search.left["reports and doctor"].append(CliRunner().invoke(app, words).output)
    assert "tiles" in search.left["reports and doctor"][0]
    assert "vip-credentials/canary" in search.left["reports and doctor"][-1]


def _in_sqlite() -> list[str]:
    url = get_settings_context().settings.server.database.connection_url
    database = Path(make_url(url.get_secret_value()).database or "")
    return [file.read_bytes().decode("latin-1") for file in database.parent.glob(f"{database.name}*")]


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def in_database(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """A Prefect API, and what its database holds."""
    if request.param == "SQLite":
        request.getfixturevalue("prefect_api")
        yield _in_sqlite
        return
    with prefect_api_on_postgresql() as port:
        yield lambda: [dump(port)]


def _collect(
    search: Search, folder: Path, caplog: pytest.LogCaptureFixture, in_database: Callable[[], list[str]]
) -> None:
    """Look into everything that was left."""
    settings = get_settings_context().settings
    search.left["database"] += in_database()
    assert sum(map(len, search.left["database"])) > 100_000, "the database was not found"
    assert any("biomed.flow.failed" in text for text in search.left["database"]), "the events are not in the database"
    search.files_below("results", Path(settings.results.local_storage_path))
    with get_client(sync_client=True) as client:
        search.left["artifacts"] += [one.model_dump_json() for one in client.read_artifacts()]
        search.left["database"] += [one.model_dump_json() for one in client.read_logs(log_filter=LogFilter())]
        search.left["database"] += [run.model_dump_json() for run in client.read_flow_runs()]
        wanted = {"filter": {"event": {"prefix": ["biomed."]}}, "limit": 50}
        search.left["events"].append(client._client.post("/events/filter", json=wanted).raise_for_status().text)
    formatter = logging.Formatter("%(name)s %(message)s %(exc_text)s")
    search.left["logs at DEBUG"] += [formatter.format(record) + repr(record.args) for record in caplog.records]
    for place in (folder, Path(os.environ["PREFECT_BIOMED_HOME"])):
        search.files_below("files", place)
    search.left["crates"] = [text for text in search.left["files"] if "ro-crate" in text.partition("\n")[0]]


def test_secrets_are_nowhere_after_runs_of_all_platforms(
    vip: Sandbox,
    lab: Lab,
    federations: Callable[[int], Federation],
    input_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    in_database: Callable[[], list[str]],
) -> None:
    federation, facts = federations(4), lab.boss.ready()
    pem = federation.key_file("north").read_text()
    vip_account = VipCredentials(api_key=vip.vip.ready()["api_key"], url=vip.vip.url)
    vip_account.save("canary", overwrite=True, _sync=True)
    accounts = (
        VipCredentials.load("canary", _sync=True),
        federation.credentials(private_key_path=None, private_key=SecretStr(pem)),
        BossCredentials(
            token=facts["tokens"]["alice"], host=facts["host"], protocol="http", aws_endpoint_url=facts["url"]
        ),
    )
    password = accounts[1].password
    assert password is not None
    search = Search(
        {
            "VIP key": vip.vip.ready()["api_key"],
            "vantage6 password": password.get_secret_value(),
            "vantage6 private key": pem.splitlines()[5],
            "Boss token": facts["tokens"]["alice"],
            "AWS session token": SESSION_TOKEN,
        }
    )
    (tmp_path / "run").mkdir()
    input_dir.rename(tmp_path / "run" / "inputs")
    for name in ("", "prefect_biomed", "boto3", "botocore", "urllib3", "prefect.flow_runs", "prefect.task_runs"):
        caplog.set_level(logging.DEBUG, logger=name)
    with search.of_children():
        _vip(search, vip, accounts[0], tmp_path / "run")
        _vantage6(search, accounts[1], tmp_path / "run")
        _boss(search, lab, accounts[2])
        what_is_running(*accounts)
    _session_token(search, lab, caplog)
    _reports(search)
    _collect(search, tmp_path / "run", caplog, in_database)
    search.show()
    assert all(search.left[place] for place in PLACES), "a place was not searched"
    assert {name: count for name, count in search.table().items() if count} == {}

    # The control: the same search is red for a leak in each of three places.
    key = search.secrets["VIP key"]
    logging.getLogger("urllib3").debug("GET /rest?apikey=%s", key)
    (tmp_path / "run" / "note.txt").write_text(f"the key is {key}")
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(vip_session, parameters={"credentials": {"api_key": key}})
    again = Search(search.secrets)
    again.begun = search.begun
    _collect(again, tmp_path / "run", caplog, in_database)
    assert {place for (_, place), count in again.table().items() if count} == {"logs at DEBUG", "files", "database"}
    with get_client(sync_client=True) as client:
        client.delete_flow_run(flow_run.id)
