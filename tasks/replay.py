"""Tasks that replay public executions, and publish ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import task

from prefect_biomed.analysis import Rules
from prefect_biomed.analysis.replay import Published, Replay
from prefect_biomed.analysis.replay import judge_replay as judge
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.files import atomic_write
from prefect_biomed.clients.texts import inline
from prefect_biomed.clients.vip import VipSession
from prefect_biomed.clients.vip.bundle import Bundle
from prefect_biomed.clients.vip.publishing import publish_session as publish
from prefect_biomed.clients.vip.replaying import ReplayPlan
from prefect_biomed.clients.vip.replaying import prepare_replay as prepare
from prefect_biomed.tasks._reporting import artifact_key, event, markdown, run_logger
from prefect_biomed.tasks.policies import RETRY
from prefect_biomed.tasks.run_names import task_run_named

__all__ = ["judge_replay", "prepare_replay", "publish_session"]


@task(task_run_name=task_run_named("Prepare replay", "session"), **RETRY)
def prepare_replay(
    credentials: VipCredentials,
    bundle: Bundle,
    session: VipSession,
    input_dir: Path | None = None,
    pipeline_id: str | None = None,
) -> list[ReplayPlan]:
    """Fetch and check the inputs of all executions of a bundle, and look whether the platform has what ran.

    Safe to repeat: it only reads from the platform (`GET /pipelines`, `GET /path/…`).

    Args:
        credentials: The account.
        bundle: The bundle.
        session: What names and places the sessions of the replays.
        input_dir: Folder of the inputs here.
        pipeline_id: What to run instead of the pipeline that was published.

    Returns:
        One plan for each execution.

    Raises:
        PreflightFailed: All problems at once, each beginning with `missing input`, `changed input` or `wrong version`.
            Nothing was sent.
    """
    logger = run_logger()
    with credentials.get_client() as client:
        plans = prepare(client, bundle, session, input_dir=input_dir, pipeline_id=pipeline_id)
    for plan in plans:
        for field, (then, now) in plan.environment.items():
            logger.warning("%s: the descriptor has changed in %s: %s, now %s", plan.workflow_id, field, then, now)
        for name in plan.unchecked:
            logger.warning("%s: nothing tells the MD5 of the input %s", plan.workflow_id, name)
    return plans


@task(task_run_name=task_run_named("Judge replay"), **RETRY)
def judge_replay(
    published: Sequence[Published],
    folder: Path,
    title: str = "",
    rules: Rules | None = None,
    level: float = 0.05,
) -> Replay:
    """Compare what replays gave with what was published, and write it down as `replay.json` and an artifact.

    Emits `biomed.replay.reproduced`, `.differs`, `.tampered` or `.not_judged`. Safe to repeat.

    Args:
        published: The executions and their replays.
        folder: Where `replay.json` goes.
        title: Title of the bundle.
        rules: What is compared and how; sensible ones when None.
        level: Probability of calling something changed when nothing is.

    Returns:
        What the replays have shown.
    """
    replay = judge(published, title=title, rules=rules, level=level)
    run_logger().info("%s", replay.sentence)
    with atomic_write(folder / "replay.json") as file:
        file.write(replay.model_dump_json(indent=2).encode())
    key = artifact_key("replay", folder.name)
    rows = [f"- {inline(one.sentence)}" for one in replay.executions]
    heading = f"# {replay.outcome.value}: {inline(title or folder.name)}"
    markdown(key, "\n".join([heading, "", *rows]), f"Replay of {title}")
    event(
        f"biomed.replay.{replay.outcome.name.lower()}",
        f"replay.{key}",
        sentence=replay.sentence,
        executions=_executions(replay),
    )
    return replay


def _executions(replay: Replay) -> Mapping[str, str]:
    return {one.name: one.execution for one in replay.executions}


@task(task_run_name=task_run_named("Publish", "session"), **RETRY)
def publish_session(
    credentials: VipCredentials,
    session: VipSession,
    folder: Path,
    title: str = "",
    author: str = "",
    with_inputs: bool = False,
) -> tuple[str, ...]:
    """Write a bundle of public executions of a session whose outputs are here.

    Safe to repeat: files appear whole and replace older ones (`GET /pipelines`).

    Args:
        credentials: The account.
        session: The session.
        folder: Where the bundle goes.
        title: Title of the publication; the name of the session when empty.
        author: Who publishes it.
        with_inputs: Whether the input files are published too.

    Returns:
        The executions in the bundle.

    Raises:
        LedgerError: No execution has succeeded, or outputs of one that has are not here.
        ConfigurationError: The inputs are not here as they were sent.
    """
    with credentials.get_client() as client:
        identifiers = publish(client, session, folder, title=title, author=author, with_inputs=with_inputs)
    run_logger().info("%d executions of %s are in %s", len(identifiers), session.session_name, folder)
    return identifiers
