"""Public keys of other organizations become known at first use, and another key is an error from then on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from pydantic import ValidationError

from harness.federation import Federation
from prefect_biomed.clients.errors import LedgerError, PreflightFailed
from prefect_biomed.clients.vantage6 import KeyChanged, Organization, PrivateKey, Vantage6Client
from prefect_biomed.clients.vantage6.known_keys import KnownKeys

SERVER = "https://vantage6.example.org/api"


@cache
def key(name: str) -> PrivateKey:
    """A key for each name, made once."""
    return PrivateKey.generate(1024)


def organization(number: int, name: str, key_name: str | None = None) -> Organization:
    return Organization(id=number, name=name, public_key=key(key_name or name).public_key.text)


def fingerprint(name: str) -> str:
    return key(name).public_key.fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "known_keys"


def known_keys(folder: Path, confirmed: Mapping[str, str] | None = None, own_key: str = "SHA256:own") -> KnownKeys:
    return KnownKeys(SERVER, own_key, confirmed, folder)


def test_a_key_becomes_known_when_it_is_used_and_not_when_it_is_looked_at(folder: Path) -> None:
    keys, south = known_keys(folder), organization(2, "south")
    assert keys.problems([south]) == []
    assert not keys.path.exists()
    assert keys.admit([south]) == {2: key("south").public_key}
    assert known_keys(folder).problems([south]) == []
    assert known_keys(folder).problems([organization(2, "south", "other")]) != []
    assert keys.path.stat().st_mode & 0o077 == 0
    other_account = known_keys(folder, own_key="SHA256:another")
    assert other_account.path != keys.path
    assert other_account.problems([organization(2, "south", "other")]) == []


@pytest.mark.parametrize(
    ("now", "tells"),
    [
        (organization(2, "south", "other"), "'south' (id 2) than before"),
        (organization(9, "south", "other"), "'south' (id 9) (id 2 at that time)"),
        (organization(2, "renamed", "other"), "'renamed' (id 2) ('south' at that time)"),
        # The server has exchanged two names: who writes to south would be read by west.
        (organization(3, "south", "west"), "'south' (id 3) (id 2 at that time)"),
    ],
    ids=["the key", "the organization of this name", "key and name", "two names"],
)
def test_another_key_of_an_organization_or_of_its_name_is_refused(folder: Path, now: Organization, tells: str) -> None:
    keys = known_keys(folder)
    keys.admit([organization(2, "south"), organization(3, "west")])
    before = keys.path.read_bytes()
    (problem,) = keys.problems([now, organization(3, "west")])
    assert tells in problem
    assert f"{fingerprint('south')} was known" in problem
    assert str(keys.path) in problem and f'known_keys={{"{now.name}": "SHA256:' in problem
    with pytest.raises(KeyChanged, match="Whoever holds the new one"):
        keys.admit([now, organization(4, "east")])
    assert keys.path.read_bytes() == before


def test_an_organization_that_was_renamed_keeps_its_key_and_its_old_name(folder: Path) -> None:
    keys = known_keys(folder)
    keys.admit([organization(2, "south")])
    keys.admit([organization(2, "deep south", "south")])
    assert keys.problems([organization(2, "deep south", "south")]) == []
    assert keys.problems([organization(9, "south", "other")]) != []
    assert keys.problems([organization(9, "deep south", "other")]) != []


@pytest.mark.parametrize("by", ["south", "2"], ids=["name", "id"])
def test_a_confirmed_key_takes_the_place_of_the_known_one(folder: Path, by: str) -> None:
    changed = organization(2, "south", "other")
    known_keys(folder).admit([organization(2, "south"), organization(3, "west")])
    confirming = known_keys(folder, {by: fingerprint("other")})
    assert confirming.problems([changed]) == []
    confirming.admit([changed])
    # From now on without the confirmation, and the old one is not good any more.
    assert known_keys(folder).problems([changed, organization(3, "west")]) == []
    assert known_keys(folder).problems([organization(2, "south")]) != []


def test_fingerprints_that_a_person_vouches_for_need_no_file(folder: Path) -> None:
    keys = known_keys(folder, {"south": fingerprint("south")})
    assert keys.problems([organization(2, "south")]) == []
    (problem,) = keys.problems([organization(2, "south", "other")])
    assert f"known_keys of the credentials tells {fingerprint('south')}" in problem


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"server": "x"}', "another server"])
def test_a_damaged_record_is_no_first_use(folder: Path, damage: str) -> None:
    keys = known_keys(folder)
    keys.admit([organization(2, "south")])
    if damage == "another server":
        record = json.loads(keys.path.read_text())
        damage = json.dumps(record | {"server": "https://other.example.org"})
    keys.path.write_text(damage)
    for use in (keys.problems, keys.admit):
        with pytest.raises(LedgerError, match="the file is damaged"):
            use([organization(2, "south", "other")])
    assert keys.path.read_text() == damage


def test_many_that_begin_at_once_lose_no_entry(folder: Path) -> None:
    members = [organization(number, f"hospital {number}", "south") for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda one: known_keys(folder).admit([one]), members))
    assert len(json.loads(known_keys(folder).path.read_text())["organizations"]) == 12


@contextmanager
def replaced_key(here: Federation, name: str) -> Iterator[PrivateKey]:
    """The key of an organization is another one on the server."""
    (member,) = [one for one in here.sandbox.registry.organizations if one.name == name]
    before, new = member.public_key, PrivateKey.generate(2048)
    member.public_key = new.public_key.text
    try:
        yield new
    finally:
        member.public_key = before


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_BIOMED_HOME", str(tmp_path))
    return tmp_path


def test_a_key_that_has_changed_is_refused_until_it_is_confirmed(
    here: Federation, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(client: Vantage6Client) -> None:
        here.launch(client, "echo", collaboration="encrypted", arguments={"a": 1})

    with here.client() as client:
        ask(client)
        (first_use,) = [line for line in caplog.messages if line.startswith("First use of the public keys of")]
        assert all(f"{name} (SHA256:" in first_use for name in ("north", "south", "west"))
        ask(client)
        with replaced_key(here, "south") as new:
            tasks = here.tasks_created()
            with pytest.raises(PreflightFailed) as refused:
                ask(client)
            assert here.tasks_created() == tasks
            old = here.key("south").public_key.fingerprint
            for told in ("'south'", old, new.public_key.fingerprint, "known_keys={", str(home)):
                assert told in str(refused.value)
            # Nothing is encrypted, so nobody's key matters.
            here.launch(client, "echo", arguments={"a": 1})
            with here.client(known_keys={"south": new.public_key.fingerprint}) as confirming:
                ask(confirming)
            ask(client)
    assert len([line for line in caplog.messages if line.startswith("First use")]) == 2


def test_steps_of_dataframes_are_encrypted_for_known_keys_only(
    home: Path, federations: Callable[[int], Federation]
) -> None:
    here = federations(5)
    with here.client() as client:
        here.data(client, "encrypted")
        with (
            replaced_key(here, "west"),
            pytest.raises(PreflightFailed, match="another public key of organization 'west'"),
        ):
            here.data(client, "encrypted")


@pytest.mark.parametrize("text", ["abc", "SHA256:abc", "MD5:00"])
def test_credentials_take_fingerprints_only(here: Federation, text: str) -> None:
    with pytest.raises(ValidationError, match="known_keys"):
        here.credentials(known_keys={"south": text})
