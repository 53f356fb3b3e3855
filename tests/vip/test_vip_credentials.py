"""The block `VipCredentials`: where the key comes from, and that it never shows."""

import json
from pathlib import Path

import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.sandbox import Sandbox

CANARY = "canary0123456789abcdef0123"


class TestVipCredentialsAsABlock(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return VipCredentials

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """The suite fetches the logo over the network; a test must not."""
        assert str(block._logo_url).startswith("https://")


def key_of(credentials: VipCredentials) -> str:
    with credentials.get_client() as client:
        return client._key()


# -- where the key comes from ------------------------------------------------------------------------------------------


def test_key_as_it_is() -> None:
    assert key_of(VipCredentials(api_key=CANARY)) == CANARY
    assert key_of(VipCredentials(api_key=SecretStr(f" {CANARY}\n"))) == CANARY


def test_key_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    path.write_text(f"{CANARY}\n")
    assert key_of(VipCredentials(api_key=str(path))) == CANARY


def test_key_in_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", CANARY)
    assert key_of(VipCredentials(api_key="MY_KEY")) == CANARY


def test_file_goes_before_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_KEY", "from-environment")
    Path("MY_KEY").write_text("from-file")
    assert key_of(VipCredentials(api_key="MY_KEY")) == "from-file"


def test_there_is_no_key_by_default() -> None:
    with pytest.raises(ValidationError, match="api_key"):
        VipCredentials()


def test_variable_that_is_not_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIP_API_KEY", raising=False)
    with (
        VipCredentials(api_key="VIP_API_KEY").get_client() as client,
        pytest.raises(ConfigurationError, match="VIP_API_KEY is not set"),
    ):
        client._key()


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_key_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key.txt"
    path.write_text(content)
    with (
        VipCredentials(api_key=str(path)).get_client() as client,
        pytest.raises(ConfigurationError, match=r"key is empty"),
    ):
        client._key()


def test_file_is_read_anew_so_that_a_key_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    with Sandbox("vip") as sandbox:
        good = sandbox.ready()["vip"]["api_key"]
        path.write_text(good)
        with VipCredentials(api_key=str(path), url=sandbox.vip.url).get_client() as client:
            client.check_key()
            sandbox.vip.switches.key_generation = 1
            path.write_text(sandbox.ready()["vip"]["api_key"])
            client.check_key()
        assert [entry.status for entry in sandbox.vip.journal.entries("PUT")] == [200, 200]


# -- that it never shows -----------------------------------------------------------------------------------------------


def test_key_shows_nowhere() -> None:
    credentials = VipCredentials(api_key=CANARY, url="https://vip.example.org")
    with credentials.get_client() as client:
        shown = [
            repr(credentials),
            str(credentials),
            repr(credentials.model_dump()),
            credentials.model_dump_json(),
            json.dumps(credentials.model_dump(mode="json")),
            repr(client),
            repr(vars(client)),
        ]
    for text in shown:
        assert CANARY not in text
    assert "https://vip.example.org" in repr(credentials)


def test_key_is_kept_when_the_block_is_stored() -> None:
    """Prefect stores blocks encrypted, and asks for the secret then."""
    stored = VipCredentials(api_key=CANARY).model_dump(mode="json", context={"include_secrets": True})
    assert VipCredentials.model_validate(stored).api_key.get_secret_value() == CANARY


# -- the other fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "vip.example.org",
        "ftp://vip.example.org",
        "https://",
        "https:///rest",
        f"https://user:{CANARY}@vip.example.org",
        f"https://{CANARY}@vip.example.org/rest",
        "https://vip.example.org/?a=b",
        "https://vip example.org",
        "",
    ],
)
def test_addresses_that_cannot_be_one_are_refused(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        VipCredentials(api_key="x", url=url)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://localhost:8080", "https://vip.example.org/", "https://vip.example.org/test/rest"]
)
def test_addresses(url: str) -> None:
    assert VipCredentials(api_key="x", url=url).url == url


@pytest.mark.parametrize(
    "settings",
    [{"parallelism": 0}, {"parallelism": 11}, {"connect_seconds": 0}, {"read_seconds": 0.5}, {"parallelism": "many"}],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        VipCredentials(api_key="x", **settings)


def test_settings_reach_the_client() -> None:
    credentials = VipCredentials(api_key="x", url="https://h/", parallelism=3)
    with credentials.get_client() as client:
        assert client.parallelism == 3
        assert client.url == "https://h"


def test_nothing_is_sent_before_it_is_needed() -> None:
    with Sandbox("vip") as sandbox:
        with VipCredentials(api_key="x", url=sandbox.vip.url).get_client():
            pass
        assert len(sandbox.vip.journal) == 0
