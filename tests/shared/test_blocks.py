"""What holds for the credentials of every platform."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block
from pydantic import ValidationError

from prefect_biomed import blocks
from prefect_biomed.blocks import BossCredentials, StorageCredentials, Vantage6Credentials, VipCredentials
from prefect_biomed.flows.jobs import VipPipeline

SECRET = "CANARY-8f3a"
HOST = "https://example.org"


@pytest.mark.parametrize("name", blocks.__all__)
def test_credentials_are_what_prefect_takes_for_credentials(name: str) -> None:
    assert issubclass(getattr(blocks, name), CredentialsBlock)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: VipCredentials(api_key=SECRET, url=f"{SECRET} with blanks"),
        lambda: VipCredentials.model_validate({"api_key": [SECRET]}),
        lambda: VipCredentials.model_validate({"api_key": "k", "girder_api_key": {"key": SECRET}}),
        lambda: Vantage6Credentials(url=HOST, private_key=SECRET, private_key_path="/key", password=SECRET),
        lambda: Vantage6Credentials(url=f"http://u:{SECRET}@example.org"),
        lambda: Vantage6Credentials(url=HOST, auth_url=f"http://u:{SECRET}@example.org"),
        lambda: Vantage6Credentials.model_validate({"url": HOST, "password": [SECRET]}),
        lambda: Vantage6Credentials.model_validate({"url": HOST, "totp_secret": {"secret": SECRET}}),
        lambda: Vantage6Credentials.model_validate({"url": HOST, "client_secret": 1, "private_key": [SECRET]}),
        lambda: BossCredentials.model_validate({"token": SECRET}),
        lambda: BossCredentials.model_validate({"host": "example.org", "token": [SECRET]}),
        lambda: BossCredentials(host=f"http://u:{SECRET}@example.org", token="t"),
        lambda: BossCredentials(host="example.org", token="t", aws_endpoint_url=f"http://u:{SECRET}@example.org"),
    ],
)
def test_an_error_about_a_field_does_not_repeat_what_was_typed(attempt: Callable[[], object]) -> None:
    with pytest.raises(ValidationError) as raised:
        attempt()
    assert SECRET not in str(raised.value)
    assert SECRET not in repr(raised.value)


@pytest.mark.parametrize(
    ("block", "given", "unknown"),
    [
        (VipCredentials, {"api_key": "k", "base_url": HOST}, "base_url"),
        (Vantage6Credentials, {"url": HOST, "username": "u", "pasword": SECRET}, "pasword"),
        (BossCredentials, {"host": "example.org", "token": "t", "protokol": "http"}, "protokol"),
        (StorageCredentials, {"secret": SECRET}, "secret"),
        (VipPipeline, {"pipeline_id": "a/1", "input_settings": {}, "nb_run": 5}, "nb_run"),
    ],
)
def test_a_misspelt_field_is_refused_and_its_value_not_shown(
    block: type[Block], given: dict[str, object], unknown: str
) -> None:
    """Prefect keeps what it does not know: the default portal would get the key, and a password be no secret."""
    with pytest.raises(ValidationError, match=f"there is no field '{unknown}'; there are: ") as raised:
        block(**given)
    assert SECRET not in str(raised.value)
