"""Public executions: what boutiques writes of each job, and the bundle that the portal makes of executions.

The bundle has the shape that VIP-portal (`ReproVipBusiness`) writes and that the Zenodo uploader of VIP's complementary
tools fills: `summary.json`, the inputs of each execution in `<workflow>.json`, what boutiques wrote in
`<invocation>/<invocation>.sh.provenance.json`, the descriptor and the outputs in `<workflow>/`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from prefect_biomed.sandbox.vip._model import User
from prefect_biomed.sandbox.vip._pipelines import Pipeline, Results
from prefect_biomed.sandbox.vip._storage import Storage

_GIRDER_PREFIX = "girder:/"


@dataclass(frozen=True)
class PublicExecution:
    """A finished execution that is to be made public.

    Attributes:
        identifier: of the execution.
        owner: who launched it.
        pipeline: what ran.
        values: parameter to values.
        returned: paths of its outputs.
        provenances: what boutiques wrote, by number of the job.
    """

    identifier: str
    owner: User
    pipeline: Pipeline
    values: Mapping[str, Sequence[str]]
    returned: Sequence[str]
    provenances: Mapping[int, dict[str, Any]]


def provenance(
    pipeline: Pipeline, values: Mapping[str, str], files: Mapping[str, Path], results: Results, stdout: Sequence[str]
) -> dict[str, Any]:
    """Write down a job as boutiques does: files by name and MD5, all other values as they were given.

    Args:
        pipeline: what ran.
        values: parameter to value.
        files: File parameter to local copy.
        results: output to files, before they are delivered.
        stdout: lines of standard output.
    """
    written: dict[str, dict[str, str]] = {}
    for output, produced in results.items():
        for number, (name, path) in enumerate(produced):
            written[output if number == 0 else f"{output}-{number + 1}"] = _public(name.rpartition("/")[2], path)
    return {
        "summary": {"name": pipeline.name},
        "public-invocation": {
            name: _public(files[name].name, files[name]) if name in files else value for name, value in values.items()
        },
        "public-output": {
            "stdout": "\n".join(stdout),
            "stderr": "",
            "exit-code": 0,
            "error-message": "",
            "shell-command": stdout[1] if len(stdout) > 1 else "",
            "missing-files": {},
            "output-files": written,
        },
        "additional-information": {},
    }


def _public(name: str, path: Path) -> dict[str, str]:
    with path.open("rb") as stream:
        return {"file-name": name, "md5sum": hashlib.file_digest(stream, "md5").hexdigest()}


def _invocation(execution: PublicExecution, job: int) -> str:
    """Return what GASW calls a job: the application and a number."""
    return f"{execution.pipeline.name.replace(' ', '-')}-{crc32(f'{execution.identifier}/{job}'.encode()):013d}"


def publish(
    executions: Sequence[PublicExecution],
    folder: Path,
    *,
    storage: Storage,
    url: str,
    title: str = "your title",
    girder: tuple[str, str] = ("", ""),
) -> None:
    """Write the bundle of finished executions.

    Args:
        executions: to be made public; their outputs are still on the platform.
        folder: a new or empty folder.
        storage: where the outputs are.
        url: of the portal.
        title: of the publication.
        girder: storage identifier and address of the Girder.

    Raises:
        FileNotFoundError: an output is on the platform no more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workflows = [_publish_one(execution, folder, storage, url, girder) for execution in executions]
    metadata = {
        "title": title,
        "upload_type": "workflow",
        "description": "",
        "creators": [{"name": executions[0].owner.name}],
    }
    _write(folder / "summary.json", {"metadata": metadata, "workflows": workflows})
    (folder / "README.md").write_text("Replay it with the replayer of VIP, or with `vip_replay` of prefect-biomed.\n")


def _publish_one(
    execution: PublicExecution, folder: Path, storage: Storage, url: str, girder: tuple[str, str]
) -> dict[str, Any]:
    inside = folder / execution.identifier
    inside.mkdir()
    _write(inside / f"{execution.pipeline.name}.json", execution.pipeline.boutiques())
    returned = {path.partition("?")[0].rpartition("/")[2]: path for path in execution.returned}
    outputs: dict[str, list[str]] = {}
    records = []
    for job, written in execution.provenances.items():
        invocation = _invocation(execution, job)
        record = folder / invocation / f"{invocation}.sh.provenance.json"
        _write(record, written)
        records.append(str(record))
        names = [known["file-name"] for known in written["public-output"]["output-files"].values()]
        outputs[invocation] = [returned[name] for name in names]
        for name in names:
            place = storage.input_file(execution.owner, returned[name])
            if place is None:
                raise FileNotFoundError(f"{returned[name]} is on the platform no more")
            target = inside / invocation / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place, target)
    _write(folder / f"{execution.identifier}.json", _inputs(execution, url, girder))
    return {
        "workflowId": execution.identifier,
        "directory": str(inside),
        "boutique_descriptor": f"{inside / execution.pipeline.name}.json",
        "provenances_files": records,
        "invocation_outputs": outputs,
    }


def _inputs(execution: PublicExecution, url: str, girder: tuple[str, str]) -> dict[str, Any]:
    values = {name: list(given) for name, given in execution.values.items() if name != "results-directory"}
    provider = {"vip_url": url, "storage_type": "LOCAL"}
    if any(value.startswith(_GIRDER_PREFIX) for given in values.values() for value in given):
        provider |= {"storage_type": "GIRDER", "storage_url": girder[1], "storage_id": girder[0]}
        values = {name: [_on_girder(value, girder[0]) for value in given] for name, given in values.items()}
    return {"provider": provider, "inputs": values}


def _on_girder(value: str, storage_id: str) -> str:
    if not value.startswith(_GIRDER_PREFIX):
        return value
    query = dict(part.partition("=")[::2] for part in value.partition("?")[2].split("&"))
    return f"{storage_id}:/{query.get('fileId', '')}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4))
