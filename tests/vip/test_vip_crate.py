"""The provenance that a session leaves beside its outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from harness.vip_steps import run, send, start
from prefect_biomed.cli.commands import app
from prefect_biomed.clients.crates import METADATA, CrateDifference, check_crate
from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.files import digest
from prefect_biomed.clients.vip import VipClient, VipSession, download, finish, open_session, write_session_crate
from prefect_biomed.sandbox import Sandbox

NewSession = Callable[..., VipSession]


def entities(session: VipSession) -> dict[str, Any]:
    return {entity["@id"]: entity for entity in json.loads((session.output_dir / METADATA).read_bytes())["@graph"]}


def typed(command: str, *words: str) -> Result:
    """What the command line makes of this."""
    return CliRunner().invoke(app, words, prog_name=command)


@pytest.fixture
def ended(vip: Sandbox, client: VipClient, new_session: NewSession) -> VipSession:
    """A session of two runs that has ended, with its outputs here."""
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"voxels", "b/é c.txt": b"x"}, nb_runs=2)
    run(client, session)
    download(client, session)
    return session


def test_executions_inputs_and_outputs_are_told_with_digests(client: VipClient, ended: VipSession) -> None:
    write_session_crate(ended, client)
    told = entities(ended)
    actions = [one for name, one in told.items() if name.startswith(f"{client.url}/executions/")]
    assert len(actions) == 2
    assert {action["actionStatus"] for action in actions} == {"http://schema.org/CompletedActionStatus"}
    results = [action["result"]["@id"] for action in actions]
    assert len(set(results)) == 2
    assert {told[name]["sha256"] for name in results} == {digest(ended.output_dir / name) for name in results}
    inputs = [one for name, one in told.items() if name.startswith("#input-")]
    assert ended.input_dir is not None
    assert {one["sha256"] for one in inputs} == {digest(path) for path in ended.input_dir.rglob("*") if path.is_file()}
    assert told["#run"]["instrument"] == {"@id": "ro-crate-workflow.json"}
    assert str(ended.output_dir) not in json.dumps(told)
    assert str(ended.input_dir) not in json.dumps(told)


def test_a_session_that_is_finished_tells_the_same_without_the_platform(client: VipClient, ended: VipSession) -> None:
    before = write_session_crate(ended, client).read_bytes()
    finish(client, ended)
    client.close()
    assert write_session_crate(open_session(ended.output_dir)).read_bytes() == before
    assert check_crate(ended.output_dir) == ()


def test_what_has_changed_is_told_on_the_shell(client: VipClient, ended: VipSession) -> None:
    folder = str(ended.output_dir)
    assert typed("prefect-biomed", "crate", folder, "--check").exit_code == 2
    assert typed("prefect-biomed", "crate", folder).exit_code == 0
    first, second = (one["result"]["@id"] for name, one in entities(ended).items() if "/executions/" in name)
    path = ended.output_dir / first
    path.write_bytes(bytes(reversed(path.read_bytes())) + b"!")
    (ended.output_dir / second).unlink()
    done = typed("prefect-biomed", "crate", folder, "--check")
    assert done.exit_code == 1
    assert set(done.output.splitlines()) == {f"{first}: changed", f"{second}: missing"}
    assert set(check_crate(ended.output_dir)) == {
        CrateDifference(path=first, what="changed"),
        CrateDifference(path=second, what="missing"),
    }


def test_outputs_that_are_gone_are_told_of_as_gone(client: VipClient, ended: VipSession) -> None:
    write_session_crate(ended, client)
    first, second = (one for name, one in sorted(entities(ended).items()) if "/executions/" in name)
    (ended.output_dir / first["result"]["@id"]).unlink()
    write_session_crate(ended, client)
    told = entities(ended)
    assert told[second["@id"]]["actionStatus"].endswith("CompletedActionStatus")
    assert told[first["@id"]]["actionStatus"].endswith("FailedActionStatus")
    assert told[first["@id"]]["error"].startswith("1 outputs are not here: /vip/")
    assert told["#run"]["error"].endswith(told[first["@id"]]["error"])


def test_nothing_is_told_of_what_has_not_ended(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    vip.vip.switches.job_seconds = 60.0
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"voxels"})
    send(client, session)
    start(client, session)
    with pytest.raises(LedgerError, match="nothing to tell of"):
        write_session_crate(session, client)
    assert not (session.output_dir / METADATA).exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"@graph": [{"@id": "a"}]}', b'{"@graph": 3}', b"[" * 100_000, b"\xff"]
)
def test_a_damaged_crate_proves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(LedgerError, match="cannot be read"):
        check_crate(tmp_path)


def test_a_file_without_a_digest_is_not_proved(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / METADATA).write_text(json.dumps({"@graph": [{"@id": "a", "@type": "File"}]}))
    with pytest.raises(LedgerError, match="no digest of a"):
        check_crate(tmp_path)
