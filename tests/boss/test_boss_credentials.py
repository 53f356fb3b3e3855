"""The block of the Boss."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr, ValidationError

from prefect_biomed.blocks import BossCredentials
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.flows.boss import boss_ingest


class TestBlockStandards(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[BossCredentials]:
        return BossCredentials

    def test_has_a_valid_image(self, block: type[BossCredentials]) -> None:
        """The logo is on the network, where tests do not go."""
        assert str(block._logo_url).startswith("https://")


def test_the_token_is_nowhere_to_be_seen() -> None:
    credentials = BossCredentials(host="h:1", token=SecretStr("canary"), protocol="http")
    with credentials.get_client() as client:
        assert client.host == "h:1"
        assert "canary" not in f"{credentials!r} {credentials} {client!r} {credentials.model_dump_json()}"


def test_a_missing_token_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("INTERN_TOKEN", raising=False)
    with pytest.raises(ConfigurationError, match="INTERN_TOKEN"):
        BossCredentials(host="h").get_client()


@pytest.mark.parametrize("host", ["https://h", "h/path", "user@h", ""])
def test_a_host_is_a_host(host: str) -> None:
    with pytest.raises(ValidationError):
        BossCredentials(host=host)


def test_a_reference_to_a_block_is_no_block() -> None:
    """Prefect refuses to run a deployment with `$ref` when the reference itself would be valid as the block."""
    definitions = parameter_schema(boss_ingest).model_dump()["definitions"]
    assert definitions["BossCredentials"]["required"]
