"""What the flows of the Boss would do: their own decisions, and those of their steps, without what changes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.storage import StorageCredentials
from prefect_biomed.clients.boss import BossClient, IngestConfig, UploadSettings, preflight
from prefect_biomed.clients.boss.launches import foresee_job
from prefect_biomed.clients.boss.preflight import missing_resources
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.once import Deed, Foreseen
from prefect_biomed.flows.plans import Plan, launch_of
from prefect_biomed.tasks.boss import NewResources
from prefect_biomed.tasks.policies import intent_token

__all__ = ["plan_cancel", "plan_ingest", "plan_join", "plan_verify"]


def plan_ingest(
    credentials: BossCredentials,
    config: IngestConfig | Path,
    upload: UploadSettings | None,
    new_resources: NewResources | None,
    complete: bool,
    idempotency_key: str | None,
    storage: StorageCredentials | None = None,
    **_: Any,
) -> Plan:
    """Plan `boss_ingest`; arguments as for it.

    Returns:
        What it would do.
    """
    config = IngestConfig.load(config).with_storage(storage.get_client() if storage else None)
    token = intent_token("boss-ingest", explicit=idempotency_key)
    with credentials.get_client() as client:
        missing = tuple(missing_resources(client, config)) if new_resources else ()
        seen = foresee_job(client, config, token)
        if seen.deed in {Deed.LAUNCH, Deed.LOOK_FIRST}:
            if not missing:
                preflight(client, config, upload or UploadSettings())
            unchecked = ("the sources are checked once the channel is there",) if missing else ()
            plan = _tiles(config.tile_count, complete=complete)
            return plan.model_copy(
                update={
                    "launches": (seen,),
                    "jobs": config.tile_count,
                    "makes": missing,
                    "notes": (*plan.notes, *unchecked),
                }
            )
        if seen.deed is Deed.DONE:
            return launch_of(seen, 0)
        return _of_job(client, int(seen.id), seen, complete=complete)


def plan_join(credentials: BossCredentials, config: IngestConfig | Path, job_id: int, complete: bool, **_: Any) -> Plan:
    """Plan `boss_join_ingest`; arguments as for it.

    Returns:
        What it would do.
    """
    IngestConfig.load(config)
    with credentials.get_client() as client:
        return _of_job(client, job_id, None, complete=complete)


def plan_cancel(credentials: BossCredentials, job_id: int) -> Plan:
    """Plan `boss_cancel_ingest`; arguments as for it.

    Returns:
        What it would do.
    """
    with credentials.get_client() as client:
        counts = client.counts(job_id)
    return Plan(ends=() if counts.status.is_terminal else (f"ingest job {job_id}",))


def plan_verify(heal: bool, **_: Any) -> Plan:
    """Plan `boss_verify`; arguments as for it.

    Returns:
        That it only reads.

    Raises:
        ConfigurationError: It is to heal, and only the comparison tells what.
    """
    if heal:
        raise ConfigurationError(
            "What boss-verify heals is known only once all has been compared. Run it without heal first: its report "
            "names the tiles."
        )
    return Plan()


def _of_job(client: BossClient, job_id: int, seen: Foreseen | None, *, complete: bool) -> Plan:
    counts = client.counts(job_id)
    if counts.status.is_terminal:
        return launch_of(seen, 0) if seen else Plan(notes=(f"ingest job {job_id} is {counts.status.name}",))
    plan = _tiles(counts.visible, complete=complete)
    return plan.model_copy(update={"launches": (seen,) if seen else ()})


def _tiles(tiles: int, *, complete: bool) -> Plan:
    completed = ("the job is completed, which is final",) if complete else ()
    return Plan(files_to_send=tiles, bytes_to_send=None, notes=completed)
