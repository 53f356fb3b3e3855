"""Step of `prefect.yaml` by which a deployment keeps what its users have set, however often it is deployed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.flows import load_flow_from_entrypoint


def keep(
    entrypoint: str,
    name: str,
    parameters: Mapping[str, Any] | None = None,
    schedules: Sequence[Mapping[str, str]] = (),
) -> dict[str, str]:
    """Read the default parameters of a deployment; create it when it is not there.

    `prefect deploy` replaces default parameters by those of the file, so the file takes those of the deployment from
    here. It also replaces schedules of the file, with all that was changed in them, and deletes those that somebody has
    added in the user interface; so the file has none, and a new deployment gets its schedules here.

    Args:
        entrypoint: The flow.
        name: Name of the deployment.
        parameters: Default parameters of a new deployment.
        schedules: Schedules of a new deployment, with `slug`, `cron` and `timezone`. They are off.

    Returns:
        `parameters`: default parameters of the deployment, as JSON.

    Raises:
        ValueError: The deployment has default parameters that the flow does not know.
        PrefectHTTPStatusError: The server does not tell; nothing has been changed.
    """
    flow: Any = load_flow_from_entrypoint(entrypoint)
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(f"{flow.name}/{name}")
        except ObjectNotFound:
            kept = dict(parameters or {})
            client.create_deployment(
                flow_id=client.create_flow_from_name(flow.name),
                name=name,
                parameters=kept,
                schedules=[
                    DeploymentScheduleCreate(
                        slug=schedule["slug"],
                        schedule=CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"]),
                        active=False,
                    )
                    for schedule in schedules
                ],
            )
            return {"parameters": json.dumps(kept)}
    if unknown := sorted(set(found.parameters) - set(flow.parameters.properties)):
        raise ValueError(
            f"The deployment {flow.name}/{name} has default parameters that its flow does not know: "
            f"{', '.join(unknown)}. Rename or remove them in the deployment, then deploy again."
        )
    if found.paused:
        print(f"{flow.name}/{name} is paused. `prefect deploy` lets it go on; a schedule that is off stays off.")
    return {"parameters": json.dumps(found.parameters)}
