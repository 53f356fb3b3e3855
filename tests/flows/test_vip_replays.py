"""Public executions of VIP, replayed and published, on the sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prefect import State

from harness.laboratory import wait_until
from harness.shell import typed
from prefect_biomed.analysis.replay import Replay, ReplayOutcome
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.vip import InputValue, VipClient
from prefect_biomed.flows.replay import vip_replay
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.sandbox import Sandbox

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip") as sandbox:
        yield sandbox


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[VipClient]:
    facts = sandbox.ready()["vip"]
    with VipClient(facts["url"], facts["api_key"]) as client:
        yield client


@pytest.fixture
def credentials(sandbox: Sandbox) -> VipCredentials:
    facts = sandbox.ready()["vip"]
    return VipCredentials(url=facts["url"], api_key=facts["api_key"])


def executions(client: VipClient) -> int:
    return len(client.workflows())


def ended(client: VipClient, volume: Path, pipeline: str) -> str:
    """An execution somebody has made."""
    client.make_folder("/vip/Home/study/out")
    client.put_file(volume, "/vip/Home/study/anatomical.nii")
    values = {"t1": "/vip/Home/study/anatomical.nii"}
    workflow = client.launch(
        name="published", pipeline_id=pipeline, input_values=values, results_location="/vip/Home/study/out"
    )
    wait_until(lambda: client.workflow(workflow.identifier).status.is_terminal, 30, "the end of the execution")
    return workflow.identifier


def replayed(credentials: VipCredentials, bundle: Path, folder: Path, **more: Any) -> tuple[State[Any], Replay]:
    called: Any = vip_replay
    state = called(credentials, bundle, output_dir=folder, refresh_time=0.1, return_state=True, **more)
    return state, state.result()


def test_a_bundle_is_replayed_once_and_a_file_that_was_tampered_with_is_told(
    sandbox: Sandbox, client: VipClient, credentials: VipCredentials, volume: Path, tmp_path: Path
) -> None:
    identifier = ended(client, volume, "SkullStrip/1.0")
    # As an archive of publications hands it out.
    packed = tmp_path / "bundle.tar.gz"
    packed.write_bytes(requests.get(f"{credentials.url}/publications/{identifier}.tar.gz", timeout=30).content)
    before = executions(client)
    state, replay = replayed(credentials, packed, tmp_path / "replay")
    assert (state.name, replay.outcome) == ("Completed", ReplayOutcome.REPRODUCED), replay.sentence
    (one,) = replay.executions
    assert "anatomical_volumes.csv" in one.identical
    # Time stamps in gzip headers.
    assert "anatomical_brain.nii.gz" in one.equal

    bundle = sandbox.vip.publish([identifier], tmp_path / "tampered")
    (output,) = bundle.rglob("anatomical_volumes.csv")
    output.write_text(output.read_text().replace("brain,", "brain,1"))
    state, replay = replayed(credentials, bundle, tmp_path / "replay")
    assert state.name == "Tampered"
    assert "anatomical_volumes.csv: the published file has the MD5" in replay.sentence
    assert "the replay gives that one" in replay.sentence
    assert executions(client) == before + 1


@pytest.mark.slow
def test_a_session_of_ours_is_published_and_replayed_on_the_shell(
    credentials: VipCredentials,
    client: VipClient,
    input_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFECT_BIOMED_VIP_URL", credentials.url)
    monkeypatch.setenv("PREFECT_BIOMED_VIP_API_KEY", credentials.api_key.get_secret_value())
    settings: dict[str, InputValue] = {"t1": "anatomical.nii", "threshold": 0.4}
    session = tmp_path / "session"
    result = vip_session(
        credentials, "GreyMatter/1.0", settings, input_dir=input_dir, output_dir=session, refresh_time=0.1
    )
    bundle = tmp_path / "bundle"
    status, said = typed("prefect-biomed", "publish", str(session), str(bundle), "--with-inputs")
    assert status == 0, said
    assert (bundle / f"{result.workflows[0].identifier}.json").is_file()
    before = executions(client)
    again = ("prefect-biomed", "replay", str(bundle), str(tmp_path / "replay"), "--set", "refresh_time=0.1")
    status, said = typed(*again)
    assert status == 0, said
    assert executions(client) == before + 1
    (measures,) = bundle.rglob("measures.csv")
    measures.write_text(measures.read_text().replace("voxels,", "voxels,1"))
    status, said = typed(*again)
    assert status == 1
    assert "Tampered" in said
    assert executions(client) == before + 1
