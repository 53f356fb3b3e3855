"""Creating an ingest job exactly once.

The protocol is that of `clients.once`. The Boss gives jobs no names, so the intent remembers which jobs were there
before, and a job of the same channel, kind and size that was not is the one that a lost answer was about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.ledger import default_folder
from prefect_biomed.clients.boss.models import IngestJob, UploadSettings
from prefect_biomed.clients.boss.preflight import preflight
from prefect_biomed.clients.errors import LaunchInDoubt, LedgerError, NotFoundError, PlatformError
from prefect_biomed.clients.once import Circumstances, Foreseen, Intent, IntentFolder, Launch, foresee, once
from prefect_biomed.clients.polling import looks, now, passed
from prefect_biomed.clients.texts import logger_of

__all__ = ["create_once", "foresee_job", "intents", "job_of_intent", "settled_job"]

logger = logger_of(__name__)

# Codes from here on are about the Boss itself, of which nobody knows what they have left behind; but for this one.
_SYSTEM_CODES = 9000
_UNKNOWN_VERSION = 9003
# By so much the clocks of the machines concerned may differ.
_CLOCK_SECONDS = 5.0


def create_once(
    client: BossClient,
    config: IngestConfig,
    token: str,
    *,
    settle_seconds: float | None = None,
    folder: Path | None = None,
    circumstances: Circumstances | None = None,
    settings: UploadSettings | None = None,
) -> IngestJob:
    """Check a configuration and make the job of an intent, once and never twice (`POST /ingest/`).

    Safe to repeat with the same token, also by two processes at once, and after a kill while the request is still on
    its way: the intent is written down before it is sent, and then the user's jobs are searched until it can no longer
    take effect. One intent of a folder at a time, because jobs are told apart by what was there before.

    Args:
        client: Client of the Boss.
        config: Configuration of the job.
        token: Identity of the intent: the same on each retry, another one for each new intent.
        settle_seconds: Longest time after which a request may still take effect although its answer was lost; that of
            the client when None.
        folder: Folder of intents; `intents` beside the ledgers by default.
        circumstances: What the caller knows of earlier attempts and other machines.
        settings: How it will be uploaded from this machine; see `preflight`.

    Returns:
        The job.

    Raises:
        PreflightFailed: Channel, extent, dtype or sources do not fit; nothing was sent.
        LaunchInDoubt: It is not known whether the job was made, or which of several it is. Repeating looks first.
        HeldElsewhere: Another process makes a job.
        LedgerError: The record of the intent is damaged, of a later version, or about another configuration.
        NotFoundError: The job was made and somebody has cancelled it. It is not made again.
        PlatformError: The Boss refused. After an error of its own it may keep a half-made job: the message says so.
    """
    creation = _Creation(client, config, token, intents(folder), settings)
    creation.check_record()
    return once(creation.as_launch(settle_seconds), intents(folder), circumstances)


def foresee_job(client: BossClient, config: IngestConfig, token: str, *, folder: Path | None = None) -> Foreseen:
    """Tell what `create_once` would do now. It only reads (`GET /ingest/`, `GET /ingest/{id}/status`).

    Args:
        client: Client of the Boss.
        config: Configuration of the job.
        token: Identity of the intent.
        folder: As for `create_once`.

    Returns:
        Whether a job would be made, or which one is taken.

    Raises:
        BiomedError: As `create_once` raises before it sends anything.
    """
    creation = _Creation(client, config, token, intents(folder))
    creation.check_record()
    return foresee(creation.as_launch(None), intents(folder), ended=lambda job: job.status.is_terminal)


def job_of_intent(token: str, folder: Path | None = None) -> int | None:
    """Tell which job an intent of this machine has led to.

    Args:
        token: The intent.
        folder: As for `create_once`.

    Returns:
        Number of the job; None when no job is known.

    Raises:
        LedgerError: The record is damaged, or of a later version of the package.
    """
    store = intents(folder)
    intent = store.read(token)
    return _number(intent.id, store.folder) if intent and intent.id else None


def settled_job(
    client: BossClient, token: str, *, settle_seconds: float | None = None, folder: Path | None = None
) -> int | None:
    """Tell which job an intent of this machine has led to, and look for it while that is in doubt.

    Safe to repeat: it makes nothing. What it finds is written down.

    Args:
        client: Client of the Boss.
        token: The intent.
        settle_seconds: As for `create_once`.
        folder: As for `create_once`.

    Returns:
        Number of the job; None when this machine knows of no such intent, or none was made and none can be any more.

    Raises:
        LaunchInDoubt: Several jobs could be meant; the message names them.
        HeldElsewhere: Another process makes a job.
        LedgerError: The record is damaged, or of a later version of the package.
        BiomedError: The jobs cannot be listed.
    """
    store = intents(folder)
    patience = client.settle_seconds if settle_seconds is None else settle_seconds
    with store.exclusive(token, patience):
        intent = store.read(token)
        asked = _asked(intent) if intent else None
        if intent is None or intent.id or intent.intended_at is None or asked is None:
            return _number(intent.id, store.folder) if intent and intent.id else None
        search = _Search(client, asked, token, store)
        left = min(max(patience - passed(intent.intended_at, intent.uptime), 0.0), patience)
        found = looks(lambda: next(iter(search.find(intent)), None), seconds=left, what=f"The ingest job of {token}")
        if found is None:
            return None
        store.write(intent.model_copy(update={"id": str(found.id)}))
        return found.id


class _Asked(BaseModel):
    """What an intent remembers, by which its job is recognised.

    Attributes:
        host: Server.
        channel: `collection/experiment/channel`.
        ingest_type: Kind of the job.
        tile_count: Its size.
        extent: Ranges by axis; jobs of 0.1 do not tell it.
        known: Jobs that were there before.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    channel: str
    tile_count: int
    ingest_type: str | None = None
    extent: dict[str, JsonValue] | None = None
    known: tuple[int, ...] = ()


class _Search:
    """Finds the job of one intent by what was asked for."""

    def __init__(self, client: BossClient, subject: _Asked, token: str, store: IntentFolder) -> None:
        self._client = client
        self._subject = subject
        self._token = token
        self._store = store

    def find(self, intent: Intent) -> Sequence[IngestJob]:
        """Look for the job that an unanswered request has made.

        Raises:
            LaunchInDoubt: Several could be meant, or it could be that of another intent.
        """
        if intent.intended_at is None and intent.since is None:
            return []  # no request of this intent can have been sent
        asked = _asked(intent)
        found = [
            whole
            for job in self._client.list_jobs()
            if self._is_alike(job)
            and (asked is None or job.id not in asked.known)
            and job.id not in self._claimed
            and _not_before(job, intent.since)
            and (whole := self._of_this_size(job)) is not None
        ]
        rivals = [token for token, rival in self._rivals.items() for job in found if rival.may_have_made(job)]
        if len(found) > 1 or rivals:
            numbers = ", ".join(str(job.id) for job in found)
            others = f" It could be that of the intent {', '.join(rivals)} as well." if rivals else ""
            raise LaunchInDoubt(
                f"Ingest job {numbers} on {self._subject.channel} could be the one that was just made.{others} "
                "Cancel those that are not wanted, or join the right one by its job_id."
            )
        return found

    def _is_alike(self, job: IngestJob) -> bool:
        return (
            f"{job.collection}/{job.experiment}/{job.channel}" == self._subject.channel
            and self._subject.ingest_type in (None, job.ingest_type.value)
            and not job.status.is_terminal
        )

    def _of_this_size(self, job: IngestJob) -> IngestJob | None:
        """The job with its counts; None when it is of another size, or was cancelled meanwhile."""
        try:
            counts = self._client.counts(job.id)
        except NotFoundError:
            return None
        if counts.tile_count != self._subject.tile_count:
            return None
        return job.model_copy(update={"tile_count": counts.tile_count, "status": counts.status})

    @cached_property
    def _others(self) -> list[tuple[Intent, _Asked]]:
        """Other intents on the same channel. Nobody changes them while this one holds the lock of the folder."""
        found = []
        for intent in self._store.others(self._token):
            try:
                asked = _asked(intent)
            except LedgerError as error:
                logger.warning("Left out: %s", error)
                continue
            if asked and _alike(asked, self._subject, extent=False):
                found.append((intent, asked))
        return found

    @property
    def _claimed(self) -> set[int]:
        return {int(intent.id) for intent, _ in self._others if intent.id and intent.id.isdecimal()}

    @property
    def _rivals(self) -> dict[str, _Rival]:
        """Other intents in doubt, of the same size but for another part of the channel."""
        return {
            intent.token: _Rival(intent, asked, self._client.settle_seconds)
            for intent, asked in self._others
            if intent.is_in_doubt and asked.extent is not None and asked.extent != self._subject.extent
        }


class _Creation(_Search):
    """Makes the job of one intent."""

    def __init__(
        self,
        client: BossClient,
        config: IngestConfig,
        token: str,
        store: IntentFolder,
        settings: UploadSettings | None = None,
    ) -> None:
        subject = _Asked(
            host=client.host,
            channel=config.channel_path,
            tile_count=config.tile_count,
            ingest_type=config.ingest_job.ingest_type,
            extent=config.ingest_job.extent.model_dump(mode="json"),
        )
        super().__init__(client, subject, token, store)
        self._config = config
        self._settings = settings

    def as_launch(self, settle_seconds: float | None) -> Launch[IngestJob]:
        """Say to the protocol how the job is found, checked and made."""
        return Launch(
            what=f"the ingest job on {self._config.channel_path}",
            token=self._token,
            settle_seconds=self._client.settle_seconds if settle_seconds is None else settle_seconds,
            find=self.find,
            prepare=self.prepare,
            send=lambda: self._client.create(self._config),
            get=self.get,
            identify=lambda job: str(job.id),
            says_no=_says_no,
        )

    def check_record(self) -> None:
        """Refuse to work with the record of another job.

        Raises:
            LedgerError: It is one.
        """
        intent = self._store.read(self._token)
        asked = _asked(intent) if intent else None
        if asked and not _alike(asked, self._subject):
            raise LedgerError(
                f"The intent {self._token} in {self._store.folder} is about another job, on {asked.channel}. Remove "
                "its file or use another idempotency_key."
            )

    def prepare(self, intent: Intent) -> Mapping[str, JsonValue]:
        """Check the configuration, and note which jobs are there before the request."""
        preflight(self._client, self._config, self._settings)
        earlier = _asked(intent)
        if earlier is not None and intent.intended_at is not None:
            # What appears after the first request is not known to be anybody else's, however late.
            known = earlier.known
        else:
            known = tuple(job.id for job in self._client.list_jobs())
        return self._subject.model_copy(update={"known": known}).model_dump(mode="json")

    def get(self, identifier: str) -> IngestJob:
        """Read the job that is known already."""
        job_id = _number(identifier, self._store.folder)
        try:
            counts = self._client.counts(job_id)
        except NotFoundError as error:
            raise NotFoundError(
                f"{error} It was made for the intent {self._token}, which makes no other. To begin anew, give another "
                "idempotency_key.",
                status=error.status,
                code=error.code,
                url=error.url,
                spoken=error.spoken,
            ) from None
        names = self._config.database
        return IngestJob(
            id=job_id,
            collection=names.collection,
            experiment=names.experiment,
            channel=names.channel,
            status=counts.status,
            ingest_type=self._config.ingest_job.ingest_type,
            tile_count=counts.tile_count,
            host=self._client.host,
        )


class _Rival:
    """Another intent in doubt, whose job looks like ours to whoever does not see its extent."""

    def __init__(self, intent: Intent, asked: _Asked, settle_seconds: float) -> None:
        assert intent.intended_at is not None
        self._since = intent.intended_at - timedelta(seconds=_CLOCK_SECONDS)
        self._until = intent.intended_at + timedelta(seconds=settle_seconds + _CLOCK_SECONDS)
        self._known = asked.known

    def may_have_made(self, job: IngestJob) -> bool:
        """Whether its request may have made this job."""
        return job.id not in self._known and (job.created_on is None or self._since <= job.created_on <= self._until)


def intents(folder: Path | None = None) -> IntentFolder:
    """Open the records of the jobs that this machine has made.

    Args:
        folder: As for `create_once`.
    """
    return IntentFolder(folder or default_folder() / "intents", one_at_a_time=True, migrate=_migrated)


def _migrated(content: Mapping[str, Any]) -> Intent:
    """Read a record of release 0.1, which had no times: its request may have been sent just now."""
    old = _Asked.model_validate(content)
    job_id: int | None = content["job_id"]
    if job_id is not None and not isinstance(job_id, int):
        raise ValueError("no number of a job")
    return Intent(
        token=content["token"],
        intended_at=now(),
        asked=old.model_dump(mode="json"),
        id=None if job_id is None else str(job_id),
    )


def _asked(intent: Intent) -> _Asked | None:
    """What an intent remembers; None before it has asked for anything.

    Raises:
        LedgerError: It is not about an ingest job.
    """
    if not intent.asked:
        return None
    try:
        return _Asked.model_validate(intent.asked)
    except ValidationError:
        raise LedgerError(
            f"The intent {intent.token} is not about an ingest job. Its file was left as it is; move it away."
        ) from None


def _alike(one: _Asked, other: _Asked, *, extent: bool = True) -> bool:
    """Whether two intents ask for jobs that look alike; what a record of 0.1 does not tell is not compared."""
    same = (one.host, one.channel, one.tile_count) == (other.host, other.channel, other.tile_count)
    kinds = one.ingest_type is None or other.ingest_type is None or one.ingest_type == other.ingest_type
    extents = not extent or one.extent is None or other.extent is None or one.extent == other.extent
    return same and kinds and extents


def _not_before(job: IngestJob, since: datetime | None) -> bool:
    return since is None or job.created_on is None or job.created_on >= since - timedelta(seconds=_CLOCK_SECONDS)


def _says_no(error: PlatformError) -> bool:
    return error.code is None or error.code < _SYSTEM_CODES or error.code == _UNKNOWN_VERSION


def _number(identifier: str, folder: Path) -> int:
    if not identifier.isdecimal():
        raise LedgerError(f"A record in {folder} tells the job {identifier!r}, which is no number. Put it right first.")
    return int(identifier)
