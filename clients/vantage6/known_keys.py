"""Public keys of organizations, as they were when this machine first wrote to them.

Only the server tells the public key of another organization, and whoever holds the server could give a key of his own
and read everything. So a key is written down at first use, and from then on another one is an error until a person
confirms it, as ssh does with the keys of hosts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.files import atomic_write, exclusive, home, on_disk
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6.encryption import PublicKey
from prefect_biomed.clients.vantage6.errors import KeyChanged
from prefect_biomed.clients.vantage6.models import Organization

__all__ = ["KnownKeys"]

logger = logger_of(__name__)

_FINGERPRINT = r"^SHA256:[A-Za-z0-9+/]{43}$"
_LOCK_SECONDS = 30.0


class _Entry(BaseModel):
    """The key of an organization. One that was renamed has an entry for each name, so that no name is taken over."""

    model_config = ConfigDict(frozen=True)

    id: int
    name: str
    fingerprint: str = Field(pattern=_FINGERPRINT)

    def is_about(self, organization: Organization) -> bool:
        return organization.id == self.id or organization.name == self.name


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)

    server: str
    own_key: str
    organizations: tuple[_Entry, ...]


class _Looked(NamedTuple):
    entries: list[_Entry]
    new: list[_Entry]
    problems: list[str]


class KnownKeys:
    """The keys that an account knows on a server, in one file below ``vantage6/known_keys`` of the package's home.

    Args:
        server: URL of the server's API.
        own_key: Fingerprint of the account's own key, empty without one. Accounts with different keys share nothing.
        confirmed: Fingerprints that a person vouches for, by name or id of the organization. They come before what is
            in the file, and go into it.
        folder: Folder of the files; that in the package's home when None.
    """

    def __init__(
        self, server: str, own_key: str, confirmed: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self._server = server
        self._own_key = own_key
        self._confirmed = dict(confirmed or {})
        self._folder = folder

    @property
    def path(self) -> Path:
        """The file. It may not exist yet."""
        name = hashlib.sha256(json.dumps([self._server, self._own_key]).encode()).hexdigest()[:32]
        return (self._folder or home("vantage6", "known_keys")) / f"{name}.json"

    def problems(self, organizations: Sequence[Organization]) -> list[str]:
        """Compare keys with those that are known. Writes nothing.

        Args:
            organizations: Those that are to be written to, with keys that can be read.

        Returns:
            A sentence for each key that has changed: whose, the old and the new one, and what to do.

        Raises:
            LedgerError: The file is damaged.
        """
        return self._look(organizations, self._read()).problems

    def admit(self, organizations: Sequence[Organization]) -> dict[int, PublicKey]:
        """Give the keys of those that are written to now; the ones that are seen for the first time become known.

        Safe to repeat, also by several processes at once.

        Args:
            organizations: The readers.

        Returns:
            Their keys by id.

        Raises:
            InvalidKey: An organization has no key that could be read.
            KeyChanged: One has another key than before, and nobody has confirmed it. Nothing was written.
            LedgerError: The file is damaged.
            LocalStorageError: The disk does not take it.
        """
        keys = {one.id: PublicKey.from_text(one.public_key) for one in organizations}
        with self._exclusive():
            looked = self._look(organizations, self._read())
            if looked.problems:
                raise KeyChanged(" ".join(looked.problems))
            if looked.new:
                self._write(looked.entries)
        if looked.new:
            logger.warning(
                "First use of the public keys of %s; compare them with what the organizations tell. Kept in %s",
                ", ".join(f"{one.name} ({one.fingerprint})" for one in looked.new),
                self.path,
            )
        return keys

    def _look(self, organizations: Sequence[Organization], entries: list[_Entry]) -> _Looked:
        new: list[_Entry] = []
        problems: list[str] = []
        for organization in organizations:
            fingerprint = PublicKey.from_text(organization.public_key).fingerprint
            seen = _Entry(id=organization.id, name=organization.name, fingerprint=fingerprint)
            vouched = self._confirmed.get(organization.name) or self._confirmed.get(str(organization.id))
            known = [one for one in entries if one.is_about(organization)]
            changed = [one for one in known if one.fingerprint != fingerprint]
            if vouched is not None and vouched != fingerprint:
                problems.append(self._contradicted(organization, vouched, fingerprint))
            elif vouched is None and changed:
                problems.append(self._changed(organization, changed[0], fingerprint))
            elif seen not in entries:
                # A confirmed key takes the place of the one before.
                entries = [one for one in entries if one not in changed] + [seen]
                new.append(seen)
        return _Looked(entries, new, problems)

    def _changed(self, organization: Organization, known: _Entry, fingerprint: str) -> str:
        was = "" if known.name == organization.name else f" ({known.name!r} at that time)"
        was += "" if known.id == organization.id else f" (id {known.id} at that time)"
        return (
            f"The server gives another public key of organization {organization.name!r} (id {organization.id}){was} "
            f"than before: {known.fingerprint} was known, {fingerprint} is new. Whoever holds the new one would read "
            "what you send, so ask the organization for its fingerprint. If it is the new one, confirm it with "
            f'known_keys={{"{organization.name}": "{fingerprint}"}} in the credentials, or take the old entry out of '
            f"{self.path}."
        )

    def _contradicted(self, organization: Organization, vouched: str, fingerprint: str) -> str:
        return (
            f"The server gives the public key {fingerprint} of organization {organization.name!r} (id "
            f"{organization.id}), but known_keys of the credentials tells {vouched}. Whoever holds the server's would "
            "read what you send, so ask the organization for its fingerprint, and correct known_keys only if it is "
            "that one."
        )

    def _read(self) -> list[_Entry]:
        with on_disk(self.path.parent):
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                # Nobody has been written to yet from here; a file that is there and unreadable is another thing.
                return []
        try:
            record = _Record.model_validate_json(content)
        except ValidationError:
            record = None
        if record is None or (record.server, record.own_key) != (self._server, self._own_key):
            raise LedgerError(
                f"The public keys known for {self._server} cannot be read from {self.path}: the file is damaged. "
                "Nothing is encrypted for keys that cannot be compared. Put the file back from a copy; or move it "
                "away, and compare with the organizations the fingerprints that are logged at the next use."
            )
        return list(record.organizations)

    def _write(self, entries: Sequence[_Entry]) -> None:
        record = _Record(server=self._server, own_key=self._own_key, organizations=tuple(entries))
        with atomic_write(self.path, mode=0o600) as file:
            file.write(record.model_dump_json(indent=2).encode() + b"\n")

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        what = f"The record of public keys of {self._server}"
        with exclusive(self.path.with_suffix(".lock"), seconds=_LOCK_SECONDS, what=what):
            yield
