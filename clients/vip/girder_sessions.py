"""Sessions with inputs or outputs on Girder: checks, folders of runs, metadata from which a session can be opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    LedgerError,
    NotFoundError,
    PermissionDeniedError,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import GenericVipError
from prefect_biomed.clients.vip.girder import GirderStorage, file_id, girder_path
from prefect_biomed.clients.vip.models import PathEntry, VipSession, Workflow
from prefect_biomed.clients.vip.session_file import FILE_NAME, VIP_HOME, SessionFile, open_session
from prefect_biomed.clients.vip.session_record import SessionRecord, WorkflowRecord

__all__ = [
    "check_outputs",
    "check_vip_key",
    "girder_of",
    "make_run_folder",
    "note_runs",
    "open_girder_session",
    "output_entries",
    "share_girder_key",
]

logger = logger_of(__name__)

_OUR_METADATA = ("session_name", "workflow_id", "workflow_start", "workflow_status")
_WRITE_ACCESS = 1
# Of this machine only, and names of files, which Girder refuses as keys.
_ONLY_LOCAL: dict[str, Any] = {
    "uploads": True,
    "downloaded": True,
    "resume": True,
    "intents": {"__all__": {"inputs": {"expected": True}}},
}


def girder_of(client: VipClient) -> GirderStorage:
    """Return the user's account on Girder.

    Args:
        client: The account on VIP.

    Returns:
        The account on Girder.

    Raises:
        ConfigurationError: The credentials have none, or the platform knows no external storages.
    """
    if not client.profile.mounts_storages:
        raise ConfigurationError("This platform cannot use Girder; only VIP can.")
    if client.girder is None:
        raise ConfigurationError("The credentials have no girder_api_key. Put one into them to use Girder.")
    return client.girder


def share_girder_key(client: VipClient) -> None:
    """Leave the user's Girder key on VIP, which its executions need. Once is enough (`PUT /user/externalKeys`).

    Args:
        client: The account on VIP, with one on Girder.

    Raises:
        ConfigurationError: The credentials have no Girder key.
        GenericVipError: VIP does not know the storage.
    """
    girder = girder_of(client)
    client.set_external_key(girder.storage_id, girder.key)


def check_vip_key(client: VipClient) -> list[str]:
    """Look whether VIP can use the user's Girder account; without, it refuses the launch and gives no reason.

    Args:
        client: The account on VIP.

    Returns:
        One problem, or none.
    """
    if not client.profile.mounts_storages or client.girder is None:
        return []
    storage = client.girder.storage_id
    try:
        known = client.external_keys()
    except (GenericVipError, NotFoundError, PermissionDeniedError, UnexpectedResponse) as error:
        logger.debug("VIP does not tell for which storages it has keys: %s", error)
        return []
    if storage in known:
        return []
    return [
        f"VIP holds no key of yours for the storage {storage!r}. Leave it there once, on the portal or with "
        "share_girder_key of prefect_biomed.clients.vip."
    ]


def check_outputs(client: VipClient, session: VipSession) -> list[str]:
    """Look whether the outputs of a session can go to Girder. Only reads.

    Args:
        client: The account on VIP.
        session: A session with `girder_output_dir`.

    Returns:
        All problems.
    """
    path = session.girder_output_dir or ""
    problems = [
        f"girder_metadata: Girder refuses the key {key!r}; it must not be empty, have a '.' or begin with '$'."
        for key in session.girder_metadata
        if not key or "." in key or key.startswith("$")
    ]
    if taken := sorted(set(_OUR_METADATA) & session.girder_metadata.keys()):
        problems.append(f"girder_metadata: {', '.join(taken)} is set for each run; choose another key.")
    try:
        found, missing = girder_of(client).nearest(path)
    except BiomedError as error:
        if is_transient(error):
            raise
        return [*problems, f"Output folder {path} on Girder: {error}"]
    if found.kind not in {"folder", "collection", "user"}:
        problems.append(f"Output folder {path} on Girder: {found.name!r} is a {found.kind}, not a folder.")
    elif found.access_level is not None and found.access_level < _WRITE_ACCESS:
        problems.append(f"Output folder {path} on Girder: you may not write in {found.name!r}.")
    elif not missing and found.meta.get("session_name", session.session_name) != session.session_name:
        problems.append(
            f"Output folder {path} on Girder belongs to session {found.meta['session_name']!r}. Choose another one."
        )
    return problems


def make_run_folder(client: VipClient, session: VipSession, repetition: int) -> str:
    """Make the folder on Girder for the outputs of one run. Safe to repeat: its name, unique by the token, finds it.

    Args:
        client: The account on VIP.
        session: A session with `girder_output_dir`.
        repetition: Number of the run, from 1.

    Returns:
        The results location for VIP, `<storage>:<folder id>`.
    """
    girder = girder_of(client)
    description = f"Outputs of run {repetition} of the VIP session {session.session_name}"
    return girder.location(girder.make_folder(session.girder_run_dir(repetition), description))


def note_runs(client: VipClient, session: VipSession, workflows: Iterable[Workflow], *, strict: bool = False) -> None:
    """Bring the metadata on Girder up to date: of the folder of each run, and of the session's folder above them.

    Safe to repeat. The keys are those of VipGirder of vip-client, which can open the session from its folder. Nothing
    is done for sessions whose outputs are not on Girder.

    Args:
        client: The account on VIP.
        session: The session.
        workflows: The runs to note, as they are now.
        strict: Whether a failure is raised; else it is logged, because the runs do not depend on it.

    Raises:
        BiomedError: Girder did not take the metadata, when `strict`.
    """
    if session.girder_output_dir is None:
        return
    if client.girder is None:
        logger.warning("The credentials have no girder_api_key; the metadata on Girder is not brought up to date")
        return
    try:
        _note_runs(client.girder, session, session.girder_output_dir, SessionFile(session, client).read(), workflows)
    except BiomedError as error:
        if strict:
            raise
        logger.warning("Metadata of %s on Girder was not written: %s", session.session_name, error)


def _note_runs(
    girder: GirderStorage, session: VipSession, folder: str, record: SessionRecord, workflows: Iterable[Workflow]
) -> None:
    places = _places_of_runs(session, record)
    runs = dict(record.workflows)
    for workflow in workflows:
        if workflow.identifier not in runs:
            continue
        # The session file may say Removed, which is true of VIP only.
        runs[workflow.identifier] = run = runs[workflow.identifier].model_copy(update={"status": workflow.status.value})
        place = places.get(workflow.identifier) or f"{folder}/{workflow.name}"
        places[workflow.identifier] = place
        ours = (session.session_name, workflow.identifier, run.start, run.status)
        girder.annotate(
            girder.entry(place).id, {**session.girder_metadata, **dict(zip(_OUR_METADATA, ours, strict=True))}
        )
    girder.annotate(
        girder.entry(folder).id,
        {
            "session_name": session.session_name,
            "pipeline_id": session.pipeline_id,
            "vip_output_dir": folder,
            "output_location": "girder",
            "input_settings": record.model_dump(mode="json")["input_settings"],
            "workflows": {
                identifier: {**run.model_dump(mode="json"), "output_path": places.get(identifier, folder)}
                for identifier, run in runs.items()
            },
            "prefect_biomed": record.ledger.model_dump(mode="json", exclude=_ONLY_LOCAL),
        },
    )


def _places_of_runs(session: VipSession, record: SessionRecord) -> dict[str, str]:
    """Folders of the runs on Girder, by workflow."""
    places = {
        launch.workflow_id: f"{session.girder_output_dir}/{name}"
        for name, launch in record.ledger.launches.items()
        if launch.workflow_id
    }
    theirs = {
        identifier: str(path)
        for identifier, run in record.workflows.items()
        if (path := (run.model_extra or {}).get("output_path"))
    }
    return theirs | places


def open_girder_session(client: VipClient, folder: str, output_dir: Path, *, download: bool = False) -> VipSession:
    """Make a session out of the metadata of its folder on Girder, whether we or vip-client began it.

    Its session file is written to the local folder, unless it is there already. Safe to repeat.

    Args:
        client: The account on VIP, with one on Girder.
        folder: Path of the session's folder on Girder.
        output_dir: Local folder for the session file, and for outputs when wanted.
        download: Whether outputs are wanted in the local folder.

    Returns:
        The session.

    Raises:
        NotFoundError: There is no such folder.
        LedgerError: The folder has no session in its metadata, or the local folder has another session.
    """
    path = girder_path(folder) or folder.rstrip("/")
    meta = girder_of(client).entry(path).meta
    try:
        found = SessionRecord.model_validate(meta)
        name = found.session_name
        found.vip_output_dir = f"{VIP_HOME}/{name}/OUTPUTS"
        token = found.ledger.newest
        intent = found.ledger.intents[token]
        session = VipSession.model_validate(
            {
                "session_name": name,
                "pipeline_id": intent.pipeline_id,
                # What vip-client has written beside it names the files in a folder one by one.
                "input_settings": intent.given if intent.input_settings is None else intent.input_settings,
                "output_dir": output_dir,
                "vip_input_dir": f"{VIP_HOME}/{name}/INPUTS",
                "vip_output_dir": found.vip_output_dir,
                "nb_runs": intent.nb_runs,
                "token": token,
                "girder_output_dir": path,
                "girder_metadata": intent.girder_metadata,
                "girder_download": download or intent.girder_download,
                "options": intent.options,
            }
        )
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors(include_input=False))
        raise LedgerError(
            f"The folder {path} on Girder has no session in its metadata, or a damaged one ({wrong}). "
            "Name the folder in which the runs have theirs."
        ) from None
    file = SessionFile(session, client)
    with file.edit() as record:
        if not (output_dir / FILE_NAME).is_file():
            record.prefect_biomed = found.ledger
        for identifier, run in found.workflows.items():
            record.workflows.setdefault(identifier, WorkflowRecord.model_validate(run.model_dump()))
        record.note_intent(session)
    return open_session(output_dir, session_name=name)


def output_entries(client: VipClient, addresses: Sequence[str]) -> list[PathEntry]:
    """Describe outputs on Girder.

    Args:
        client: The account on VIP, with one on Girder.
        addresses: Addresses as VIP gives them.

    Returns:
        Their sizes, in the same order; `exists` is False for those that are not there any more.
    """
    found = girder_of(client).files([file_id(address) for address in addresses])
    return [
        PathEntry(path=address, exists=entry is not None, size=entry.size if entry else None)
        for address, entry in zip(addresses, found, strict=True)
    ]
