"""Sending the inputs of a session: eight at a time, nothing twice, nothing half."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.errors import (
    BiomedError,
    LedgerError,
    PreflightFailed,
    SourceUnreadable,
    TransferFailed,
    UnexpectedResponse,
)
from prefect_biomed.clients.files import digest
from prefect_biomed.clients.polling import now
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.transfer import transfer_all
from prefect_biomed.clients.vip.carmin import compare_digest
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.finish import other_holders
from prefect_biomed.clients.vip.models import VipSession
from prefect_biomed.clients.vip.monitoring import details, is_named_after, list_all
from prefect_biomed.clients.vip.preflight import LocalFile, Preflight, preflight
from prefect_biomed.clients.vip.remote_files import delete_and_wait, list_folder_or_nothing, put_and_verify
from prefect_biomed.clients.vip.session_file import SessionFile
from prefect_biomed.clients.vip.session_record import InputsRecord, SessionRecord, UploadedFile, digest_of_inputs

__all__ = ["UploadSummary", "complete_inputs", "foresee_inputs", "foresee_upload", "restore_inputs", "upload"]

logger = logger_of(__name__)

_SAVE_EVERY_SECONDS = 5.0
_DELETE_SECONDS = 300.0
_SETTLE_SECONDS = 90.0
# So long after a look nobody looks again.
_PROOF_SECONDS = 600.0

Progress = Callable[[int, int], None]
"""Called with the bytes transferred so far and the bytes in all."""


class UploadSummary(BaseModel):
    """What an upload did.

    Attributes:
        sent: Number of files sent.
        skipped: Number of files that were there already.
        replaced: How many of those sent took the place of an older version.
        bytes_sent: Bytes sent.
        trusted: What is taken for the inputs as it is, although nobody has compared it, and why; None for nothing.
    """

    model_config = ConfigDict(frozen=True)

    sent: int
    skipped: int
    replaced: int
    bytes_sent: int
    trusted: str | None = None


_NOTHING = UploadSummary(sent=0, skipped=0, replaced=0, bytes_sent=0)


def upload(
    client: VipClient,
    session: VipSession,
    plan: Preflight,
    *,
    update_files: bool = True,
    settle_seconds: float = _SETTLE_SECONDS,
    progress: Progress | None = None,
) -> UploadSummary:
    """Bring the files of a session to the platform.

    Safe to repeat, also after a kill: one listing for each folder is compared with the local files and with the record
    of what was sent, and only what is missing or differs is sent. What was sent is proven in the end: each folder is
    listed once more, and names and sizes compared, whatever the answers to the uploads were. What is missing is sent a
    second time. Two processes on one session take turns.

    Args:
        client: The account; its `parallelism` is the number of transfers at once.
        session: The session. What is intended is written down before anything is sent.
        plan: What the pre-flight found.
        update_files: False takes inputs that are on the platform as they are, and sends nothing; unless their folder
            does not exist, or the record says that an upload into it was broken off.
        settle_seconds: How long a file may take to appear after a failed answer.
        progress: Told the bytes done and in all.

    Returns:
        What was done.

    Raises:
        PreflightFailed: With `update_files` False some inputs are not on the platform.
        LedgerError: Files would be replaced that runs of this session name, or of one that uses its inputs, may still
            read; nothing was sent.
        TransferFailed: Some files could not be sent, or are not there although they were accepted; the others are.
        AuthenticationError: The key was refused. What was sent is recorded.
        PermissionDeniedError: The same for a lack of rights.
        StorageFull: The same for a lack of room.
        SessionLocked: Another process uploads for this session.
    """
    file = SessionFile(session, client)
    # What another process has half sent would be taken for an older version, deleted and sent again.
    with file.exclusive("upload"):
        return _upload(client, session, plan, file, update_files, settle_seconds, progress)


def _upload(
    client: VipClient,
    session: VipSession,
    plan: Preflight,
    file: SessionFile,
    update_files: bool,
    settle_seconds: float,
    progress: Progress | None,
) -> UploadSummary:
    begun = InputsRecord(
        include=plan.include,
        exclude=plan.exclude,
        expected={item.name: item.size for item in plan.files},
        is_complete=session.input_dir is None,
    )
    known, taken = _inputs_of(file.read(), session), None
    if not update_files and _may_be_taken(client, session, known):
        taken = _taken(client, session, plan, known)
    with file.edit() as record:
        intent = record.note_intent(session, {**session.input_settings, **plan.settings})
        intent.required_outputs = plan.required_outputs
        if taken is not None:
            intent.inputs = taken[0]
        elif not intent.inputs.is_complete:
            intent.inputs = begun
    if session.input_dir is None:
        return _NOTHING
    if taken is not None:
        return taken[1]
    return _bring(client, session, plan, begun, file, settle_seconds, progress)


def _bring(
    client: VipClient,
    session: VipSession,
    plan: Preflight,
    begun: InputsRecord,
    file: SessionFile,
    settle_seconds: float,
    progress: Progress | None,
) -> UploadSummary:
    """Send what is missing or differs, until the platform is seen to have it all."""
    there, to_make = _list_folders(client, session, plan)
    record = file.read()
    todo = _compare(client, session, plan, there, record.ledger.uploads)
    _refuse_to_replace(client, session, record, todo.outdated)
    if todo.missing or to_make:
        # Not before: a launch that relies on inputs that are complete is not to wait for a twin that changes nothing.
        with file.edit() as record:
            record.note_intent(session).inputs = begun
    client.make_folder(session.vip_input_dir)
    for folder in to_make:
        client.make_folder(f"{session.vip_input_dir}/{folder}")
    logger.info("%d files to send (%d bytes), %d are there already", len(todo.missing), todo.bytes, len(todo.done))
    summary = todo.summary  # what is done grows from here
    journal = _Journal(file, todo.done, todo.bytes, progress)
    try:
        _send_until_proven(client, session, plan, todo, journal, settle_seconds)
    finally:
        journal.save()
    _note_complete(file, session, begun)
    return summary


def foresee_upload(
    client: VipClient, session: VipSession, plan: Preflight, *, update_files: bool = True
) -> UploadSummary:
    """Tell what `upload` would do now. It only reads, here and there.

    Args:
        client: The account.
        session: The session.
        plan: What the pre-flight found.
        update_files: As for `upload`.

    Returns:
        What would be sent, and what is there already.

    Raises:
        LedgerError: Something else was launched under the token of the session; or as for `upload`.
        PreflightFailed: As for `upload`.
    """
    record = SessionFile(session, client).read()
    record.refuse_another(session)
    known = _inputs_of(record, session)
    if session.input_dir is None:
        return _NOTHING
    if not update_files and _may_be_taken(client, session, known):
        return _taken(client, session, plan, known)[1]
    there, _ = _list_folders(client, session, plan)
    todo = _compare(client, session, plan, there, record.ledger.uploads)
    _refuse_to_replace(client, session, record, todo.outdated)
    return todo.summary


def _refuse_to_replace(client: VipClient, session: VipSession, record: SessionRecord, outdated: set[str]) -> None:
    """Make sure that no run computes on inputs that are replaced while it goes on."""
    if not outdated:
        return
    users: list[str] = []
    for token, intent in record.ledger.intents.items():
        if intent.inputs.expected and not outdated & intent.inputs.expected.keys():
            continue
        for name, launch in record.ledger.launched(token).items():
            has_ended = launch.workflow_id in record.over or (
                launch.workflow_id is not None and details(client, launch.workflow_id, record).status.is_terminal
            )
            users += [] if has_ended else [name]
    if holders := other_holders(client, session):
        listing = list_all(client)
        running = [workflow for workflow in listing.workflows if not workflow.status.is_terminal]
        users += [one.name for one in running if any(is_named_after(holder, one) for holder in holders)]
        users += holders if listing.gap else ()
    if users:
        raise LedgerError(
            f"{', '.join(sorted(outdated)[:3])} of session {session.session_name!r} differs from what is on the "
            f"platform, and {', '.join(users)} may still read it. Nothing was sent. Wait for the runs or kill them, or "
            "take another session_name."
        )


def _may_be_taken(client: VipClient, session: VipSession, known: InputsRecord) -> bool:
    """Whether there may be inputs of which no upload was broken off."""
    return session.input_dir is not None and known.is_complete is not False and client.exists(session.vip_input_dir)


def _taken(
    client: VipClient, session: VipSession, plan: Preflight, known: InputsRecord
) -> tuple[InputsRecord, UploadSummary]:
    """What is known of inputs that are to be taken as they are, and what came of that."""
    if known.is_complete and known.expected:
        # A launch looks at them once more.
        return known, _NOTHING.model_copy(update={"skipped": len(known.expected)})
    if not PurePosixPath(session.vip_input_dir).is_relative_to(session.vip_dir):
        # What their owner has left out of the folder here is not known either.
        return known.model_copy(update={"is_complete": True}), _NOTHING.model_copy(
            update={"trusted": _unknown(session)}
        )
    there, _ = _list_folders(client, session, plan)
    sizes = {
        item.name: there[str(PurePosixPath(item.name).parent)].get(PurePosixPath(item.name).name) for item in plan.files
    }
    if absent := [item.local_name for item in plan.files if sizes[item.name] is None]:
        raise PreflightFailed(
            f"Session {session.session_name!r}",
            [
                f"{len(absent)} of {len(plan.files)} inputs are not in {session.vip_input_dir}, among them "
                f"{', '.join(absent[:3])}, and nothing is sent with update_files=False. Leave it out."
            ],
        )
    others = [item.local_name for item in plan.files if sizes[item.name] != item.size]
    told = f"{len(plan.files)} inputs in {session.vip_input_dir} are taken as they are, because update_files is False."
    if others:
        told += f" {len(others)} have other sizes than here: {', '.join(others[:20])}."
    expected = {name: size for name, size in sizes.items() if size is not None}
    inputs = InputsRecord(include=plan.include, exclude=plan.exclude, expected=expected, is_complete=True, proven=now())
    return inputs, _NOTHING.model_copy(update={"skipped": len(plan.files), "trusted": told})


def _unknown(session: VipSession) -> str:
    return (
        f"Nothing is written down here of what the inputs in {session.vip_input_dir} are, so nobody can tell whether "
        "some are missing. They are taken as they are; files that values name are looked for."
    )


def _note_complete(file: SessionFile, session: VipSession, inputs: InputsRecord) -> None:
    with file.edit() as record:
        digest = digest_of_inputs(inputs.expected, record.ledger.uploads)
        proof = {"is_complete": True, "proven": now(), "digest": digest}
        record.note_intent(session).inputs = inputs.model_copy(update=proof)


def complete_inputs(client: VipClient, session: VipSession, *, progress: Progress | None = None) -> UploadSummary:
    """Send what is missing of the inputs of a session that was broken off. Safe to repeat.

    Inputs that were complete are looked at again while a run of the session is still to be launched, as
    `restore_inputs` does. Where the input folder is not on this machine, the platform is compared with the record of
    what was to be sent.

    Args:
        client: The account.
        session: The session, as its session file has it.
        progress: Told the bytes done and in all.

    Returns:
        What was done.

    Raises:
        LedgerError: Inputs are missing, or it is not known whether they are, and their folder is not here; or some that
            were there are missing, and the files here are others by now.
        PreflightFailed: The input folder has changed, so that it cannot be sent.
        TransferFailed: Some files could not be sent; the others were.
    """
    return _completed(client, session, _Sending(client, session, progress))


def restore_inputs(client: VipClient, session: VipSession, *, progress: Progress | None = None) -> UploadSummary:
    """See that inputs that were complete are still on the platform, before something is launched on them.

    Somebody may have deleted some since. One listing for each folder is compared with the record, names and sizes; what
    is missing is sent again, as it was. Not looked at again within ten minutes. Safe to repeat.

    Args:
        client: The account.
        session: The session.
        progress: Told the bytes done and in all.

    Returns:
        What was done.

    Raises:
        LedgerError: Some are missing, and their folder is not here, or the files in it are others by now; or they were
            replaced by another upload under this name.
        PreflightFailed: The input folder has changed, so that it cannot be sent.
        TransferFailed: Some files could not be sent; the others were.
    """
    record = SessionFile(session, client).read()
    _refuse_replaced(record, session)
    proven = _inputs_of(record, session).proven
    if session.input_dir is None or (proven and 0 <= (now() - proven).total_seconds() <= _PROOF_SECONDS):
        return _NOTHING
    return _restored(client, session, record, _Sending(client, session, progress))


def foresee_inputs(client: VipClient, session: VipSession) -> UploadSummary:
    """Tell what `complete_inputs` would do now. It only reads, here and there.

    Args:
        client: The account.
        session: The session, as its session file has it.

    Returns:
        What would be sent, and what is there already.

    Raises:
        LedgerError: As for `complete_inputs`.
        PreflightFailed: As for `complete_inputs`.
    """
    return _completed(client, session, _Foreseeing(client, session))


class _Foreseeing:
    """What would be done about inputs."""

    def __init__(self, client: VipClient, session: VipSession) -> None:
        self._client = client
        self._session = session

    def send(self, plan: Preflight, inputs: InputsRecord | None = None) -> UploadSummary:
        """Bring files to the platform; with the record of inputs that were complete these files are a part of them."""
        return foresee_upload(self._client, self._session, plan)

    def note(self, inputs: InputsRecord) -> None:
        """Take note that all of them were seen on the platform."""


class _Sending(_Foreseeing):
    """What is done about inputs."""

    def __init__(self, client: VipClient, session: VipSession, progress: Progress | None) -> None:
        super().__init__(client, session)
        self._progress = progress

    def send(self, plan: Preflight, inputs: InputsRecord | None = None) -> UploadSummary:
        """Bring files to the platform; with the record of inputs that were complete these files are a part of them."""
        client, session, progress = self._client, self._session, self._progress
        if inputs is None:
            return upload(client, session, plan, progress=progress)
        file = SessionFile(session, client)
        with file.exclusive("upload"):
            return _bring(client, session, plan, inputs, file, _SETTLE_SECONDS, progress)

    def note(self, inputs: InputsRecord) -> None:
        """Take note that all of them were seen on the platform."""
        _note_complete(SessionFile(self._session, self._client), self._session, inputs)


def _inputs_of(record: SessionRecord, session: VipSession) -> InputsRecord:
    intent = record.ledger.intents.get(session.token)
    return intent.inputs if intent is not None else InputsRecord()


def _completed(client: VipClient, session: VipSession, hands: _Foreseeing) -> UploadSummary:
    """What comes of the inputs."""
    record = SessionFile(session, client).read()
    inputs = _inputs_of(record, session)
    if session.input_dir is None or record.is_adopted(session.token):
        return _NOTHING
    if inputs.is_complete or (inputs.is_complete is None and record.ledger.launched(session.token)):
        is_needed = record.not_launched(session, is_newest=session.token == record.ledger.newest)
        if is_needed:
            _refuse_replaced(record, session)
        return _restored(client, session, record, hands) if is_needed else _NOTHING
    if session.input_dir.is_dir():
        return hands.send(preflight(client, session, include=inputs.include, exclude=inputs.exclude))
    missing = _missing(client, session, inputs.expected)
    if missing or not inputs.expected:
        told = f"{len(missing)} are missing, among them {', '.join(missing[:3])}" if missing else "nobody wrote it down"
        raise LedgerError(
            f"It is not known that all inputs of session {session.session_name!r} are on the platform ({told}), and "
            f"{session.input_dir} is not on this machine. Run this where that folder is."
        )
    hands.note(inputs)
    return _NOTHING.model_copy(update={"skipped": len(inputs.expected)})


def _refuse_replaced(record: SessionRecord, session: VipSession) -> None:
    """Make sure that no other upload under this name has replaced what was sent for what is to be launched."""
    inputs = _inputs_of(record, session)
    digest = digest_of_inputs(inputs.expected, record.ledger.uploads)
    if None not in (inputs.digest, digest) and digest != inputs.digest:
        raise LedgerError(
            f"Inputs of session {session.session_name!r} were replaced by another upload under this name since they "
            "were sent for what is to be launched. Start a new session."
        )


def _restored(client: VipClient, session: VipSession, record: SessionRecord, hands: _Foreseeing) -> UploadSummary:
    """What comes of inputs that were complete; those of which nobody knows what they were are taken as they are."""
    inputs, uploads = _inputs_of(record, session), record.ledger.uploads
    expected = inputs.expected or {name: sent.size for name, sent in uploads.items()}
    if not expected:
        return _NOTHING if inputs.proven else _NOTHING.model_copy(update={"trusted": _unknown(session)})
    inputs = inputs.model_copy(update={"expected": expected, "is_complete": True})
    lost = _missing(client, session, expected)
    if not lost:
        hands.note(inputs)
        return _NOTHING.model_copy(update={"skipped": len(expected)})
    logger.warning("%d inputs that were on the platform are not there any more: %s", len(lost), ", ".join(lost[:20]))
    plan = _plan_of_lost(client, session, inputs, uploads, lost)
    return hands.send(plan, inputs).model_copy(update={"skipped": len(expected) - len(lost)})


def _plan_of_lost(
    client: VipClient,
    session: VipSession,
    inputs: InputsRecord,
    uploads: Mapping[str, UploadedFile],
    lost: Sequence[str],
) -> Preflight:
    """What is to be sent again: the very files that were there, or nothing."""
    told = (
        f"{len(lost)} inputs of session {session.session_name!r} are not on the platform any more, among them "
        f"{', '.join(lost[:3])}: they were removed or replaced since the upload."
    )
    if session.input_dir is None or not session.input_dir.is_dir():
        raise LedgerError(f"{told} {session.input_dir} is not on this machine. Run this where that folder is.")
    plan = preflight(client, session, include=inputs.include, exclude=inputs.exclude)
    files = {item.name: item for item in plan.files if item.name in set(lost)}
    others = [
        name
        for name in lost
        if name not in files or _unchanged(files[name], inputs.expected[name], uploads.get(name)) is None
    ]
    if others:
        raise LedgerError(
            f"{told} {session.input_dir} does not hold any more what was sent as {', '.join(others[:3])}. Put it back, "
            "or start a new session."
        )
    return replace(plan, files=tuple(files.values()))


def _missing(client: VipClient, session: VipSession, expected: dict[str, int]) -> list[str]:
    folders = {PurePosixPath(name).parent.as_posix() for name in expected}
    there = {
        folder: list_folder_or_nothing(client, str(PurePosixPath(session.vip_input_dir, folder))) for folder in folders
    }
    _add_hidden(client, session, expected, there)
    return [
        name
        for name, size in sorted(expected.items())
        if there[PurePosixPath(name).parent.as_posix()].get(PurePosixPath(name).name) != size
    ]


@dataclass(frozen=True)
class _Todo:
    """What an upload has to do.

    Attributes:
        done: Files that are on the platform already.
        missing: Files to send.
        outdated: Names of those to send of which another version is on the platform.
    """

    done: dict[str, UploadedFile]
    missing: list[LocalFile]
    outdated: set[str]

    @property
    def bytes(self) -> int:
        """Bytes to send."""
        return sum(item.size for item in self.missing)

    @property
    def summary(self) -> UploadSummary:
        """What an upload that succeeds has done."""
        return UploadSummary(
            sent=len(self.missing), skipped=len(self.done), replaced=len(self.outdated), bytes_sent=self.bytes
        )


class _Journal:
    """Writes down what has arrived, every few seconds and at the end, and reports progress."""

    def __init__(self, file: SessionFile, done: dict[str, UploadedFile], total: int, progress: Progress | None) -> None:
        self._file = file
        self._done = done
        self._total = total
        self._progress = progress
        self._bytes_sent = 0
        self._saved_at = time.monotonic()

    def note(self, item: LocalFile, sent: UploadedFile) -> None:
        """Take note of a file that has arrived."""
        if item.name not in self._done:
            self._bytes_sent += item.size
        self._done[item.name] = sent
        if self._progress:
            self._progress(self._bytes_sent, self._total)
        if time.monotonic() - self._saved_at > _SAVE_EVERY_SECONDS:
            self.save()

    def forget(self, names: Iterable[str]) -> None:
        """Take back what was taken for arrived and has not."""
        for name in names:
            self._done.pop(name, None)

    def save(self) -> None:
        """Write down what has arrived."""
        with self._file.edit() as record:
            record.ledger.uploads.update(self._done)
        self._saved_at = time.monotonic()


def _list_folders(
    client: VipClient, session: VipSession, plan: Preflight
) -> tuple[dict[str, dict[str, int | None]], list[str]]:
    """What is in the folders of the inputs, and those that are to be made."""
    there = {".": list_folder_or_nothing(client, session.vip_input_dir)}
    to_make: list[str] = []
    for folder in plan.folders:
        position = PurePosixPath(folder)
        path = f"{session.vip_input_dir}/{folder}"
        is_listed = position.name in there[position.parent.as_posix()]
        if is_listed or (_is_hidden(client, position.name) and client.exists(path)):
            there[folder] = list_folder_or_nothing(client, path)
        else:
            to_make.append(folder)
            there[folder] = {}
    _add_hidden(client, session, [item.name for item in plan.files], there)
    return there, to_make


def _is_hidden(client: VipClient, name: str) -> bool:
    return name.startswith(".") and not client.profile.lists_hidden_files


def _add_hidden(
    client: VipClient, session: VipSession, names: Iterable[str], there: dict[str, dict[str, int | None]]
) -> None:
    """Ask for files by themselves that the platform leaves out of its lists."""
    for name in names:
        position = PurePosixPath(name)
        sizes = there[position.parent.as_posix()]
        if position.name not in sizes and _is_hidden(client, position.name):
            entry = client.entry(f"{session.vip_input_dir}/{name}")
            if entry.exists and not entry.is_directory:
                sizes[position.name] = entry.size


def _compare(
    client: VipClient,
    session: VipSession,
    plan: Preflight,
    there: dict[str, dict[str, int | None]],
    sent_before: dict[str, UploadedFile],
) -> _Todo:
    todo = _Todo(done={}, missing=[], outdated=set())
    for item in plan.files:
        position = PurePosixPath(item.name)
        sizes = there[position.parent.as_posix()]
        if position.name not in sizes:
            todo.missing.append(item)
        elif (known := _unchanged(item, sizes[position.name], sent_before.get(item.name))) is not None and (
            item.name in sent_before or _is_same(client, session, item)
        ):
            todo.done[item.name] = known
        else:
            todo.missing.append(item)
            todo.outdated.add(item.name)
    return todo


def _is_same(client: VipClient, session: VipSession, item: LocalFile) -> bool:
    """Whether a file of the right size that somebody else has sent is the same, where the platform can tell."""
    if client.profile.stores_raw_bodies:
        return True
    try:
        compare_digest(item.path, f"{session.vip_input_dir}/{item.name}", client.md5)
    except UnexpectedResponse as error:
        logger.warning("%s", error)
        return False
    return True


def _send_until_proven(
    client: VipClient, session: VipSession, plan: Preflight, todo: _Todo, journal: _Journal, settle_seconds: float
) -> None:
    """Send what is missing; what the listings do not show then is sent once more, unless it was refused."""
    outdated = todo.outdated
    failures = _send_all(client, session, todo.missing, outdated, journal, settle_seconds)
    absent = _absent(client, session, plan.files) if todo.missing else {}
    again = [item for item in plan.files if item.name in absent and item.local_name not in failures]
    if again:
        logger.warning("%d files are not there although they were accepted; sending them again", len(again))
        outdated = {item.name for item in again if absent[item.name] is not None}
        failures |= _send_all(client, session, again, outdated, journal, settle_seconds)
        absent = _absent(client, session, plan.files)
    missing = {
        item.local_name: _not_there(session, item, absent[item.name]) for item in plan.files if item.name in absent
    }
    journal.forget(absent)
    # Some that were answered with an error have arrived all the same.
    if failed := missing | {name: error for name, error in failures.items() if name in missing}:
        raise TransferFailed(f"Upload to {session.vip_input_dir}", failed, len(plan.files))


def _send_all(
    client: VipClient,
    session: VipSession,
    items: Sequence[LocalFile],
    outdated: set[str],
    journal: _Journal,
    settle_seconds: float,
) -> dict[str, BiomedError]:
    """Send files; return why some could not be sent."""
    try:
        transfer_all(
            items,
            lambda item: _send(client, session, item, item.name in outdated, settle_seconds),
            name=lambda item: item.local_name,
            subject=f"Upload to {session.vip_input_dir}",
            parallelism=client.parallelism,
            on_done=journal.note,
        )
    except TransferFailed as error:
        return error.failures
    return {}


def _absent(client: VipClient, session: VipSession, files: Iterable[LocalFile]) -> dict[str, int | None]:
    """The files that are not on the platform with their size, and the size that is there instead, None for nothing."""
    absent: dict[str, int | None] = {}
    there: dict[str, dict[str, int | None]] = {}
    for item in files:
        path = PurePosixPath(session.vip_input_dir, item.name)
        folder = str(path.parent)
        if folder not in there:
            there[folder] = list_folder_or_nothing(client, folder)
        if path.name in there[folder] and there[folder][path.name] == item.size:
            continue
        # Hidden files, and whatever else a platform does not list.
        entry = client.entry(str(path))
        if not entry.exists or entry.is_directory or entry.size != item.size:
            absent[item.name] = (entry.size or 0) if entry.exists else None
    return absent


def _not_there(session: VipSession, item: LocalFile, size: int | None) -> UnexpectedResponse:
    found = "it is not there" if size is None else f"{size} bytes are there"
    return UnexpectedResponse(
        f"{session.vip_input_dir}/{item.name} was accepted twice, with {item.size} bytes, but {found}. Leave the file "
        "as it is while it is sent, and run this again, or ask the platform's support."
    )


def _send(
    client: VipClient, session: VipSession, item: LocalFile, is_outdated: bool, settle_seconds: float
) -> UploadedFile:
    path = f"{session.vip_input_dir}/{item.name}"
    if is_outdated:
        delete_and_wait(client, path, timeout_seconds=_DELETE_SECONDS)
    try:
        # Taken before the file is sent: one that changes meanwhile differs from its record and is sent again.
        record = UploadedFile(size=item.size, mtime_ns=item.mtime_ns, sha256=digest(item.path))
        put_and_verify(client, item.path, path, settle_seconds=settle_seconds)
    except OSError as error:
        raise SourceUnreadable(
            f"{item.path} cannot be read any more ({error.strerror}). Put it back or exclude it, and run this again."
        ) from error
    return record


def _unchanged(item: LocalFile, size_there: int | None, sent: UploadedFile | None) -> UploadedFile | None:
    """What is on the platform when it is this very file, else None.

    A file of the right size that we have no record of was sent before a kill, or by vip-client: it counts as complete.
    """
    if size_there != item.size:
        return None
    if sent is not None and (sent.size, sent.mtime_ns) == (item.size, item.mtime_ns):
        return sent
    now = UploadedFile(size=item.size, mtime_ns=item.mtime_ns, sha256=digest(item.path))
    return now if sent is None or sent.sha256 == now.sha256 else None
