"""What the flows of VIP would do: their own decisions, and those of their steps, without the requests that change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError, NotFoundError
from prefect_biomed.clients.once import Deed
from prefect_biomed.clients.vip import SessionFile, VipClient, VipSession, open_intents, open_session, preflight
from prefect_biomed.clients.vip.bids import by_subject
from prefect_biomed.clients.vip.finish import foresee_finish, on_inputs_of
from prefect_biomed.clients.vip.launches import foresee_launch
from prefect_biomed.clients.vip.monitoring import foresee_kill, state
from prefect_biomed.clients.vip.session_file import sessions_below
from prefect_biomed.clients.vip.upload import UploadSummary, foresee_inputs, foresee_upload
from prefect_biomed.flows import sessions as naming
from prefect_biomed.flows.plans import Plan, launch_of, merged
from prefect_biomed.flows.vip import PipelineRun, open_sessions, session_on_inputs_of
from prefect_biomed.flows.vip_parameters import GirderSession, SessionUpload, Upload, chosen

__all__ = [
    "plan_collect",
    "plan_described",
    "plan_kill",
    "plan_resume",
    "plan_session",
    "plan_sessions_on_one_upload",
    "plan_shared_inputs",
]


def plan_session(
    credentials: VipCredentials, upload: SessionUpload | None, refresh_time: float, waiting: object, **given: Any
) -> Plan:
    """Plan `vip_session`; arguments as for it.

    Returns:
        What it would do.
    """
    upload = upload or SessionUpload()
    session = naming.new_session(upload=upload, **given)
    with credentials.get_client() as client:
        if upload.inputs_of is not None:
            session = on_inputs_of(client, session, open_session(upload.inputs_of.expanduser()))
        check = preflight(client, session, include=upload.include, exclude=upload.exclude)
        update_files = upload.update_files and upload.inputs_of is None
        sent = foresee_upload(client, session, check, update_files=update_files)
        launched = _launches(client, session, range(1, session.nb_runs + 1), check.jobs)
        made = _made(session, sent, launched)
        subjects = Plan(notes=tuple(by_subject(session.input_settings)))
        return merged([_upload(sent), launched, _removal(client, session, made), subjects])


def plan_resume(
    credentials: VipCredentials,
    session_name: str | None,
    output_dir: Path | None,
    vip_home: str,
    outputs: Any,
    removal: Any,
    girder: GirderSession | None,
    **_: Any,
) -> Plan:
    """Plan `vip_resume`; arguments as for it.

    Returns:
        What it would do.
    """
    intents = open_sessions(credentials, session_name, output_dir, vip_home, girder or GirderSession())
    intents = [one.model_copy(update={"options": chosen(one.options, outputs, removal)}) for one in intents]
    parts: list[Plan] = []
    made: set[str] = set()
    with credentials.get_client() as client:
        for session in intents:
            record = SessionFile(session, client).read()
            if record.is_adopted(session.token):
                continue
            sent = foresee_inputs(client, session)
            repetitions = record.repetitions_to_launch(session, is_newest=session is intents[-1])
            jobs = 0
            if any(not record.ledger.launches.get(session.workflow_name(one)) for one in repetitions):
                jobs = preflight(client, session, inputs_uploaded=not sent.sent).jobs
            launched = _launches(client, session, repetitions, jobs)
            made |= _made(session, sent, launched)
            parts += [_upload(sent), launched]
        return merged([*parts, _removal(client, intents[-1], made)])


def plan_shared_inputs(
    credentials: VipCredentials,
    runs: Sequence[PipelineRun],
    upload: Upload | None,
    refresh_time: float,
    waiting: object,
    **given: Any,
) -> Plan:
    """Plan `vip_shared_inputs`; arguments as for it.

    Returns:
        What it would do.
    """
    upload = upload or Upload()
    owner = naming.new_session(upload=SessionUpload(**upload.model_dump()), **given)
    sessions = [
        session_on_inputs_of(owner, number, run, owner.output_dir / str(number))
        for number, run in enumerate(runs, start=1)
    ]
    owner = owner.model_copy(update={"girder_output_dir": None})
    return plan_sessions_on_one_upload(credentials, owner, sessions, upload)


def plan_sessions_on_one_upload(
    credentials: VipCredentials, owner: VipSession, sessions: Sequence[VipSession], upload: Upload
) -> Plan:
    """Plan sessions that use the inputs of another one, which is finished at the end.

    Args:
        credentials: The account.
        owner: The session that uploads the inputs.
        sessions: Those that use them.
        upload: Which inputs are sent.

    Returns:
        What would be done.
    """
    names = [session.session_name for session in sessions]
    with credentials.get_client() as client:
        jobs = [preflight(client, session, include=upload.include, exclude=upload.exclude).jobs for session in sessions]
        check = preflight(client, owner, include=upload.include, exclude=upload.exclude)
        sent = foresee_upload(client, owner, check, update_files=upload.update_files)
        parts, made = [_upload(sent)], _made(owner, sent, Plan())
        for session, number in zip(sessions, jobs, strict=True):
            launched = _launches(client, session, range(1, session.nb_runs + 1), number)
            made |= _made(session, UploadSummary(sent=0, skipped=0, replaced=0, bytes_sent=0), launched)
            parts.append(launched)
        parts += [_removal(client, session, made, keep_input=owner.input_dir is not None) for session in sessions]
        if owner.input_dir is not None:
            parts.append(_removal(client, owner, made, leaving=names))
        return merged(parts)


def plan_described(client: VipClient, session: VipSession, *, send: bool) -> Plan:
    """Plan a session that uploads its own inputs and runs once, as it is described.

    Args:
        client: The account.
        session: The session.
        send: Whether inputs are uploaded and the run is launched; not so when its execution is known.

    Returns:
        What would be done.
    """
    if not send:
        return merged([_launches(client, session, [1], 0), _removal(client, session)])
    check = preflight(client, session)
    sent = foresee_upload(client, session, check)
    launched = _launches(client, session, [1], check.jobs)
    return merged([_upload(sent), launched, _removal(client, session, _made(session, sent, launched))])


def plan_kill(
    credentials: VipCredentials, session_name: str | None, output_dir: Path | None, vip_home: str, **_: Any
) -> Plan:
    """Plan `vip_kill`; arguments as for it.

    Returns:
        What it would do.

    Raises:
        ConfigurationError: Neither a name nor a folder was given.
    """
    if session_name is None and output_dir is None:
        raise ConfigurationError("Give session_name or output_dir.")
    folder = (output_dir or naming.default_output_dir(session_name or "")).expanduser().absolute()
    with credentials.get_client() as client:
        running = foresee_kill(client, session_name=session_name, output_dir=folder, vip_home=vip_home)
    return Plan(ends=tuple(f"execution {one.identifier} ({one.name})" for one in running))


def plan_collect(credentials: VipCredentials, folder: Path, outputs: Any, removal: Any) -> Plan:
    """Plan `vip_collect`; arguments as for it.

    Returns:
        What it would do. Sessions that are left alone are in the notes.
    """
    parts: list[Plan] = []
    with credentials.get_client() as client:
        for path in sessions_below(folder.expanduser().absolute()):
            intents = open_intents(path)
            session = intents[-1].model_copy(update={"options": chosen(intents[-1].options, outputs, removal)})
            record = SessionFile(session, client).read()
            open_ids = record.workflow_ids()
            unlaunched = [name for one in intents for name in record.not_launched(one, is_newest=one is intents[-1])]
            try:
                running = [one for one in open_ids if not state(client, one, record.over).status.is_terminal]
            except NotFoundError as error:
                parts.append(Plan(notes=(f"{session.session_name} is left alone: {error}",)))
                continue
            if open_ids and not unlaunched and not running:
                parts.append(_removal(client, session))
            elif open_ids:
                left = f"{len(running)} runs go on, {len(unlaunched)} are not launched"
                parts.append(Plan(notes=(f"{session.session_name} is left alone: {left}",)))
    return merged(parts)


def _upload(sent: UploadSummary) -> Plan:
    return Plan(
        files_to_send=sent.sent,
        bytes_to_send=sent.bytes_sent,
        files_replaced=sent.replaced,
        files_reused=sent.skipped,
        notes=(sent.trusted,) if sent.trusted else (),
    )


def _launches(client: VipClient, session: VipSession, repetitions: Collection[int], jobs: int) -> Plan:
    return merged(launch_of(foresee_launch(client, session, one), jobs or 1) for one in repetitions)


def _made(session: VipSession, sent: UploadSummary, launched: Plan) -> set[str]:
    """Folders that will have been made."""
    made = {session.vip_input_dir} if session.input_dir is not None and sent.sent else set()
    if any(one.deed in {Deed.LAUNCH, Deed.LOOK_FIRST} for one in launched.launches):
        made.add(session.vip_output_dir)
    return made


def _removal(
    client: VipClient,
    session: VipSession,
    made: Collection[str] = (),
    leaving: Collection[str] = (),
    *,
    keep_input: bool = False,
) -> Plan:
    options = session.options
    if not options.finish:
        return Plan(notes=(f"{session.session_name} stays on the platform",))
    if keep_input:
        session = session.model_copy(update={"options": options.model_copy(update={"keep_input": True})})
    gone = foresee_finish(client, session, made, leaving)
    records = (f"the records of the runs of {session.session_name}",) if options.delete_records else ()
    return Plan(removes=(*gone.removed, *records), kept_for=gone.kept_for)
