"""Tasks of the operator: what our runs have left on the platforms, and taking it away."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar
from uuid import UUID

from prefect import task
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactCollectionFilter,
    ArtifactCollectionFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun
from pydantic import BaseModel, ConfigDict

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import NotFoundError
from prefect_biomed.clients.vantage6 import Task as Vantage6Task
from prefect_biomed.clients.vip import VipClient, Workflow, kill, remove_session
from prefect_biomed.clients.vip.finish import runs_of_session
from prefect_biomed.clients.vip.monitoring import list_all, state
from prefect_biomed.clients.vip.session_file import VIP_HOME
from prefect_biomed.tasks._reporting import artifact_key, run_logger
from prefect_biomed.tasks.policies import RETRY, lasting_folder
from prefect_biomed.tasks.run_names import task_run_named

__all__ = ["Leftover", "boss_leftovers", "remove_vip_leftovers", "vantage6_leftovers", "vip_leftovers"]

_OF_OURS = re.compile(r"^(?P<name>.+)-(?P<token>[a-z0-9]{10})$")
_RUN_OF_SESSION = re.compile(r"^(?P<session>[0-9A-Za-z_-]+)-r\d{3,}-[0-9a-z]{4,32}$")
_SESSION = re.compile(r"^[0-9A-Za-z_-]+$")
_PAGE = 200
T = TypeVar("T")


class Leftover(BaseModel):
    """Something that our runs have left on a platform.

    Attributes:
        platform: Where it is.
        kind: What it is.
        identifier: Identifier, or path, on the platform.
        name: Its name there.
        status: Its status in the platform's words; empty for folders.
        since: When it began, where the platform tells.
        flow_run_id: Flow run that made it, where this Prefect server knows.
        flow_run: Name and state of that flow run.
        resume: Command that brings its work to an end; empty when somebody is at it.
        remove: Command that removes it.
    """

    model_config = ConfigDict(frozen=True)

    platform: Literal["vip", "vantage6", "boss"]
    kind: Literal["execution", "session folder", "task", "ingest job"]
    identifier: str
    name: str = ""
    status: str = ""
    since: datetime | None = None
    flow_run_id: UUID | None = None
    flow_run: str = ""
    resume: str = ""
    remove: str = ""


@task(task_run_name=task_run_named("What is on VIP"), **RETRY)
def vip_leftovers(credentials: VipCredentials, vip_home: str = VIP_HOME) -> list[Leftover]:
    """List executions of ours that have not ended, and folders of sessions that were not removed.

    Safe to repeat: it only reads (`GET /executions`, `GET /path/…?action=list`).

    Args:
        credentials: The account.
        vip_home: Folder on the platform that holds the folders of sessions.

    Returns:
        What is there. Folders of sessions of vip-client are among them: both use one layout.

    Raises:
        AuthenticationError: The key was refused.
    """
    with credentials.get_client() as client:
        folders = [e for e in client.list_folder(vip_home) if e.is_directory] if client.exists(vip_home) else []
        listed = client.workflows()
        if client.is_cut_off(listed):
            run_logger().warning(
                "VIP lists only the %d newest executions of the account. Older ones that still run are not shown; "
                "vip-kill and vip-resume find those of a session by its folder.",
                len(listed),
            )
    # vip-client gives the name of a session to all of its runs.
    sessions = {PurePosixPath(folder.path).name for folder in folders}
    ours = [workflow for workflow in listed if _RUN_OF_SESSION.match(workflow.name) or workflow.name in sessions]
    runs = _flow_runs({workflow.identifier: artifact_key("vip", workflow.identifier) for workflow in ours})
    by_session: dict[str, list[Workflow]] = {}
    for workflow in ours:
        by_session.setdefault(_session_of(workflow), []).append(workflow)
    found: list[Leftover] = []
    for workflow in ours:
        if not workflow.status.is_terminal:
            run = runs.get(workflow.identifier)
            found.append(
                Leftover(
                    platform="vip",
                    kind="execution",
                    identifier=workflow.identifier,
                    name=workflow.name,
                    status=workflow.status.value,
                    since=workflow.start_date,
                    resume=_resume(run, _resume_session(credentials, _session_of(workflow), run)),
                    remove=_removal(credentials, executions=[workflow.identifier]),
                    **_told(run),
                )
            )
    for folder in folders:
        session = PurePosixPath(folder.path).name
        own = by_session.get(session, [])
        run = next((runs[w.identifier] for w in own if w.identifier in runs), None)
        found.append(
            Leftover(
                platform="vip",
                kind="session folder",
                identifier=folder.path,
                name=session,
                since=min((w.start_date for w in own if w.start_date), default=None),
                resume=_resume(run, _resume_session(credentials, session, run)),
                remove=_removal(credentials, sessions=[session]) if _SESSION.match(session) else "",
                **_told(run),
            )
        )
    return found


@task(task_run_name=task_run_named("What is on vantage6"), **RETRY)
def vantage6_leftovers(credentials: Vantage6Credentials) -> list[Leftover]:
    """List tasks of ours that have not ended.

    Safe to repeat: it only reads (`GET task`). Tasks are known by the token in their names.

    Args:
        credentials: The account.

    Returns:
        What is there.

    Raises:
        AuthenticationError: Name or password were refused.
    """
    with credentials.get_client() as client:
        named = [one for one in client.records(Vantage6Task, name=f"%-{'_' * 10}") if _OF_OURS.match(one.name)]
        # Lists of some generations tell no status.
        still = [one for one in named if not one.status.is_terminal and not client.task_status(one.id).is_terminal]
    runs = _flow_runs({str(one.id): artifact_key("vantage6-task", one.id) for one in still})
    return [
        Leftover(
            platform="vantage6",
            kind="task",
            identifier=str(one.id),
            name=one.name,
            status=one.status.value,
            since=one.created_at,
            resume=_resume(
                runs.get(str(one.id)),
                _command(
                    "federated-analysis",
                    credentials=_reference(credentials),
                    task_id=one.id,
                    collaboration="...",
                    image="...",
                    method="...",
                ),
            ),
            remove=_command("remove-leftovers", vantage6=_reference(credentials), tasks=[one.id]),
            **_told(runs.get(str(one.id))),
        )
        for one in still
    ]


@task(task_run_name=task_run_named("What is on the Boss"), **RETRY)
def boss_leftovers(credentials: BossCredentials) -> list[Leftover]:
    """List ingest jobs of the account that are neither complete nor cancelled.

    Safe to repeat: it only reads (`GET /ingest/`). The Boss has no names for jobs, so jobs that others have made with
    this account are listed too, without a flow run.

    Args:
        credentials: The account.

    Returns:
        What is there.

    Raises:
        AuthenticationError: The token was refused.
    """
    with credentials.get_client() as client:
        still = [job for job in client.list_jobs() if not job.status.is_terminal]
    runs = _flow_runs({str(job.id): artifact_key("boss-job", job.id) for job in still})
    return [
        Leftover(
            platform="boss",
            kind="ingest job",
            identifier=str(job.id),
            name=f"{job.collection}/{job.experiment}/{job.channel}",
            status=job.status.name,
            since=job.created_on,
            resume=_resume(
                runs.get(str(job.id)),
                _command(
                    "boss-join-ingest", credentials=_reference(credentials), job_id=job.id, config="...", complete=True
                ),
            ),
            remove=_command("remove-leftovers", boss=_reference(credentials), ingest_jobs=[job.id]),
            **_told(runs.get(str(job.id))),
        )
        for job in still
    ]


@task(task_run_name=task_run_named("Remove from VIP", "sessions", "executions"), **RETRY)
def remove_vip_leftovers(
    credentials: VipCredentials,
    executions: Sequence[str] = (),
    sessions: Sequence[str] = (),
    vip_home: str = VIP_HOME,
    timeout_seconds: float = 300.0,
) -> list[str]:
    """Kill executions, and remove sessions: kill their executions, then delete their folders on the platform.

    Safe to repeat: what has ended or is gone is left alone (`PUT /executions/{id}/kill`, `DELETE /path/…`). What a
    session runs is told by the platform's list and by its session file: on the platform, or in
    `vip_outputs/<session>` here.

    Args:
        credentials: The account.
        executions: Identifiers of executions to kill.
        sessions: Names of sessions to remove.
        vip_home: Folder on the platform that holds the folders of sessions.
        timeout_seconds: How long to wait for the kills, and for each deletion.

    Returns:
        What was done, in words.

    Raises:
        StillNeeded: Another session uses the inputs of one of these. Nothing of that one was removed.
        StillRunning: The platform does not list all executions, and some of the sessions may go on that are neither
            named, nor listed, nor written down. Nothing was killed or removed.
        DeadlineExceeded: Something takes longer; repeating goes on with it.
    """
    done: list[str] = []
    with credentials.get_client() as client:
        running = running_executions(client, executions, sessions, vip_home)
        kill(client, running, timeout_seconds=timeout_seconds)
        done += [f"killed {identifier}" for identifier in running]
        for session in sessions:
            if remove_session(client, f"{vip_home}/{session}", timeout_seconds=timeout_seconds):
                done.append(f"removed {vip_home}/{session}")
    run_logger().info("%s", ", ".join(done) or "There was nothing to remove")
    return done


def running_executions(
    client: VipClient, executions: Sequence[str], sessions: Sequence[str], vip_home: str = VIP_HOME
) -> list[str]:
    """List what has not ended of some executions and sessions. It only reads (`GET /executions`).

    Args:
        client: The account.
        executions: Identifiers of executions.
        sessions: Names of sessions.
        vip_home: Folder on the platform that holds the folders of sessions.

    Returns:
        Identifiers, those that the platform does not know among them, because they may run elsewhere.

    Raises:
        StillRunning: Some of the sessions may go on that are neither named, nor listed, nor written down.
    """
    listing = list_all(client)
    states = {identifier: _state(client, identifier) for identifier in executions}
    names = [workflow.name for workflow in states.values() if workflow]
    for session in sessions:
        folder = lasting_folder() / "vip_outputs" / session
        for one in runs_of_session(client, session, listing, output_dir=folder, vip_home=vip_home, asked=names):
            listed = listing.by_id.get(one)
            states[one] = listed if listed and listed.status.is_terminal else _state(client, one)
    # What the platform does not know may run all the same.
    return [one for one, workflow in states.items() if not workflow or not workflow.status.is_terminal]


def _state(client: VipClient, identifier: str) -> Workflow | None:
    try:
        return state(client, identifier)
    except NotFoundError:
        return None


def _session_of(workflow: Workflow) -> str:
    named = _RUN_OF_SESSION.match(workflow.name)
    return named["session"] if named else workflow.name


def _flow_runs(keys: Mapping[str, str]) -> dict[str, FlowRun]:
    """Find the flow runs that launched things, by the link each launch has left as an artifact.

    Args:
        keys: Artifact keys by identifier.

    Returns:
        Outermost flow runs by identifier.
    """
    made_by: dict[str, UUID] = {}
    with get_client(sync_client=True) as client:
        for some in _portions(sorted(keys.values())):
            artifacts = client.read_latest_artifacts(
                artifact_filter=ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=some)), limit=_PAGE
            )
            made_by |= {a.key: a.flow_run_id for a in artifacts if a.key and a.flow_run_id}
        runs: dict[UUID, FlowRun] = {}
        for some_ids in _portions(sorted(set(made_by.values()))):
            read = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=some_ids)), limit=_PAGE)
            runs |= {run.id: run for run in read}
        for identifier, run in list(runs.items()):
            while run.parent_task_run_id is not None:
                parent = client.read_task_run(run.parent_task_run_id).flow_run_id
                if parent is None:
                    break
                run = client.read_flow_run(parent)
            runs[identifier] = run
    return {identifier: runs[made_by[key]] for identifier, key in keys.items() if made_by.get(key) in runs}


def _portions(items: Sequence[T]) -> Iterator[list[T]]:
    for start in range(0, len(items), _PAGE):
        yield list(items[start : start + _PAGE])


def _told(run: FlowRun | None) -> dict[str, Any]:
    if run is None:
        return {}
    return {"flow_run_id": run.id, "flow_run": f"{run.name} ({run.state_name})"}


def _resume(run: FlowRun | None, otherwise: str) -> str:
    """The flow run goes on by itself, is resumed, or is retried; where there is none that can, the other command."""
    state = run.state if run else None
    if run is None or state is None or state.is_completed() or run.deployment_id is None:
        return otherwise
    if state.is_paused():
        return f"prefect flow-run resume {run.id}"
    if state.is_final():
        return f"prefect flow-run retry {run.id}"
    return ""


def _resume_session(credentials: VipCredentials, session: str, run: FlowRun | None) -> str:
    given = run.parameters if run and run.parameters.get("session_name") in (None, session) else {}
    folder = {"output_dir": given["output_dir"]} if given.get("output_dir") else {}
    return _command("vip-resume", credentials=_reference(credentials), session_name=session, **folder)


def _removal(credentials: VipCredentials, **what: list[str]) -> str:
    return _command("remove-leftovers", vip=_reference(credentials), **what)


def _command(deployment: str, **parameters: object) -> str:
    # Names come from the platform, and a person pastes this into a shell.
    return f"prefect deployment run {deployment}/{deployment} --params {shlex.quote(json.dumps(parameters))}"


def _reference(block: Block) -> object:
    """How a saved block is given to a deployment; never its content."""
    name = block._block_document_name
    return {"$ref": {"block_document_slug": f"{block.get_block_type_slug()}/{name}"}} if name else "..."
