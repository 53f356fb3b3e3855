"""Inputs and outputs on Girder, from the pre-flight to the metadata, against the sandbox and real volumes."""

from __future__ import annotations

import builtins
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import girder_client
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    LedgerError,
    NetworkError,
    PlatformError,
    PreflightFailed,
    UnexpectedResponse,
    UnsafeContent,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    GirderStorage,
    VipClient,
    VipSession,
    Workflow,
    WorkflowStatus,
    download,
    launch,
    monitor,
    open_girder_session,
    open_session,
    preflight,
    share_girder_key,
)
from prefect_biomed.clients.vip.download import Output, fetch_file
from prefect_biomed.clients.vip.girder import local_names
from prefect_biomed.clients.vip.girder_sessions import note_runs
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.flows.vip import vip_collect, vip_resume, vip_session
from prefect_biomed.flows.vip_parameters import Girder, GirderSession, SessionWaiting
from prefect_biomed.sandbox import Fault, Sandbox
from prefect_biomed.tasks import vip as steps

INPUTS = "/collection/Sandbox/Inputs"
RESULTS = "/collection/Sandbox/Results"
QUICK = PollSettings(interval_seconds=0.05, deadline_seconds=20.0)


@pytest.fixture
def official(vip: Sandbox) -> Any:
    """girder-client as it is, to look at what we did."""
    facts = vip.vip.ready()["girder"]
    client = girder_client.GirderClient(apiUrl=facts["api_url"])
    client.authenticate(apiKey=facts["api_key"])
    return client


@pytest.fixture
def volumes(official: Any, volume: Path) -> dict[str, str]:
    """Two real volumes on Girder: identifier by name."""
    folder = official.resourceLookup(INPUTS)["_id"]
    return {
        name: official.uploadFileToFolder(folder, str(volume), filename=name)["_id"] for name in ("two.nii", "one.nii")
    }


@pytest.fixture
def credentials(vip: Sandbox) -> VipCredentials:
    ready = vip.vip.ready()
    return VipCredentials(
        api_key=SecretStr(ready["api_key"]),
        url=ready["url"],
        girder_api_key=SecretStr(ready["girder"]["api_key"]),
        girder_url=ready["girder"]["api_url"],
    )


@pytest.fixture
def client(credentials: VipCredentials) -> Iterator[VipClient]:
    with credentials.get_client() as client:
        share_girder_key(client)
        yield client


@pytest.fixture
def session(tmp_path: Path) -> Callable[..., VipSession]:
    def make(**changes: Any) -> VipSession:
        return VipSession(
            **{
                "session_name": "study",
                "pipeline_id": "GreyMatter/1.0",
                "input_settings": {"t1": f"girder:{INPUTS}"},
                "output_dir": tmp_path / "out",
                "vip_input_dir": "/vip/Home/API/study/INPUTS",
                "vip_output_dir": "/vip/Home/API/study/OUTPUTS",
                "token": "abcdefghij",
                "girder_output_dir": f"{RESULTS}/study",
                "girder_metadata": {"site": "Lyon", "visit": 2},
                **changes,
            }
        )

    return make


def wait(client: VipClient, session: VipSession) -> list[Workflow]:
    workflows: list[Workflow] = []
    for workflows in monitor(client, session, QUICK):  # noqa: B007  # the last look is what counts
        pass
    return workflows


def folders(official: Any, path: str) -> dict[str, dict[str, Any]]:
    return {folder["name"]: folder for folder in official.listFolder(official.resourceLookup(path)["_id"])}


def launches(vip: Sandbox) -> int:
    return len(vip.vip.journal.entries("POST", "/rest/executions"))


# -- the values --------------------------------------------------------------------------------------------------------


def test_file_item_and_folder(
    client: VipClient, volumes: dict[str, str], session: Callable[..., VipSession], tmp_path: Path
) -> None:
    one, two = (f"pilotGirder:{volumes[name]}" for name in ("one.nii", "two.nii"))
    cases: dict[str, tuple[Any, Any]] = {
        "file": (f"girder:{INPUTS}/one.nii/one.nii", one),
        "item": (f"girder:{INPUTS}/one.nii", one),
        "folder, by name": (f"girder:{INPUTS}/", [one, two]),
        "as vip-client writes it": (f"{INPUTS}/two.nii", two),
        "as VIP wants it": (two, two),
        "list": ([f"girder:{INPUTS}/two.nii", one, f"girder:{INPUTS}"], [two, one, one, two]),
    }
    for name, (given, sent) in cases.items():
        plan = preflight(client, session(input_settings={"t1": given}, output_dir=tmp_path / name))
        assert plan.input_values == {"t1": sent}, name
        assert plan.jobs == (len(sent) if isinstance(sent, list) else 1), name
    # The session file names files on Girder by path, in the words of vip-client.
    plan = preflight(client, session(input_settings={"t1": f"girder:{INPUTS}/"}))
    assert plan.settings == {"t1": INPUTS}
    assert plan.girder_inputs == {"t1": [one, two]}


def test_a_text_that_looks_like_a_path_on_girder_stays_a_text(
    client: VipClient, session: Callable[..., VipSession], vip: Sandbox
) -> None:
    with pytest.raises(PreflightFailed) as caught:
        preflight(
            client, session(pipeline_id="AlwaysFails/1.0", input_settings={"reason": f"girder:{INPUTS}/nothing; x"})
        )
    assert not [entry for entry in vip.vip.journal if "nothing" in entry.query]
    assert "';'" in str(caught.value)


def test_all_problems_at_once(
    client: VipClient, official: Any, volume: Path, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    results = official.resourceLookup(RESULTS)["_id"]
    pair = official.createItem(results, "pair")
    for name in ("a.nii", "b.nii"):
        official.uploadFileToItem(pair["_id"], str(volume), filename=name)
    official.createFolder(results, "empty")
    with pytest.raises(PreflightFailed) as caught:
        preflight(
            client,
            session(
                input_settings={
                    "t1": [
                        f"girder:{INPUTS}/absent.nii",
                        f"girder:{RESULTS}/pair",
                        f"girder:{RESULTS}/empty",
                        f"girder:{RESULTS}",
                        "girder:/collection/Sandbox",
                        "girder:/collection/Restricted/Data",
                        f"girder:{INPUTS}/one.nii",
                    ],
                    "threshold": "high",
                    "unknown": 1,
                },
                girder_output_dir=f"{INPUTS}/one.nii/study",
                girder_metadata={"a.b": 1, "$x": 2, "": 3, "workflow_status": "fine"},
            ),
        )
    problems = "\n".join(caught.value.problems)
    for words in (
        f"Girder has no {INPUTS}/absent.nii",
        "'pair' has 2",
        f"{RESULTS}/empty on Girder has no items",
        "/collection/Sandbox is a collection",
        "Read access denied",
        "'high'",
        "no parameter 'unknown'",
        "'one.nii' is a item, not a folder",
        "key 'a.b'",
        "key '$x'",
        "key ''",
        "workflow_status is set for each run",
    ):
        assert words in problems, words
    assert len(caught.value.problems) == 13


def test_output_folder_that_cannot_be(client: VipClient, official: Any, session: Callable[..., VipSession]) -> None:
    taken = official.createFolder(official.resourceLookup(RESULTS)["_id"], "study")
    official.addMetadataToFolder(taken["_id"], {"session_name": "another"})
    for path, words in {
        "/collection/Absent/x": "Girder has no /collection/Absent",
        "/collection/Restricted/Data/x": "Read access denied",
        f"{RESULTS}/study": "belongs to session 'another'",
    }.items():
        with pytest.raises(PreflightFailed, match=words):
            preflight(client, session(input_settings={"t1": "pilotGirder:x"}, girder_output_dir=path))
    preflight(client, session(input_settings={"t1": "pilotGirder:x"}, girder_output_dir="/collection/Sandbox/new/a"))


def test_no_credentials_for_girder(
    vip: Sandbox, credentials: VipCredentials, session: Callable[..., VipSession]
) -> None:
    bare = credentials.model_copy(update={"girder_api_key": None})
    with bare.get_client() as client, pytest.raises(PreflightFailed) as caught:
        preflight(client, session())
    assert len([p for p in caught.value.problems if "no girder_api_key" in p]) == 2
    with bare.get_client() as client:
        assert preflight(client, session(input_settings={"t1": "pilotGirder:x"}, girder_output_dir=None)).jobs == 1


def test_key_that_vip_lacks_is_reported_before_the_launch(
    vip: Sandbox, credentials: VipCredentials, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    with credentials.get_client() as client:
        for settings in ({"t1": f"girder:{INPUTS}"}, {"t1": f"pilotGirder:{volumes['one.nii']}"}):
            with pytest.raises(PreflightFailed, match="VIP holds no key of yours for the storage 'pilotGirder'"):
                preflight(client, session(input_settings=settings, girder_output_dir=None))
        share_girder_key(client)
        share_girder_key(client)
        assert client.external_keys() == ["pilotGirder"]
        preflight(client, session())
        client.remove_external_key("pilotGirder")
        assert client.external_keys() == []


def test_wrong_girder_key_is_tried_once_and_not_told(
    vip: Sandbox, credentials: VipCredentials, session: Callable[..., VipSession]
) -> None:
    wrong = credentials.model_copy(update={"girder_api_key": SecretStr("canary-of-girder")})
    with wrong.get_client() as client, pytest.raises(PreflightFailed) as caught:
        preflight(client, session(input_settings={"t1": [f"girder:{INPUTS}", f"girder:{RESULTS}"]}))
    assert "girder_api_key" in str(caught.value)
    assert "canary-of-girder" not in str(caught.value)
    assert len(vip.vip.journal.entries("POST", "api_key/token")) == 1


def test_network_error_does_not_tell_the_key(vip: Sandbox, credentials: VipCredentials) -> None:
    """girder-client sends the key in the query, and the errors of requests repeat the address."""
    key = credentials.girder_api_key.get_secret_value() if credentials.girder_api_key else ""
    vip.vip.faults.add(Fault(path="/api_key/token", drop="before"))
    with credentials.get_client() as client, pytest.raises(NetworkError) as caught:
        client.girder.entry(INPUTS)  # type: ignore[union-attr]  # the credentials have a key
    assert key
    assert key not in repr(caught.value)
    assert caught.value.__suppress_context__ or key not in repr(caught.value.__context__)


def test_girder_that_breaks_down_at_the_sign_in_has_not_refused_the_key(
    vip: Sandbox, client: VipClient, volumes: dict[str, str]
) -> None:
    broken = {"status": 500, "body": '{"message": "An unexpected error occurred", "type": "internal"}'}
    vip.vip.faults.add(Fault(path="/api_key/token", times=1, content_type="application/json", **broken))
    girder = client.girder
    assert girder is not None
    with pytest.raises(PlatformError, match="An unexpected error occurred") as caught:
        girder.entry(INPUTS)
    assert not isinstance(caught.value, AuthenticationError)
    assert girder.entry(f"{INPUTS}/one.nii/one.nii").id == volumes["one.nii"]


def test_url_that_is_no_girder(vip: Sandbox, credentials: VipCredentials) -> None:
    elsewhere = credentials.model_copy(update={"girder_url": f"{credentials.url}/rest"})
    with elsewhere.get_client() as client, pytest.raises((UnexpectedResponse, AuthenticationError)) as caught:
        client.girder.entry(INPUTS)  # type: ignore[union-attr]  # the credentials have a key
    assert "/api/v1" in str(caught.value)


def test_expired_token_is_renewed(vip: Sandbox, client: VipClient, volumes: dict[str, str]) -> None:
    assert client.girder is not None
    vip.vip.journal.clear()
    client.girder.entry(INPUTS)
    vip.vip.girder._tokens.clear()
    assert client.girder.entry(f"{INPUTS}/one.nii/one.nii").id == volumes["one.nii"]
    assert len(vip.vip.journal.entries("POST", "api_key/token")) == 2


def test_without_the_extra_the_error_names_it(
    credentials: VipCredentials, session: Callable[..., VipSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "girder_client":
            raise ImportError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "girder_client")
    monkeypatch.setattr(builtins, "__import__", absent)
    with credentials.get_client() as client:
        with pytest.raises(ConfigurationError, match=r"prefect-biomed\[girder\]"):
            client.girder.entry(INPUTS)  # type: ignore[union-attr]  # the credentials have a key
        with pytest.raises(PreflightFailed, match=r"prefect-biomed\[girder\]"):
            preflight(client, session())


# -- launching ---------------------------------------------------------------------------------------------------------


def test_a_run_has_its_folder_with_metadata_from_launch_to_end(
    vip: Sandbox, client: VipClient, official: Any, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    vip.vip.switches.job_seconds = 1.0
    mine = session()
    launched = launch(client, mine, 1)
    (folder,) = folders(official, f"{RESULTS}/study").values()
    assert folder["name"] == "study-r001-abcdefghij"
    assert folder["meta"].pop("workflow_start")
    assert folder["meta"] == {
        "site": "Lyon",
        "visit": 2,
        "session_name": "study",
        "workflow_id": launched.identifier,
        "workflow_status": launched.status.value,
    }
    assert launched.status is not WorkflowStatus.FINISHED
    intent = open_record(mine)["prefect_biomed"]["launches"]["study-r001-abcdefghij"]
    assert intent["results_location"] == f"pilotGirder:{folder['_id']}"

    (ended,) = wait(client, mine)
    assert ended.status is WorkflowStatus.FINISHED
    (folder,) = folders(official, f"{RESULTS}/study").values()
    assert folder["meta"]["workflow_status"] == "Finished"
    names = {item["name"] for item in official.listItem(folder["_id"])}
    assert names == {"one_greymatter.tar.gz", "two_greymatter.tar.gz"}

    parent = official.resourceLookup(f"{RESULTS}/study")["meta"]
    assert {key: parent[key] for key in ("session_name", "pipeline_id", "vip_output_dir", "output_location")} == {
        "session_name": "study",
        "pipeline_id": "GreyMatter/1.0",
        "vip_output_dir": f"{RESULTS}/study",
        "output_location": "girder",
    }
    assert parent["input_settings"] == {"t1": INPUTS}
    assert parent["workflows"][launched.identifier]["status"] == "Finished"
    assert parent["workflows"][launched.identifier]["output_path"] == f"{RESULTS}/study/{folder['name']}"
    # Nothing is left on VIP, not even an empty folder.
    assert not client.exists("/vip/Home/API/study")


def open_record(session: VipSession) -> Any:
    return json.loads((session.output_dir / "session_data.json").read_text())


def test_launched_twice_is_one_folder_and_one_execution(
    vip: Sandbox,
    client: VipClient,
    official: Any,
    volumes: dict[str, str],
    session: Callable[..., VipSession],
    tmp_path: Path,
) -> None:
    first = launch(client, session(), 1)
    again = launch(client, session(), 1)
    # A machine that has no session file.
    elsewhere = launch(client, session(output_dir=tmp_path / "elsewhere"), 1)
    assert first.identifier == again.identifier == elsewhere.identifier
    assert launches(vip) == 1
    assert list(folders(official, f"{RESULTS}/study")) == ["study-r001-abcdefghij"]


@pytest.mark.parametrize("where", ["after the folder", "after the launch", "before the metadata"])
def test_a_launch_that_broke_is_taken_up_where_it_broke(
    vip: Sandbox,
    client: VipClient,
    official: Any,
    volumes: dict[str, str],
    session: Callable[..., VipSession],
    where: str,
) -> None:
    mine = session()
    fault = {
        "after the folder": Fault(method="POST", path="/api/v1/folder$", calls=[2], drop="after"),
        "after the launch": Fault(method="POST", path="/executions$", calls=[1], drop="after"),
        "before the metadata": Fault(method="PUT", path="/metadata$", calls=[1], status=503, body="{}"),
    }[where]
    vip.vip.faults.add(fault)
    if where == "after the folder":
        with pytest.raises(NetworkError):
            launch(client, mine, 1)
        assert launches(vip) == 0
    launched = launch(client, mine, 1)
    wait(client, mine)
    assert launches(vip) == 1
    (folder,) = folders(official, f"{RESULTS}/study").values()
    assert folder["meta"]["workflow_id"] == launched.identifier
    assert folder["meta"]["workflow_status"] == "Finished"
    assert len(list(official.listItem(folder["_id"]))) == 2


def test_all_runs_of_a_session_get_the_files_of_the_first(
    vip: Sandbox,
    client: VipClient,
    official: Any,
    volume: Path,
    volumes: dict[str, str],
    session: Callable[..., VipSession],
) -> None:
    mine = session(nb_runs=2)
    launch(client, mine, 1)
    official.uploadFileToFolder(official.resourceLookup(INPUTS)["_id"], str(volume), filename="three.nii")
    launch(client, mine, 2)
    assert [len(workflow.jobs) for workflow in wait(client, mine)] == [2, 2]
    assert sorted(folders(official, f"{RESULTS}/study")) == ["study-r001-abcdefghij", "study-r002-abcdefghij"]
    assert open_record(mine)["input_settings"] == {"t1": INPUTS}


def test_metadata_that_girder_refuses_at_the_end_is_told(
    vip: Sandbox, client: VipClient, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    mine = session()
    launch(client, mine, 1)
    vip.vip.faults.add(Fault(method="PUT", path="/metadata$", times=1, status=503, body="{}"))
    with pytest.raises(Exception, match="out of order") as caught:
        wait(client, mine)
    assert getattr(caught.value, "transient", False)
    assert wait(client, mine)[0].status is WorkflowStatus.FINISHED


def test_metadata_is_skipped_without_credentials(
    credentials: VipCredentials,
    client: VipClient,
    volumes: dict[str, str],
    session: Callable[..., VipSession],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = session()
    launch(client, mine, 1)
    with (
        caplog.at_level(logging.WARNING),
        credentials.model_copy(update={"girder_api_key": None}).get_client() as bare,
    ):
        assert wait(bare, mine)[0].status is WorkflowStatus.FINISHED
    assert "not brought up to date" in caplog.text


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_outputs_stay_on_girder_unless_wanted(
    vip: Sandbox, client: VipClient, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    mine = session()
    launched = launch(client, mine, 1)
    wait(client, mine)
    summary = download(client, mine)
    assert (summary.fetched, summary.files) == (0, {})
    assert not list(mine.output_dir.rglob("*.csv"))

    wanted = session(girder_download=True)
    vip.vip.faults.add(Fault(path="/file/.*/download", calls=[1], truncate_bytes=100))
    summary = download(client, wanted)
    assert summary.fetched == 2
    assert len([path for path in summary.files[launched.identifier] if path.name == "measures.csv"]) == 2
    assert not list(mine.output_dir.rglob("*.part"))
    assert len(vip.vip.journal.entries("GET", "/download")) == 3
    vip.vip.journal.clear()
    assert download(client, wanted).fetched == 0
    assert not vip.vip.journal.entries("GET", "/download")
    assert not vip.vip.journal.entries("GET", "/results")


def test_a_broken_download_is_taken_up_where_it_broke(
    vip: Sandbox, client: VipClient, volumes: dict[str, str], volume: Path, tmp_path: Path
) -> None:
    address = f"girder:/one.nii?apiurl=http://h&fileId={volumes['one.nii']}"
    output = Output(address, tmp_path / "one.nii", volume.stat().st_size)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("prefect_biomed.clients.http._CHUNK_BYTES", 1000)
        vip.vip.faults.add(Fault(path="/file/.*/download", calls=[1], truncate_bytes=5000))
        fetch_file(client, output, retry_seconds=[0.0])
    assert [entry.status for entry in vip.vip.journal.entries("GET", "/download")] == [200, 206]
    assert output.local.read_bytes() == volume.read_bytes()


def test_outputs_of_one_name_do_not_replace_each_other() -> None:
    addresses = [f"girder:/{name}?apiurl=http://h&fileId={number}" for number, name in enumerate("aab")]
    assert list(local_names(addresses).values()) == ["0/a", "1/a", "b"]
    assert local_names(["girder:/..%2F..%2Fpasswd?apiurl=h&fileId=7"]) == {
        "girder:/..%2F..%2Fpasswd?apiurl=h&fileId=7": "passwd"
    }


def test_names_from_girder_do_not_leave_the_folder(
    client: VipClient, volumes: dict[str, str], session: Callable[..., VipSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = session(girder_download=True)
    launched = launch(client, mine, 1)
    wait(client, mine)
    evil = Workflow(
        identifier=launched.identifier, outputs=(f"girder:/..?apiurl=http://h&fileId={volumes['one.nii']}",)
    )
    monkeypatch.setattr(client, "workflow", lambda identifier: evil)
    with pytest.raises(UnsafeContent):
        download(client, mine)


def test_output_that_somebody_deleted_is_told(
    client: VipClient, official: Any, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    mine = session(girder_download=True)
    launch(client, mine, 1)
    wait(client, mine)
    (folder,) = folders(official, f"{RESULTS}/study").values()
    for item in official.listItem(folder["_id"]):
        official.delete(f"item/{item['_id']}")
    summary = download(client, mine)
    assert (summary.fetched, len(summary.gone)) == (0, 2)


def test_the_object_store_behind_girder_gets_no_token(
    vip: Sandbox, client: VipClient, volumes: dict[str, str], session: Callable[..., VipSession], tmp_path: Path
) -> None:
    """A Girder with an object store answers a download with a redirect to another host."""
    seen: list[dict[str, str]] = []

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", "7")
            self.end_headers()
            self.wfile.write(b"content")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Store) as store:
        thread = Thread(target=store.serve_forever)
        thread.start()
        try:
            target = f"http://127.0.0.1:{store.server_port}/bucket/object?signature=x"
            vip.vip.faults.add(Fault(path="/file/.*/download", status=303, headers={"Location": target}, body=""))
            assert client.girder is not None
            with client.girder.open_file(volumes["one.nii"]) as (_, chunks):
                assert b"".join(chunks) == b"content"
        finally:
            store.shutdown()
            thread.join()
    assert len(seen) == 1
    assert not [name for name in seen[0] if name.lower() in {"girder-token", "authorization", "cookie"}]


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_live_tokens_reach_neither_models_nor_session_file(
    vip: Sandbox, client: VipClient, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    mine = session(girder_download=True)
    launched = launch(client, mine, 1)
    wait(client, mine)
    download(client, mine)
    raw = client.ask(dict[str, object], "GET", f"/executions/{launched.identifier}")
    live = set(re.findall(r"token=(\w+)", json.dumps(raw)))
    assert live, "the sandbox has given a token, as VIP does"
    assert all(vip.vip.girder.user_of(token) for token in live)
    shown = [
        client.workflow(launched.identifier).model_dump_json(),
        repr(client.workflow(launched.identifier)),
        *(workflow.model_dump_json() for workflow in client.workflows()),
        *(path.read_text() for path in mine.output_dir.rglob("*.json")),
    ]
    for text in shown:
        assert not [token for token in live if token in text]
    (output, _) = client.workflow(launched.identifier).outputs
    assert re.fullmatch(r"girder:/\w+\.tar\.gz\?apiurl=http://[\w.:/]+&fileId=\w{24}", output)


@pytest.mark.usefixtures("prefect_api")
def test_session_through_the_flow_and_no_secret_anywhere(
    vip: Sandbox,
    credentials: VipCredentials,
    client: VipClient,
    official: Any,
    volumes: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments: dict[str, Any] = {
        "credentials": credentials,
        "pipeline_id": "GreyMatter/1.0",
        "input_settings": {"t1": f"girder:{INPUTS}"},
        "output_dir": tmp_path / "out",
        "nb_runs": 2,
        "refresh_time": 0.2,
        "girder": Girder(output=f"girder:{RESULTS}/weekly/", metadata={"study": "demo"}, download=True),
    }
    with caplog.at_level(logging.DEBUG):
        result = vip_session(**arguments, session_name="flow")
    assert [workflow.status for workflow in result.workflows] == [WorkflowStatus.FINISHED] * 2
    assert [len([p for p in files if p.name == "measures.csv"]) for files in result.files.values()] == [2, 2]
    assert result.session.girder_output_dir == f"{RESULTS}/weekly/flow"
    runs = folders(official, f"{RESULTS}/weekly/flow")
    assert [run["meta"]["study"] for run in runs.values()] == ["demo", "demo"]
    assert [run["meta"]["workflow_status"] for run in runs.values()] == ["Finished", "Finished"]

    secrets = [
        vip.vip.ready()["girder"]["api_key"],
        vip.vip.ready()["api_key"],
        *vip.vip.girder._tokens,
    ]
    assert len(secrets) > 4
    with get_client(sync_client=True) as prefect:
        places = {
            "artifacts": " ".join(str(artifact) for artifact in prefect.read_artifacts()),
            "flow runs": " ".join(run.model_dump_json() for run in prefect.read_flow_runs()),
            "task runs": " ".join(run.model_dump_json() for run in prefect.read_task_runs()),
            "log": caplog.text,
            "result": result.model_dump_json(),
            "Girder": json.dumps([official.resourceLookup(f"{RESULTS}/weekly/flow"), *runs.values()]),
        }
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            places[str(path)] = path.read_bytes().decode(errors="replace")
    assert str(tmp_path / "out" / "session_data.json") in places
    for place, text in places.items():
        assert text or place.endswith(".lock"), place
        assert not [secret for secret in secrets if secret in text], place


# -- taking up ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("prefect_api")
def test_resume_from_the_folder_on_girder_alone(
    vip: Sandbox,
    credentials: VipCredentials,
    client: VipClient,
    official: Any,
    volumes: dict[str, str],
    tmp_path: Path,
) -> None:
    @flow
    def stops_after_one_of_two() -> VipSession:
        session = new_session(
            pipeline_id="GreyMatter/1.0",
            input_settings={"t1": f"girder:{INPUTS}/one.nii"},
            output_dir=tmp_path / "first",
            session_name="stopped",
            nb_runs=2,
            girder=Girder(output=RESULTS, metadata={"study": "demo"}),
        )
        steps.upload_inputs(credentials, session)
        steps.launch_pipeline(credentials, session, 1)
        return session

    stopped = stops_after_one_of_two()
    result = vip_resume(
        credentials,
        output_dir=tmp_path / "second",
        refresh_time=0.2,
        girder=GirderSession(folder=f"{RESULTS}/stopped", download=True),
    )
    assert result.session.token == stopped.token
    assert launches(vip) == 2
    runs = folders(official, f"{RESULTS}/stopped")
    assert sorted(runs) == [stopped.workflow_name(1), stopped.workflow_name(2)]
    assert {run["meta"]["study"] for run in runs.values()} == {"demo"}
    assert [len([p for p in files if p.name == "measures.csv"]) for files in result.files.values()] == [1, 1]


@pytest.mark.usefixtures("prefect_api")
def test_finished_session_can_still_be_downloaded_and_is_not_collected_again(
    vip: Sandbox, credentials: VipCredentials, client: VipClient, volumes: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "sessions"
    vip_session(
        credentials,
        "GreyMatter/1.0",
        {"t1": f"girder:{INPUTS}/one.nii"},
        output_dir=folder / "one",
        session_name="one",
        refresh_time=0.2,
        girder=Girder(output=RESULTS),
        waiting=SessionWaiting(wait=False),
    )
    while not (collected := vip_collect(credentials, folder)):
        pass
    assert collected[0].is_finished
    assert collected[0].files == {}
    assert vip_collect(credentials, folder) == []
    girder = GirderSession(download=True)
    result = vip_resume(credentials, output_dir=folder / "one", girder=girder, refresh_time=0.2)
    ((_, files),) = result.files.items()
    assert "measures.csv" in {path.name for path in files}
    assert launches(vip) == 1


def test_folder_without_a_session(client: VipClient, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="has no session in its metadata"):
        open_girder_session(client, RESULTS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_kill_is_noted(
    vip: Sandbox, client: VipClient, official: Any, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    vip.vip.switches.job_seconds = 30.0
    mine = session()
    launched = launch(client, mine, 1)
    client.kill(launched.identifier)
    (killed,) = wait(client, mine)
    assert killed.status is WorkflowStatus.KILLED
    (folder,) = folders(official, f"{RESULTS}/study").values()
    assert folder["meta"]["workflow_status"] == "Killed"


def test_noting_is_repeatable_and_keeps_metadata_of_others(
    client: VipClient, official: Any, volumes: dict[str, str], session: Callable[..., VipSession]
) -> None:
    mine = session()
    launch(client, mine, 1)
    workflows = wait(client, mine)
    (folder,) = folders(official, f"{RESULTS}/study").values()
    official.addMetadataToFolder(folder["_id"], {"rating": "good"})
    before = folders(official, f"{RESULTS}/study")[folder["name"]]["meta"]
    note_runs(client, mine, workflows, strict=True)
    assert folders(official, f"{RESULTS}/study")[folder["name"]]["meta"] == before
    assert before["rating"] == "good"
    assert open_session(mine.output_dir).girder_output_dir == mine.girder_output_dir


def test_carmin_knows_no_girder(session: Callable[..., VipSession], tmp_path: Path) -> None:
    with Sandbox("vip", vip={"profile": "carmin"}) as sandbox:
        ready = sandbox.vip.ready()
        (pipeline,) = [name for name in ready["pipelines"] if "GreyMatter_1.0" in name]
        girder = GirderStorage("http://127.0.0.1:9", "key")
        with (
            VipClient(ready["url"], ready["api_key"], girder=girder) as client,
            pytest.raises(PreflightFailed, match="only VIP can"),
        ):
            preflight(client, session(pipeline_id=pipeline))
