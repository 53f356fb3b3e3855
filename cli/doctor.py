"""What is wrong with an installation, and what to do next: `prefect-biomed doctor`.

Each check looks at one thing and says what it saw. What was asked for and not seen is never called fine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import requests
from httpx import HTTPError
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version
from prefect.blocks.core import Block
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterId
from prefect.client.schemas.objects import WorkerStatus
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from pydantic import BaseModel

from prefect_biomed.clients.errors import BiomedError
from prefect_biomed.clients.files import home
from prefect_biomed.deployments.setup import credentials_types

__all__ = ["Finding", "Level", "examine"]

DISTRIBUTION = "prefect-biomed"
_LEAST_FREE_BYTES = 5 * 2**30
_LARGEST_SKEW_SECONDS = 60.0
_PROBE_SECONDS = 90.0
"""How long the scheduler may take; it looks each minute."""
_LOOK_SECONDS = 2.0


class Level(StrEnum):
    """How much a finding matters."""

    FINE = "fine"
    WARNING = "warning"
    BROKEN = "broken"


class Finding(BaseModel):
    """What one check has seen.

    Attributes:
        about: What was looked at.
        level: How much it matters.
        seen: What was seen.
        next_step: What to do next; empty when it is fine.
    """

    about: str
    level: Level
    seen: str
    next_step: str = ""


def fine(about: str, seen: str) -> Finding:
    """Make the finding that nothing has to be done."""
    return Finding(about=about, level=Level.FINE, seen=seen)


def warning(about: str, seen: str, next_step: str) -> Finding:
    """Make the finding that something will be in the way of some uses."""
    return Finding(about=about, level=Level.WARNING, seen=seen, next_step=next_step)


def broken(about: str, seen: str, next_step: str) -> Finding:
    """Make the finding that something does not work."""
    return Finding(about=about, level=Level.BROKEN, seen=seen, next_step=next_step)


Versions = Callable[[str], str | None]


def installed(name: str) -> str | None:
    """Tell the version of an installed distribution; None when there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions(requirements: Iterable[str], version_of: Versions = installed) -> list[Finding]:
    """See whether the dependencies are there in versions that are known to work, and which extras are.

    Args:
        requirements: What the package asks for, as its metadata lists it.
        version_of: Tells installed versions.

    Returns:
        One finding for the base, one for each extra that is missing or there in part, one for known bad pairs.
    """
    base: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in requirements:
        requirement = Requirement(line)
        extra = _extra_of(requirement.marker)
        problem = _problem(requirement, version_of(requirement.name))
        if extra is None and problem:
            base.append(problem)
        elif extra is not None and extra not in {"dev", "all", "docs"} and requirement.name != DISTRIBUTION:
            extras.setdefault(extra, []).extend([problem] if problem else [])
    findings = [
        broken("installation", "; ".join(base), f"pip install --upgrade {DISTRIBUTION}")
        if base
        else fine("installation", f"{DISTRIBUTION} {version_of(DISTRIBUTION) or 'of a source tree'}")
    ]
    for extra, problems in sorted(extras.items()):
        about = f"extra {extra}"
        findings.append(
            warning(about, "; ".join(problems), f"pip install '{DISTRIBUTION}[{extra}]' when you need it")
            if problems
            else fine(about, "installed")
        )
    return [*findings, *_bad_pairs(version_of)]


def _extra_of(marker: Marker | None) -> str | None:
    text = str(marker or "")
    return text.partition("extra == ")[2].strip("\"'() ") or None if "extra == " in text else None


def _problem(requirement: Requirement, version: str | None) -> str:
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {requirement.specifier}"
    return ""


def _bad_pairs(version_of: Versions) -> list[Finding]:
    """Versions that a server starts with and does not work with."""
    prefect, sqlalchemy, fastapi = (Version(version_of(n) or "0") for n in ("prefect", "sqlalchemy", "fastapi"))
    bad = []
    if prefect < Version("3.9.1") and sqlalchemy >= Version("2.1"):
        bad.append(f"prefect {prefect} with sqlalchemy {sqlalchemy}: the server's scheduler dies, no schedule fires")
    if prefect < Version("3.9.1") and fastapi >= Version("0.155"):
        bad.append(f"prefect {prefect} with fastapi {fastapi}: the server does not start")
    if bad:
        return [broken("versions", "; ".join(bad), "pip install 'prefect>=3.9.1', and start the server again")]
    return [fine("versions", f"prefect {prefect}, sqlalchemy {sqlalchemy}, fastapi {fastapi}")]


class Answer(Protocol):
    """What an answer over HTTP tells."""

    @property
    def headers(self) -> Any:
        """Its headers."""

    @property
    def ok(self) -> bool:
        """Whether it is one of success."""

    @property
    def status_code(self) -> int:
        """Its status."""


def check_server(api_url: str | None, get: Callable[[str], Answer]) -> list[Finding]:
    """See whether the Prefect server answers, and whether its clock and ours agree.

    Args:
        api_url: Address of its API; None when none is set.
        get: Asks it; raises `OSError` when it cannot be reached.

    Returns:
        The findings; none about the clock where the server does not tell the time.
    """
    if not api_url:
        return [
            warning(
                "server",
                "PREFECT_API_URL is not set: each run has a server of its own, and no schedule can fire",
                "prefect server start, then: prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api",
            )
        ]
    try:
        answer = get(f"{api_url}/health")
    except OSError as error:
        step = "Start it: prefect server start. Or correct the address: prefect config set PREFECT_API_URL=…"
        return [broken("server", f"{api_url} cannot be reached ({type(error).__name__})", step)]
    if not answer.ok:
        step = "Look into the server's log; set PREFECT_API_KEY when it asks for a key (401 and 403)."
        return [broken("server", f"{api_url} answered {answer.status_code}", step)]
    findings = [fine("server", api_url)]
    if told := answer.headers.get("Date"):
        skew = abs((datetime.now(UTC) - parsedate_to_datetime(told)).total_seconds())
        seen = f"{skew:.0f} s between this machine and the server"
        findings.append(
            fine("clock", seen)
            if skew <= _LARGEST_SKEW_SECONDS
            else broken("clock", seen, "Synchronise both clocks (NTP): launches in doubt are settled by time.")
        )
    return findings


def check_scheduler(
    client: SyncPrefectClient, *, seconds: float = _PROBE_SECONDS, sleep: Callable[[float], None] = time.sleep
) -> Finding:
    """See whether a schedule makes a run, by one of our own that is removed again.

    The deployment of the probe has no work pool, so that nobody carries its run out.

    Args:
        client: The server.
        seconds: How long the scheduler may take.
        sleep: Waits.

    Returns:
        The finding.
    """
    name = f"prefect-biomed-doctor-{uuid4().hex[:8]}"
    flow_id = client.create_flow_from_name(name)
    schedule = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(days=1)), active=True)
    of_probe = FlowFilter(id=FlowFilterId(any_=[flow_id]))
    try:
        client.create_deployment(flow_id, name, schedules=[schedule])
        for _ in range(max(1, round(seconds / _LOOK_SECONDS))):
            if client.read_flow_runs(flow_filter=of_probe, limit=1):
                return fine("scheduler", "a schedule of ours has made a run")
            sleep(_LOOK_SECONDS)
    finally:
        # A deployment takes the runs that its schedule has made with it, and a flow its deployments.
        for deployment in client.read_deployments(flow_filter=of_probe):
            client.delete_deployment(deployment.id)
        for run in client.read_flow_runs(flow_filter=of_probe, limit=200):
            client.delete_flow_run(run.id)
        client.delete_flow(flow_id)
    return broken(
        "scheduler",
        f"no run for a schedule of ours in {seconds:.0f} s",
        "Start the server's background services: prefect server start without --no-services, or prefect server "
        "services start; its log says why they ended.",
    )


def check_workers(client: SyncPrefectClient, pool: str) -> list[Finding]:
    """See whether the work pool is there, takes runs, and has a worker that is alive.

    Args:
        client: The server.
        pool: Name of the work pool.

    Returns:
        The findings.
    """
    about = f"work pool {pool}"
    try:
        found = client.read_work_pool(pool)
    except ObjectNotFound:
        return [broken(about, "there is none", f"prefect-biomed deploy --pool {pool}")]
    if found.is_paused:
        return [broken(about, "it is paused", f"prefect work-pool resume {pool}")]
    workers = client.read_workers_for_work_pool(pool)
    alive = [worker.name for worker in workers if worker.status == WorkerStatus.ONLINE]
    if not alive:
        seen = f"none of {len(workers)} workers is alive" if workers else "no worker was ever there"
        return [fine(about, "there"), broken("worker", seen, f"prefect worker start --pool {pool}")]
    return [fine(about, "there"), fine("worker", ", ".join(alive))]


def check_blocks(client: SyncPrefectClient, slugs: Iterable[str]) -> tuple[list[Finding], dict[str, list[str]]]:
    """See which credentials are saved.

    Args:
        client: The server.
        slugs: Slugs of the types of blocks.

    Returns:
        The findings, and names of the saved blocks by slug.
    """
    saved: dict[str, list[str]] = {}
    for slug in slugs:
        documents = client.read_block_documents_by_type(slug)
        if names := [document.name for document in documents if document.name]:
            saved[slug] = names
    if not saved:
        step = "PREFECT_BIOMED_VIP_API_KEY=… prefect-biomed deploy --block lab"
        return [warning("blocks", "no credentials are saved", step)], saved
    return [fine("blocks", ", ".join(f"{slug}/{name}" for slug, names in saved.items() for name in names))], saved


def check_storage(client: SyncPrefectClient, block: str | None) -> Finding:
    """See whether the block in which results are kept is there.

    Args:
        client: The server.
        block: `slug/name` of the block; None for the local disk, which is looked at by itself.

    Returns:
        The finding.
    """
    if block is None:
        step = "With workers on several machines: prefect config set PREFECT_DEFAULT_RESULT_STORAGE_BLOCK=…"
        return Finding(about="result storage", level=Level.FINE, seen="this machine's disk", next_step=step)
    slug, _, name = block.partition("/")
    try:
        client.read_block_document_by_name(name, slug)
    except ObjectNotFound:
        step = "Save that block, or: prefect config unset PREFECT_DEFAULT_RESULT_STORAGE_BLOCK"
        return broken("result storage", f"there is no block {block}", step)
    return fine("result storage", block)


def check_account(name: str, ask: Callable[[], object]) -> Finding:
    """See whether a platform can be reached and takes the key.

    Args:
        name: The block, as `vip-credentials/lab`.
        ask: Asks the platform for something that only an account may read; raises an error of ours.

    Returns:
        The finding.
    """
    try:
        ask()
    except BiomedError as error:
        step = f"Correct the block {name} or its key; when the platform is down, try again later."
        return broken(name, f"{type(error).__name__}: {error}", step)
    except ValueError as error:
        # Of a field that is wrong, or of a block that was deleted since; the value would stand in the message.
        return broken(name, f"cannot be loaded ({type(error).__name__})", f"Save the block {name} again.")
    return fine(name, "the platform answers and takes the key")


def check_disk(folders: Iterable[Path], free: Callable[[Path], int] | None = None) -> list[Finding]:
    """See whether records and results can be written.

    Args:
        folders: Where they go; those that do not exist yet are judged by the folder above.
        free: Tells free bytes; those of the file system when None.

    Returns:
        One finding for each folder.
    """
    free = free or (lambda path: shutil.disk_usage(path).free)
    findings = []
    for folder in folders:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        about = f"disk of {folder}"
        probe = there / f".doctor-{uuid4().hex}"
        try:
            probe.touch()
            probe.unlink()
            bytes_free = free(there)
        except OSError as error:
            step = "Give this user write access, or name another folder with PREFECT_BIOMED_HOME or PREFECT_HOME."
            findings.append(broken(about, f"cannot be written to ({error.strerror})", step))
            continue
        seen = f"{bytes_free / 2**30:.1f} GiB free"
        findings.append(
            fine(about, seen)
            if bytes_free >= _LEAST_FREE_BYTES
            else broken(about, seen, "Make room: outputs of sessions are downloaded whole, 5 GiB is little.")
        )
    return findings


def examine(*, pool: str = "biomed", probe_seconds: float = _PROBE_SECONDS) -> list[Finding]:
    """Look at everything that a run needs.

    Nothing is left behind: the probe of the scheduler is removed again.

    Args:
        pool: Name of the work pool.
        probe_seconds: How long the scheduler may take.

    Returns:
        What was seen.
    """
    settings = get_current_settings()
    findings = check_versions(metadata.requires(DISTRIBUTION) or ())
    findings += check_disk(dict.fromkeys([home(), Path(settings.results.local_storage_path)]))
    server = check_server(settings.api.url, lambda url: requests.get(url, timeout=10))
    findings += server
    if server[0].level is Level.FINE:
        block = settings.results.default_storage_block
        findings += asked("server", lambda: _on_server(pool, probe_seconds, block))
    return findings


def _on_server(pool: str, probe_seconds: float, block: str | None) -> list[Finding]:
    """What only the server knows. One that refuses one thing may tell the others."""
    with get_client(sync_client=True) as client:
        return [
            *asked("scheduler", lambda: [check_scheduler(client, seconds=probe_seconds)]),
            *asked(f"work pool {pool}", lambda: check_workers(client, pool)),
            *asked("result storage", lambda: [check_storage(client, block)]),
            *asked("blocks", lambda: _accounts(client)),
        ]


def asked(about: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Ask the Prefect server; that it refuses or does not answer is what was seen.

    Args:
        about: What is looked at.
        look: Looks.

    Returns:
        What was seen.
    """
    try:
        return look()
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        step = (
            "Set the key that the server asks for: prefect config set PREFECT_API_AUTH_STRING=user:password, or "
            "prefect cloud login."
            if status in {401, 403}
            else "Look into the server's log."
        )
        return [broken(about, f"the server answered {status}", step)]
    except (HTTPError, ObjectNotFound, OSError) as error:
        return [broken(about, f"the server could not be asked ({type(error).__name__})", "Look into the server's log.")]


def _accounts(client: SyncPrefectClient) -> list[Finding]:
    """The saved blocks, and whether each platform takes its key."""
    kinds = {kind.get_block_type_slug(): (platform, kind) for platform, kind in credentials_types().items()}
    findings, saved = check_blocks(client, kinds)
    for slug, names in saved.items():
        platform, kind = kinds[slug]
        for name in names:
            findings.append(check_account(f"{slug}/{name}", partial(_log_in, platform, kind, name)))
    return findings


def _log_in(platform: str, kind: type[Block], name: str) -> None:
    """Ask a platform for what only an account may read; nothing is changed there."""
    load: Any = kind.load  # its type is that of the asynchronous twin
    account = load(name, _sync=True)
    with account.get_client() as client:
        _READS[platform](client)


_READS: dict[str, Callable[[Any], object]] = {
    "vip": lambda client: client.check_key(),
    "vantage6": lambda client: client.me,
    "boss": lambda client: client.list_jobs(),
}
