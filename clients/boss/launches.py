"""Creating a job once: the intent is written before the request, so that a retry finds what it has led to.

The Boss gives jobs no names. So the intent notes which jobs were there before, and a job of the same channel, type and
size that was not is the one that an unanswered request has made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.ledger import default_folder
from prefect_biomed.clients.boss.models import IngestJob
from prefect_biomed.clients.errors import (
    ConnectionFailed,
    LaunchInDoubt,
    LedgerError,
    NetworkError,
    PlatformError,
    ServerUnavailable,
)
from prefect_biomed.clients.files import atomic_write

__all__ = ["create_once", "job_of_intent"]


class _Intent(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str
    host: str
    channel: str
    tile_count: int
    known: tuple[int, ...]
    job_id: int | None = None


def create_once(
    client: BossClient,
    config: IngestConfig,
    token: str,
    *,
    not_before: datetime | None = None,
    folder: Path | None = None,
) -> IngestJob:
    """Make the job of an intent, or find it when an earlier call has made it.

    Safe to repeat with the same token, also after a kill.

    Args:
        client: Client of the Boss.
        config: Configuration of the job.
        token: Identity of the intent: the same on each retry, another one for each new intent.
        not_before: When this is a retry on a machine that knows nothing of the intent: when it was first tried.
        folder: Folder of intents; `intents` beside the ledgers by default.

    Returns:
        The job.

    Raises:
        LaunchInDoubt: It is not known whether the request took effect; a retry looks first.
        LedgerError: The file of the intent is damaged or belongs to another configuration.
        BiomedError: As for `BossClient.create`.
    """
    folder = folder or default_folder() / "intents"
    with _locked(folder):
        intent = _read(folder, token)
        if intent and (intent.host, intent.channel, intent.tile_count) != _subject(client, config):
            raise LedgerError(f"The intent {token} in {folder} is about another job. Remove it or use another name.")
        if intent and intent.job_id is not None:
            return _described(client, config, intent.job_id)
        others = {item.job_id for item in _all(folder) if item.host == client.host and item.job_id is not None}
        found = None
        if intent:
            found = _find_created(client, config, known=intent.known, claimed=others)
        elif not_before:
            found = _find_created(client, config, claimed=others, not_before=not_before)
        if found:
            _write(folder, _intent(token, client, config, known=(), job_id=found.id))
            return found
        if intent is None:
            known = tuple(job.id for job in client.list_jobs())
            intent = _intent(token, client, config, known=known)
            _write(folder, intent)
        try:
            job = client.create(config)
        except ConnectionFailed:
            raise
        except (NetworkError, ServerUnavailable) as error:
            found = _find_created(client, config, known=intent.known, claimed=others)
            if found is None:
                raise LaunchInDoubt(
                    f"The Boss did not answer whether it made the job on {config.channel_path} ({error}). No new job "
                    "is there yet; a retry looks again before it asks."
                ) from error
            job = found
        except PlatformError as error:
            if error.code != 9001:
                _path(folder, token).unlink(missing_ok=True)
            raise
        _write(folder, intent.model_copy(update={"job_id": job.id}))
        return job


def job_of_intent(token: str, folder: Path | None = None) -> int | None:
    """Tell which job an intent of this machine has led to; None when that is not known."""
    intent = _read(folder or default_folder() / "intents", token)
    return intent.job_id if intent else None


def _subject(client: BossClient, config: IngestConfig) -> tuple[str, str, int]:
    return client.host, config.channel_path, config.tile_count


def _intent(
    token: str, client: BossClient, config: IngestConfig, *, known: tuple[int, ...], job_id: int | None = None
) -> _Intent:
    host, channel, tile_count = _subject(client, config)
    return _Intent(token=token, host=host, channel=channel, tile_count=tile_count, known=known, job_id=job_id)


def _described(client: BossClient, config: IngestConfig, job_id: int) -> IngestJob:
    counts = client.counts(job_id)
    names = config.database
    return IngestJob(
        id=job_id,
        collection=names.collection,
        experiment=names.experiment,
        channel=names.channel,
        status=counts.status,
        ingest_type=config.ingest_job.ingest_type,
        tile_count=counts.tile_count,
        host=client.host,
    )


def _path(folder: Path, token: str) -> Path:
    return folder / f"{token}.json"


def _read(folder: Path, token: str) -> _Intent | None:
    path = _path(folder, token)
    try:
        return _Intent.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise LedgerError(f"{path} is damaged. Look for the job with list_jobs, then remove the file.") from None


def _all(folder: Path) -> Iterator[_Intent]:
    for path in folder.glob("*.json"):
        intent = _read(folder, path.stem)
        if intent:
            yield intent


def _write(folder: Path, intent: _Intent) -> None:
    with atomic_write(_path(folder, intent.token)) as file:
        file.write(json.dumps(intent.model_dump(mode="json")).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


def _find_created(
    client: BossClient,
    config: IngestConfig,
    *,
    known: Collection[int] = (),
    claimed: Collection[int] = (),
    not_before: datetime | None = None,
) -> IngestJob | None:
    """Look for a job that an earlier, unanswered `create` has made.

    The Boss has no names for jobs, so the job is known by its channel, type and number of tiles, and by not
    having been there before.

    Args:
        client: Client of the Boss.
        config: What was posted.
        known: Jobs that were there before the post.
        claimed: Jobs that are known to belong to others of our intents.
        not_before: Jobs made before this moment are not meant, by the server's clock.

    Returns:
        The job; None when there is none.

    Raises:
        LaunchInDoubt: Several could be meant.
    """
    kind = config.ingest_job.ingest_type
    names = (config.database.collection, config.database.experiment, config.database.channel)
    found = []
    for job in client.list_jobs():
        if job.id in known or job.id in claimed or job.status.is_terminal:
            continue
        if (job.collection, job.experiment, job.channel) != names or job.ingest_type != kind:
            continue
        if not_before and job.created_on and job.created_on < not_before:
            continue
        counts = client.counts(job.id)
        if counts.tile_count == config.tile_count:
            found.append(job.model_copy(update={"tile_count": counts.tile_count, "status": counts.status}))
    if len(found) > 1:
        numbers = ", ".join(str(job.id) for job in found)
        raise LaunchInDoubt(
            f"Jobs {numbers} on {config.channel_path} could each be the one that was just made. Cancel those that "
            "are not wanted, or give job_id."
        )
    return found[0] if found else None
