"""Writing a bundle of public executions of a session, in the shape that VIP gives to its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from zlib import crc32

from prefect_biomed.clients.errors import ConfigurationError, LedgerError
from prefect_biomed.clients.files import atomic_write, digest, on_disk, safe_join
from prefect_biomed.clients.vip.bundle import PROVENANCE, SUMMARY
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.download import local_outputs, not_here
from prefect_biomed.clients.vip.local_files import stored_name
from prefect_biomed.clients.vip.models import InputValue, VipSession, WorkflowStatus
from prefect_biomed.clients.vip.session_file import SessionFile
from prefect_biomed.clients.vip.session_record import EndedRecord, LaunchRecord, SessionRecord, UploadedFile

__all__ = ["publish_session"]

_README = """# Public executions

Written by prefect-biomed in the shape that VIP gives to public executions: `summary.json`, the inputs of each execution
in `<workflow>.json`, MD5s of inputs and outputs in `<invocation>/<invocation>.sh.provenance.json`, descriptor and
outputs in `<workflow>/`. `prefect-biomed replay` runs them again and tells whether they give the same.
"""


def publish_session(
    client: VipClient,
    session: VipSession,
    folder: Path,
    *,
    title: str = "",
    author: str = "",
    with_inputs: bool = False,
) -> tuple[str, ...]:
    """Write a bundle of the executions of a session that have succeeded and whose outputs are all here.

    VIP does not hand out what boutiques wrote of each job, so the provenance is written from what is known here: one
    record for each execution, with the MD5s of its input and output files. Safe to repeat: files appear whole.

    Args:
        client: The account; the descriptor of the pipeline is read (`GET /pipelines/{identifier}`).
        session: The session.
        folder: Where the bundle goes.
        title: Title of the publication; the name of the session when empty.
        author: Who publishes it.
        with_inputs: Whether the input files are published too, in the folder `inputs`.

    Returns:
        The executions in the bundle.

    Raises:
        LedgerError: No execution has succeeded, or outputs of one that has are not here.
        ConfigurationError: The input files are not here any more, or not as they were sent; or the platform has no
            Boutiques descriptor of the pipeline.
    """
    record = SessionFile(session, client).read()
    identifiers = _succeeded(record, session, tells_jobs=client.profile.tells_jobs)
    descriptor = client.descriptor(session.pipeline_id or "")
    if descriptor is None:
        raise ConfigurationError(f"The platform has no Boutiques descriptor of {session.pipeline_id}.")
    inputs = _Inputs(record, session, descriptor)
    with on_disk(folder):
        workflows = [
            _publish_one(record, session, identifier, folder, descriptor, inputs, client.url)
            for identifier in identifiers
        ]
        if with_inputs:
            for name, path in inputs.files.items():
                _copy(path, safe_join(folder / "inputs", name))
        metadata = {
            "title": title or session.session_name,
            "upload_type": "workflow",
            "description": "",
            "creators": [{"name": author}],
        }
        _write(folder / SUMMARY, {"metadata": metadata, "workflows": workflows})
        (folder / "README.md").write_text(_README)
    return identifiers


def _succeeded(record: SessionRecord, session: VipSession, *, tells_jobs: bool) -> tuple[str, ...]:
    ended = record.ledger.ended
    found = tuple(
        identifier
        for identifier in record.workflows_of(session.token)
        if identifier in ended and _all_succeeded(ended[identifier], tells_jobs=tells_jobs)
    )
    if not found:
        raise LedgerError(f"No execution of {session.session_name} is known to have succeeded with all of its jobs.")
    for identifier in found:
        outputs = record.workflows[identifier].outputs
        lacking = not_here(session, identifier, outputs)
        if lacking or not outputs:
            what = ", ".join(lacking[:5]) or "any output"
            raise LedgerError(f"{identifier} cannot be published: {what} is not in {session.output_dir}.")
    return found


def _all_succeeded(ended: EndedRecord, *, tells_jobs: bool) -> bool:
    is_told = ended.jobs > 0 or not tells_jobs
    return ended.status == WorkflowStatus.FINISHED and is_told and not ended.failed_jobs and not ended.open_jobs


class _Inputs:
    """The values of a session as they were sent, and its input files here."""

    def __init__(self, record: SessionRecord, session: VipSession, descriptor: Mapping[str, Any]) -> None:
        intent = record.ledger.intents[session.token]
        self._folder = (intent.vip_input_dir or "").rstrip("/")
        self._sent = intent.input_settings or intent.given
        described = [one for one in descriptor.get("inputs", ()) if one.get("type") == "File"]
        self._named = {key for one in described for key in (one.get("id"), one.get("name")) if key}
        self.files = _local_files(session, record.ledger.uploads)

    def values(self, launch: LaunchRecord | None) -> tuple[dict[str, list[str]], str | None]:
        """The values as VIP writes them, and the identifier of the Girder where some are on one."""
        given = self._sent | (launch.girder_inputs if launch else {})
        on_girder = set(launch.girder_inputs) if launch else set()
        storage: str | None = None
        found: dict[str, list[str]] = {}
        for name, value in given.items():
            texts = [_text(one) for one in (value if isinstance(value, list) else [value]) if one is not None]
            if name in on_girder:
                storage = texts[0].partition(":")[0]
                texts = [":/".join(text.split(":", 1)) for text in texts]
            elif name in self._named:
                texts = [text if text.startswith("/") else f"{self._folder}/{text}" for text in texts]
            found[name] = texts
        return found, storage

    def public(self, values: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The values as boutiques writes them: files with their MD5, where they are here."""
        found: dict[str, Any] = {}
        for name, texts in values.items():
            shown = [self._public(text) if name in self._named else text for text in texts]
            found[name] = shown[0] if len(shown) == 1 else shown
        return found

    def _public(self, path: str) -> dict[str, Any]:
        name = PurePosixPath(path).name
        below = path.removeprefix(self._folder + "/")
        if below in self.files:
            return {"file-name": name, "md5sum": digest(self.files[below], "md5")}
        inside = [(one, file) for one, file in self.files.items() if one.startswith(below + "/")]
        if not inside:
            return {"file-name": name}
        return {
            "file-name": name,
            "files": [{"file-name": PurePosixPath(one).name, "md5sum": digest(file, "md5")} for one, file in inside],
        }


def _local_files(session: VipSession, uploads: Mapping[str, UploadedFile]) -> dict[str, Path]:
    """The input files here by the names they have on the platform, as they were when they were sent."""
    found: dict[str, Path] = {}
    for name, sent in uploads.items():
        path = session.input_dir / name if session.input_dir is not None else None
        if path is None or not path.is_file() or digest(path) != sent.sha256:
            raise ConfigurationError(
                f"The input {name} of {session.session_name} is not in {session.input_dir} as it was sent, so its MD5 "
                "cannot be told. Put it back."
            )
        found["/".join(stored_name(part) for part in PurePosixPath(name).parts)] = path
    return found


def _text(value: InputValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _publish_one(
    record: SessionRecord,
    session: VipSession,
    identifier: str,
    folder: Path,
    descriptor: Mapping[str, Any],
    inputs: _Inputs,
    url: str,
) -> dict[str, Any]:
    application = str(descriptor.get("name", "pipeline"))
    invocation = f"{application.replace(' ', '-')}-{crc32(identifier.encode()):013d}"
    inside = folder / identifier
    _write(inside / f"{invocation.rpartition('-')[0]}.json", descriptor)
    launch = next((one for one in record.ledger.launches.values() if one.workflow_id == identifier), None)
    values, storage = inputs.values(launch)
    outputs = local_outputs(session, identifier, record.workflows[identifier].outputs)
    written: dict[str, Any] = {}
    for number, output in enumerate(outputs, start=1):
        _copy(output.local, safe_join(inside / invocation, output.local.name))
        written[f"output-{number}"] = _public_output(output.local)
    provenance = {
        "summary": {"name": application},
        "public-invocation": inputs.public(values),
        "public-output": {
            "stdout": "",
            "stderr": "",
            "exit-code": 0,
            "error-message": "",
            "shell-command": "",
            "missing-files": {},
            "output-files": written,
        },
        "additional-information": {"written-by": "prefect-biomed"},
    }
    place = folder / invocation / f"{invocation}{PROVENANCE}"
    _write(place, provenance)
    provider = {"vip_url": url, "storage_type": "GIRDER" if storage else "LOCAL"}
    if storage:
        provider |= {"storage_id": storage, "storage_url": ""}
    _write(folder / f"{identifier}.json", {"provider": provider, "inputs": values})
    return {
        "workflowId": identifier,
        "directory": identifier,
        "boutique_descriptor": f"{identifier}/{invocation.rpartition('-')[0]}.json",
        "provenances_files": [place.relative_to(folder).as_posix()],
        "invocation_outputs": {invocation: [output.path for output in outputs]},
    }


def _public_output(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"file-name": path.name, "files": [_public_output(one) for one in sorted(path.iterdir())]}
    return {"file-name": path.name, "md5sum": digest(path, "md5")}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    with atomic_write(target) as written, source.open("rb") as read:
        shutil.copyfileobj(read, written)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode())
