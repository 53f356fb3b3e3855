"""Install the automations that bring dead runs back without a hand: `python deployments/automations.py`.

With `--notify slack-webhook/lab` they also tell people, through a notification block of that name, when a
repeatability experiment finds that results have changed, and of suspended runs that nobody resumes.

They act on runs that carry the tag `biomed`, which all deployments of this package have. Run it again to change a
setting; an automation that somebody has paused stays paused. An automation of your own is one more entry of
`automations`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence, Set
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture, RunDeployment, SendNotification
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound

from prefect_biomed.flows.cancellation import AFTER_CRASH, NEVER_BEGAN

TAG = "biomed"
# By so much may the clock of a worker be behind that of the server.
_CLOCK_SECONDS = 10.0
END_CANCELLED = "end-cancelled/end-cancelled"


def automations(
    tags: Sequence[str] = (TAG,),
    *,
    silence_seconds: float = 600.0,
    quiet_seconds: float = 30.0,
    begin_seconds: float = 600.0,
    max_runs: int = 5,
) -> list[Automation]:
    """List the automations of this package.

    Args:
        tags: Runs with any of these tags are looked after.
        silence_seconds: A run that shows no sign of life for so long is taken for dead. Three times the workers'
            `PREFECT_FLOWS_HEARTBEAT_FREQUENCY`, which is 180 s and at least 30 s, and some more.
        quiet_seconds: A crashed run is scheduled again when nothing more happens to it for so long. Runner and worker
            report one crash one after the other, and the second report would undo a retry in between.
        begin_seconds: A run that a worker has taken and that does not begin for so long is scheduled again.
        max_runs: A run that has begun so often is not scheduled again; a person may still retry it. A suspended run
            that is resumed does not begin anew.

    Returns:
        The automations, not yet installed.

    Raises:
        ValueError: `quiet_seconds`, `silence_seconds` or `begin_seconds` is less than 10, which Prefect does not allow.
    """
    retry = {"state": StateType.SCHEDULED, "name": "AwaitingRetry"}
    return [
        Automation(
            name="biomed: report dead runs as crashed",
            description="The host or the worker died with the run, or it lost the network: no heartbeat comes.",
            # Each of them is enough: a server on SQLite loses events when it is busy. A run that is suspended, or was
            # scheduled again by somebody, has no heartbeat and is not dead. A run that has ended cannot be reported as
            # crashed: the server refuses.
            trigger=_stays({"Running", "heartbeat"}, tags, timedelta(seconds=silence_seconds)),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED,
                    message=f"No sign of life for {silence_seconds:.0f} s: its process, worker or network is gone.",
                )
            ],
        ),
        Automation(
            name="biomed: schedule crashed runs again",
            description=f"At most until a run has begun {max_runs} times.",
            # Runs that crash before they begin have the count 0: the installation is broken, a retry is no cure.
            trigger=_stays({"Crashed"}, tags, timedelta(seconds=quiet_seconds), counts=range(1, max_runs)),
            actions=[ChangeFlowRunState(**retry, message=AFTER_CRASH)],
        ),
        Automation(
            name="biomed: schedule runs again that never began",
            description="The worker died between taking the run and starting it.",
            trigger=_stays({"Pending", "Submitting"}, tags, timedelta(seconds=begin_seconds)),
            actions=[ChangeFlowRunState(**retry, message=NEVER_BEGAN)],
        ),
    ]


def end_cancelled(deployment: UUID, tags: Sequence[str] = (TAG,), *, cancel_seconds: float = 30.0) -> Automation:
    """Make the automation that ends runs which were cancelled while their worker and their process were dead.

    Args:
        deployment: The deployment `end-cancelled/end-cancelled`.
        tags: Runs with any of these tags are looked after.
        cancel_seconds: A cancelled run that has not ended for so long is left alone by its worker; at least 10. Runs
            that were cancelled later may still be ended by their workers, and are not touched.

    Returns:
        The automation, not yet installed.
    """
    return Automation(
        name="biomed: end cancelled runs whose worker is gone",
        description="Kills what they have left on the platform, when they are to, and ends them.",
        trigger=_stays({"Cancelling"}, tags, timedelta(seconds=cancel_seconds)),
        actions=[
            RunDeployment(deployment_id=deployment, parameters={"seconds": max(cancel_seconds - _CLOCK_SECONDS, 0.0)})
        ],
    )


def _stays(
    events: Set[str], tags: Sequence[str], within: timedelta, *, counts: Sequence[int] | None = None
) -> EventTrigger:
    """Fires when one of these events came of a run with any of the tags, and no other one in time."""
    times = {} if counts is None else {"prefect.run-count": [str(count) for count in counts]}
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*", **times},
        match_related={
            "prefect.resource.role": "tag",
            "prefect.resource.id": [f"prefect.tag.{tag}" for tag in tags],
        },
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        after={f"prefect.flow-run.{event}" for event in events},
        expect={"prefect.flow-run.*"},
        threshold=1,
        within=within,
    )


def sweep(deployment: UUID, seconds: float) -> str:
    """Give the deployment `end-cancelled/end-cancelled` a schedule, unless it has one or somebody has turned it off.

    The automation hears of a cancelled run by an event, and a server that is killed loses the last events.

    Args:
        deployment: The deployment.
        seconds: Time between two looks; 0 makes no schedule.

    Returns:
        What was done, one line; empty when nothing was.
    """
    if not seconds:
        return ""
    with get_client(sync_client=True) as client:
        if client.read_deployment_schedules(deployment):
            return ""
        schedule = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(seconds=seconds)), active=True)
        client.create_deployment_schedules(deployment, [schedule])
    return f"scheduled: {END_CANCELLED} every {seconds:.0f} s"


def drift_notification(block: str) -> Automation:
    """Make the automation that tells people when a repeatability experiment finds a change.

    Args:
        block: Notification block to send with, `<type slug>/<name>`.

    Returns:
        The automation, not yet installed.

    Raises:
        ValueError: There is no such block.
    """
    return Automation(
        name="biomed: tell when results have changed",
        description="A file that was stable has changed against the baseline of a repeatability experiment.",
        trigger=EventTrigger(expect={"biomed.repeatability.drift"}, posture=Posture.Reactive, threshold=1),
        actions=[
            SendNotification(
                block_document_id=_saved(block),
                subject="{{ event.payload.pipeline }} has changed",
                body=(
                    "{{ event.payload.pipeline }} {{ event.payload.sentence }}. It began with the series of "
                    "{{ event.payload.since }}. The report is {{ event.payload.report }}"
                ),
            )
        ],
    )


def suspension_notification(block: str, tags: Sequence[str] = (TAG,), *, suspended_hours: float = 24.0) -> Automation:
    """Make the automation that tells people of suspended runs that nobody resumes: their collector does not run.

    Args:
        block: Notification block to send with, `<type slug>/<name>`.
        tags: Runs with any of these tags are looked after.
        suspended_hours: It tells of a run that has been suspended for so long.

    Returns:
        The automation, not yet installed.

    Raises:
        ValueError: There is no such block.
    """
    return Automation(
        name="biomed: tell of suspended runs that nobody resumes",
        description="The schedule of vip-collect is off, or its folder is not that of the session.",
        trigger=_stays({"Suspended"}, tags, timedelta(hours=suspended_hours)),
        actions=[
            SendNotification(
                block_document_id=_saved(block),
                subject="{{ flow_run.name }} is suspended, and nobody resumes it",
                body=(
                    f"It has been suspended for {suspended_hours:g} h. Turn the schedule of vip-collect on, with the "
                    "folder of its session; or resume it when its executions have ended: {{ flow_run|ui_url }}. "
                    "A run that was resumed too early suspends itself again."
                ),
            )
        ],
    )


def _saved(block: str) -> UUID:
    load: Any = Block.load  # its type is that of the asynchronous twin
    document: Block = load(block, _sync=True)
    identifier = document._block_document_id
    if identifier is None:
        raise ValueError(f"The block {block} is not saved.")
    return identifier


def install(wanted: Iterable[Automation]) -> list[str]:
    """Create automations, or bring those of the same name to the wanted form.

    Args:
        wanted: The automations; their names are their identity.

    Returns:
        What was done, one line for each.
    """
    done = []
    for automation in wanted:
        with get_client(sync_client=True) as client:
            existing = client.read_automations_by_name(automation.name)
        if existing:
            automation.id, automation.enabled = existing[0].id, existing[0].enabled
            automation.update()
            done.append(f"updated: {automation.name}" + ("" if automation.enabled else " (stays paused)"))
        else:
            automation.create()
            done.append(f"installed: {automation.name}")
    return done


def main() -> None:
    """Install the automations and say so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tag", action="append", help=f"look after runs with this tag (default: {TAG}); repeatable")
    for option, default, text in (
        ("--silence-seconds", 600.0, "a run without heartbeat for so long is dead"),
        ("--quiet-seconds", 30.0, "time between a crash and the retry"),
        ("--cancel-seconds", 30.0, "a cancelled run that has not ended for so long is ended"),
        ("--sweep-seconds", 300.0, "look so often for cancelled runs of which no event has told; 0 for never"),
        ("--begin-seconds", 600.0, "a run that does not begin for so long is scheduled again"),
    ):
        parser.add_argument(option, type=float, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--max-runs", type=int, default=5, help="begin a run at most so often (default: %(default)s)")
    parser.add_argument("--notify", metavar="TYPE/NAME", help="notification block to tell people with")
    told = "with --notify, tell of a run that has been suspended for so long (default: %(default)s)"
    parser.add_argument("--suspended-hours", type=float, default=24.0, help=told)
    given = parser.parse_args()
    wanted = automations(
        given.tag or (TAG,),
        silence_seconds=given.silence_seconds,
        quiet_seconds=given.quiet_seconds,
        begin_seconds=given.begin_seconds,
        max_runs=given.max_runs,
    )
    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(END_CANCELLED).id
    except ObjectNotFound:
        print(f"There is no deployment {END_CANCELLED}. Deploy it and run this again, so that cancelled runs end too.")
    else:
        wanted.append(end_cancelled(deployment, given.tag or (TAG,), cancel_seconds=given.cancel_seconds))
        if made := sweep(deployment, given.sweep_seconds):
            print(made)
    if given.notify:
        wanted.append(drift_notification(given.notify))
        hours = given.suspended_hours
        wanted.append(suspension_notification(given.notify, given.tag or (TAG,), suspended_hours=hours))
    print("\n".join(install(wanted)))


if __name__ == "__main__":
    main()
