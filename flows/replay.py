"""Flows that replay public executions of VIP, and publish ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect.states import Completed

from prefect_biomed import analysis
from prefect_biomed.analysis.replay import Published, Replay, ReplayOutcome
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vip import SessionOptions, VipSession, WorkflowFailed, judge, open_session
from prefect_biomed.clients.vip.bundle import Bundle, PublishedExecution, open_bundle
from prefect_biomed.clients.vip.replaying import ReplayPlan
from prefect_biomed.clients.vip.session_file import VIP_HOME, SessionFile
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.parameters import RefreshTime, Waiting
from prefect_biomed.flows.repeatability import Assessment
from prefect_biomed.flows.sessions import default_output_dir
from prefect_biomed.flows.vip import finish_session
from prefect_biomed.flows.vip_parameters import PipelineId, Removal, SessionName, VipHome, chosen
from prefect_biomed.tasks import replay as replays
from prefect_biomed.tasks import vip as steps
from prefect_biomed.tasks.policies import is_deployed
from prefect_biomed.tasks.run_names import flow_run_named

__all__ = ["is_launched", "opened_bundle", "session_of_replays", "vip_publish", "vip_replay"]


@checked_flow(name="vip-replay", needs=analysis.require_extra, flow_run_name=flow_run_named("session_name", "bundle"))
def vip_replay(
    credentials: VipCredentials,
    bundle: Path,
    output_dir: Path | None = None,
    input_dir: Path | None = None,
    pipeline_id: PipelineId | None = None,
    session_name: SessionName | None = None,
    refresh_time: RefreshTime = 30.0,
    vip_home: VipHome = VIP_HOME,
    removal: Removal | None = None,
    waiting: Waiting | None = None,
    assessment: Assessment | None = None,
) -> Replay:
    """Run public executions of VIP again, once each, and tell whether they give what was published.

    Digests are compared first, then contents. The state it ends with is named `Completed` when everything is
    reproduced, else `Differs`, `Tampered` (a published file contradicts its own provenance) or `NotJudged`. Replaying
    the same bundle again takes up the replay that there is and launches nothing twice, also in another flow run; give
    another `session_name` and `output_dir` for another replay.

    Args:
        credentials: The account.
        bundle: The bundle: its folder, or an archive of it, as VIP publishes it on Zenodo.
        output_dir: Local folder of the replay; `vip_outputs/<session_name>` when empty.
        input_dir: Local folder of the input files, laid out as they were or by their names alone. Those that are not in
            it are taken from the bundle, from Girder, or from their path on the platform.
        pipeline_id: What to run instead of the pipeline and version that were published.
        session_name: Name of the sessions, before the number of the execution; made of the bundle when empty.
        refresh_time: Seconds between two looks at the executions.
        vip_home: Folder on the platform that holds the folders of sessions.
        removal: What is removed from the platform at the end; all of the sessions when empty.
        waiting: How long to wait for capacity and for the executions; to the end when empty.
        assessment: Probability of a false alarm, and rules of the comparison.

    Returns:
        What the replay has shown; also in `replay.json` of the output folder.

    Raises:
        ConfigurationError: The bundle is none, something is not in it, or the extra `analysis` is not installed.
        PreflightFailed: Missing inputs, changed inputs and wrong versions, all at once. Nothing was sent.
        WorkflowFailed: A replay failed. Nothing is said of what it would have given.
        DeadlineExceeded: The replays have not ended in time; replaying again goes on waiting.
    """
    waiting, assessment = waiting or Waiting(), assessment or Assessment()
    opened = opened_bundle(bundle, output_dir)
    session = session_of_replays(session_name or f"replay-{opened.identity}", output_dir, vip_home, removal)
    plans = replays.prepare_replay(credentials, opened, session, input_dir, pipeline_id)
    for plan in plans:
        if not is_launched(credentials, plan.session):
            steps.upload_inputs(credentials, plan.session)
            steps.launch_pipeline(credentials, plan.session, queue_timeout_seconds=waiting.queue_timeout_seconds)
    published = [
        _collected(credentials, execution, plan, refresh_time, waiting)
        for execution, plan in zip(opened.executions, plans, strict=True)
    ]
    replay = replays.judge_replay(
        published, session.output_dir, assessment.title or opened.title, assessment.rules, assessment.level
    )
    for plan in plans:
        finish_session(credentials, plan.session)
    return _ended(replay)


@checked_flow(name="vip-publish", flow_run_name=flow_run_named("output_dir"))
def vip_publish(
    credentials: VipCredentials,
    output_dir: Path,
    bundle: Path,
    title: str = "",
    author: str = "",
    with_inputs: bool = False,
) -> list[str]:
    """Write a bundle of public executions of a session, as VIP does of its own, that `vip_replay` can run again.

    Args:
        credentials: The account.
        output_dir: Folder of the session, with its outputs and its `session_data.json`.
        bundle: Folder for the bundle.
        title: Title of the publication; the name of the session when empty.
        author: Who publishes it.
        with_inputs: Whether the input files are published too, in the folder `inputs` of the bundle.

    Returns:
        The executions in the bundle.

    Raises:
        LedgerError: There is no session file, no execution has succeeded, or outputs are not here.
        ConfigurationError: The input files are not here as they were sent, or the platform has no descriptor.
    """
    session = open_session(output_dir.expanduser().absolute())
    target = bundle.expanduser().absolute()
    return list(replays.publish_session(credentials, session, target, title, author, with_inputs))


def opened_bundle(bundle: Path, output_dir: Path | None) -> Bundle:
    """Open a bundle, unpacked beside the replay when it is an archive.

    Args:
        bundle: Its folder or archive.
        output_dir: Local folder of the replay.

    Returns:
        The bundle.

    Raises:
        ConfigurationError: It is none; or its path is relative in a run of a deployment.
    """
    if is_deployed() and not bundle.expanduser().is_absolute():
        raise ConfigurationError(f"bundle is the relative path {bundle}. Give an absolute path.")
    bundle = bundle.expanduser().absolute()
    return open_bundle(bundle, (output_dir or bundle.parent).expanduser().absolute() / ".bundle")


def session_of_replays(name: str, output_dir: Path | None, vip_home: str, removal: Removal | None) -> VipSession:
    """Name and place the sessions of the replays; each has a token of its own.

    Args:
        name: Name of the sessions, before the number of the execution.
        output_dir: Local folder of the replay.
        vip_home: Folder on the platform that holds the folders of sessions.
        removal: What is removed at the end.

    Returns:
        The session that theirs are made of.

    Raises:
        ConfigurationError: The values make no session.
    """
    return VipSession.planned(
        session_name=name,
        output_dir=(output_dir or default_output_dir(name)).expanduser().absolute(),
        vip_input_dir=f"{vip_home}/{name}/INPUTS",
        vip_output_dir=f"{vip_home}/{name}/OUTPUTS",
        token="replay",
        # Every job counts; archives stay packed, since digests were written of them as they are.
        options=chosen(SessionOptions(unzip=False, strict=True), removal),
    )


def is_launched(credentials: VipCredentials, session: VipSession) -> bool:
    """Tell whether an execution is known, so that nothing has to be sent for it again.

    Args:
        credentials: The account.
        session: The session of one replay.

    Returns:
        Whether its session file tells of one.
    """
    with credentials.get_client() as client:
        file = SessionFile(session, client)
        return file.exists and bool(file.read().workflows_of(session.token))


def _collected(
    credentials: VipCredentials,
    execution: PublishedExecution,
    plan: ReplayPlan,
    refresh_time: float,
    waiting: Waiting,
) -> Published:
    """Wait for the replay of one execution and fetch what it gave."""
    session = plan.session
    workflows = steps.monitor_workflows(
        credentials,
        session,
        refresh_time=refresh_time,
        timeout_seconds=waiting.timeout_seconds,
        raise_on_failure=False,
    )
    downloaded = steps.download_outputs(credentials, session)
    with credentials.get_client() as client:
        failed = [one for one in judge(client, session, workflows, fetched=True) if not one.is_success]
    if failed:
        problems = "; ".join(problem for one in failed for problem in one.problems)
        raise WorkflowFailed(
            f"The replay of {execution.workflow_id} failed: {problems}. Nothing is said of what it would have given. "
            f"When the cause is mended, give another session_name than {session.session_name.rpartition('-')[0]} and "
            "another output_dir.",
            [one.workflow for one in failed],
        )
    (workflow, *_) = workflows
    return Published(
        name=execution.workflow_id,
        pipeline=session.pipeline_id or "",
        group=json.dumps([execution.pipeline_id, execution.inputs], sort_keys=True),
        digests=execution.outputs,
        places=execution.places,
        contradictions=execution.contradictions,
        execution=workflow.identifier,
        replayed={path.name: path for path in downloaded.files.get(workflow.identifier, ())},
        environment=plan.environment,
        unchecked=plan.unchecked,
    )


_STATES = {
    ReplayOutcome.REPRODUCED: "Completed",
    ReplayOutcome.DIFFERS: "Differs",
    ReplayOutcome.TAMPERED: "Tampered",
    ReplayOutcome.NOT_JUDGED: "NotJudged",
}


def _ended(replay: Replay) -> Replay:
    """End the flow with what was shown as the message of its state; Prefect hands the replay in it to callers."""
    state: Any = Completed(name=_STATES[replay.outcome], message=replay.sentence, data=replay)
    ended: Replay = state  # Prefect takes the state for the result it holds
    return ended
