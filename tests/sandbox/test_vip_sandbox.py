"""Profile `vip` of the VIP sandbox behaves as VIP-portal does, seen with plain requests."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import girder_client
import nibabel
import numpy as np
import psutil
import pytest
import requests

from prefect_biomed.sandbox import Fault, Sandbox
from prefect_biomed.sandbox.vip import PIPELINES, VipSwitches

ANATOMICAL = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
TERMINAL = {"Finished", "ExecutionFailed", "Killed"}


class Portal:
    """The REST API with the key of one user."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url + "/rest"
        self.session = requests.Session()
        if key is not None:
            self.session.headers["apikey"] = key

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.session.request(method, self.url + path, timeout=30, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.call("GET", path, **options)

    def put(self, path: str, **options: Any) -> requests.Response:
        return self.call("PUT", path, **options)

    def at(self, path: str, action: str, **options: Any) -> requests.Response:
        return self.get("/path" + quote(path), params={"action": action}, **options)

    def exists(self, path: str) -> bool:
        found: bool = self.at(path, "exists").json()["exists"]
        return found

    def upload(self, path: str, content: bytes) -> requests.Response:
        return self.put("/path" + quote(path), data=content, headers={"Content-Type": "application/octet-stream"})

    def mkdir(self, path: str) -> None:
        assert self.put("/path" + quote(path)).status_code == 201

    def post(self, pipeline: str, values: dict[str, Any], name: str = "run", **more: Any) -> requests.Response:
        body = {"name": name, "pipelineIdentifier": pipeline, "inputValues": values, **more}
        return self.call("POST", "/executions", json=body)

    def launch(self, pipeline: str, values: dict[str, Any], name: str = "run", **more: Any) -> str:
        answer = self.post(pipeline, values, name, **more)
        assert answer.status_code == 200, answer.text
        identifier: str = answer.json()["identifier"]
        return identifier

    def execution(self, identifier: str) -> dict[str, Any]:
        answer = self.get(f"/executions/{identifier}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def run(self, pipeline: str, values: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self.wait(self.launch(pipeline, values, **more))

    def wait(self, identifier: str) -> dict[str, Any]:
        return until(lambda: self.execution(identifier), lambda found: found["status"] in TERMINAL)


def until(look: Callable[[], Any], done: Callable[[Any], bool], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not done(found := look()):
        assert time.monotonic() < deadline, f"still {found}"
        time.sleep(0.02)
    return found


def refused(answer: requests.Response, status: int, code: int) -> None:
    assert (answer.status_code, answer.json()["errorCode"]) == (status, code), answer.text
    # The official client recognises an error by exactly these keys in this order.
    assert list(answer.json()) == ["errorCode", "errorMessage"]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip") as sandbox:
        yield sandbox


@pytest.fixture
def connect(sandbox: Sandbox) -> Iterator[Callable[[str | None], Portal]]:
    opened: list[Portal] = []

    def connect(user: str | None) -> Portal:
        facts = sandbox.ready()["vip"]
        key = facts["users"][user]["api_key"] if user in facts["users"] else user
        opened.append(Portal(facts["url"], key))
        return opened[-1]

    yield connect
    for portal in opened:
        portal.session.close()


@pytest.fixture
def portal(connect: Callable[[str | None], Portal]) -> Portal:
    return connect("alice")


@pytest.fixture
def t1(portal: Portal) -> str:
    path = "/vip/Home/anatomical.nii"
    assert portal.upload(path, ANATOMICAL.read_bytes()).status_code == 201
    return path


# Keys


def test_wrong_key_everywhere(connect: Callable[[str | None], Portal]) -> None:
    wrong = connect("not-a-key")
    for method, path in [("GET", "/platform"), ("PUT", "/platform"), ("GET", "/pipelines"), ("GET", "/nothing")]:
        answer = wrong.call(method, path)
        refused(answer, 401, 8002)
        assert answer.headers["WWW-Authenticate"] == "header; header-name=apikey"
    refused(connect("dave").get("/platform"), 401, 8004)


def test_no_key(connect: Callable[[str | None], Portal]) -> None:
    nobody = connect(None)
    refused(nobody.get("/pipelines"), 401, 8003)
    refused(nobody.get("/pipelines?public&x=1"), 401, 8003)
    refused(nobody.upload("/vip/Home/x", b"x" * 100_000), 401, 8003)
    assert nobody.get("/platform").json()["maxSizeDirectTransfer"] == 15_000_000
    public = {found["identifier"] for found in nobody.get("/pipelines?public").json()}
    assert "GreyMatter/1.0" in public
    assert "CardioFlow/2.0" not in public


def test_key_is_regenerated(sandbox: Sandbox, portal: Portal, connect: Callable[[str | None], Portal]) -> None:
    assert portal.get("/pipelines").status_code == 200
    sandbox.vip.switches.key_generation += 1
    refused(portal.get("/pipelines"), 401, 8002)
    assert connect("alice").get("/pipelines").status_code == 200


def test_authenticate(sandbox: Sandbox, connect: Callable[[str | None], Portal]) -> None:
    facts = sandbox.ready()["vip"]["users"]["bob"]
    nobody = connect(None)
    right = {"username": facts["email"], "password": facts["password"]}
    answer = nobody.call("POST", "/authenticate", json=right).json()
    assert answer == {"httpHeader": "apikey", "httpHeaderValue": facts["api_key"]}
    refused(nobody.call("POST", "/authenticate", json={**right, "password": "x"}), 401, 8002)


def test_same_seed_same_keys_and_identifiers() -> None:
    seen = []
    for seed in (4, 4, 5):
        with Sandbox("vip", seed=seed) as sandbox:
            facts = sandbox.ready()["vip"]
            portal = Portal(facts["url"], facts["api_key"])
            with portal.session:
                seen.append((facts["api_key"], portal.launch("EveryType/1.0", {"text": "x"})))
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][1].startswith("workflow-")
    assert len(seen[0][1]) == len("workflow-") + 6


def test_unknown_addresses(portal: Portal) -> None:
    refused(portal.get("/nothing"), 404, 8000)
    refused(portal.call("POST", "/path/vip/Home/x", data=b"x"), 405, 8000)
    refused(portal.call("POST", "/executions", data="name=x"), 415, 8000)
    refused(portal.call("POST", "/executions", data="{", headers={"Content-Type": "application/json"}), 400, 8000)
    page = requests.get(portal.url.removesuffix("/rest"), timeout=5)
    assert page.headers["Content-Type"].startswith("text/html")


# Pipelines


def test_pipelines_of_the_groups(portal: Portal, connect: Callable[[str | None], Portal]) -> None:
    listed = portal.get("/pipelines").json()
    identifiers = {found["identifier"] for found in listed}
    assert {"GreyMatter/1.0", "GreyMatter/1.1", "Free Surf (x)/0.3.7"} <= identifiers
    assert not {"GreyMatter/0.9", "CardioFlow/2.0"} & identifiers
    assert all(found["parameters"] == [] and found["description"] is None for found in listed)
    assert all(found["canExecute"] for found in listed)
    refused(portal.get("/pipelines/CardioFlow/2.0"), 400, 8008)
    refused(portal.get("/pipelines/GreyMatter/0.9"), 400, 8007)
    refused(portal.get("/pipelines/GreyMatter/7"), 400, 8007)
    refused(portal.get("/pipelines/x"), 400, 8005)
    assert connect("bob").get("/pipelines/CardioFlow/2.0").status_code == 200


def test_pipeline_by_every_address(portal: Portal) -> None:
    name = "Free Surf (x)/0.3.7"
    answers = [
        portal.get("/pipelines/" + quote(name)),
        portal.get("/pipelines/" + quote(name, safe="")),
        portal.get("/pipelines", params={"pipelineId": name}),
        portal.get("/pipelines/" + quote(name) + "/"),
    ]
    assert len({answer.text for answer in answers}) == 1
    found = answers[0].json()
    assert (found["identifier"], found["name"], found["version"]) == (name, "Free Surf (x)", "0.3.7")
    assert [parameter["name"] for parameter in found["parameters"]] == ["nifti", "directives", "license"]
    assert found["parameters"][1] == {
        "name": "directives",
        "type": "String",
        "isOptional": False,
        "isReturnedValue": False,
        "defaultValue": "-all",
        "description": "Options of recon-all.",
    }


def test_parameter_types_and_descriptor(sandbox: Sandbox, portal: Portal) -> None:
    found = portal.get("/pipelines/EveryType/1.0").json()["parameters"]
    assert {parameter["name"]: parameter["type"] for parameter in found} == {
        "file": "File",
        "text": "String",
        "flag": "Boolean",
        "count": "Int64",
        "ratio": "Double",
        "words": "List",
        "files": "List",
        "comment": "String",
    }
    assert {parameter["name"]: parameter["defaultValue"] for parameter in found if parameter["defaultValue"]} == {
        "count": 5,
        "ratio": 0.5,
    }
    descriptor = portal.get("/pipelines/PairwiseDifference/1.0", params={"format": "boutiques"}).json()
    assert descriptor["custom"] == {"vip:dot": ["fixed", "moving"]}
    assert descriptor["inputs"][0]["list"] is True
    sandbox.vip.switches.placeholder_defaults = True
    found = portal.get("/pipelines/EveryType/1.0").json()["parameters"]
    assert found[0]["defaultValue"] == "$input.getDefaultValue()"


# Paths


def test_put_needs_a_parent(portal: Portal) -> None:
    refused(portal.upload("/vip/Home/a/b.txt", b"x"), 400, 8000)
    assert not portal.exists("/vip/Home/a")
    answer = portal.upload("/vip/Home/a", b"")
    assert (answer.status_code, answer.content) == (201, b"")
    assert portal.at("/vip/Home/a", "properties").json()["isDirectory"] is True
    portal.mkdir("/vip/Home/a/")
    assert portal.upload("/vip/Home/a/b.txt", b"x").status_code == 201


def test_existing_directory_may_be_refused(sandbox: Sandbox, portal: Portal) -> None:
    portal.mkdir("/vip/Home/a")
    sandbox.vip.switches.mkdir_existing_fails = True
    refused(portal.put("/path/vip/Home/a"), 400, 8000)


def test_names_are_rewritten(sandbox: Sandbox, portal: Portal) -> None:
    answer = portal.upload("/vip/Home/ a b é.txt", b"x")
    assert (answer.status_code, answer.content) == (201, b"")
    portal.mkdir("/vip/Home/my dir")
    names = {found["path"] for found in portal.at("/vip/Home", "list").json()}
    assert names == {"/vip/Home/a_b_e.txt", "/vip/Home/my_dir"}
    refused(portal.upload("/vip/Home/my dir/x", b"x"), 400, 8000)
    refused(portal.upload("/vip/Home/日本", b"x"), 400, 8000)
    sandbox.vip.switches.rewrite_names = False
    assert portal.upload("/vip/Home/日 本", b"x").status_code == 201
    assert portal.exists("/vip/Home/日 本")


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "a+b", "a&b;c", "~x'\"", "-", ".hidden"])
def test_quoted_names_come_back(portal: Portal, name: str) -> None:
    assert portal.upload(f"/vip/Home/{name}", b"content").status_code == 201
    assert portal.at(f"/vip/Home/{name}", "content").content == b"content"
    assert [found["path"] for found in portal.at("/vip/Home", "list").json()] == [f"/vip/Home/{name}"]


def test_no_overwriting(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.reschedule_seconds = 0.05
    portal.upload("/vip/Home/x", b"old")
    refused(portal.upload("/vip/Home/x", b"new"), 400, 8000)
    time.sleep(0.4)
    assert portal.at("/vip/Home/x", "content").content == b"old"


def test_refused_upload_is_tried_again(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.reschedule_seconds = 2  # time enough to delete what is in the way
    portal.upload("/vip/Home/x", b"old")
    refused(portal.upload("/vip/Home/x", b"refused before"), 400, 8000)
    assert portal.call("DELETE", "/path/vip/Home/x").status_code == 204
    answer = until(lambda: portal.at("/vip/Home/x", "content"), lambda answer: answer.content == b"refused before")
    assert answer.status_code == 200


def test_deletion_takes_effect_later(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.delete_seconds = 0.3
    portal.mkdir("/vip/Home/a")
    portal.upload("/vip/Home/a/x", b"x")
    assert portal.call("DELETE", "/path/vip/Home/a").status_code == 204
    assert portal.exists("/vip/Home/a")
    until(lambda: portal.exists("/vip/Home/a"), lambda found: not found)
    refused(portal.call("DELETE", "/path/vip/Home/a"), 400, 8000)
    refused(portal.call("DELETE", "/path/vip/Home"), 400, 8013)


def test_lost_deletion(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.lose_deletes = 1
    portal.upload("/vip/Home/x", b"x")
    assert portal.call("DELETE", "/path/vip/Home/x").status_code == 204
    time.sleep(0.3)
    assert portal.exists("/vip/Home/x")
    portal.call("DELETE", "/path/vip/Home/x")
    until(lambda: portal.exists("/vip/Home/x"), lambda found: not found)


def test_properties(portal: Portal) -> None:
    portal.mkdir("/vip/Home/a")
    portal.upload("/vip/Home/a/x.txt", b"12345")
    assert portal.at("/vip/Home/a/x.txt", "properties").json() == {
        "path": "/vip/Home/a/x.txt",
        "lastModificationDate": None,
        "isDirectory": False,
        "exists": True,
        "size": 5,
        "executionId": None,
        "mimeType": "text/plain",
    }
    directory = portal.at("/vip/Home/a", "properties").json()
    assert (directory["size"], directory["mimeType"]) == (1, "text/directory")
    assert abs(directory["lastModificationDate"] - time.time()) < 60
    missing = portal.at("/vip/Home/none/none", "properties")
    assert missing.status_code == 200
    assert missing.json()["exists"] is False
    assert {value for key, value in missing.json().items() if key not in ("exists", "path")} == {None}


def test_what_paths_do_not_give(sandbox: Sandbox, portal: Portal) -> None:
    portal.upload("/vip/Home/x", b"12345")
    refused(portal.at("/vip/Home/x", "list"), 400, 8000)
    refused(portal.at("/vip/Home/none", "list"), 400, 8000)
    for path in ("/vip", "/vip/Home", "/vip/Home/none"):
        refused(portal.at(path, "content"), 400, 8000)
    refused(portal.at("/vip/Home/x", "md5"), 400, 8000)
    refused(portal.get("/path/vip/Home/x"), 400, 8000)
    sandbox.vip.switches.max_direct_transfer_bytes = 4
    refused(portal.at("/vip/Home/x", "content"), 400, 8000)
    assert portal.get("/platform").json()["maxSizeDirectTransfer"] == 4


def test_tree_and_permissions(portal: Portal, connect: Callable[[str | None], Portal]) -> None:
    top = [found["path"] for found in portal.at("/vip", "list").json()]
    assert top == ["/vip/Home", "/vip/Trash", "/vip/Neuroimaging (group)", "/vip/Open Science (group)"]
    for path in ("/etc/passwd", "/vip/Cardiology (group)", "/vip/Users/bob", "/vip/Home/../../etc", "/vip/x"):
        refused(portal.at(path, "exists"), 400, 8013)
    assert portal.exists("/vip/Home/none/../../Trash")
    for path in ("/vip", "/vip/Home", "/vip/new"):
        refused(portal.upload(path, b"x"), 400, 8013)
    assert portal.upload("/vip/Neuroimaging (group)/shared.txt", b"x").status_code == 201
    beginner = connect("carol")
    assert beginner.at("/vip/Neuroimaging (group)/shared.txt", "content").content == b"x"
    refused(beginner.upload("/vip/Neuroimaging (group)/y", b"x"), 400, 8013)
    refused(beginner.call("DELETE", "/path/vip/Neuroimaging (group)/shared.txt"), 400, 8013)
    assert not beginner.exists("/vip/Home/shared.txt")
    assert [found["path"] for found in portal.at("/vip/Home/", "list").json()] == []


def test_carmin_json_upload(portal: Portal) -> None:
    def put(**body: object) -> requests.Response:
        headers = {"Content-Type": "application/carmin+json"}
        return portal.put("/path/vip/Home/" + str(body.pop("name")), data=json.dumps(body), headers=headers)

    assert put(name="a.bin", base64Content="AP8=", type="File", md5="ignored").status_code == 201
    assert portal.at("/vip/Home/a.bin", "content").content == b"\x00\xff"
    assert put(name="empty", base64Content="", type="File").status_code == 201
    assert portal.at("/vip/Home/empty", "properties").json()["size"] == 0
    refused(put(name="b", base64Content="AP8=", type="Archive"), 400, 8000)
    refused(put(name="b", base64Content="A\nP8=", type="File"), 400, 8000)
    refused(put(name="b", type="File"), 400, 8009)


def test_late_upload(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.transfer_limit_seconds = 0.1
    sandbox.vip.switches.transfer_seconds = 0.5
    refused(portal.upload("/vip/Home/x", b"late"), 400, 8000)
    assert not portal.exists("/vip/Home/x")
    until(lambda: portal.exists("/vip/Home/x"), bool)


def test_rescheduled_upload(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.reschedule_uploads = 1
    sandbox.vip.switches.reschedule_seconds = 0.3
    refused(portal.upload("/vip/Home/x", b"late"), 400, 8000)
    assert not portal.exists("/vip/Home/x")
    assert portal.upload("/vip/Home/y", b"at once").status_code == 201
    until(lambda: portal.exists("/vip/Home/x"), bool)


def test_slow_fetch_is_cached(sandbox: Sandbox, portal: Portal) -> None:
    portal.upload("/vip/Home/x", b"content")
    sandbox.vip.switches.download_seconds = 0.4
    sandbox.vip.switches.transfer_limit_seconds = 0.1
    refused(portal.at("/vip/Home/x", "content"), 400, 8000)
    time.sleep(0.5)
    begun = time.monotonic()
    assert portal.at("/vip/Home/x", "content").content == b"content"
    assert time.monotonic() - begun < 0.2


def test_transfers_compete(sandbox: Sandbox) -> None:
    sandbox.vip.switches.transfer_seconds = 0.2
    sandbox.vip.switches.transfer_slots = 2
    facts = sandbox.ready()["vip"]

    def upload(number: int) -> None:
        portal = Portal(facts["url"], facts["api_key"])
        with portal.session:
            assert portal.upload(f"/vip/Home/{number}", b"x").status_code == 201

    begun = time.monotonic()
    threads = [threading.Thread(target=upload, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun >= 0.6
    assert sandbox.vip.journal.peak(method="PUT") == 6


def test_ranges(sandbox: Sandbox, portal: Portal) -> None:
    portal.upload("/vip/Home/x", b"0123456789")
    answer = portal.at("/vip/Home/x", "content", headers={"Range": "bytes=4-"})
    assert (answer.status_code, answer.content) == (206, b"456789")
    assert answer.headers["Accept-Ranges"] == "bytes"
    sandbox.vip.switches.ranges = False
    answer = portal.at("/vip/Home/x", "content", headers={"Range": "bytes=4-"})
    assert (answer.status_code, answer.content) == (200, b"0123456789")
    assert answer.headers["Content-Length"] == "10"
    assert "Accept-Ranges" not in answer.headers


def test_broken_upload_leaves_nothing(sandbox: Sandbox, portal: Portal) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionAbortedError

    with pytest.raises(requests.ConnectionError):
        portal.put("/path/vip/Home/x", data=broken())
    assert not portal.exists("/vip/Home/x")
    until(lambda: list((sandbox.vip.directory / "storage" / "spool").iterdir()), lambda found: not found)


def test_faults_reach_the_api(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.faults.add(Fault(method="PUT", path="/path/", calls=[1], status=502, body="<html>Bad Gateway</html>"))
    assert portal.upload("/vip/Home/x", b"x").status_code == 502
    assert not portal.exists("/vip/Home/x")
    assert portal.upload("/vip/Home/x", b"x").status_code == 201


# Executions


def test_execution_object(portal: Portal, t1: str) -> None:
    before = time.time()
    begun = portal.post("GreyMatter/1.0", {"t1": t1}, name="my run", resultsLocation="/vip/Home/out")
    assert begun.status_code == 200
    found = portal.wait(begun.json()["identifier"])
    assert list(found) == [
        *("identifier", "name", "pipelineIdentifier", "timeout", "status", "inputValues", "returnedFiles"),
        *("studyIdentifier", "errorCode", "startDate", "endDate", "resultsLocation", "jobs"),
    ]
    assert (found["name"], found["pipelineIdentifier"], found["status"]) == ("my run", "GreyMatter/1.0", "Finished")
    assert abs(found["startDate"] / 1000 - before) < 10
    assert found["endDate"] is found["resultsLocation"] is found["errorCode"] is None
    directory = found["inputValues"]["results-directory"]
    assert directory.startswith("/vip/Home/out/20")
    assert found["inputValues"] == {"t1": t1, "threshold": "0.35", "results-directory": directory}
    assert found["returnedFiles"] == {"archive": [directory + "/anatomical_greymatter.tar.gz"]}
    assert found["jobs"] == {"0": {"status": "COMPLETED", "exitCode": 0, "exitMessage": "ok"}}
    results = portal.get(f"/executions/{found['identifier']}/results").json()
    assert [(one["path"], one["exists"]) for one in results] == [(found["returnedFiles"]["archive"][0], True)]


def test_exact_pipeline(portal: Portal, t1: str) -> None:
    archives = []
    for version in ("1.0", "1.0", "1.1"):
        found = portal.run(f"GreyMatter/{version}", {"t1": t1, "label": "x"}, resultsLocation=f"/vip/Home/{version}")
        archives.append(portal.at(found["returnedFiles"]["archive"][0], "content").content)
    first, second, other = (members(archive) for archive in archives)
    assert sorted(first) == ["mask.nii.gz", "measures.csv", "settings.json"]
    assert archives[0] != archives[1]
    assert first["mask.nii.gz"] != second["mask.nii.gz"]
    assert decompressed(first) == decompressed(second)
    assert first["measures.csv"] != other["measures.csv"]
    mask = np.asarray(nibabel.Nifti1Image.from_bytes(decompressed(first)["mask.nii.gz"]).dataobj)
    assert mask.shape == nibabel.load(ANATOMICAL).shape
    assert f"voxels,{int(mask.sum())},1\n" in first["measures.csv"].decode()


def test_odd_execution(sandbox: Sandbox, portal: Portal, t1: str) -> None:
    sandbox.vip.switches.odd_execution = 2
    runs = []
    for number in range(3):
        found = portal.run("GreyMatter/1.0", {"t1": t1}, resultsLocation=f"/vip/Home/{number}")
        runs.append(decompressed(members(portal.at(found["returnedFiles"]["archive"][0], "content").content)))
    assert runs[0] == runs[2]
    assert {name for name in runs[0] if runs[0][name] != runs[1][name]} == {"measures.csv"}


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        return {one.name: packed.extractfile(one).read() for one in packed.getmembers()}  # type: ignore[union-attr]  # files only


def decompressed(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: gzip.decompress(content) if name.endswith(".gz") else content for name, content in found.items()}


def test_noisy_pipeline(sandbox: Sandbox, portal: Portal, t1: str) -> None:
    def brain() -> Any:
        found = portal.run("SkullStripNoisy/1.0", {"t1": t1})
        content = portal.at(found["returnedFiles"]["brain"][0], "content").content
        return np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj, dtype=float)

    sandbox.vip.switches.noise_digits = 4
    first, second = brain(), brain()
    inside = first != 0
    relative = np.abs(first[inside] - second[inside]) / first[inside]
    assert 2e-5 < np.sqrt((relative**2).mean()) < 5e-4
    sandbox.vip.switches.noise_digits = 12
    sandbox.vip.switches.math_library = "alternative"
    shifted = brain()
    assert np.mean(shifted[inside] / first[inside]) == pytest.approx(1.001, abs=2e-4)


def test_failing_pipeline(portal: Portal) -> None:
    found = portal.run("AlwaysFails/1.0", {"reason": "no more memory", "exit_status": 9})
    assert found["status"] == "ExecutionFailed"
    assert found["returnedFiles"] is None
    assert found["jobs"]["0"] == {"status": "ERROR", "exitCode": 50, "exitMessage": "the tool exited with status 9"}
    answer = portal.get(f"/executions/{found['identifier']}/stderr")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "no more memory" in answer.text
    assert "AlwaysFails/1.0" in portal.get(f"/executions/{found['identifier']}/stdout").text


def test_missing_input_shows_up_only_later(sandbox: Sandbox, portal: Portal) -> None:
    found = portal.run("GreyMatter/1.0", {"t1": "/vip/Home/none.nii"})
    assert (found["status"], found["jobs"]["0"]["exitCode"]) == ("ExecutionFailed", 40)
    sandbox.vip.switches.missing_input = "hold"
    identifier = portal.launch("GreyMatter/1.0", {"t1": "/vip/Home/none.nii"})
    held = until(lambda: portal.execution(identifier), lambda one: one["jobs"].get("0", {})["status"] == "ERROR_HELD")
    assert held["status"] == "Running"


def test_not_an_image(portal: Portal) -> None:
    portal.upload("/vip/Home/x.nii", b"not an image")
    found = portal.run("GreyMatter/1.0", {"t1": "/vip/Home/x.nii"})
    assert found["status"] == "ExecutionFailed"
    assert "not a readable image" in portal.get(f"/executions/{found['identifier']}/stderr").text


def test_cross_product_and_partial_success(portal: Portal, t1: str) -> None:
    portal.upload("/vip/Home/second.nii", ANATOMICAL.read_bytes())
    values = {"image": [t1, "/vip/Home/second.nii"], "slice": [1, 2, 3], "fail_on": 2}
    found = portal.run("SliceStatistics/2.0", values)
    assert found["status"] == "Finished"
    assert [found["jobs"][str(number)]["status"] for number in range(6)] == ["COMPLETED", "ERROR", "COMPLETED"] * 2
    assert len(found["returnedFiles"]["statistics"]) == 4
    assert found["inputValues"]["slice"] == "1"
    identifier = found["identifier"]
    assert "corrupt" not in portal.get(f"/executions/{identifier}/stderr").text
    assert "slice 2 is corrupt" in portal.get(f"/executions/{identifier}/jobs/1/stderr").text
    assert "slice 2 is corrupt" in portal.get(f"/executions/{identifier}/jobs/4/stderr").text
    refused(portal.get(f"/executions/{identifier}/jobs/x/stderr"), 400, 8000)


def test_text_with_separator_is_a_list(portal: Portal) -> None:
    found = portal.run("EveryType/1.0", {"text": "x@@y", "flag": True, "count": 7, "ratio": 1e-7})
    assert len(found["jobs"]) == 2
    written = [json.loads(portal.at(path, "content").content) for path in found["returnedFiles"]["values"]]
    assert sorted(one["text"] for one in written) == ["x", "y"]
    assert (written[0]["flag"], written[0]["count"], written[0]["ratio"]) == ("true", "7", "1.0E-7")


def test_dot(portal: Portal, t1: str) -> None:
    found = portal.run("PairwiseDifference/1.0", {"fixed": [t1, t1], "moving": [t1, t1]})
    assert (found["status"], len(found["jobs"])) == ("Finished", 2)
    found = portal.run("PairwiseDifference/1.0", {"fixed": [t1, t1], "moving": [t1, t1, t1]})
    assert (found["status"], found["jobs"]) == ("ExecutionFailed", {})
    assert portal.get(f"/executions/{found['identifier']}/stdout").text == "no log found"


def test_counters_and_folders(portal: Portal) -> None:
    found = portal.run("MonteCarlo/2.3", {"run": 3}, resultsLocation="/vip/Home/mc")
    assert sorted(found["returnedFiles"]["run_file"]) == [f"/vip/Home/mc/run000{number}.json" for number in range(3)]
    portal.mkdir("/vip/Home/folder")
    for name in ("a", "b"):
        portal.upload(f"/vip/Home/folder/{name}", name.encode())
    found = portal.run("FolderChecksums/1.0", {"folder": "/vip/Home/folder"})
    assert sorted(path.split("/")[-1] for path in found["returnedFiles"]["checksum"]) == ["a.csv", "b.csv"]


def test_too_many_jobs_fail_after_the_launch(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.max_jobs = 3
    found = portal.run("MonteCarlo/2.3", {"run": 4})
    assert (found["status"], found["jobs"]) == ("ExecutionFailed", {})


def test_checks_at_launch(portal: Portal, t1: str) -> None:
    def post(**body: object) -> requests.Response:
        return portal.call("POST", "/executions", json=body)

    good: dict[str, Any] = {"name": "x", "pipelineIdentifier": "EveryType/1.0", "inputValues": {"text": "x"}}
    refused(post(**{**good, "name": "a.b"}), 400, 8019)
    refused(post(**{**good, "name": ""}), 400, 8019)
    refused(post(**{**good, "name": None}), 400, 8009)
    refused(post(pipelineIdentifier="EveryType/1.0"), 400, 8009)
    for value in ("it's", "", "a#b", "a%41", "é", "a\nb", ["ok", "a*"]):
        refused(post(**{**good, "inputValues": {"text": value}}), 400, 8009)
    for value in (None, ["x", None]):
        refused(post(**{**good, "inputValues": {"text": value}}), 500, 8000)
    missing = post(**{**good, "inputValues": {}})
    refused(missing, 400, 8018)
    assert "text" in missing.json()["errorMessage"]
    refused(post(**{**good, "pipelineIdentifier": "x"}), 400, 8005)
    refused(post(**{**good, "pipelineIdentifier": "x/1"}), 400, 8007)
    refused(post(**{**good, "pipelineIdentifier": "CardioFlow/2.0"}), 400, 8008)
    # The first check that fails decides.
    refused(post(name="a.b", pipelineIdentifier="x", inputValues={"text": "it's"}), 400, 8009)
    refused(post(name="a.b", pipelineIdentifier="x", inputValues={}), 400, 8019)
    for path in ("/vip/Cardiology (group)/x", "/vip/Users/bob/x", "srm:1234"):
        refused(post(**{**good, "inputValues": {"text": "x", "file": path}}), 400, 8000)
    assert post(**{**good, "inputValues": {"text": "x", "unknown": "y"}, "timeout": 5, "x": 1}).status_code == 200
    assert len(portal.get("/executions").json()) == 1


def test_lists(portal: Portal, connect: Callable[[str | None], Portal]) -> None:
    identifiers = [
        portal.run("EveryType/1.0", {"text": "x"}, name=f"run {number}")["identifier"] for number in range(3)
    ]
    listed = portal.get("/executions").json()
    assert [one["identifier"] for one in listed] == identifiers[::-1]
    assert all(one["inputValues"] == one["returnedFiles"] == one["jobs"] == {} for one in listed)
    assert [one["name"] for one in portal.get("/executions?limit=2").json()] == ["run 2", "run 1"]
    for query in ("limit=501", "offset=0", "studyIdentifier=x", "limit=x"):
        refused(portal.get("/executions?" + query), 400, 8000)
    count = portal.get("/executions/count")
    assert (count.text, count.headers["Content-Type"]) == ("3", "text/plain; charset=utf-8")
    assert connect("bob").get("/executions").json() == []


def test_executions_of_others(portal: Portal, connect: Callable[[str | None], Portal]) -> None:
    identifier = portal.launch("EveryType/1.0", {"text": "x"})
    other = connect("bob")
    for answer in (
        other.get(f"/executions/{identifier}"),
        other.get(f"/executions/{identifier}/stdout"),
        other.put(f"/executions/{identifier}/kill"),
        portal.get("/executions/workflow-none"),
    ):
        refused(answer, 400, 8000)
    page = portal.get(f"/executions/{identifier}/summary")
    assert page.status_code == 403
    assert page.headers["Content-Type"].startswith("text/html")
    assert connect("shanoir").get(f"/executions/{identifier}/summary").json()["inputValues"] == {}


def test_examples(portal: Portal, connect: Callable[[str | None], Portal]) -> None:
    (example,) = connect("bob").get("/executions/examples").json()
    assert (example["status"], example["inputValues"]) == ("Finished", {})
    found = until(
        lambda: portal.get(f"/executions/examples/{example['identifier']}").json(), lambda one: one["returnedFiles"]
    )
    assert json.loads(portal.at(found["returnedFiles"]["values"][0], "content").content)["text"] == "an example"
    assert portal.get("/executions").json() == []
    identifier = portal.launch("EveryType/1.0", {"text": "x"})
    refused(portal.get(f"/executions/examples/{identifier}"), 400, 8016)


def test_rename(portal: Portal) -> None:
    identifier = portal.launch("EveryType/1.0", {"text": "x"})
    body = {"name": "new name", "pipelineIdentifier": "anything"}
    assert portal.put(f"/executions/{identifier}", json=body).json()["name"] == "new name"
    refused(portal.put(f"/executions/{identifier}", json={"name": "x"}), 400, 8009)
    refused(portal.put(f"/executions/{identifier}", json={**body, "name": "a.b"}), 400, 8019)
    refused(portal.put(f"/executions/{identifier}", json={**body, "timeout": 5}), 400, 8000)
    refused(portal.put(f"/executions/{identifier}/play"), 400, 8001)


def test_delete_is_a_trap_and_kill_kills(sandbox: Sandbox, portal: Portal, t1: str) -> None:
    sandbox.vip.switches.kill_seconds = 0.3
    identifier = portal.launch("SlowSegmentation/1.0", {"image": t1, "duration": 30})
    answer = portal.call("DELETE", f"/executions/{identifier}?deleteFiles=true")
    assert (answer.status_code, answer.json()["status"]) == (200, "Running")
    assert portal.put(f"/executions/{identifier}/kill").status_code == 204
    assert portal.execution(identifier)["status"] == "Unknown"
    killed = portal.wait(identifier)
    assert (killed["status"], killed["returnedFiles"]) == ("Killed", {})
    assert killed["jobs"]["0"]["status"] == "KILL"


def test_kill_does_not_look(portal: Portal) -> None:
    identifier = portal.run("EveryType/1.0", {"text": "x"})["identifier"]
    assert portal.put(f"/executions/{identifier}/kill").status_code == 204
    killed = portal.execution(identifier)
    assert killed["status"] == "Killed"
    assert len(killed["returnedFiles"]["values"]) == 1


def test_deleting_executions(portal: Portal) -> None:
    failed = portal.run("AlwaysFails/1.0", {})["identifier"]
    refused(portal.put(f"/executions/{failed}/delete", json={"deleteFiles": True}), 400, 8000)
    found = portal.run("EveryType/1.0", {"text": "x"}, resultsLocation="/vip/Home/out")
    refused(portal.put(f"/executions/{found['identifier']}/delete", json={}), 400, 8009)
    assert portal.put(f"/executions/{found['identifier']}/delete", json={"deleteFiles": True}).status_code == 204
    refused(portal.get(f"/executions/{found['identifier']}"), 400, 8015)
    assert [one["identifier"] for one in portal.get("/executions").json()] == [failed]
    (path,) = found["returnedFiles"]["values"]
    until(lambda: portal.exists(path), lambda found: not found)
    assert portal.exists(path.rpartition("/")[0])


def test_results_that_were_deleted(portal: Portal) -> None:
    found = portal.run("EveryType/1.0", {"text": "x"})
    (path,) = found["returnedFiles"]["values"]
    portal.call("DELETE", "/path" + path)
    until(lambda: portal.exists(path), lambda found: not found)
    (result,) = portal.get(f"/executions/{found['identifier']}/results").json()
    assert (result["path"], result["exists"]) == (path, False)


def test_capacity_is_freed_by_looking(
    sandbox: Sandbox, portal: Portal, connect: Callable[[str | None], Portal]
) -> None:
    sandbox.vip.switches.max_running_user = 1
    # Long enough for the answer of the launch, which is a look, too, to come before the end.
    sandbox.vip.switches.job_seconds = 0.3
    identifier = portal.launch("EveryType/1.0", {"text": "x"})
    engine = sandbox.vip.engine
    until(lambda: engine.find(identifier), lambda one: one is not None and one.ended is not None)
    refused(portal.post("EveryType/1.0", {"text": "x"}), 400, 2001)
    portal.get("/executions")
    portal.launch("EveryType/1.0", {"text": "x"})
    sandbox.vip.switches.max_running_platform = 1
    refused(connect("bob").post("EveryType/1.0", {"text": "x"}), 400, 2000)


def test_engine_lag(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.unknown_seconds = 0.2
    sandbox.vip.switches.ready_seconds = 0.2
    begun = portal.post("EveryType/1.0", {"text": "x"}).json()
    assert (begun["status"], begun["inputValues"], begun["returnedFiles"]) == ("Unknown", {}, None)
    seen = [begun["status"]]

    def look() -> str:
        seen.append(portal.execution(begun["identifier"])["status"])
        return seen[-1]

    until(look, lambda status: status == "Finished")
    assert list(dict.fromkeys(status for status in seen if status != "Running")) == ["Unknown", "Ready", "Finished"]


def test_name_shows_up_later(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.unnamed_seconds = 0.3
    begun = portal.post("EveryType/1.0", {"text": "x"}, name="my run").json()
    assert begun["name"] == begun["identifier"]
    until(lambda: portal.get("/executions").json()[0]["name"], lambda name: name == "my run")


def test_status_script(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.status_script = ["Unknown", "Ready", "Running", "Unknown"]
    begun = portal.post("EveryType/1.0", {"text": "x"}).json()
    seen = [begun["status"], *(portal.execution(begun["identifier"])["status"] for _ in range(3))]
    assert seen == ["Unknown", "Ready", "Running", "Unknown"]
    assert portal.wait(begun["identifier"])["status"] == "Finished"


def test_held_job(sandbox: Sandbox, portal: Portal, t1: str) -> None:
    sandbox.vip.switches.held_jobs = [1]
    identifier = portal.launch("SliceStatistics/2.0", {"image": t1, "slice": [1, 2]})
    held = until(lambda: portal.execution(identifier), lambda one: one["returnedFiles"] is not None)
    until(lambda: portal.execution(identifier)["jobs"]["1"]["status"], lambda status: status == "ERROR_HELD")
    assert held["status"] == "Running"
    assert len(held["returnedFiles"]["statistics"]) == 1
    portal.put(f"/executions/{identifier}/kill")
    killed = portal.wait(identifier)
    assert (killed["status"], len(killed["returnedFiles"]["statistics"])) == ("Killed", 1)


def test_unreachable_engine(sandbox: Sandbox, portal: Portal, t1: str) -> None:
    identifier = portal.launch("SlowSegmentation/1.0", {"image": t1, "duration": 30})
    sandbox.vip.switches.engine_unreachable = True
    refused(portal.get(f"/executions/{identifier}"), 400, 8000)
    refused(portal.get("/executions"), 400, 8000)
    refused(portal.post("EveryType/1.0", {"text": "x"}), 400, 8000)
    refused(portal.put(f"/executions/{identifier}/kill"), 400, 8000)
    sandbox.vip.switches.engine_unreachable = False
    assert portal.execution(identifier)["status"] == "Killed"


@pytest.mark.parametrize(
    ("collision", "statuses"), [("replace", {"Finished"}), ("fail", {"Finished", "ExecutionFailed"})]
)
def test_runs_of_one_second_share_a_directory(
    sandbox: Sandbox, portal: Portal, collision: str, statuses: set[str]
) -> None:
    sandbox.vip.switches.clock_seconds = 1_700_000_000
    sandbox.vip.switches.result_collision = collision
    runs = [portal.run("EveryType/1.0", {"text": "x"}, resultsLocation="/vip/Home/out") for _ in range(2)]
    assert {run["status"] for run in runs} == statuses
    assert {run["inputValues"]["results-directory"] for run in runs} == {"/vip/Home/out/2023-11-14_221320"}
    if collision == "fail":
        assert runs[1]["jobs"]["0"]["exitCode"] == 32


def test_older_portals(sandbox: Sandbox, portal: Portal) -> None:
    switches = sandbox.vip.switches
    switches.jobs_map, switches.date_unit = False, "s"
    switches.result_directory_format = "%d-%m-%Y_%H:%M:%S"
    found = portal.run("EveryType/1.0", {"text": "x"})
    assert "jobs" not in found
    assert abs(found["startDate"] - time.time()) < 60
    (path,) = found["returnedFiles"]["values"]
    assert path.count(":") == 2
    assert portal.at(path, "content").status_code == 200


def test_launches_wait_for_each_other(sandbox: Sandbox) -> None:
    sandbox.vip.switches.launch_seconds = 0.2
    facts = sandbox.ready()["vip"]

    def launch() -> None:
        portal = Portal(facts["url"], facts["api_key"])
        with portal.session:
            portal.launch("EveryType/1.0", {"text": "x"})

    begun = time.monotonic()
    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun >= 0.6


def test_hostile_outputs(portal: Portal) -> None:
    found = portal.run("HostileOutputs/1.0", {"kind": "parent"})
    with tarfile.open(fileobj=io.BytesIO(portal.at(found["returnedFiles"]["result"][0], "content").content)) as packed:
        assert "../escaped.txt" in packed.getnames()
    found = portal.run("HostileOutputs/1.0", {"kind": "outside"}, resultsLocation="/vip/Home/out")
    assert found["returnedFiles"]["result"] == ["/vip/Home/outside/result.txt"]
    found = portal.run("HostileOutputs/1.0", {"kind": "colon"})
    assert ":" in found["returnedFiles"]["result"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "members"), [("many", 150_000), ("bomb", 1)])
def test_archives_that_are_too_much(portal: Portal, kind: str, members: int) -> None:
    found = portal.run("HostileOutputs/1.0", {"kind": kind})
    content = portal.at(found["returnedFiles"]["result"][0], "content").content
    assert len(content) < 5_000_000
    with tarfile.open(fileobj=io.BytesIO(content)) as packed:
        first = packed.next()
        assert first is not None
        assert first.size == (1 << 30 if kind == "bomb" else 0)
        if kind == "many":
            assert len(packed.getnames()) == members


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    size, limit = 300 * 2**20, 40 * 2**20
    command = [sys.executable, "-m", "prefect_biomed.sandbox", "vip", "--set", f"vip.max_direct_transfer_bytes={size}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())["vip"]
        portal = Portal(facts["url"], facts["api_key"])
        measured = psutil.Process(process.pid)
        idle = measured.memory_info().rss
        big = tmp_path / "big"
        with big.open("wb") as stream:
            stream.truncate(size)
        with portal.session:
            with big.open("rb") as stream:
                assert portal.put("/path/vip/Home/big", data=stream).status_code == 201
            assert measured.memory_info().rss - idle < limit
            with portal.at("/vip/Home/big", "content", stream=True) as answer:
                received = 0
                for chunk in answer.iter_content(1 << 20):
                    received += len(chunk)
                    if received % (50 << 20) == 0:
                        assert measured.memory_info().rss - idle < limit
            assert received == size
            portal.run("CopyFile/1.0", {"file": "/vip/Home/big"})
            assert measured.memory_info().rss - idle < limit
        process.terminate()
        assert process.wait(10) == 0


def test_no_secret_in_the_journal(sandbox: Sandbox, portal: Portal, t1: str) -> None:
    portal.run("GreyMatter/1.0", {"t1": t1})
    written = json.dumps(requests.get(sandbox.vip.url + "/_sandbox/journal", timeout=5).json())
    assert sandbox.ready()["vip"]["api_key"] not in written


# Girder


@pytest.fixture
def girder(sandbox: Sandbox) -> Any:
    facts = sandbox.ready()["vip"]["girder"]
    client = girder_client.GirderClient(apiUrl=facts["api_url"])
    client.authenticate(apiKey=facts["api_key"])
    return client


def test_girder_keys(sandbox: Sandbox, girder: Any) -> None:
    assert girder.get("user/me")["login"] == "alice"
    stranger = girder_client.GirderClient(apiUrl=girder.urlBase)
    with pytest.raises(girder_client.HttpError) as wrong:
        stranger.authenticate(apiKey="wrong")
    assert wrong.value.status == 400
    with pytest.raises(girder_client.HttpError) as nobody:
        stranger.get("folder", {"parentType": "collection", "parentId": "0" * 24})
    assert nobody.value.status == 401
    # As a form, which keeps the key out of logs.
    as_form = requests.post(
        girder.urlBase + "api_key/token", data={"key": sandbox.ready()["vip"]["girder"]["api_key"]}, timeout=5
    )
    assert stranger.urlBase == girder.urlBase
    assert as_form.json()["user"]["login"] == "alice"
    facts = sandbox.ready()["vip"]["users"]["bob"]
    stranger.authenticate(username="bob", password=facts["password"])
    assert stranger.resourceLookup("/collection/Restricted/Data")["name"] == "Data"
    with pytest.raises(girder_client.HttpError) as denied:
        girder.resourceLookup("/collection/Restricted/Data")
    assert denied.value.status == 403
    written = json.dumps(requests.get(sandbox.vip.url + "/_sandbox/journal", timeout=5).json())
    assert sandbox.ready()["vip"]["girder"]["api_key"] not in written


def test_girder_files(girder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = girder.resourceLookup("/collection/Sandbox/Inputs")
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 10)
    whole = girder.uploadFileToFolder(folder["_id"], str(tmp_path / "a.bin"))
    assert (whole["_modelType"], whole["size"]) == ("file", 2560)
    # In chunks, as a large file.
    monkeypatch.setattr(girder, "MAX_CHUNK_SIZE", 1000)
    chunked = girder.uploadFileToFolder(folder["_id"], str(tmp_path / "a.bin"), filename="b.bin")
    again = girder.uploadFileToFolder(folder["_id"], str(tmp_path / "a.bin"), filename="b.bin")
    assert [item["name"] for item in girder.listItem(folder["_id"])] == ["a.bin", "b.bin", "b.bin (1)"]
    for file in (whole, chunked, again):
        buffer = io.BytesIO()
        girder.downloadFile(file["_id"], buffer)
        assert buffer.getvalue() == bytes(range(256)) * 10
    girder.uploadFileContents(chunked["_id"], io.BytesIO(b"new"), 3)
    assert girder.getFile(chunked["_id"])["size"] == 3
    path = "/collection/Sandbox/Inputs/a.bin/a.bin"
    assert girder.resourceLookup(path)["_id"] == whole["_id"]
    assert girder.get(f"resource/{whole['_id']}/path", {"type": "file"}) == path
    girder.delete(f"folder/{folder['_id']}")
    with pytest.raises(girder_client.HttpError) as missing:
        girder.resourceLookup(path)
    assert missing.value.status == 400


def test_girder_folders_and_metadata(girder: Any) -> None:
    parent = girder.resourceLookup("/collection/Sandbox/Results")["_id"]
    folder = girder.createFolder(parent, "run", description="x", metadata={"a": 1, "b": None})
    assert folder["meta"] == {"a": 1}
    assert girder.createFolder(parent, "run", reuseExisting=True)["_id"] == folder["_id"]
    with pytest.raises(girder_client.HttpError, match="already exists here"):
        girder.createFolder(parent, "run")
    girder.addMetadataToFolder(folder["_id"], {"a": None, "session": {"name": "s"}})
    assert girder.getFolder(folder["_id"])["meta"] == {"session": {"name": "s"}}
    with pytest.raises(girder_client.HttpError, match="a\\.b"):
        girder.addMetadataToFolder(folder["_id"], {"a.b": 1})
    for wrong in ("0" * 24, "x"):
        with pytest.raises(girder_client.HttpError) as missing:
            girder.getFolder(wrong)
        assert missing.value.status == 400


def test_girder_inputs_and_results(portal: Portal, girder: Any) -> None:
    inputs = girder.resourceLookup("/collection/Sandbox/Inputs")["_id"]
    results = girder.resourceLookup("/collection/Sandbox/Results")["_id"]
    file = girder.uploadFileToFolder(inputs, str(ANATOMICAL))
    body = {"t1": f"pilotGirder:{file['_id']}"}
    # Without the user's key, VIP cannot fetch anything from Girder.
    refused(portal.post("GreyMatter/1.0", body), 400, 8000)
    keys = {"storageIdentifier": "pilotGirder", "apiKey": "wrong"}
    assert portal.put("/user/externalKeys", json=keys).status_code == 204
    refused(portal.post("GreyMatter/1.0", body), 400, 8000)
    keys["apiKey"] = girder_key = portal_girder_key(portal)
    assert portal.put("/user/externalKeys", json=keys).status_code == 204
    assert portal.get("/user/externalKeys").json()[0]["apiKey"] == girder_key
    refused(portal.put("/user/externalKeys", json={**keys, "storageIdentifier": "x"}), 400, 8000)
    refused(portal.post("GreyMatter/1.0", {"t1": f"pilotGirder:{'0' * 24}"}), 400, 8000)
    found = portal.run("GreyMatter/1.0", body, resultsLocation=f"pilotGirder:{results}")
    assert found["status"] == "Finished"
    (uri,) = found["returnedFiles"]["archive"]
    assert uri.startswith("girder:/anatomical_greymatter.tar.gz?apiurl=")
    (item,) = girder.listItem(results)
    (stored,) = girder.listFile(item["_id"])
    buffer = io.BytesIO()
    girder.downloadFile(stored["_id"], buffer)
    assert "measures.csv" in members(buffer.getvalue())
    refused(portal.get(f"/executions/{found['identifier']}/results"), 400, 8013)
    found = portal.run("GreyMatter/1.0", body, resultsLocation=f"pilotGirder:{'0' * 24}")
    assert (found["status"], found["jobs"]["0"]["exitCode"]) == ("ExecutionFailed", 32)
    assert portal.call("DELETE", "/user/externalKeys/pilotGirder").status_code == 204
    refused(portal.post("GreyMatter/1.0", body), 400, 8000)


def portal_girder_key(portal: Portal) -> str:
    base = portal.url.removesuffix("/rest")
    key: str = requests.get(base + "/_sandbox/ready", timeout=5).json()["girder"]["api_key"]
    return key


def test_documentation_names_every_switch_and_pipeline() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text(encoding="utf-8")
    for name in VipSwitches.model_fields:
        assert f"`{name}`" in text, name
    for identifier in PIPELINES:
        assert f"`{identifier}`" in text, identifier


# Restarts


def test_executions_transfers_and_deletions_go_on_while_the_portal_restarts(sandbox: Sandbox, portal: Portal) -> None:
    portal.upload("/vip/Home/old.txt", b"old")
    sandbox.vip.switches.delete_seconds = sandbox.vip.switches.transfer_seconds = 0.5
    identifier = portal.launch("SlowSegmentation/1.0", {"duration": 1, "image": "/vip/Home/old.txt"}, "slow")
    portal.call("DELETE", "/path/vip/Home/old.txt")

    def upload() -> None:
        with pytest.raises(requests.ConnectionError):
            requests.put(
                portal.url + "/path/vip/Home/new.txt", data=b"new", headers=dict(portal.session.headers), timeout=30
            )

    thread = threading.Thread(target=upload)
    thread.start()
    until(lambda: [entry.bytes_in for entry in sandbox.vip.journal.entries("PUT", "new.txt")], lambda got: got == [3])
    time.sleep(0.1)
    with sandbox.outage("vip"):
        thread.join()
        with pytest.raises(requests.ConnectionError):
            portal.get("/platform")
    assert portal.execution(identifier)["name"] == "slow"
    until(lambda: portal.exists("/vip/Home/new.txt"), bool)
    until(lambda: portal.exists("/vip/Home/old.txt"), lambda found: not found)
    assert portal.wait(identifier)["status"] == "Finished"


def test_launch_that_a_restart_cuts_off_is_not_carried_out(sandbox: Sandbox, portal: Portal) -> None:
    sandbox.vip.switches.launch_seconds = 1

    def launch() -> None:
        with pytest.raises(requests.ConnectionError):
            Portal(sandbox.vip.url, sandbox.ready()["vip"]["api_key"]).post("CopyFile/1.0", {"file": "/vip/Home/x"})

    threads = [threading.Thread(target=launch) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(sandbox.vip.journal), lambda count: count == 2)
    time.sleep(0.1)
    sandbox.restart("vip")
    for thread in threads:
        thread.join()
    sandbox.vip.switches.launch_seconds = 0.1
    # Two at once, as the lock of the launches belongs to the portal that went down.
    identifiers: list[str] = []
    threads = [
        threading.Thread(target=lambda: identifiers.append(portal.launch("EveryType/1.0", {"text": "x"})))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one["identifier"] for one in portal.get("/executions").json()} == set(identifiers)
    assert len(identifiers) == 2
