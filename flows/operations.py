"""Flows of the operator: what is still running remotely, and taking away what nobody will finish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from pydantic import Field

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.vip.session_file import VIP_HOME
from prefect_biomed.flows import cancellation
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.vip_parameters import VipHome
from prefect_biomed.tasks import operations as steps
from prefect_biomed.tasks._reporting import run_logger, table
from prefect_biomed.tasks.boss import cancel_ingest_job
from prefect_biomed.tasks.operations import Leftover
from prefect_biomed.tasks.run_names import flow_run_named
from prefect_biomed.tasks.vantage6 import kill_task

__all__ = ["check_accounts", "end_cancelled", "remove_leftovers", "what_is_running"]

Seconds = Annotated[float, Field(ge=0, title="Seconds since the cancellation")]
SessionName = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$")]


@checked_flow(name="what-is-running", flow_run_name="what is running")
def what_is_running(
    vip: VipCredentials | None = None,
    vantage6: Vantage6Credentials | None = None,
    boss: BossCredentials | None = None,
    vip_home: VipHome = VIP_HOME,
) -> list[Leftover]:
    """Show in one table what our runs have left on the platforms, since when, who began it, and how to go on.

    Nothing is changed. Platforms without credentials are left out; one that cannot be reached does not hide the others.

    Args:
        vip: Account on VIP: executions that have not ended, folders of sessions that were not removed.
        vantage6: Account on vantage6: tasks that have not ended.
        boss: Account on the Boss: ingest jobs that are neither complete nor cancelled.
        vip_home: Folder on VIP that holds the folders of sessions.

    Returns:
        What is there; also as the artifact `what-is-running`, with the commands that resume and remove each.

    Raises:
        ConfigurationError: No credentials were given.
        BiomedError: A platform could not be asked; the artifact shows the others.
    """
    looks: dict[str, Callable[[], list[Leftover]]] = {}
    if vip is not None:
        looks["VIP"] = lambda: steps.vip_leftovers(vip, vip_home)
    if vantage6 is not None:
        looks["vantage6"] = lambda: steps.vantage6_leftovers(vantage6)
    if boss is not None:
        looks["Boss"] = lambda: steps.boss_leftovers(boss)
    if not looks:
        raise ConfigurationError("Give the credentials of at least one platform.")
    found, problems = _ask_all(looks)
    table("what-is-running", [_row(one) for one in found], "What our runs have left on the platforms")
    run_logger().info("%d things are on the platforms", len(found))
    if problems:
        raise BiomedError("Not all platforms could be asked.\n" + "\n".join(problems))
    return found


@checked_flow(name="remove-leftovers", flow_run_name=flow_run_named("sessions", "executions", "tasks", "ingest_jobs"))
def remove_leftovers(
    vip: VipCredentials | None = None,
    vantage6: Vantage6Credentials | None = None,
    boss: BossCredentials | None = None,
    executions: Sequence[str] = (),
    sessions: Sequence[SessionName] = (),
    tasks: Sequence[int] = (),
    ingest_jobs: Sequence[int] = (),
    vip_home: VipHome = VIP_HOME,
) -> list[str]:
    """Take away what nobody will finish. What was computed there and not downloaded is lost.

    Cancel the flow run first, if there is one at work. The table of `what-is-running` gives the whole command.

    Args:
        vip: Account on VIP.
        vantage6: Account on vantage6.
        boss: Account on the Boss.
        executions: Identifiers of VIP executions to kill.
        sessions: Names of VIP sessions: their executions are killed, their folders on the platform deleted.
        tasks: Ids of vantage6 tasks to kill, with their subtasks.
        ingest_jobs: Numbers of Boss ingest jobs to cancel; what was ingested stays.
        vip_home: Folder on VIP that holds the folders of sessions.

    Returns:
        What was done, in words.

    Raises:
        ConfigurationError: Credentials are missing for something that was named. Nothing was done.
        StillNeeded: Another VIP session uses the inputs of one of these.
        StillRunning: VIP does not list all executions, and some of these sessions may go on that are neither named, nor
            listed, nor written down. Nothing was killed or removed there.
        CancelNotPermitted: The vantage6 role may not kill tasks.
    """
    done: list[str] = []
    check_accounts(vip, vantage6, boss, executions, sessions, tasks, ingest_jobs)
    if vip is not None and (executions or sessions):
        done += steps.remove_vip_leftovers(vip, executions, sessions, vip_home)
    if vantage6 is not None:
        for task_id in tasks:
            outcome = kill_task(vantage6, task_id)
            done.append(f"vantage6 task {task_id} is {outcome.task.status.value}")
    if boss is not None:
        done += [cancel_ingest_job(boss, job_id) for job_id in ingest_jobs]
    return done


def check_accounts(
    vip: VipCredentials | None,
    vantage6: Vantage6Credentials | None,
    boss: BossCredentials | None,
    executions: Sequence[str],
    sessions: Sequence[str],
    tasks: Sequence[int],
    ingest_jobs: Sequence[int],
) -> None:
    """Make sure that there is an account for all that is to be removed; arguments as for `remove_leftovers`.

    Raises:
        ConfigurationError: There is none for something.
    """
    for platform, credentials, named in (
        ("vip", vip, [*executions, *sessions]),
        ("vantage6", vantage6, list(tasks)),
        ("boss", boss, list(ingest_jobs)),
    ):
        if named and credentials is None:
            raise ConfigurationError(f"Give the credentials {platform} to remove {', '.join(map(str, named))}.")


@checked_flow(name="end-cancelled", flow_run_name="end cancelled runs", retries=5, retry_delay_seconds=60)
def end_cancelled(seconds: Seconds = 20.0, tag: str = "biomed") -> list[str]:
    """End runs that were cancelled while their worker and their process were dead, and what they have left running.

    Without it such a run stays `Cancelling` for ever, and its remote jobs run on. An automation of
    `deployments/automations.py` starts this flow. Safe to repeat.

    Args:
        seconds: How long a run has to have been `Cancelling`. A worker that is alive ends it within a minute.
        tag: Tag of the runs that are looked after.

    Returns:
        Names of the runs that were ended. Their remote jobs were killed where `cancel_remote` of `waiting` says so.

    Raises:
        BiomedError: A run could not be ended; it stays as it is, and the others were dealt with.
    """
    ended, problems = [], []
    for run in cancellation.left_alone(tag, seconds):
        try:
            cancellation.carry_out(run)
        except Exception as error:  # a flow of the user's own may raise anything in its hooks; the others go on
            problems.append(f"{run.name} ({run.id}): {error}")
        else:
            ended.append(run.name)
            run_logger().info("Ended the cancelled run %s (%s)", run.name, run.id)
    if problems:
        raise BiomedError("Not all cancelled runs could be ended.\n" + "\n".join(problems))
    return ended


def _ask_all(looks: Mapping[str, Callable[[], list[Leftover]]]) -> tuple[list[Leftover], list[str]]:
    """Ask every platform; one that cannot be asked does not hide the others."""
    found: list[Leftover] = []
    problems: list[str] = []
    for platform, look in looks.items():
        try:
            found += look()
        except BiomedError as error:
            problems.append(f"{platform}: {error}")
    return found, problems


def _row(one: Leftover) -> dict[str, object]:
    return {
        "platform": one.platform,
        "what": one.kind,
        "identifier": one.identifier,
        "name": one.name,
        "status": one.status,
        "since": one.since.isoformat(timespec="seconds") if one.since else "",
        "flow run": f"{one.flow_run} {one.flow_run_id}" if one.flow_run_id else "",
        "resume": one.resume,
        "remove": one.remove,
    }
