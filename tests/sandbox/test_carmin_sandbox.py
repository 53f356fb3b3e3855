"""Profile `carmin` of the VIP sandbox behaves as CARMIN-server does, seen with plain requests."""

import base64
import hashlib
import io
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import pytest
import requests

from prefect_biomed.sandbox import Sandbox

ANATOMICAL = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
EVERY_BYTE = bytes(range(256))


class Server:
    """The API with the key of one user."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self.session = requests.Session()
        if key is not None:
            self.session.headers["apiKey"] = key

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.session.request(method, self.url + path, timeout=30, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.call("GET", path, **options)

    def put(self, path: str, **options: Any) -> requests.Response:
        return self.call("PUT", path, **options)

    def put_encoded(self, path: str, content: bytes, kind: str = "File") -> requests.Response:
        body = {"base64Content": base64.b64encode(content).decode(), "type": kind}
        return self.put(path, json=body, headers={"Content-Type": "application/carmin+json"})

    def url_of(self, path: str) -> str:
        return self.url + "/path/" + path

    def post(self, pipeline: str, values: dict[str, Any], **more: Any) -> requests.Response:
        body = {"name": "run", "pipelineIdentifier": pipeline, "inputValues": values, **more}
        return self.call("POST", "/executions", json=body)

    def create(self, pipeline: str, values: dict[str, Any], **more: Any) -> str:
        answer = self.post(pipeline, values, **more)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "Initializing"
        identifier: str = answer.json()["identifier"]
        return identifier

    def play(self, identifier: str) -> None:
        answer = self.put(f"/executions/{identifier}/play")
        assert (answer.status_code, answer.content) == (204, b"")

    def wait(self, identifier: str) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while True:
            found: dict[str, Any] = self.get(f"/executions/{identifier}").json()
            if found["status"] not in ("Initializing", "Running"):
                return found
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def run(self, pipeline: str, values: dict[str, Any], **more: Any) -> dict[str, Any]:
        identifier = self.create(pipeline, values, **more)
        self.play(identifier)
        return self.wait(identifier)


def refused(answer: requests.Response, status: int, code: int) -> None:
    assert (answer.status_code, answer.json()["errorCode"]) == (status, code), answer.text


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip", vip={"profile": "carmin"}) as sandbox:
        yield sandbox


@pytest.fixture
def connect(sandbox: Sandbox) -> Iterator[Callable[[str | None], Server]]:
    opened: list[Server] = []

    def connect(user: str | None) -> Server:
        facts = sandbox.ready()["vip"]
        opened.append(Server(facts["url"], facts["users"][user]["api_key"] if user in facts["users"] else user))
        return opened[-1]

    yield connect
    for server in opened:
        server.session.close()


@pytest.fixture
def server(connect: Callable[[str | None], Server]) -> Server:
    return connect("alice")


def test_keys(sandbox: Sandbox, connect: Callable[[str | None], Server]) -> None:
    nobody = connect(None)
    refused(nobody.get("/pipelines"), 401, 20)
    refused(connect("wrong").get("/pipelines"), 401, 25)
    found = nobody.get("/platform").json()
    assert "APIErrorCodesAndMessage" in found
    assert found["defaultLimitListExecutions"] == 10
    facts = sandbox.ready()["vip"]["users"]["alice"]
    right = {"username": "alice", "password": facts["password"]}
    answer = nobody.call("POST", "/authenticate", json=right).json()
    assert answer == {"httpHeader": "apiKey", "httpHeaderValue": facts["api_key"]}
    refused(nobody.call("POST", "/authenticate", json={**right, "password": "x"}), 400, 30)
    refused(nobody.call("POST", "/authenticate", json={"username": "alice"}), 400, 10)
    refused(nobody.get("/rest/platform"), 404, 404)


def test_pipelines(server: Server) -> None:
    listed = server.get("/pipelines").json()
    found = next(one for one in listed if one["identifier"] == "boutiques_GreyMatter_1.0.json")
    assert server.get("/pipelines/boutiques_GreyMatter_1.0.json").json() == found
    parameters = {one["id"]: one for one in found["parameters"]}
    assert parameters["archive"]["isReturnedValue"] is True
    assert parameters["t1"]["name"] == "T1"
    assert parameters["threshold"]["defaultValue"] == "0.35"
    assert "defaultValue" not in parameters["t1"]
    refused(server.get("/pipelines/x"), 400, 115)
    refused(server.get("/pipelines?propertyValue=x"), 400, 35)
    assert server.get("/pipelines/boutiques_GreyMatter_1.0.json/boutiquesdescriptor").json()["tool-version"] == "1.0"


def test_raw_upload_corrupts(server: Server) -> None:
    answer = server.put("/path/alice/raw.bin", data=EVERY_BYTE)
    assert answer.status_code == 201
    assert answer.json()["platformPath"] == server.url_of("alice/raw.bin")
    assert server.get("/path/alice/raw.bin?action=content").content == EVERY_BYTE[:128]
    assert server.put("/path/alice/raw.bin", data=b"again").status_code == 201
    assert server.put_encoded("/path/alice/exact.bin", EVERY_BYTE).status_code == 201
    assert server.get("/path/alice/exact.bin?action=content").content == EVERY_BYTE
    md5 = server.get("/path/alice/exact.bin?action=md5").json()
    assert md5 == {"md5": hashlib.md5(EVERY_BYTE).hexdigest()}
    refused(server.put_encoded("/path/alice/exact.bin", EVERY_BYTE, "Else"), 400, 10)


def test_directories(server: Server) -> None:
    answer = server.put("/path/alice/a")
    assert answer.status_code == 201
    assert answer.headers["Content-Type"].startswith("text/html")
    assert answer.headers["Location"] == server.url_of("alice/a")
    assert answer.json()["isDirectory"] is True
    refused(server.put("/path/alice/a"), 400, 55)
    # A form is as good as nothing.
    assert server.put("/path/alice/b", data={"x": "y"}).json()["isDirectory"] is True
    refused(server.put("/path/alice/none/x", data=b"x"), 401, 50)
    refused(server.put("/path/alice/a", data=b"x"), 400, 50)
    refused(server.put_encoded("/path/alice/a", b"x"), 400, 75)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("deep/x.bin", EVERY_BYTE)
    assert server.put_encoded("/path/alice/unzipped", buffer.getvalue(), "Archive").status_code == 201
    assert server.get("/path/alice/unzipped/deep/x.bin?action=content").content == EVERY_BYTE
    refused(server.put_encoded("/path/alice/c", b"no zip", "Archive"), 400, 90)
    packed = server.get("/path/alice/unzipped?action=content")
    assert packed.headers["Content-Type"] == "application/gzip"
    with tarfile.open(fileobj=io.BytesIO(packed.content)) as unpacked:
        assert "unzipped/deep/x.bin" in unpacked.getnames()
    properties = server.get("/path/alice/unzipped?action=properties").json()
    assert properties["size"] == 256
    assert abs(properties["lastModificationDate"] - time.time()) < 60


def test_missing_and_forbidden_paths(server: Server, connect: Callable[[str | None], Server]) -> None:
    refused(server.get("/path/alice/none?action=properties"), 401, 56)
    refused(server.get("/path/alice/none?action=content"), 401, 56)
    assert server.get("/path/alice/none?action=exists").json() == {"exists": False}
    for path in ("bob", "bob/x", "", "alice/../bob", "../../etc"):
        refused(server.get(f"/path/{path.replace('..', '%2e%2e')}?action=exists"), 401, 50)
    assert connect("shanoir").get("/path/bob?action=exists").json() == {"exists": True}
    server.put("/path/alice/x", data=b"x")
    server.put("/path/alice/.hidden", data=b"x")
    names = [one["platformPath"] for one in server.get("/path/alice?action=list").json()]
    assert names == [server.url_of("alice/executions"), server.url_of("alice/x")]
    refused(server.get("/path/alice/x?action=list"), 400, 70)
    refused(server.get("/path/alice/x"), 400, 85)
    refused(server.get("/path/alice/x?action=y"), 400, 60)
    refused(server.get("/path/alice?action=md5"), 400, 65)
    refused(server.call("DELETE", "/path/alice/none"), 400, 56)
    refused(server.call("DELETE", "/path/alice"), 403, 45)
    refused(server.call("DELETE", "/path/bob/x"), 403, 45)
    refused(server.put("/path/alice/executions/x", data=b"x"), 401, 50)
    assert server.call("DELETE", "/path/alice/x").status_code == 204
    assert server.get("/path/alice/x?action=exists").json() == {"exists": False}


def test_execution(server: Server) -> None:
    server.put_encoded("/path/alice/t1.nii", ANATOMICAL.read_bytes())
    values = {"t1": server.url_of("alice/t1.nii"), "threshold": 0.4}
    identifier = server.create("boutiques_GreyMatter_1.0.json", values)
    refused(server.get(f"/executions/{identifier}/results"), 400, 155)
    refused(server.get(f"/executions/{identifier}/stdout"), 400, 56)
    refused(server.put(f"/executions/{identifier}/kill"), 400, 145)
    server.play(identifier)
    refused(server.put(f"/executions/{identifier}/play"), 400, 135)
    found = server.wait(identifier)
    assert found["status"] == "Finished"
    assert found["inputValues"] == values
    assert abs(found["startDate"] / 1000 - time.time()) < 60
    assert found["endDate"] >= found["startDate"]
    path = f"alice/executions/{identifier}/t1_greymatter.tar.gz"
    assert found["returnedFiles"] == [server.url_of(path)]
    (result,) = server.get(f"/executions/{identifier}/results").json()
    assert (result["platformPath"], result["executionId"]) == (server.url_of(path), identifier)
    with tarfile.open(fileobj=io.BytesIO(server.get(f"/path/{path}?action=content").content)) as archive:
        assert sorted(archive.getnames()) == ["mask.nii.gz", "measures.csv", "settings.json"]
    assert "GreyMatter" in server.get(f"/executions/{identifier}/stdout").text
    refused(server.call("DELETE", f"/executions/{identifier}"), 400, 145)
    assert server.call("DELETE", f"/executions/{identifier}?deleteFiles=true").status_code == 204
    refused(server.get(f"/executions/{identifier}"), 400, 105)
    assert server.get(f"/path/{path}?action=exists").json() == {"exists": False}


def test_finished_says_nothing_about_success(server: Server) -> None:
    found = server.run("boutiques_AlwaysFails_1.0.json", {"reason": "broken"})
    assert (found["status"], found["returnedFiles"]) == ("Finished", [])
    assert "broken" in server.get(f"/executions/{found['identifier']}/stderr").text


def test_checks_at_creation(server: Server) -> None:
    pipeline = "boutiques_EveryType_1.0.json"
    refused(server.post("x", {"text": "x"}), 400, 115)
    refused(server.post(pipeline, {"text": "x"}, identifier="x"), 400, 100)
    refused(server.post(pipeline, {"text": "x"}, timeout=1), 400, 140)
    refused(server.call("POST", "/executions", json={"name": "x"}), 400, 10)
    refused(server.call("POST", "/executions", data=b"{"), 400, 10)
    refused(server.post(pipeline, {"text": "x", "file": server.url_of("alice/none")}), 400, 110)
    assert server.get("/executions/count").json() == 0
    for wrong in (
        {},
        {"text": 5},
        {"text": "x", "count": "5"},
        {"text": "x", "unknown": 1},
        {"text": "x", "words": "y"},
    ):
        refused(server.post(pipeline, wrong), 400, 130)
    server.put("/path/alice/x", data=b"x")
    refused(server.post(pipeline, {"text": "x", "files": [server.url_of("alice/x")]}), 500, 1)
    # All of these were stored.
    assert server.get("/executions/count").json() == 6
    statuses = [one["status"] for one in server.get("/executions").json()]
    assert statuses == ["Initializing"] + ["InitializationFailed"] * 5


def test_lists(server: Server, connect: Callable[[str | None], Server]) -> None:
    identifiers = [server.create("boutiques_EveryType_1.0.json", {"text": str(number)}) for number in range(12)]

    def listed(query: str = "") -> list[str]:
        return [one["identifier"] for one in server.get("/executions" + query).json()]

    assert listed() == identifiers[::-1][:10]
    assert listed("?limit=3&offset=2") == identifiers[::-1][2:5]
    assert connect("bob").get("/executions").json() == []
    seen = connect("bob").get(f"/executions/{identifiers[0]}").json()
    assert "error" in seen["inputValues"]
    refused(connect("bob").put(f"/executions/{identifiers[0]}/play"), 400, 45)


def test_change_and_kill(server: Server) -> None:
    server.put("/path/alice/x", data=b"x")
    values = {"image": server.url_of("alice/x"), "duration": 30}
    identifier = server.create("boutiques_SlowSegmentation_1.0.json", values)
    assert server.put(f"/executions/{identifier}", json={"name": "new"}).status_code == 204
    refused(server.put(f"/executions/{identifier}", json={"status": "Finished"}), 400, 125)
    refused(server.put(f"/executions/{identifier}", json={"identifier": "x"}), 400, 125)
    refused(server.put("/executions/none", json={"name": "new"}), 400, 105)
    server.play(identifier)
    assert server.get(f"/executions/{identifier}").json()["name"] == "new"
    assert server.put(f"/executions/{identifier}/kill").status_code == 204
    assert server.get(f"/executions/{identifier}").json()["status"] == "Killed"
    second = server.create("boutiques_SlowSegmentation_1.0.json", values)
    server.play(second)
    assert server.call("DELETE", f"/executions/{second}").status_code == 204
    assert server.get(f"/executions/{second}").json()["status"] == "Killed"


def test_timeout(server: Server) -> None:
    server.put("/path/alice/x", data=b"x")
    values = {"image": server.url_of("alice/x"), "duration": 30}
    found = server.run("boutiques_SlowSegmentation_1.0.json", values, timeout=2)
    assert found["status"] == "ExecutionFailed"
    assert "timed out" in server.get(f"/executions/{found['identifier']}/stderr").text


def test_stock_server(sandbox: Sandbox, server: Server) -> None:
    sandbox.vip.switches.carmin_stock = True
    identifier = server.create("boutiques_EveryType_1.0.json", {"text": "x"})
    server.play(identifier)
    deadline = time.monotonic() + 10
    while server.get(f"/executions/{identifier}/results").status_code == 400:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    refused(server.get(f"/executions/{identifier}"), 500, 1)
    refused(server.get("/executions"), 500, 1)
    refused(server.put(f"/executions/{identifier}/kill"), 500, 1)
    assert len(server.get(f"/executions/{identifier}/results").json()) == 1
