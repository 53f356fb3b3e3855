"""The official client of VIP, unmodified from PyPI, works against the sandbox as it does against the real platform."""

import itertools
import json
import os
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import girder_client
import nibabel
import pytest
import requests

from prefect_biomed.sandbox import Entry, Sandbox

pytestmark = pytest.mark.conformance

ANATOMICAL = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"


@pytest.fixture(scope="module")
def vip_client(official_environment: Callable[..., Path]) -> Path:
    return official_environment("vip-client", ["vip-client==0.1.10"])


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip") as sandbox:
        yield sandbox


def run(interpreter: Path, folder: Path, code: str, *arguments: str, **secrets: str) -> str:
    """Run a script in the official environment and return what it printed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **secrets}
    done = subprocess.run(
        [str(interpreter), "-c", code, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def kind(entry: Entry) -> str:
    """Return what a request was for, without the names in it."""
    parts = entry.path.removeprefix("/rest/").split("/")
    if parts[0] == "path":
        if entry.method == "GET":
            return entry.query.removeprefix("action=")
        if entry.method == "PUT":
            return "upload" if entry.bytes_in else "mkdir"
        return "DELETE path"
    if parts[0] == "executions":
        return f"{entry.method} executions{'/ID' * (len(parts) > 1)}{'/' + parts[2] if len(parts) > 2 else ''}"
    if parts[0] == "pipelines":
        return f"{entry.method} pipelines{'/A/V' * (len(parts) > 1)}"
    return f"{entry.method} {parts[0]}"


def transcript(entries: list[Entry]) -> list[str]:
    """Return what the requests were for; the same one after the other becomes one line with a count."""
    return [f"{name} x{len(list(same))}" for name, same in itertools.groupby(entries, kind)]


SESSION = """
import json, sys, time
from pathlib import Path
from vip_client import VipSession

begun = time.monotonic()
url, inputs, outputs = sys.argv[1:]
VipSession.init(api_key="VIP_API_KEY", vip_portal_url=url)
VipSession.show_pipeline("GreyMatter/1.0")
session = VipSession(output_dir=outputs, session_name="conformance")
session.upload_inputs(inputs)
files = [str(Path(inputs, "anatomical.nii")), str(Path(inputs, "sub", "second.nii"))]
session.launch_pipeline("GreyMatter/1.0", {"t1": files, "threshold": 0.4}, nb_runs=2)
session.monitor_workflows(refresh_time=1)
session.download_outputs()
downloaded = time.monotonic()
session.finish(timeout=30)
print("SECONDS", json.dumps([downloaded - begun, time.monotonic() - downloaded]))
"""


def test_session(vip_client: Path, sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tmp_path / "inputs"
    (inputs / "sub").mkdir(parents=True)
    for name in ("anatomical.nii", "sub/second.nii"):
        (inputs / name).write_bytes(ANATOMICAL.read_bytes())
    facts = sandbox.ready()["vip"]
    # Runs that begin in the same second share a directory, as on the real platform.
    sandbox.vip.switches.launch_seconds = 1.1
    printed = run(
        vip_client,
        tmp_path,
        SESSION,
        facts["url"],
        str(inputs),
        str(tmp_path / "outputs"),
        VIP_API_KEY=facts["api_key"],
    )

    data = json.loads((tmp_path / "outputs" / "session_data.json").read_text())
    assert {workflow["status"] for workflow in data["workflows"].values()} == {"Removed"}, printed
    assert len(data["workflows"]) == 2
    # The client extracts an archive into a directory of its name.
    measures = sorted((tmp_path / "outputs").glob("*/*_greymatter.tar.gz/measures.csv"))
    assert len(measures) == 4
    assert len({path.read_text() for path in measures}) == 1
    assert not sandbox.vip.storage.exists(sandbox.vip.users.main, "/vip/Home/API/conformance")

    seen = transcript(sandbox.vip.journal.entries())
    with capsys.disabled():
        seconds, finish_seconds = json.loads(printed.rpartition("SECONDS")[2])
        print(f"\nvip-client 0.1.10: {len(sandbox.vip.journal)} requests, session {seconds:.1f} s, ", end="")
        print(f"finish {finish_seconds:.1f} s")
        print("  " + ", ".join(seen))
    assert [entry.status for entry in sandbox.vip.journal if entry.status not in (200, 201, 204)] == []
    polls, looks_at_the_end = seen[16], seen[-1]
    assert seen == [
        # init
        "PUT platform x1",
        "GET pipelines x1",
        # show_pipeline
        "GET pipelines/A/V x1",
        # upload_inputs: are there inputs? Which of the directories above them exist? Then each directory in turn.
        "exists x5",
        "mkdir x3",
        "upload x1",
        "exists x2",
        "mkdir x1",
        "upload x1",
        # launch_pipeline: directory of outputs, definition, one look per input file, then run by run
        "exists x2",
        "mkdir x1",
        "GET pipelines/A/V x1",
        "exists x2",
        "POST executions x1",
        "GET executions/ID x1",
        "POST executions x1",
        # the look after the second launch, then both runs in every poll
        polls,
        "GET executions/ID/results x2",
        "content x4",
        # finish: is it there? Delete it, look until it is gone, then look for the directories of both runs.
        "exists x1",
        "DELETE path x1",
        looks_at_the_end,
    ]
    name, _, count = polls.rpartition(" x")
    assert name == "GET executions/ID"
    assert int(count) % 2 == 1
    name, _, count = looks_at_the_end.rpartition(" x")
    assert name == "exists"
    assert int(count) >= 3


FAILURES = """
import json, sys
from vip_client import VipSession
from vip_client.utils import vip

url, inputs, outputs = sys.argv[1:]
try:
    VipSession.init(api_key="not-the-key", vip_portal_url=url)
except Exception as error:
    print("REFUSED", error)
VipSession.init(api_key="VIP_API_KEY", vip_portal_url=url)
session = VipSession(output_dir=outputs, session_name="failures")
session.upload_inputs(inputs)
path = session.vip_input_dir + "/a_file.txt"
assert vip.exists(path) and not vip.is_dir(path)
assert [one["path"] for one in vip.list_elements(session.vip_input_dir)] == [path]
assert vip.upload(inputs + "/a file.txt", path) is False

failed = vip.init_exec("AlwaysFails/1.0", "failing", {"reason": "out of memory"}, session.vip_output_dir)
while vip.is_running(failed):
    pass
info = vip.execution_info(failed)
assert info["status"] == "ExecutionFailed" and info["returnedFiles"] is None, info
assert "out of memory" in vip.get_exec_stderr(failed)
assert "AlwaysFails" in vip.get_exec_stdout(failed)

slow = vip.init_exec("SlowSegmentation/1.0", "slow", {"image": path, "duration": 60}, session.vip_output_dir)
assert vip.is_running(slow)
try:
    session.launch_pipeline("SlowSegmentation/1.0", {"image": path, "duration": 60})
except Exception as error:
    print("FULL", error)
assert vip.kill_execution(slow)
assert vip.count_executions() == 2 == len(vip.list_executions())
print("EXAMPLES", [one["name"] for one in vip.list_examples()])
assert vip.platform_info()["supportedAPIVersion"] == "0.3"
session.finish(timeout=30)
"""


def test_failures(vip_client: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "a file.txt").write_text("content")
    facts = sandbox.ready()["vip"]
    sandbox.vip.switches.max_running_user = 1
    printed = run(
        vip_client,
        tmp_path,
        FAILURES,
        facts["url"],
        str(inputs),
        str(tmp_path / "outputs"),
        VIP_API_KEY=facts["api_key"],
    )
    assert "REFUSED" in printed
    assert "8002" in printed
    assert "FULL" in printed
    assert "2001" in printed
    assert facts["api_key"] not in printed


GIRDER = """
import json, sys, time
from vip_client import VipGirder

url, girder_url = sys.argv[1:]
begun = time.monotonic()
session = VipGirder.init(
    vip_key="VIP_API_KEY", girder_key="GIRDER_API_KEY", vip_portal_url=url, girder_api_url=girder_url,
    girder_id_prefix="pilotGirder",
    output_dir="/collection/Sandbox/Results/conformance", session_name="girder-conformance",
    pipeline_id="GreyMatter/1.0", input_settings={"t1": "/collection/Sandbox/Inputs"},
    custom_wf_metadata={"study": "conformance"},
)
session.run_session(nb_runs=2, refresh_time=1)
session.finish()
again = VipGirder(output_dir="/collection/Sandbox/Results/conformance")
assert again.session_name == "girder-conformance", again.session_name
assert again.workflows == session.workflows
print("SECONDS", time.monotonic() - begun)
"""


def test_girder(vip_client: Path, sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = sandbox.ready()["vip"]
    girder = girder_client.GirderClient(apiUrl=facts["girder"]["api_url"])
    girder.authenticate(apiKey=facts["girder"]["api_key"])
    inputs = girder.resourceLookup("/collection/Sandbox/Inputs")["_id"]
    for name in ("one.nii", "two.nii"):
        girder.uploadFileToFolder(inputs, str(ANATOMICAL), filename=name)
    # What a user does once on the portal.
    requests.put(
        facts["url"] + "/rest/user/externalKeys",
        json={"storageIdentifier": facts["girder"]["storage_id"], "apiKey": facts["girder"]["api_key"]},
        headers={"apikey": facts["api_key"]},
        timeout=10,
    ).raise_for_status()
    # The client names the folder of a run by the second.
    sandbox.vip.switches.launch_seconds = 1.1
    sandbox.vip.journal.clear()
    printed = run(
        vip_client,
        tmp_path,
        GIRDER,
        facts["url"],
        facts["girder"]["api_url"],
        VIP_API_KEY=facts["api_key"],
        GIRDER_API_KEY=facts["girder"]["api_key"],
    )

    top = girder.resourceLookup("/collection/Sandbox/Results/conformance")
    assert top["meta"]["session_name"] == "girder-conformance"
    folders = list(girder.listFolder(top["_id"]))
    assert len(folders) == 2
    measures = set()
    for folder in folders:
        assert folder["meta"]["workflow_status"] == "Finished", printed
        assert folder["meta"]["study"] == "conformance"
        assert folder["meta"]["workflow_id"] in top["meta"]["workflows"]
        names = {item["name"] for item in girder.listItem(folder["_id"])}
        assert names == {"one_greymatter.tar.gz", "two_greymatter.tar.gz"}
        for item in girder.listItem(folder["_id"]):
            (file,) = girder.listFile(item["_id"])
            girder.downloadFile(file["_id"], str(tmp_path / "archive"))
            with tarfile.open(tmp_path / "archive") as archive:
                member = archive.extractfile("measures.csv")
                assert member is not None
                measures.add(member.read())
    assert len(measures) == 1
    counts = Counter("girder" if entry.path.startswith("/girder/") else "vip" for entry in sandbox.vip.journal)
    with capsys.disabled():
        print(f"\nVipGirder 0.1.10: {dict(counts)} requests, {float(printed.rpartition('SECONDS')[2]):.1f} s")
