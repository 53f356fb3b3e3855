"""Ending sessions: what is removed from the platform, and who may still need it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import NotFetched, SessionLocked, StillNeeded, StillRunning
from prefect_biomed.clients.vip.models import VipSession, Workflow, WorkflowStatus
from prefect_biomed.clients.vip.monitoring import Listing, details, is_named_after, list_all, session_on_file
from prefect_biomed.clients.vip.outcome import judge, options_of
from prefect_biomed.clients.vip.preflight import preflight
from prefect_biomed.clients.vip.remote_files import delete_and_wait, is_there, list_folder_or_nothing, put_and_verify
from prefect_biomed.clients.vip.session_file import FILE_NAME, VIP_HOME, SessionFile
from prefect_biomed.clients.vip.session_record import SessionRecord

__all__ = [
    "FinishSummary",
    "finish",
    "foresee_finish",
    "on_inputs_of",
    "other_holders",
    "removable_session",
    "remove_session",
    "runs_of_session",
    "share_inputs",
]

logger = logger_of(__name__)

_HOLDERS = "HOLDERS"
_RUN_FOLDER = re.compile(r"r\d{3,}-[0-9a-z]{4,32}")


class FinishSummary(BaseModel):
    """What finishing did.

    Attributes:
        removed: Folders removed from the platform.
        kept_for: Sessions, or runs of this one, that still need the inputs, which were kept therefore.
        left_to: Runs of other intents of this session name that go on or are still to be fetched, and what nobody has
            written down. Only what belongs to this intent was removed; who finishes last removes the rest.
    """

    model_config = ConfigDict(frozen=True)

    removed: tuple[str, ...]
    kept_for: tuple[str, ...]
    left_to: tuple[str, ...] = ()


def share_inputs(client: VipClient, session: VipSession, owner: VipSession) -> VipSession:
    """Let a session use the inputs of another one, and count it among those who hold them. Safe to repeat.

    Each holder has a small file in the folder `HOLDERS` beside the inputs, so that the count is known on every machine
    and survives crashes. What the inputs are is taken over into the record of the session, so that a launch can tell
    when some of them are gone.

    Args:
        client: The account.
        session: The session that needs inputs; it must have none of its own.
        owner: The session that uploaded them.

    Returns:
        The session, with the input folders of the owner.

    Raises:
        LedgerError: The owner's inputs are not on the platform or not complete, or the session has inputs of its own.
        PreflightFailed: The settings of the session do not fit its pipeline; it holds nothing then.
    """
    borrower = on_inputs_of(client, session, owner)
    preflight(client, borrower, inputs_uploaded=True)
    for holder in (owner, session):
        _hold(client, owner.vip_input_dir, holder.session_name)
    if not client.exists(owner.vip_input_dir):
        raise LedgerError(f"{owner.vip_input_dir} was removed just now. Upload the inputs of the owner again.")
    _take_over_inputs(client, borrower, owner)
    return borrower


def _take_over_inputs(client: VipClient, borrower: VipSession, owner: VipSession) -> None:
    """Write down in the record of a borrower what the inputs are, where the record of their owner tells."""
    lent = SessionFile(owner, client).read()
    intent = lent.ledger.intents.get(owner.token)
    if intent is None or not intent.inputs.is_complete:
        return
    with SessionFile(borrower, client).edit() as record:
        record.note_intent(borrower).inputs = intent.inputs
        names = intent.inputs.expected or lent.ledger.uploads
        record.ledger.uploads |= {name: sent for name, sent in lent.ledger.uploads.items() if name in names}


def on_inputs_of(client: VipClient, session: VipSession, owner: VipSession) -> VipSession:
    """Tell what `share_inputs` would make of a session. It only reads.

    Args:
        client: The account.
        session: As for `share_inputs`.
        owner: As for `share_inputs`.

    Returns:
        The session, with the input folders of the owner.

    Raises:
        LedgerError: As for `share_inputs`.
    """
    SessionFile(owner, client).read().refuse_incomplete_inputs(owner)
    if not client.exists(owner.vip_input_dir):
        raise LedgerError(f"{owner.vip_input_dir} is not on the platform. Upload the inputs of the owner first.")
    own = f"{session.vip_dir}/INPUTS"
    if own != owner.vip_input_dir and client.exists(own):
        raise LedgerError(f"Session {session.session_name!r} has inputs of its own in {own}. Choose another name.")
    return session.model_copy(update={"vip_input_dir": owner.vip_input_dir, "input_dir": owner.input_dir})


def finish(
    client: VipClient,
    session: VipSession,
    *,
    timeout_seconds: float = 300.0,
    keep_input: bool | None = None,
    keep_output: bool | None = None,
    delete_records: bool | None = None,
) -> FinishSummary:
    """Remove the folders of a session from the platform and mark its workflows `Removed`. Safe to repeat.

    Only outputs are removed that the record shows as fetched, or as not wanted by the options of the session. Inputs
    that other sessions hold are kept, and those that runs of another intent of this session name are still to use. When
    such runs, as those of a twin of a flow run, go on or are not fetched, the outputs of this intent alone are removed.
    The last one out removes the rest.

    Args:
        client: The account.
        session: The session.
        timeout_seconds: How long to wait for each deletion.
        keep_input: Whether the inputs stay on the platform; as the session's options say when None. False removes them
            although some runs of the session were never launched.
        keep_output: Whether the outputs stay on the platform; as the session's options say when None.
        delete_records: Whether the platform's records of finished and killed executions are deleted too; as the
            session's options say when None. On platforms other than VIP they hold the outputs and go with them.

    Returns:
        What was removed and what was kept for whom.

    Raises:
        StillRunning: Some executions have not ended, or may have been launched, or are neither written down nor listed;
            nothing was removed.
        NotFetched: Some have wanted outputs that were not fetched, or there are outputs of runs of which nothing is
            written down; nothing was removed.
        StillNeeded: Some runs of the session were never launched, which need the inputs; nothing was removed.
        DeadlineExceeded: A deletion takes longer. Finishing again goes on with it.
    """
    options = session.options
    may_strand = keep_input is False
    keep_input = options.keep_input if keep_input is None else keep_input
    keep_output = options.keep_output if keep_output is None else keep_output
    delete_records = options.delete_records if delete_records is None else delete_records
    if client.profile.keeps_outputs_in_records:
        delete_records = not keep_output
    file = SessionFile(session, client)
    with file.exclusive("finish"):
        workflows, left_to = _ended(client, session, file)
        unfetched = () if keep_output and not delete_records else _unfetched_of_others(client, session, workflows)
        if not keep_output:
            left_to += (*unfetched, *_strange_outputs(client, session, file))
        if not (keep_input or left_to or may_strand):
            _refuse_unlaunched(client, session, file.read())
        if left_to or keep_output:
            # Nobody has looked whether the outputs of the others were fetched, for which their records are needed.
            record = file.read()
            workflows = [one for one in workflows if record.intent_of(one.identifier) == session.token]
        if not keep_output:
            # First, because a record that is kept on the platform goes with the outputs.
            with file.edit() as record:
                if left_to:
                    begun = {workflow.identifier for workflow in workflows}
                    record.ledger.removing = sorted(begun.union(record.ledger.removing))
                else:
                    record.ledger.is_removed = True
        removed = [] if keep_output else _remove_outputs(client, session, file, left_to, timeout_seconds)
        held_by = left_to
        if not keep_input and not left_to:
            inputs, held_by = _remove_inputs(client, session, file, timeout_seconds)
            removed += inputs
        removed += _remove_empty(client, session, timeout_seconds)
        if delete_records:
            _delete_records(client, workflows)
        if not keep_output:
            with file.edit() as record:
                for workflow in workflows:
                    record.workflows[workflow.identifier].status = WorkflowStatus.REMOVED.value
    if held_by:
        logger.info("%s is kept for %s", session.vip_input_dir, ", ".join(held_by))
    return FinishSummary(removed=tuple(removed), kept_for=held_by, left_to=left_to)


def foresee_finish(
    client: VipClient, session: VipSession, made: Collection[str] = (), leaving: Collection[str] = ()
) -> FinishSummary:
    """Tell what `finish` would remove once all runs of the session have succeeded. It only reads.

    Args:
        client: The account.
        session: The session; its options count.
        made: Folders that will have been made until then, inputs and outputs.
        leaving: Other sessions that will have given up the inputs until then.

    Returns:
        What would be removed, and for whom inputs would be kept.
    """
    options = session.options

    def will_be(path: str) -> bool:
        return path in made or is_there(client, path)

    removed: list[str] = []
    held_by: tuple[str, ...] = ()
    if not options.keep_output and will_be(session.vip_output_dir):
        removed.append(session.vip_output_dir)
    if not options.keep_input:
        held_by = tuple(name for name in other_holders(client, session) if name not in leaving)
        removed += [session.vip_input_dir] if not held_by and will_be(session.vip_input_dir) else []
    for folder in _parents(session):
        names = list_folder_or_nothing(client, folder).keys()
        inside = {f"{folder}/{name}" for name in names} | {path for path in made if _is_in(path, folder)}
        gone = {*removed, *((f"{folder}/{_HOLDERS}",) if session.vip_input_dir in removed else ())}
        if inside and inside <= gone:
            removed.append(folder)
    return FinishSummary(removed=tuple(removed), kept_for=held_by)


def _parents(session: VipSession) -> list[str]:
    """The folders that are removed when nothing is in them any more."""
    return sorted({session.vip_dir, str(PurePosixPath(session.vip_input_dir).parent)})


def _is_in(path: str, folder: str) -> bool:
    return str(PurePosixPath(path).parent) == folder


def _ended(client: VipClient, session: VipSession, file: SessionFile) -> tuple[list[Workflow], tuple[str, ...]]:
    """Executions of the session that have ended and were not removed, and how they ended, which is written down.

    Returns:
        These; and the runs of other intents that go on, or may, as those of a twin of this flow run.
    """
    record = file.read()
    begun = [name for name, launch in record.ledger.launches.items() if launch.workflow_id is None]
    own = {session.workflow_name(repetition) for repetition in range(1, session.nb_runs + 1)}
    listing = list_all(client)
    # Nobody has written down what these have come to, so their names tell.
    found = listing.where(lambda one: one.name in {*own, *begun}).workflows if begun or not file.exists else ()
    lost = [name for name in begun if name not in {workflow.name for workflow in found}]
    if session.pipeline_id is not None and not file.exists and len(found) < session.nb_runs and listing.gap:
        raise StillRunning(
            f"Session {session.session_name!r} is not finished: nothing is written down of it here, and not all its "
            "runs are listed, so some may go on. Nothing was removed. Finish it where its record is. "
            f"({listing.gap})"
        )
    if found:
        with file.edit() as record:
            record.adopt(found)
    workflows = _states(client, record, listing.by_id)
    running = [workflow.identifier for workflow in workflows if not workflow.status.is_terminal]
    _refuse_going_on(
        session,
        [identifier for identifier in running if record.intent_of(identifier) == session.token],
        [name for name in lost if record.token_of(name) == session.token],
    )
    known = [one for one in workflows if one.status.is_terminal and one.status != WorkflowStatus.REMOVED]
    if known:
        with file.edit() as record:
            for workflow in known:
                record.note_workflow(workflow)
    return [one for one in workflows if one.status.is_terminal], (*running, *lost)


def _refuse_going_on(session: VipSession, running: Sequence[str], lost: Sequence[str]) -> None:
    if lost:
        raise StillRunning(
            f"Session {session.session_name!r} is not finished: it is not known whether {', '.join(lost)} was "
            "launched. Nothing was removed. Run vip_resume, which finds out."
        )
    if running:
        raise StillRunning(
            f"Session {session.session_name!r} is not finished: {', '.join(running)} may still write outputs. "
            "Nothing was removed. Wait for them, or kill them.",
            running,
        )


def _refuse_unlaunched(client: VipClient, session: VipSession, record: SessionRecord) -> None:
    unlaunched = record.not_launched(session, is_newest=session.token == record.ledger.newest)
    if unlaunched and is_there(client, session.vip_input_dir):
        raise StillNeeded(
            f"Session {session.session_name!r} is not finished: {', '.join(unlaunched)} was never launched and needs "
            "its inputs. Nothing was removed. Run vip_resume, which launches it, or finish with keep_input: True keeps "
            "the inputs for it, False removes them all the same."
        )


def _unfetched_of_others(client: VipClient, session: VipSession, workflows: Sequence[Workflow]) -> tuple[str, ...]:
    """Name the runs of other intents whose wanted outputs are not here; refuse when there are such of this one."""
    file = SessionFile(session, client)
    if not file.exists and client.profile.takes_results_location and is_there(client, session.vip_output_dir):
        raise NotFetched(
            f"Session {session.session_name!r} is not finished: nothing is written down of it here, and there are "
            f"outputs in {session.vip_output_dir}. Nothing was removed. Download them first, or keep them with "
            "keep_output."
        )
    record = file.read()
    lost = {
        one.workflow.identifier: one.unfetched
        for one in judge(client, session, workflows, fetched=True)
        # What has been fetched and is not here any more is still on the platform, until its removal was begun.
        if one.unfetched and not record.ledger.is_given_up(one.workflow.identifier)
    }
    own = {identifier: outputs for identifier, outputs in lost.items() if record.intent_of(identifier) == session.token}
    if own:
        told = "; ".join(f"{identifier} ({', '.join(outputs[:3])})" for identifier, outputs in own.items())
        raise NotFetched(
            f"Session {session.session_name!r} is not finished: wanted outputs are not here: {told}. Nothing was "
            "removed. Download them, keep them with keep_output and without delete_records, or take the status of "
            "these runs out of get_status of the session's options.",
            list(own),
        )
    return tuple(lost)


def _strange_outputs(client: VipClient, session: VipSession, file: SessionFile) -> tuple[str, ...]:
    """Name what is among the outputs and of which nothing is written down here; refuse when some is of this intent.

    A twin on another machine leaves folders of its runs there, vip-client its own, and a user may put anything there.
    """
    record = file.read()
    top = PurePosixPath(session.vip_output_dir)
    silent = {one for one in record.workflows if _is_wanted_without_outputs(session, record, one)}
    paths = [one.results_location for one in record.ledger.launches.values() if one.workflow_id not in silent]
    paths += [str(output["path"]) for run in record.workflows.values() for output in run.outputs]
    known = {path.relative_to(top).parts[0] for one in paths if top in (path := PurePosixPath(one)).parents}
    there = list_folder_or_nothing(client, str(top))
    strange = [name for name in there if name not in known | {FILE_NAME}]
    lost = [name for name in strange if there[name] is not None or _holds_files(client, f"{top}/{name}")]
    if own := [name for name in lost if name.endswith(f"-{session.token}")]:
        raise NotFetched(
            f"Session {session.session_name!r} is not finished: {top} has outputs of runs of which nothing is written "
            f"down here: {', '.join(own)}. Nothing was removed. Download them, finish it where its record is, or keep "
            "them with keep_output."
        )
    return tuple(f"{top}/{name}" for name in lost)


def _is_wanted_without_outputs(session: VipSession, record: SessionRecord, workflow_id: str) -> bool:
    """Whether the outputs of a run are wanted and the platform has told of none; they may be in its folder."""
    ended = record.ledger.ended.get(workflow_id)
    if record.workflows[workflow_id].outputs or ended is None:
        return False
    return ended.status in options_of(session, record, workflow_id).get_status


def _holds_files(client: VipClient, folder: str) -> bool:
    there = list_folder_or_nothing(client, folder)
    return any(size is not None or _holds_files(client, f"{folder}/{name}") for name, size in there.items())


def _remove_outputs(
    client: VipClient, session: VipSession, file: SessionFile, left_to: Sequence[str], timeout_seconds: float
) -> list[str]:
    """Remove the outputs of the session; those of this intent alone when other runs still need the rest."""
    if not left_to:
        return _remove(client, session.vip_output_dir, timeout_seconds)
    launched = file.read().ledger.launched(session.token).values()
    folders = {one.results_location for one in launched if _is_in(one.results_location, session.vip_output_dir)}
    return [removed for folder in sorted(folders) for removed in _remove(client, folder, timeout_seconds)]


def _remove_inputs(
    client: VipClient, session: VipSession, file: SessionFile, timeout_seconds: float
) -> tuple[list[str], tuple[str, ...]]:
    """Remove the inputs, unless somebody is still to use them; return what was removed, and who that is."""
    with ExitStack() as stack:
        try:
            # Who uploads finds inputs there that would be gone when they are used.
            stack.enter_context(file.exclusive("upload", 0))
        except SessionLocked:
            return [], (f"an upload of {session.session_name}",)
        held_by = _still_to_launch(client, session)
        return ([], held_by) if held_by else _release(client, session, timeout_seconds)


def _remove_empty(client: VipClient, session: VipSession, timeout_seconds: float) -> list[str]:
    empty = [one for one in _parents(session) if is_there(client, one) and not list_folder_or_nothing(client, one)]
    return [removed for folder in empty for removed in _remove(client, folder, timeout_seconds)]


def _still_to_launch(client: VipClient, session: VipSession) -> tuple[str, ...]:
    """Runs of other intents under this session name that are to use the inputs, as those of a twin of this flow run."""
    record = SessionFile(session, client).read()
    ledger = record.ledger
    waiting: list[str] = []
    for token, intent in ledger.intents.items():
        if token != session.token:
            fields = {"token": token, "pipeline_id": intent.pipeline_id, "nb_runs": intent.nb_runs}
            other = session.model_copy(update=fields)
            waiting += record.not_launched(other, is_newest=token == ledger.newest)
    return tuple(waiting)


def _delete_records(client: VipClient, workflows: Sequence[Workflow]) -> None:
    for workflow in workflows:
        if client.profile.keeps_outputs_in_records:
            if workflow.status != WorkflowStatus.REMOVED:
                client.delete_workflow(workflow.identifier, delete_files=True)
        elif workflow.status in {WorkflowStatus.FINISHED, WorkflowStatus.KILLED}:
            client.delete_workflow(workflow.identifier)


def _states(client: VipClient, record: SessionRecord, listed: Mapping[str, Workflow]) -> list[Workflow]:
    """Describe executions as far as that is not written down: a list tells neither jobs nor outputs."""
    states = []
    for identifier in record.workflow_ids():
        summary, ended = listed.get(identifier), record.ledger.ended.get(identifier)
        is_known = summary is not None and ended is not None and summary.status == ended.status
        states.append(summary if is_known and summary is not None else details(client, identifier, record))
    return states


def _hold(client: VipClient, input_dir: str, holder: str) -> None:
    folder = f"{PurePosixPath(input_dir).parent}/{_HOLDERS}"
    client.make_folder(folder)
    if holder in list_folder_or_nothing(client, folder):
        return
    with tempfile.TemporaryDirectory() as temporary:
        mark = Path(temporary, holder)
        mark.write_text(f"{holder} uses {input_dir}\n")
        put_and_verify(client, mark, f"{folder}/{holder}")


def _release(client: VipClient, session: VipSession, timeout_seconds: float) -> tuple[list[str], tuple[str, ...]]:
    """Give up the hold of a session; remove the inputs when nobody else holds them.

    Returns:
        What was removed, and who still holds the inputs.
    """
    me = session.session_name
    folder = _holders_of(session)
    holders = list_folder_or_nothing(client, folder)
    if me in holders and len(holders) > 1:
        delete_and_wait(client, f"{folder}/{me}", timeout_seconds=timeout_seconds)
    # Two sessions that leave at once see each other above, and both see an empty folder here.
    if others := other_holders(client, session):
        return [], others
    removed = _remove(client, session.vip_input_dir, timeout_seconds)
    # Only now: after a kill in between, the next to finish finds the folder and goes on.
    _remove(client, folder, timeout_seconds)
    return removed, ()


def _holders_of(session: VipSession) -> str:
    return f"{PurePosixPath(session.vip_input_dir).parent}/{_HOLDERS}"


def other_holders(client: VipClient, session: VipSession) -> tuple[str, ...]:
    """Tell who else holds the inputs of a session. It only reads.

    Args:
        client: The account.
        session: The session.

    Returns:
        Names of sessions.
    """
    if is_there(client, _holders_of(session)):
        return tuple(sorted(list_folder_or_nothing(client, _holders_of(session)).keys() - {session.session_name}))
    is_owner = PurePosixPath(session.vip_input_dir).is_relative_to(session.vip_dir)
    return () if is_owner else ("their owner",)


def _remove(client: VipClient, path: str, timeout_seconds: float) -> list[str]:
    if not is_there(client, path):
        return []
    delete_and_wait(client, path, timeout_seconds=timeout_seconds)
    return [path]


def remove_session(client: VipClient, folder: str, *, timeout_seconds: float = 300.0) -> bool:
    """Remove the folder of a session from the platform by its path alone, without a session file. Safe to repeat.

    For sessions that nobody will finish. Executions that run go on writing into it: kill them first.

    Args:
        client: The account.
        folder: The session's folder.
        timeout_seconds: How long to wait for the deletion.

    Returns:
        Whether there was one.

    Raises:
        StillNeeded: Sessions whose folders are still there use its inputs.
        DeadlineExceeded: The deletion takes longer.
    """
    return removable_session(client, folder) and bool(_remove(client, folder, timeout_seconds))


def removable_session(client: VipClient, folder: str) -> bool:
    """Tell whether `remove_session` would remove something. It only reads.

    Args:
        client: The account.
        folder: The session's folder.

    Returns:
        Whether there is such a folder.

    Raises:
        StillNeeded: As for `remove_session`.
    """
    path = PurePosixPath(folder)
    if not is_there(client, folder):
        return False
    holders = list_folder_or_nothing(client, f"{folder}/{_HOLDERS}").keys() - {path.name}
    if others := sorted(name for name in holders if is_there(client, str(path.parent / name))):
        raise StillNeeded(f"{folder} holds the inputs of {', '.join(others)}. Finish or remove those first.")
    return True


def runs_of_session(
    client: VipClient,
    session_name: str,
    listing: Listing,
    *,
    output_dir: Path,
    vip_home: str = VIP_HOME,
    asked: Collection[str] = (),
) -> list[str]:
    """Identify all executions of a session that is to be removed by its name alone. It only reads.

    Where the platform does not list all executions, each run that has a folder for its results must be listed, asked
    for by its identifier or written down; where nothing is written down, there must be such folders.

    Args:
        client: The account.
        session_name: Name of the session.
        listing: Executions of the account.
        output_dir: Folder here that may hold its session file, which may be on the platform as well.
        vip_home: Folder on the platform that holds the folders of sessions.
        asked: Names of further executions, of which the caller knows the identifiers.

    Returns:
        Identifiers of those listed or written down, but for those whose outputs were removed.

    Raises:
        StillRunning: Others may go on.
        LedgerError: The session file is damaged, or belongs to another session.
    """
    session = session_on_file(client, session_name, output_dir, vip_home)
    record = SessionFile(session, client).read() if session else None
    found = listing.where(lambda workflow: is_named_after(session_name, workflow))
    if listing.gap is not None:
        launches = record.ledger.launches if record else {}
        known = {*asked, *(workflow.name for workflow in found.workflows)}
        known |= {name for name, launch in launches.items() if launch.workflow_id}
        outputs = list_folder_or_nothing(client, f"{vip_home}/{session_name}/OUTPUTS")
        folders = [
            name for name, size in outputs.items() if size is None and (not record or _RUN_FOLDER.fullmatch(name))
        ]
        runs = {*launches, *(f"{session_name}-{folder}" for folder in folders)}
        if runs - known or not (record or runs):
            told = ", ".join(sorted(runs - known)) or "any run of it"
            raise StillRunning(
                f"Session {session_name!r} is not removed: it is not known whether {told} goes on. Nothing was killed "
                "or removed. Give the identifiers of its runs as executions, from the portal, or finish it where its "
                f"record is. ({listing.gap})"
            )
    return list(dict.fromkeys([*(record.workflow_ids() if record else ()), *found.by_id]))
