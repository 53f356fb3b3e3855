"""The arguments of an algorithm's function, in memory or in files of any size, as one call for each reader.

A call is written to a temporary file once, and encrypted from there piece by piece for each organization, so memory
does not depend on its size.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import fsspec

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.http import bare
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.encryption import PublicKey, encode_base64_stream
from prefect_biomed.clients.vantage6.models import ArgumentsFile, Organization

__all__ = ["Call", "problems_of_arguments", "problems_of_files", "written_call"]

_PIECE_BYTES = 3 * 1024**2
_MEMORY_BYTES = 8 * 1024**2


def problems_of_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Find arguments that are not JSON.

    Args:
        arguments: Keyword arguments of an algorithm's function.

    Returns:
        One sentence for each problem.
    """
    problems = []
    for name, value in arguments.items():
        try:
            # Names are sorted here because those of different kinds cannot be: JSON would make the same of 1 and "1".
            json.dumps(value, allow_nan=False, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            problems.append(f"arguments[{name!r}] is not JSON: {error}.")
    return problems


def problems_of_files(source: ArgumentsFile | None, arguments: Mapping[str, Any]) -> list[str]:
    """Find files of arguments that are not there, and arguments that are given twice. Does not read them.

    Args:
        source: As `TaskRequest.arguments_file`.
        arguments: Those given beside it.

    Returns:
        One sentence for each problem.
    """
    paths = source.values() if isinstance(source, dict) else [source] if source is not None else []
    problems = [
        f"arguments_file: there is no file {path} where this runs."
        for path in paths
        if not _is_url(path) and not Path(path).expanduser().is_file()
    ]
    twice = sorted(source.keys() & arguments.keys()) if isinstance(source, dict) else []
    return problems + [f"arguments_file: {name!r} is in arguments, too." for name in twice]


@contextmanager
def written_call(
    major: int,
    method: str,
    arguments: Mapping[str, Any],
    files: ArgumentsFile | None = None,
    *,
    central: bool = False,
) -> Iterator[Call]:
    """Write the call of an algorithm's function as a task carries it, before encryption.

    Args:
        major: Generation of the server, 3, 4 or 5.
        method: Name of the function. Generation 5 sends it outside of the call.
        arguments: Keyword arguments of the function.
        files: Further keyword arguments, as `TaskRequest.arguments_file`. They are read now.
        central: Whether the function coordinates others (generation 3 calls it master).

    Yields:
        The call, good in this block.

    Raises:
        ConfigurationError: An argument is not JSON, a file cannot be read, or an argument is given twice.
    """
    if problems := problems_of_arguments(arguments):
        raise ConfigurationError(f"{method!r}: {' '.join(problems)}")
    start, end = _around(major, method, central=central)
    with tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES) as file:
        file.write(start)
        members = []
        for number, member in enumerate(_members(arguments, files)):
            file.write(b", " if number else b"")
            content = hashlib.sha256()
            for piece in member:
                file.write(piece)
                content.update(piece)
            members.append(content.digest())
        file.write(end)
        # In whatever order they were given, they are the same arguments.
        digest = hashlib.sha256(b"".join(sorted(members))).hexdigest()
        yield Call(file, "arguments" if major == 5 else "input", digest)


class Call:
    """The call of a function, from which payloads are made.

    Args:
        file: The call.
        field: Name of a payload in a request.
        digest: Of the arguments.

    Attributes:
        digest: SHA-256 of the arguments, the same whatever their order.
    """

    def __init__(self, file: IO[bytes], field: str, digest: str) -> None:
        self.digest = digest
        self._file = file
        self._field = field

    def pieces(self) -> Iterator[bytes]:
        """Read the call from its beginning, piece by piece."""
        self._file.seek(0)
        while piece := self._file.read(_PIECE_BYTES):
            yield piece

    def payloads(
        self,
        client: Vantage6Client,
        organizations: Sequence[Organization],
        *,
        encrypted: bool,
        mark: Callable[[int], bytes | None],
    ) -> list[dict[str, Any]]:
        """Write the payload of each organization in memory, as `write_body` does it to a file.

        Args:
            client: The account.
            organizations: The readers.
            encrypted: Whether to encrypt.
            mark: Gives the mark of what the organization of an id gets, by which the sender knows it again.

        Returns:
            The value of ``organizations`` in a request.

        Raises:
            KeyChanged: An organization has another public key than before. Nothing was sent.
            PlatformError: The blob store refused a payload.
        """
        keys = _keys(client, organizations, encrypted=encrypted)
        return [
            {
                "id": one.id,
                self._field: b"".join(self._payload(client, keys.get(one.id), mark=mark(one.id))).decode(),
            }
            for one in organizations
        ]

    def write_body(
        self,
        client: Vantage6Client,
        fields: Mapping[str, Any],
        organizations: Sequence[Organization],
        *,
        encrypted: bool,
    ) -> IO[bytes]:
        """Write a request with the payload of each organization, each encrypted for its reader only.

        With a blob store the payload is uploaded, once for each organization, and its name is sent.

        Args:
            client: The account.
            fields: What the request has beside ``organizations``; not empty.
            organizations: The readers.
            encrypted: Whether to encrypt.

        Returns:
            The body as a temporary file, which goes when it is closed.

        Raises:
            KeyChanged: An organization has another public key than before. Nothing was sent.
            PlatformError: The blob store refused a payload.
        """
        keys = _keys(client, organizations, encrypted=encrypted)
        body = tempfile.TemporaryFile()  # noqa: SIM115 - whoever sends it closes it
        try:
            body.write(json.dumps(fields).encode().removesuffix(b"}") + b', "organizations": [')
            for number, organization in enumerate(organizations):
                start = f'{", " if number else ""}{{"id": {organization.id}, "{self._field}": "'
                body.write(start.encode())
                for piece in self._payload(client, keys.get(organization.id)):
                    body.write(piece)
                body.write(b'"}')
            body.write(b"]}")
        except BaseException:
            body.close()
            raise
        return body

    def _payload(self, client: Vantage6Client, key: PublicKey | None, *, mark: bytes | None = None) -> Iterator[bytes]:
        if client.has_blob_store:
            with tempfile.TemporaryFile() as blob:
                pieces = self.pieces()
                for piece in key.encrypt_stream(pieces, mark=mark) if key else encode_base64_stream(pieces):
                    blob.write(piece)
                yield client.upload_blob(blob).encode()
        else:
            pieces = self.pieces()
            yield from key.encrypt_text_stream(pieces, mark=mark) if key else encode_base64_stream(pieces)


def _keys(client: Vantage6Client, organizations: Sequence[Organization], *, encrypted: bool) -> Mapping[int, PublicKey]:
    """The keys of the readers; none where nothing is encrypted."""
    return client.known_keys.admit(organizations) if encrypted else {}


def _around(major: int, method: str, *, central: bool) -> tuple[bytes, bytes]:
    if major == 5:
        return b"{", b"}"
    outside: dict[str, Any] = {"method": method}
    if major == 3:
        # Without an output format the algorithm would answer with a pickle.
        outside |= {"master": central, "args": [], "output_format": "json"}
    start = json.dumps(outside).removesuffix("}") + ', "kwargs": {'
    return (b"json." if major == 3 else b"") + start.encode(), b"}}"


def _members(arguments: Mapping[str, Any], files: ArgumentsFile | None) -> Iterator[Iterable[bytes]]:
    """Write ``"name": value`` for each argument; a JSON file of several is taken over as it stands."""
    for name, value in arguments.items():
        yield [f"{json.dumps(name)}: ".encode(), json.dumps(value, allow_nan=False).encode()]
    if isinstance(files, dict):
        for name, path in files.items():
            yield _argument_of_file(name, path)
    elif files is not None and (inside := _arguments_of_file(files, arguments.keys())):
        yield [inside]


def _arguments_of_file(path: str | Path, taken: Collection[str]) -> bytes:
    content = _json_of(path)
    found = _parsed(content, path)
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"arguments_file {_shown(path)} holds no JSON object with the arguments by their names. A mapping such as "
            '{"weights": "…"} makes one argument of a file.'
        )
    if twice := sorted(taken & found.keys()):
        raise ConfigurationError(f"arguments_file {_shown(path)} has {', '.join(twice)}, and so has arguments.")
    return content.strip()[1:-1].strip()


def _argument_of_file(name: str, path: str | Path) -> Iterator[bytes]:
    yield f"{json.dumps(name)}: ".encode()
    if _shown(path).endswith(".json"):
        content = _json_of(path)
        _parsed(content, path)
        yield content.strip()
        return
    yield b'"'
    with _opened(path) as file:
        # Pieces of a multiple of three bytes can be put one after the other in base64.
        while piece := file.read(_PIECE_BYTES):
            rest = b"" if len(piece) % 3 == 0 else file.read(3 - len(piece) % 3)
            yield binascii.b2a_base64(piece + rest, newline=False)
    yield b'"'


def _json_of(path: str | Path) -> bytes:
    with _opened(path) as file, tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES) as copy:
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        return copy.read().removeprefix(b"\xef\xbb\xbf")


def _parsed(content: bytes, path: str | Path) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(content.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"arguments_file {_shown(path)} is not JSON: {error}.") from None


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    if not _is_url(path):
        try:
            with Path(path).expanduser().open("rb") as file:
                yield file
        except OSError as error:
            raise ConfigurationError(f"arguments_file {path} cannot be read: {error.strerror}.") from error
        return
    try:
        with fsspec.open(str(path), "rb") as file:
            yield file
    except ImportError as error:
        # It says what to install.
        raise ConfigurationError(f"arguments_file {_shown(path)} cannot be read: {error}.") from error
    except Exception as error:
        # Each storage has errors of its own, and some quote the address with the secrets in it.
        raise ConfigurationError(f"arguments_file {_shown(path)} cannot be read: {type(error).__name__}.") from None


def _is_url(path: str | Path) -> bool:
    return isinstance(path, str) and "://" in path


def _shown(path: str | Path) -> str:
    """The name of a file; an address without what may be a secret in it."""
    return bare(str(path)) if _is_url(path) else str(path)
