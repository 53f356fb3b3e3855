"""The provenance of a session as an RO-Crate in its output folder."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from prefect_biomed.clients.crates import Execution, Provenance, Source, write_crate
from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.download import local_outputs
from prefect_biomed.clients.vip.local_files import stored_name
from prefect_biomed.clients.vip.models import VipSession, WorkflowStatus
from prefect_biomed.clients.vip.outcome import unfetched
from prefect_biomed.clients.vip.session_file import SessionFile
from prefect_biomed.clients.vip.session_record import EndedRecord, IntentRecord, SessionRecord

__all__ = ["write_session_crate"]


def write_session_crate(session: VipSession, client: VipClient | None = None, *, licence: str = "") -> Path:
    """Write how the outputs of a session came about, from its session file, into `ro-crate-metadata.json` beside them.

    All executions that have ended are told of, the failed ones too, with those of their outputs that are here; one
    whose outputs are not here any more is told of as that. Safe to repeat: the same session file and outputs give the
    same bytes.

    Args:
        session: The session.
        client: Needed when the session file is kept on the platform.
        licence: Address of the licence of the outputs.

    Returns:
        The file.

    Raises:
        LedgerError: Nothing of the session has ended yet, or its file is of a release that did not write down the
            platform: `vip_resume` does.
        LocalStorageError: The folder cannot be read or written.
    """
    record = SessionFile(session, client).read()
    url = record.ledger.platform_url if client is None else client.url
    if url is None:
        raise LedgerError(
            f"The session file of {session.session_name} does not tell its platform. Resume the session once: "
            f"prefect-biomed resume {session.output_dir}"
        )
    newest = record.ledger.intents[record.ledger.newest]
    pipeline = newest.pipeline_id or ""
    provenance = Provenance(
        name=session.session_name,
        flow="vip-session",
        parameters={
            "pipeline_id": pipeline,
            "input_settings": dict(newest.given or newest.input_settings or {}),
            "nb_runs": newest.nb_runs,
            "session_name": session.session_name,
        },
        platform="VIP",
        platform_url=url,
        program=pipeline,
        program_version=pipeline.rpartition("/")[2],
        program_address=f"{url}/pipelines/{quote(pipeline, safe='')}",
        executions=tuple(_executions(record, session, url)),
    )
    return write_crate(session.output_dir, provenance, licence=licence)


def _executions(record: SessionRecord, session: VipSession, url: str) -> Iterator[Execution]:
    names = {launch.workflow_id: name for name, launch in record.ledger.launches.items()}
    for token, intent in record.ledger.intents.items():
        for identifier in record.workflows_of(token):
            ended = record.ledger.ended.get(identifier)
            if ended is None:
                continue
            began = datetime.strptime(record.workflows[identifier].start, "%Y/%m/%d %H:%M:%S").astimezone()
            launch = record.ledger.launches.get(names.get(identifier, ""))
            yield Execution(
                address=f"{url}/executions/{quote(identifier, safe='')}",
                name=names.get(identifier, identifier),
                error=_error(record, session, identifier, ended),
                began=began,
                ended=ended.seen,
                settings={
                    "pipeline": intent.pipeline_id or "",
                    **(intent.input_settings or intent.given),
                    **(launch.girder_inputs if launch else {}),
                },
                inputs=tuple(_inputs(record, intent, url)),
                outputs=tuple(_outputs(record, session, identifier)),
            )


def _error(record: SessionRecord, session: VipSession, identifier: str, ended: EndedRecord) -> str | None:
    if ended.status != WorkflowStatus.FINISHED:
        return f"ended as {ended.status}"
    if ended.failed_jobs:
        return f"{ended.failed_jobs} of {ended.jobs} jobs failed"
    if ended.open_jobs:
        return f"it is not known how {ended.open_jobs} of {ended.jobs} jobs ended"
    # Results that are to be here and are not would otherwise look like results that there never were.
    lacking = unfetched(session, record, identifier) if ended.status in session.options.get_status else ()
    return f"{len(lacking)} outputs are not here: {', '.join(lacking[:5])}" if lacking else None


def _inputs(record: SessionRecord, intent: IntentRecord, url: str) -> Iterator[Source]:
    names = intent.inputs.expected or record.ledger.uploads
    for name in sorted(names):
        sent = record.ledger.uploads.get(name)
        stored = "/".join(stored_name(part) for part in PurePosixPath(name).parts)
        place = f"{intent.vip_input_dir or ''}/{stored}"
        yield Source(
            address=f"vip://{urlsplit(url).netloc}{quote(place)}",
            name=name,
            sha256=sent.sha256 if sent else None,
            size=sent.size if sent else None,
        )


def _outputs(record: SessionRecord, session: VipSession, identifier: str) -> Iterator[str]:
    for output in local_outputs(session, identifier, record.workflows[identifier].outputs):
        # The folder of an unpacked archive stands for the archive.
        files = output.local.rglob("*") if output.local.is_dir() else [output.local]
        for path in files:
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(session.output_dir).as_posix()
