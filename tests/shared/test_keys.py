"""Where secrets of blocks come from, and what a run of a deployment may read on its worker."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from pydantic import SecretStr

from prefect_biomed.blocks import BossCredentials, StorageCredentials, Vantage6Credentials, VipCredentials
from prefect_biomed.blocks._keys import FOLDERS, VARIABLES, Keys, for_a_deployed_run
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.flows._checked import INLINE_KEYS
from prefect_biomed.flows.boss import boss_ingest
from prefect_biomed.flows.vip import vip_session

HOST = "https://example.org"
SECRET = "CANARY-4c11"
MODULES = ("boss", "operations", "repeatability", "replay", "research_pipeline", "vantage6", "vip")


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the process that a worker starts for a run of a deployment."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "0a7d2a50-9f5c-4a30-a8a4-0f7d9c1f6c55")
    for variable in (VARIABLES, FOLDERS, INLINE_KEYS):
        monkeypatch.delenv(variable, raising=False)


def flows() -> list[Flow[..., Any]]:
    modules = [importlib.import_module(f"prefect_biomed.flows.{name}") for name in MODULES]
    found = [one for module in modules for one in vars(module).values() if isinstance(one, Flow)]
    return list({one.name: one for one in found}.values())


STORAGE_KEYS = ("access_key_id", "secret_access_key", "session_token", "service_account", "authorization")


def named(value: str) -> list[tuple[Keys, str]]:
    return [
        (VipCredentials(api_key=value, girder_api_key=value), "api_key"),
        (VipCredentials(api_key=value, girder_api_key=value), "girder_api_key"),
        (Vantage6Credentials(url=HOST, password=value), "password"),
        (Vantage6Credentials(url=HOST, totp_secret=value), "totp_secret"),
        (Vantage6Credentials(url=HOST, client_secret=value), "client_secret"),
        (Vantage6Credentials(url=HOST, private_key=value), "private_key"),
        (BossCredentials(host="h", token=value), "token"),
        *((StorageCredentials(location="s3://lab", **{name: value}), name) for name in STORAGE_KEYS),
    ]


def test_every_secret_of_every_block_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", f"{SECRET}\n")
    (tmp_path / "key").write_text(f" {SECRET}\n")
    for value in ("env:SOME_KEY", f"file:{tmp_path / 'key'}", SECRET):
        assert {block.secret(field).get_secret_value() for block, field in named(value)} == {SECRET}
    secrets = {
        (type(block), field)
        for kind in (VipCredentials, Vantage6Credentials, BossCredentials, StorageCredentials)
        for block, _ in named("x")
        if isinstance(block, kind)
        for field, about in kind.model_fields.items()
        if SecretStr in (about.annotation, *getattr(about.annotation, "__args__", ()))
    }
    assert secrets == {(type(block), field) for block, field in named("x")}, "a secret is not tried"


@pytest.mark.usefixtures("deployed")
def test_a_deployed_run_reads_what_the_worker_allows_and_refuses_all_else_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", SECRET)
    file = tmp_path / "keys" / "key"
    file.parent.mkdir()
    file.write_text(SECRET)
    (tmp_path / "keys" / "link").symlink_to(Path(__file__))
    refusals: list[ConfigurationError] = []
    for value in ("env:SOME_KEY", f"file:{file}"):
        for block, field in named(value):
            with pytest.raises(ConfigurationError, match=f"{field} names .*{value.partition(':')[2]}") as refused:
                block.secret(field)
            refusals.append(refused.value)
    for official in ("SOME_KEY", str(file)):
        with pytest.raises(ConfigurationError, match="may not read"):
            VipCredentials(api_key=official).secret("api_key")
    with pytest.raises(ConfigurationError, match="private_key_path"):
        Vantage6Credentials(url=HOST, private_key_path=file)._read_private_key()
    monkeypatch.setenv("INTERN_TOKEN", SECRET)
    with pytest.raises(ConfigurationError, match="INTERN_TOKEN"):
        BossCredentials(host="evil.example.org").get_client()
    assert not any(SECRET in str(one) for one in refusals)

    # The advice of the errors is followed.
    monkeypatch.setenv(VARIABLES, str(refusals[0]).rpartition(f"{VARIABLES}=")[2] + ", INTERN_TOKEN")
    monkeypatch.setenv(FOLDERS, str(refusals[-1]).rpartition(f"{FOLDERS}=")[2])
    for value in ("env:SOME_KEY", f"file:{file}"):
        assert {block.secret(field).get_secret_value() for block, field in named(value)} == {SECRET}
    assert VipCredentials(api_key="SOME_KEY").secret("api_key") == SecretStr(SECRET)
    with BossCredentials(host="h").get_client() as client:
        assert client is not None
    for path in (f"{file.parent}/../other", f"{file.parent}/link", "/proc/self/environ"):
        with pytest.raises(ConfigurationError, match="may not read"):
            VipCredentials(api_key=f"file:{path}").secret("api_key")


def test_where_a_block_was_made_decides_also_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task runner may carry it to another machine, and the process of a worker ends several runs."""
    monkeypatch.setenv("SOME_KEY", SECRET)
    with for_a_deployed_run():
        block = VipCredentials(api_key="env:SOME_KEY")
    for carried in (block, block.model_copy(update={"parallelism": 2}), pickle.loads(pickle.dumps(block))):
        with pytest.raises(ConfigurationError, match="SOME_KEY"):
            carried.secret("api_key")
    pem = tmp_path / "key.pem"
    assert Vantage6Credentials(url=HOST, private_key_path=pem).readable(pem, "private_key_path") == pem


def test_what_is_named_and_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for value, said in (
        ("env:SOME_KEY", "SOME_KEY is not set"),
        (f"file:{tmp_path / 'none'}", "cannot be read: No such file"),
        (f"file:{tmp_path / 'binary'}", "it is no text"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            Vantage6Credentials(url=HOST, password=value).secret("password")


# -- parameters of flows -----------------------------------------------------------------------------------------------


def accounts_of(flow: Flow[..., Any]) -> dict[str, dict[str, str]]:
    given = {
        "VipCredentials": {"api_key": SECRET, "url": HOST},
        "Vantage6Credentials": {"url": HOST, "username": "u", "password": SECRET},
        "BossCredentials": {"host": "example.org", "token": SECRET},
        "StorageCredentials": {"location": "s3://lab", "secret_access_key": SECRET},
    }
    return {name: given[kind.__name__] for name, kind in flow._blocks.items()}  # type: ignore[attr-defined]


@pytest.mark.usefixtures("deployed")
def test_no_flow_of_a_deployment_takes_a_key_in_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    for flow in flows():
        for name, account in accounts_of(flow).items():
            with pytest.raises(ConfigurationError, match=f"The parameter {name} of this run holds a secret") as refused:
                flow.validate_parameters({name: account})
            assert SECRET not in str(refused.value)
            assert "deployments/setup.py" in str(refused.value)
            tried += 1
    assert tried >= 24
    parameters = {"credentials": {"host": "h", "token": "env:A_TOKEN"}, "config": "job.json"}
    assert isinstance(boss_ingest.validate_parameters(parameters)["credentials"], BossCredentials)
    parameters["credentials"]["token"] = SECRET
    monkeypatch.setenv(INLINE_KEYS, "allowed")
    assert isinstance(boss_ingest.validate_parameters(parameters)["credentials"], BossCredentials)


def test_every_credential_is_a_parameter_of_its_own() -> None:
    """In a group it would not be looked at."""

    def holds_block(schema: dict[str, Any], definition: str) -> bool:
        return "Credentials" in json.dumps(schema["definitions"][definition].get("properties", {}))

    for flow in flows():
        schema = flow.parameters.model_dump()
        groups = [name for name in schema["definitions"] if not name.endswith("Credentials")]
        assert not [name for name in groups if holds_block(schema, name)], flow.name
        assert type(flow).__name__ == "_CheckedFlow", f"{flow.name} is not made by checked_flow"


def test_wrong_parameters_beside_a_key_do_not_show_it(caplog: pytest.LogCaptureFixture) -> None:
    """Prefect logs all parameters as they were given when one is wrong."""
    with pytest.raises(Exception, match="nb_runs") as wrong:
        vip_session.validate_parameters(
            {"credentials": {"api_key": SECRET}, "pipeline_id": "A/1", "input_settings": {}, "nb_runs": "many"}
        )
    assert "nb_runs" in caplog.text
    assert SECRET not in caplog.text + str(wrong.value)
    for account in (SECRET, {"api_key": [SECRET]}, {"api_key": "k", "url": f"http://u:{SECRET}@h"}, [SECRET]):
        with pytest.raises(ConfigurationError, match="VipCredentials") as refused:
            vip_session.validate_parameters(
                {"credentials": account, "pipeline_id": "A/1", "input_settings": {}, "nb_runs": "many"}
            )
        assert SECRET not in caplog.text + str(refused.value)


def test_parameters_too_large_for_the_engine_are_refused_with_what_to_do() -> None:
    long = [f"/vip/Home/file-{number:08}.nii" for number in range(25_000)]
    for name, value, advice in (
        ("input_settings", {"image": long}, "inputs_of"),
        ("config", {"tiles": long}, "into a file"),
        ("arguments", {"values": long}, "arguments_file"),
        ("sessions", long, "several runs"),
    ):
        with pytest.raises(ConfigurationError, match=rf"{name} alone \d+; the engine takes 524288. .*{advice}"):
            vip_session.serialize_parameters({name: value, "other": 1})
    assert isinstance(vip_session.serialize_parameters({"input_settings": {"image": long[:1000]}}), dict)
