"""What the flows of experiments would do: their own decisions, and those of their steps, without what changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect_biomed import analysis
from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.vip import InputValue
from prefect_biomed.clients.vip.replaying import prepare_replay
from prefect_biomed.flows.plans import Plan, merged
from prefect_biomed.flows.repeatability import owner_of, perturbed_to_run, sessions_of
from prefect_biomed.flows.replay import is_launched, opened_bundle, session_of_replays
from prefect_biomed.flows.research_pipeline import (
    ImageStage,
    IngestStage,
    TableStage,
    analysis_of_stage,
    session_of_stage,
)
from prefect_biomed.flows.vantage6 import federated_analysis
from prefect_biomed.flows.vantage6_plans import plan_analysis
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.flows.vip_parameters import Removal, Upload
from prefect_biomed.flows.vip_plans import plan_described, plan_session, plan_sessions_on_one_upload
from prefect_biomed.tasks.policies import planned_child

__all__ = ["plan_experiment", "plan_replay", "plan_research"]


def plan_experiment(
    credentials: VipCredentials,
    pipelines: Sequence[str],
    input_settings: dict[str, InputValue],
    experiment_dir: Path,
    input_dir: Path | None,
    repetitions: int,
    baseline_pipeline: str | None,
    session_name: str | None,
    upload: Upload | None,
    outputs: Any,
    removal: Removal | None,
    **_: Any,
) -> Plan:
    """Plan `repeatability_experiment`; arguments as for it.

    Returns:
        What it would do.
    """
    upload = upload or Upload()
    owner = owner_of(
        input_dir=input_dir,
        output_dir=experiment_dir,
        session_name=session_name,
        upload=upload,
        outputs=outputs,
        removal=removal,
    )
    experiment = analysis.Experiment(owner.output_dir)
    series = experiment.name_series(owner.token)
    runs = [*pipelines, *perturbed_to_run(experiment, series, baseline_pipeline, input_settings, input_dir)]
    owner, sessions = sessions_of(owner, runs, input_settings, repetitions, experiment, series)
    return plan_sessions_on_one_upload(credentials, owner, sessions, upload)


def plan_replay(
    credentials: VipCredentials,
    bundle: Path,
    output_dir: Path | None,
    input_dir: Path | None,
    pipeline_id: str | None,
    session_name: str | None,
    vip_home: str,
    removal: Removal | None,
    **_: Any,
) -> Plan:
    """Plan `vip_replay`; arguments as for it. Inputs that are on the platform are fetched, which checks them.

    Returns:
        What it would do.
    """
    opened = opened_bundle(bundle, output_dir)
    session = session_of_replays(session_name or f"replay-{opened.identity}", output_dir, vip_home, removal)
    with credentials.get_client() as client:
        replays = prepare_replay(client, opened, session, input_dir=input_dir, pipeline_id=pipeline_id)
        return merged(
            plan_described(client, one.session, send=not is_launched(credentials, one.session)) for one in replays
        )


def plan_research(
    output_dir: Path,
    images: ImageStage | None,
    vip: VipCredentials | None,
    table: TableStage | None,
    vantage6: Vantage6Credentials | None,
    ingest: IngestStage | None,
    boss: BossCredentials | None,
) -> Plan:
    """Plan `research_pipeline`; arguments as for it.

    Returns:
        What it would do. A volume is derived before it is ingested, so that stage is only named.
    """
    parts: list[Plan] = []
    if images is not None and vip is not None:
        with planned_child(vip_session):
            given: dict[str, Any] = {"session_name": None, "nb_runs": 1, "girder": None, "removal": None}
            parts.append(
                plan_session(vip, refresh_time=1, waiting=None, **given, **session_of_stage(images, output_dir))
            )
    if table is not None and vantage6 is not None:
        with planned_child(federated_analysis):
            parts.append(
                plan_analysis(
                    vantage6,
                    outputs=None,
                    waiting=None,
                    refresh_time=1,
                    task_id=None,
                    idempotency_key=None,
                    arguments_file=None,
                    **analysis_of_stage(table),
                )
            )
    if ingest is not None and boss is not None:
        channel = f"{ingest.collection}/{ingest.experiment}/{ingest.channel}"
        parts.append(Plan(notes=(f"an ingest into {channel}, planned once its volume is there",)))
    return merged(parts)
