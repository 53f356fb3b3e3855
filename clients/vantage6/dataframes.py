"""How a dataframe of generation 5 came about, and whether that is what somebody asks for.

The server keeps the tasks that made a dataframe, and in their runs the arguments. In a collaboration without encryption
these can be read. Where they are encrypted only their readers can, so a message carries a mark by which its sender
knows it again: its counter block is a keyed digest of the arguments (`PrivateKey.mark`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from pydantic import JsonValue

from prefect_biomed.clients.errors import NotFoundError, PermissionDeniedError
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6._long_json import LongText
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.encryption import PrivateKey, counter_block, decode_base64_stream
from prefect_biomed.clients.vantage6.errors import DecryptionFailed, NameConflict
from prefect_biomed.clients.vantage6.models import (
    Action,
    Dataframe,
    DataframeDescription,
    DataframeStep,
    Function,
    Organization,
    RunWithArguments,
    Task,
)
from prefect_biomed.clients.vantage6.monitoring import organization_names

__all__ = ["Chain", "arguments_mark", "delete_unused", "description_of", "same_image", "step_differences", "steps_of"]

logger = logger_of(__name__)

_STEPS = frozenset({Action.DATA_EXTRACTION, Action.PREPROCESSING})
_BLOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHOWN_CHARACTERS = 300


def steps_of(client: Vantage6Client, dataframe_id: int) -> list[Task]:
    """List the tasks that made a dataframe, in their order: the extraction first.

    Args:
        client: The account.
        dataframe_id: The dataframe.
    """
    tasks = client.records(Task, dataframe_id=dataframe_id)
    return sorted((task for task in tasks if task.action in _STEPS), key=lambda task: task.id)


def description_of(client: Vantage6Client, dataframe_id: int) -> DataframeDescription:
    """Tell how a dataframe came about: its extraction and each step. Safe to repeat.

    Five requests at most, and one more for each step; arguments in a blob store take one for each organization.

    Args:
        client: The account. With the private key of its organization, arguments that were sent to that one are read.
        dataframe_id: The dataframe.

    Returns:
        The dataframe and its steps.

    Raises:
        NotFoundError: There is none of this id.
        PermissionDeniedError: The account may not see it.
    """
    frame = client.get(Dataframe, dataframe_id)
    steps = steps_of(client, dataframe_id)
    names = organization_names(client, steps[0].collaboration_id) if steps else {}
    described = []
    for number, task in enumerate(steps):
        sent = list(_arguments_of(client, task))
        known = [one.value for one in sent if one.value is not None]
        equal = bool(known) and all(value == known[0] for value in known)
        described.append(
            DataframeStep(
                number=number,
                task_id=task.id,
                image=task.image,
                method=task.method or "",
                arguments=known[0] if equal else None,
                arguments_hidden=None if equal else _why_hidden(sent),
                status=task.status,
                organizations=tuple(
                    names.get(one.organization_id, f"organization {one.organization_id}") for one in sent
                ),
            )
        )
    return DataframeDescription(dataframe=frame, steps=tuple(described))


def delete_unused(client: Vantage6Client, frame: Dataframe, steps: Sequence[Task], why: str) -> None:
    """Delete a dataframe that nobody uses at this moment, so that it can be made anew.

    Args:
        client: The account.
        frame: The dataframe.
        steps: The tasks that made it.
        why: Why it has to be made anew, for messages.

    Raises:
        NameConflict: It is being made or computed on, or the account may not delete it.
    """
    subject = f"Dataframe {frame.name!r} (id {frame.id}) has to be made anew ({why})"
    using = {task.id for task in client.records(Task, session_id=frame.session_id) if _reads(task, frame.id)}
    using |= {step.id for step in steps if not step.status.is_terminal}
    # A task counts as failed while runs of it go on and write.
    using |= {
        step.id for step in steps if step.status.is_failure and not all(run.is_finished for run in client.runs(step.id))
    }
    if using:
        raise NameConflict(
            f"{subject}, but is in use by task {', '.join(map(str, sorted(using)))}. Wait until they have ended or "
            "kill them, or choose another name. Nothing was deleted."
        )
    try:
        client.delete(Dataframe, frame.id)
    except NotFoundError:
        logger.info("Dataframe %d was deleted meanwhile", frame.id)
    except PermissionDeniedError as error:
        raise NameConflict(
            f"{subject}, which this account may not do. Choose another name, or ask its owner to delete it: "
            f"delete_dataframe(credentials, {frame.id})."
        ) from error


def _reads(task: Task, dataframe_id: int) -> bool:
    """Whether a task that has not ended reads a dataframe."""
    ids = [one.get("dataframe_id") for one in task.databases if isinstance(one, dict)]
    return dataframe_id in ids and not task.status.is_terminal


class Chain:
    """What somebody asks of a dataframe: the database, the extraction and every step after it.

    Args:
        session_id: The session.
        name: Name of the dataframe.
        label: Label of the database.
        functions: The extraction, and what changes the dataframe after it.
        organizations: Those that should have it.

    Attributes:
        organizations: The same.
    """

    def __init__(
        self,
        session_id: int,
        name: str,
        label: str,
        functions: Sequence[Function],
        organizations: Sequence[Organization],
    ) -> None:
        self._session_id = session_id
        self._name = name
        self._label = label
        self._functions = functions
        self.organizations = organizations

    @property
    def plan(self) -> str:
        """A text that is the same for the same database and functions, and different for others."""
        return _canonical([self._label, *(one.model_dump() for one in self._functions)])

    def differences(
        self, client: Vantage6Client, frame: Dataframe, steps: Sequence[Task], *, unfinished: bool
    ) -> list[str]:
        """Compare a dataframe with what is asked for.

        Args:
            client: The account.
            frame: The dataframe that is there.
            steps: The tasks that made it.
            unfinished: Whether whoever began it was about to make just this, so that steps may still be missing.

        Returns:
            A sentence for each difference, and for each thing that cannot be compared; empty when it is the same.
        """
        found = [] if frame.db_label == self._label else [f"database {frame.db_label!r}, not {self._label!r}"]
        if not steps:
            return [*found, "the tasks that made it are not listed, so it cannot be compared"]
        for number, (task, wanted) in enumerate(zip_longest(steps, self._functions)):
            what = f"step {number}" if number else "the extraction"
            if wanted is None:
                known = next((one.value for one in _arguments_of(client, task) if one.value is not None), None)
                found.append(f"{what} is {_shown(task.method or '', known)}, and none is asked for")
            elif task is None:
                if not unfinished:
                    found.append(f"{what}, {_shown(wanted.method, wanted.arguments)}, was not made")
            else:
                differing = step_differences(
                    client, task, wanted, self.organizations, (self._session_id, self._name, number)
                )
                found += [f"{what} has {one}" for one in differing]
        return found


def step_differences(
    client: Vantage6Client,
    task: Task,
    wanted: Function,
    organizations: Sequence[Organization],
    place: tuple[int, str, int],
) -> list[str]:
    """Compare the task of a step with what is asked for.

    Args:
        client: The account.
        task: The task that is there.
        wanted: What is asked for.
        organizations: Those that should have executed it.
        place: Session, name of the dataframe, and number of the step; 0 is the extraction.

    Returns:
        What differs, or cannot be compared; empty when it is the same.
    """
    found = []
    if not same_image(task.image, wanted.image):
        found.append(f"image {task.image!r}, not {wanted.image!r}")
    if task.method != wanted.method:
        return [*found, f"method {task.method!r}, not {wanted.method!r}"]
    sent = {one.organization_id: one for one in _arguments_of(client, task)}
    if lacking := [one.name for one in organizations if one.id not in sent]:
        found.append(f"nothing of {', '.join(lacking)}")
    unknown: dict[str, list[str]] = {}
    for organization in organizations:
        one = sent.get(organization.id)
        if one is None or one.is_call_of(client.private_key, place, wanted):
            continue
        if one.value is not None and not _same(one.value, wanted.arguments):
            wish = _shown(wanted.method, wanted.arguments)
            return [*found, f"{_shown(wanted.method, one.value)}, not {wish}"]
        unknown.setdefault(one.hidden, []).append(organization.name)
    found += [f"other arguments at {', '.join(names)}, or {why}" for why, names in unknown.items()]
    return found


def arguments_mark(
    key: PrivateKey, place: tuple[int, str, int], organization_id: int, method: str, arguments: Mapping[str, Any]
) -> bytes:
    """Make the mark of the arguments that one organization gets for one step of one dataframe.

    Args:
        key: Private key of the organization that sends them.
        place: As for `step_differences`.
        organization_id: The reader.
        method: Function to call.
        arguments: Its keyword arguments.
    """
    return key.mark(_canonical([*place, organization_id, method, dict(arguments)]).encode())


def same_image(there: str, wanted: str) -> bool:
    """Tell whether a task was made with an image; a store adds the digest to its name.

    Args:
        there: Image of the task.
        wanted: Image asked for. With a digest, this one and no other.
    """
    return there == wanted or ("@" not in wanted and there.partition("@")[0] == wanted)


class _Sent:
    """The arguments of one run.

    Args:
        organization_id: Who was to read them.
        value: The arguments, None when they are hidden.
        block: Counter block of the encrypted message, None when there is none.
        hidden: Why they are hidden.
    """

    def __init__(
        self,
        organization_id: int | None,
        *,
        value: dict[str, JsonValue] | None = None,
        block: bytes | None = None,
        hidden: str = "",
    ) -> None:
        self.organization_id = organization_id
        self.value = value
        self.block = block
        self.hidden = hidden or "which cannot be read"

    def is_call_of(self, key: PrivateKey | None, place: tuple[int, str, int], wanted: Function) -> bool:
        """Whether the organization was sent just these arguments."""
        if self.value is not None:
            return _same(self.value, wanted.arguments)
        if self.block is None or key is None or self.organization_id is None:
            return False
        return self.block == arguments_mark(key, place, self.organization_id, wanted.method, wanted.arguments)


def _arguments_of(client: Vantage6Client, task: Task) -> Iterator[_Sent]:
    """Read what the runs of a task were given, as far as it can be read."""
    for run, texts in client.pages(RunWithArguments, task_id=task.id):
        content = texts.get("arguments", run.arguments)
        if not content and run.cleanup_at is not None:
            yield _Sent(run.organization_id, hidden="the server's clean-up deleted them")
        elif content is None:
            yield _Sent(run.organization_id, hidden="the server does not tell them")
        elif not content:
            yield _Sent(run.organization_id, value={})
        else:
            yield _read(client, run.organization_id, content)


def _read(client: Vantage6Client, organization_id: int | None, content: str | LongText) -> _Sent:
    is_blob = isinstance(content, str) and _BLOB.fullmatch(content) is not None
    block = None
    try:
        with _chunks(client, content) as chunks:
            # Base64 has no such sign, and the header of a message is shorter than one piece of it.
            start = next(chunks, b"")
            pieces = _chained(start, chunks)
            if b"$" not in start:
                return _Sent(organization_id, value=_decoded(decode_base64_stream(pieces)))
            block, pieces = counter_block(pieces)
            if client.private_key is None or organization_id != client.organization_id:
                raise DecryptionFailed("encrypted for others")
            key = client.private_key
            plain = key.decrypt_stream(pieces) if is_blob else key.decrypt_text_stream(pieces)
            return _Sent(organization_id, value=_decoded(plain), block=block)
    except (DecryptionFailed, ValueError):
        if block is None:
            return _Sent(organization_id, hidden="what is no JSON object")
        return _Sent(
            organization_id, block=block, hidden="the same sent with another key or program, which encryption hides"
        )


@contextmanager
def _chunks(client: Vantage6Client, content: str | LongText) -> Iterator[Iterator[bytes]]:
    if isinstance(content, LongText):
        yield content.chunks()
    elif _BLOB.fullmatch(content):
        with client.download(f"/blobstream/{content}") as chunks:
            yield chunks
    else:
        yield iter([content.encode("ascii", "replace")])


def _chained(start: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield start
    yield from rest


def _decoded(chunks: Iterable[bytes]) -> dict[str, JsonValue]:
    value = json.loads(b"".join(chunks) or b"{}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _why_hidden(sent: Sequence[_Sent]) -> str:
    if not sent:
        return "no run is listed"
    if any(one.value is not None for one in sent):
        return "they differ from organization to organization"
    if any(one.block is not None for one in sent):
        return "encrypted for others"
    return sent[0].hidden


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return _canonical(dict(one)) == _canonical(dict(other))


def _shown(method: str, arguments: Mapping[str, Any] | None) -> str:
    if arguments is None:
        return repr(method)
    text = f"{method}({', '.join(f'{name}={json.dumps(value)}' for name, value in arguments.items())})"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"
