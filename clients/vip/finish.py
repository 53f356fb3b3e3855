"""Ending sessions: what is removed from the platform, and who may still need it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.errors import LedgerError, NotFoundError
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import StillNeeded, StillRunning
from prefect_biomed.clients.vip.models import VipSession, Workflow, WorkflowStatus
from prefect_biomed.clients.vip.monitoring import list_by_id
from prefect_biomed.clients.vip.remote_files import delete_and_wait, list_folder_or_nothing, put_and_verify
from prefect_biomed.clients.vip.session_file import SessionFile

__all__ = ["FinishSummary", "finish", "remove_session", "share_inputs"]

logger = logging.getLogger(__name__)

_HOLDERS = "HOLDERS"


class FinishSummary(BaseModel):
    """What finishing did.

    Attributes:
        removed: Folders removed from the platform.
        kept_for: Sessions that still need the inputs, which were kept therefore.
    """

    model_config = ConfigDict(frozen=True)

    removed: tuple[str, ...]
    kept_for: tuple[str, ...]


def share_inputs(client: VipClient, session: VipSession, owner: VipSession) -> VipSession:
    """Let a session use the inputs of another one, and count it among those who hold them. Safe to repeat.

    Each holder has a small file in the folder `HOLDERS` beside the inputs, so that the count is known on every machine
    and survives crashes.

    Args:
        client: The account.
        session: The session that needs inputs; it must have none of its own.
        owner: The session that uploaded them.

    Returns:
        The session, with the input folders of the owner.

    Raises:
        LedgerError: The owner's inputs are not on the platform, or the session has inputs of its own.
    """
    if not client.exists(owner.vip_input_dir):
        raise LedgerError(f"{owner.vip_input_dir} is not on the platform. Upload the inputs of the owner first.")
    own = f"{session.vip_dir}/INPUTS"
    if own != owner.vip_input_dir and client.exists(own):
        raise LedgerError(f"Session {session.session_name!r} has inputs of its own in {own}. Choose another name.")
    for holder in (owner, session):
        _hold(client, owner.vip_input_dir, holder.session_name)
    if not client.exists(owner.vip_input_dir):
        raise LedgerError(f"{owner.vip_input_dir} was removed just now. Upload the inputs of the owner again.")
    return session.model_copy(update={"vip_input_dir": owner.vip_input_dir, "input_dir": owner.input_dir})


def finish(
    client: VipClient,
    session: VipSession,
    *,
    timeout_seconds: float = 300.0,
    keep_input: bool = False,
    keep_output: bool = False,
    delete_records: bool = False,
) -> FinishSummary:
    """Remove the folders of a session from the platform and mark its workflows `Removed`. Safe to repeat.

    Inputs that other sessions hold are kept; the last one out removes them.

    Args:
        client: The account.
        session: The session.
        timeout_seconds: How long to wait for each deletion.
        keep_input: Whether the inputs stay on the platform.
        keep_output: Whether the outputs stay on the platform.
        delete_records: Whether the platform's records of finished and killed executions are deleted too. On platforms
            other than VIP they hold the outputs and go with them.

    Returns:
        What was removed and what was kept for whom.

    Raises:
        StillRunning: Some executions have not ended; nothing was removed.
        DeadlineExceeded: A deletion takes longer. Finishing again goes on with it.
    """
    file = SessionFile(session, client)
    with file.exclusive("finish"):
        ids = file.read().workflow_ids()
        workflows = _ended(client, session, ids)
        removed, held_by = _remove_folders(client, session, timeout_seconds, keep_input, keep_output)
        if client.profile.keeps_outputs_in_records:
            delete_records = not keep_output
        if delete_records:
            _delete_records(client, workflows)
        if not keep_output and session.backup != "vip":
            with file.edit() as record:
                for identifier in ids:
                    record.workflows[identifier].status = WorkflowStatus.REMOVED.value
    if held_by:
        logger.info("%s is kept for %s", session.vip_input_dir, ", ".join(held_by))
    return FinishSummary(removed=tuple(removed), kept_for=held_by)


def _ended(client: VipClient, session: VipSession, ids: list[str]) -> list[Workflow]:
    workflows = _states(client, ids)
    if running := [workflow.identifier for workflow in workflows if not workflow.status.is_terminal]:
        raise StillRunning(
            f"Session {session.session_name!r} is not finished: {', '.join(running)} may still write outputs. "
            "Nothing was removed. Wait for them, or kill them.",
            running,
        )
    return workflows


def _remove_folders(
    client: VipClient, session: VipSession, timeout_seconds: float, keep_input: bool, keep_output: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Remove what is not kept; return what was removed, and who still holds the inputs."""
    removed: list[str] = []
    held_by: tuple[str, ...] = ()
    if not keep_output:
        removed += _remove(client, session.vip_output_dir, timeout_seconds)
    if not keep_input:
        inputs, held_by = _release(client, session, timeout_seconds)
        removed += inputs
    for folder in {session.vip_dir, str(PurePosixPath(session.vip_input_dir).parent)}:
        if client.exists(folder) and not list_folder_or_nothing(client, folder):
            removed += _remove(client, folder, timeout_seconds)
    return removed, held_by


def _delete_records(client: VipClient, workflows: Sequence[Workflow]) -> None:
    for workflow in workflows:
        if client.profile.keeps_outputs_in_records:
            if workflow.status != WorkflowStatus.REMOVED:
                client.delete_workflow(workflow.identifier, delete_files=True)
        elif workflow.status in {WorkflowStatus.FINISHED, WorkflowStatus.KILLED}:
            client.delete_workflow(workflow.identifier)


def _states(client: VipClient, ids: list[str]) -> list[Workflow]:
    if not ids:
        return []
    listed = list_by_id(client)
    return [listed.get(identifier) or _state(client, identifier) for identifier in ids]


def _state(client: VipClient, identifier: str) -> Workflow:
    try:
        return client.workflow(identifier)
    except NotFoundError:
        # Its record was deleted, which the platform allows only after the end.
        return Workflow(identifier=identifier, status=WorkflowStatus.REMOVED)


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
    folder = f"{PurePosixPath(session.vip_input_dir).parent}/{_HOLDERS}"
    if not client.exists(folder):
        if PurePosixPath(session.vip_input_dir).is_relative_to(session.vip_dir):
            return _remove(client, session.vip_input_dir, timeout_seconds), ()
        return [], ("their owner",)
    holders = list_folder_or_nothing(client, folder)
    if me in holders and len(holders) > 1:
        delete_and_wait(client, f"{folder}/{me}", timeout_seconds=timeout_seconds)
        # Two sessions that leave at once see each other above, and both see an empty folder here.
        holders = list_folder_or_nothing(client, folder)
    if others := tuple(sorted(holders.keys() - {me})):
        return [], others
    removed = _remove(client, session.vip_input_dir, timeout_seconds)
    # Only now: after a kill in between, the next to finish finds the folder and goes on.
    _remove(client, folder, timeout_seconds)
    return removed, ()


def _remove(client: VipClient, path: str, timeout_seconds: float) -> list[str]:
    if not client.exists(path):
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
    path = PurePosixPath(folder)
    if not client.exists(folder):
        return False
    holders = list_folder_or_nothing(client, f"{folder}/{_HOLDERS}").keys() - {path.name}
    if others := sorted(name for name in holders if client.exists(str(path.parent / name))):
        raise StillNeeded(f"{folder} holds the inputs of {', '.join(others)}. Finish or remove those first.")
    return bool(_remove(client, folder, timeout_seconds))
