"""The block of vantage6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr, ValidationError

from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.clients.errors import ConnectionFailed
from prefect_biomed.clients.vantage6 import InvalidKey
from prefect_biomed.flows.vantage6 import federated_analysis

SECRETS = ("password", "totp_secret", "client_secret", "private_key")


class TestBlockStandards(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Vantage6Credentials]:
        return Vantage6Credentials

    def test_has_a_valid_image(self, block: type[Vantage6Credentials]) -> None:
        """The logo is on the network, where tests do not go."""
        assert str(block._logo_url).startswith("https://")


def test_the_secrets_are_nowhere_to_be_seen() -> None:
    credentials = Vantage6Credentials(url="http://h", **{name: SecretStr("canary") for name in SECRETS})
    assert "canary" not in f"{credentials!r} {credentials} {credentials.model_dump_json()}"


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "h"},
        {"url": "https://user:password@h"},
        {"url": "https://h", "auth_url": "ftp://h"},
        {"url": "https://h", "private_key": "x", "private_key_path": "y"},
        {"url": "https://h", "connect_seconds": 0},
    ],
)
def test_fields_that_cannot_work_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Vantage6Credentials(**fields)


def test_a_key_that_cannot_be_read_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    for fields in ({"private_key": SecretStr("canary")}, {"private_key_path": tmp_path / "missing.pem"}):
        with pytest.raises(InvalidKey) as refused:
            Vantage6Credentials(url="http://127.0.0.1:9", **fields).get_client()
        assert "canary" not in str(refused.value)


def test_a_server_that_is_not_there_is_said() -> None:
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9"):
        Vantage6Credentials(url="http://127.0.0.1:9").get_client()


def test_a_reference_to_a_block_is_no_block() -> None:
    """Prefect refuses to run a deployment with `$ref` when the reference itself would be valid as the block."""
    definitions = parameter_schema(federated_analysis).model_dump()["definitions"]
    assert definitions["Vantage6Credentials"]["required"]
