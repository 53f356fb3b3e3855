"""The provenance of an experiment as one RO-Crate for all its series."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from prefect_biomed.analysis.experiment import Experiment, RunRecord
from prefect_biomed.clients.crates import Execution, Provenance, Source, write_crate
from prefect_biomed.clients.errors import LedgerError

__all__ = ["write_experiment_crate"]


def write_experiment_crate(folder: Path, *, licence: str = "") -> Path:
    """Write how the results of all series of an experiment came about, from its `experiment.jsonl`.

    Safe to repeat: the same records and files give the same bytes.

    Args:
        folder: Folder of the experiment.
        licence: Address of the licence of the results.

    Returns:
        `ro-crate-metadata.json`.

    Raises:
        LedgerError: There is no run yet, or a record is damaged.
        LocalStorageError: The folder cannot be read or written.
    """
    records = Experiment(folder).records()
    if not records:
        raise LedgerError(f"{folder} has no run that has ended yet: there is nothing to tell of.")
    addressed = next((record.url for record in records if record.url), "")
    platform = f"{urlsplit(addressed).scheme}://{urlsplit(addressed).netloc}" if addressed else "urn:prefect-biomed:vip"
    pipelines = sorted({record.pipeline for record in records})
    provenance = Provenance(
        name=folder.name,
        flow="repeatability-experiment",
        parameters={
            "pipelines": list(pipelines),
            "input_settings": records[0].parameters,
            "repetitions": max(record.repetition for record in records),
        },
        platform="VIP",
        platform_url=platform,
        program=" and ".join(pipelines),
        program_version=", ".join(pipeline.rpartition("/")[2] for pipeline in pipelines),
        program_address=f"{platform}/pipelines/{quote(pipelines[0], safe='')}",
        executions=tuple(_execution(folder, record) for record in records),
    )
    return write_crate(folder, provenance, licence=licence)


def _execution(folder: Path, record: RunRecord) -> Execution:
    # Where a run can be looked at need not be a page of its own.
    address = f"{record.url or 'urn:prefect-biomed:run'}#{quote(record.execution or record.name, safe='')}"
    lost = record.succeeded and record.folder is not None and not (folder / record.folder).is_dir()
    return Execution(
        address=address,
        name=f"{record.series}, {record.pipeline}, run {record.repetition}",
        error="its outputs are not here" if lost else None if record.succeeded else record.message or record.status,
        began=record.started or record.began,
        ended=record.recorded,
        settings={"pipeline": record.pipeline, "series": record.series, **record.parameters},
        inputs=tuple(_inputs(record)),
        outputs=tuple(_outputs(folder, record)),
    )


def _inputs(record: RunRecord) -> Iterator[Source]:
    """The inputs of a run have one digest, of all their names and contents."""
    if record.inputs:
        yield Source(address=f"urn:prefect-biomed:inputs:{record.inputs}", name="input files", sha256=record.inputs)


def _outputs(folder: Path, record: RunRecord) -> Iterator[str]:
    if record.folder is None:
        return
    for path in (folder / record.folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix()
