"""The experiment folder: what was run when, with what outcome, and what the weeks say about each other.

    experiment.jsonl              one line for each run, only ever added to
    judgements.jsonl              one line for each series that was judged by a baseline
    series/<series>/<pipeline>/   outputs of one series of repetitions
    reports/<series>/             report of that series

A series is the repetitions made at one time. Lines are written whole, under a lock; half a line that a power cut left
behind is cut off by the next to write.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_biomed.analysis.comparison import compare_runs, runs_below, series_below
from prefect_biomed.analysis.models import (
    Evidence,
    Judgement,
    PipelineReport,
    Report,
    Rules,
    RunSummary,
    SeriesSummary,
    Variability,
)
from prefect_biomed.analysis.monitor import Monitor, Shown
from prefect_biomed.analysis.stability import LEAST_REFERENCES, judge_runs, judge_variability, series_of
from prefect_biomed.clients.errors import ConfigurationError, LedgerError
from prefect_biomed.clients.files import digest, is_later_version
from prefect_biomed.clients.texts import logger_of

__all__ = ["Experiment", "RunRecord", "inputs_digest"]

logger = logger_of(__name__)

_RECORDS = "experiment.jsonl"
_JUDGEMENTS = "judgements.jsonl"
_VERSION = 1
_LOCK_SECONDS = 60.0
# Another value makes all series be judged again.
_METHOD = "exchange of runs"
Line = TypeVar("Line", bound=BaseModel)


class RunRecord(BaseModel):
    """One line of `experiment.jsonl`: one run, from its parameters to the digests of what came out.

    Attributes:
        version: Version of this layout.
        series: Name of the series.
        began: When the series began.
        pipeline: Pipeline and version.
        repetition: Number of the run within its series, from 1.
        parameters: Settings it ran with.
        inputs: Digest of all input files; empty when they were on the platform already.
        execution: Identifier the platform gave.
        status: Status at the end.
        succeeded: Whether its outputs count.
        message: Why it failed.
        answer: What the platform said of it at the end.
        folder: Folder of its outputs, relative to the experiment folder; None when there are none.
        digests: SHA-256 of the decompressed content by file.
        started: When the platform started it.
        recorded: When this line was written.
        url: Where it can be looked at.
        flow_run: The flow run that launched it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    series: str
    began: datetime
    pipeline: str
    repetition: int
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: str = ""
    execution: str = ""
    status: str = ""
    succeeded: bool = True
    message: str = ""
    answer: dict[str, Any] = Field(default_factory=dict)
    folder: str | None = None
    digests: dict[str, str] = Field(default_factory=dict)
    started: datetime | None = None
    recorded: datetime
    url: str = ""
    flow_run: str = ""

    @property
    def name(self) -> str:
        """Name of the run within its series."""
        return f"run {self.repetition}"

    @property
    def identity(self) -> tuple[str, str, int]:
        """What no other line has."""
        return self.series, self.pipeline, self.repetition

    @property
    def conditions(self) -> tuple[str, str]:
        """What has to be equal for two runs to be repetitions of each other."""
        return hashlib.sha256(repr(sorted(self.parameters.items())).encode()).hexdigest(), self.inputs


class _JudgementRecord(BaseModel):
    """One line of `judgements.jsonl`. Lines of another method are left where they are and not used."""

    version: Literal[1] = 1
    series: str
    pipeline: str
    baseline: str
    level: float
    rules: str
    method: str = ""
    judgement: Judgement


@dataclass(frozen=True)
class _Baseline:
    """Reference runs.

    Attributes:
        name: What the judgements are kept under.
        series: Names of its series; none for a folder from elsewhere.
        runs: Folders of its runs by name.
        units: Series by name of the run.
    """

    name: str
    series: tuple[str, ...]
    runs: dict[str, Path]
    units: dict[str, str]

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, Path]]) -> _Baseline:
        """Take several series together; the runs of a single one keep their names."""
        names = list(found)
        is_one = len(names) == 1
        runs = {
            run if is_one else f"{name}/{run}": path for name, known in found.items() for run, path in known.items()
        }
        units = {run if is_one else f"{name}/{run}": name for name, known in found.items() for run in known}
        label = names[0] if is_one else f"{names[0]} to {names[-1]}, {len(names)} series"
        return cls(label, tuple(names), runs, units)


@dataclass(frozen=True)
class _How:
    """How series are judged."""

    rules: Rules
    level: float
    unit: Literal["run", "series"]

    @property
    def method(self) -> str:
        """What judgements of the same kind are kept under."""
        return _METHOD if self.unit == "run" else f"exchange of {self.unit}"

    def judge(self, base: _Baseline, series: str, runs: Mapping[str, Path]) -> Judgement:
        """Judge the runs of a series."""
        new = {f"{series}/{name}": folder for name, folder in runs.items()} if self.unit == "series" else dict(runs)
        units = base.units | dict.fromkeys(new, series)
        if self.unit == "run" and len(base.series) < 2:
            units = {}
        return judge_runs(
            base.runs, new, rules=self.rules, level=self.level, units=units or None, unit=self.unit if units else None
        )


def _folder_baseline(folder: Path, count: int) -> _Baseline:
    """Reference runs from elsewhere; with several series each sub-folder is one."""
    try:
        if count == 1:
            runs = runs_below(folder)
            return _Baseline(str(folder), (), runs, {})
        runs = series_below(folder)
    except ConfigurationError as error:
        raise ConfigurationError(f"The baseline {folder} cannot be used: {error}") from None
    return _Baseline(str(folder), (), runs, series_of(runs))


def inputs_digest(folder: Path | None) -> str:
    """Digest the names and contents of all files below a folder.

    Args:
        folder: The folder; None for none.

    Returns:
        64 hexadecimal digits; empty for None.
    """
    if folder is None:
        return ""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{digest(path)}\n".encode())
    return whole.hexdigest()


class Experiment:
    """An experiment folder.

    Args:
        folder: The folder; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_series(self, token: str) -> str:
        """Name a series, or find the one that this token began.

        Args:
            token: The same for every retry of one intent.

        Returns:
            `<UTC time>-<token>`; its folder exists.
        """
        above = self.folder / "series"
        above.mkdir(parents=True, exist_ok=True)
        with self._locked():
            name = self.name_series(token)
            (above / name).mkdir(exist_ok=True)
        return name

    def name_series(self, token: str) -> str:
        """Tell the name that `open_series` would give now. Nothing is made.

        Args:
            token: As for `open_series`.

        Returns:
            The name of the series that this token began, or would begin.
        """
        found = sorted(path.name for path in (self.folder / "series").glob(f"*-{token}"))
        return found[0] if found else f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{token}"

    def output_dir(self, series: str, pipeline: str) -> Path:
        """Tell where the outputs of one pipeline of a series go.

        Args:
            series: The series.
            pipeline: The pipeline.

        Returns:
            A folder below the experiment folder.
        """
        return self.folder / "series" / series / re.sub(r"[^A-Za-z0-9._-]+", "-", pipeline).strip(".-")

    def report_dir(self, series: str) -> Path:
        """Tell where the report of a series goes."""
        return self.folder / "reports" / series

    def append(self, records: Iterable[RunRecord]) -> list[RunRecord]:
        """Add runs. Safe to repeat: what is there already is not added again.

        Args:
            records: The runs.

        Returns:
            Those that were new.
        """
        with self._locked():
            known = {record.identity for record in self.records()}
            new = [record for record in records if record.identity not in known]
            self._write(_RECORDS, new)
        return new

    def records(self) -> list[RunRecord]:
        """Read all runs, oldest first.

        Raises:
            LedgerError: A line is damaged.
        """
        return list(self._read(_RECORDS, RunRecord))

    def runs(self, records: Iterable[RunRecord]) -> dict[str, Path]:
        """Find the outputs of runs that succeeded.

        Args:
            records: Runs.

        Returns:
            Folders by name of the run.
        """
        return {
            record.name: self.folder / record.folder
            for record in records
            if record.succeeded and record.folder is not None and (self.folder / record.folder).is_dir()
        }

    def report(
        self,
        series: str,
        *,
        title: str = "Repeatability experiment",
        baseline: str | None = None,
        rules: Rules | None = None,
        level: float = 0.05,
        baseline_pipeline: str | None = None,
        variability: Variability | None = None,
        unit: Literal["run", "series"] = "run",
        baseline_series: int = 1,
    ) -> Report:
        """Compare the runs of a series with each other, with the baseline, and with all series since.

        Args:
            series: The series.
            title: Title of the report.
            baseline: Series of the reference runs, or a folder whose sub-folders are reference runs. When None, the
                first series of the same pipeline with the same settings and inputs and at least three good runs.
            rules: What is compared and how.
            level: Probability of a false alarm, for each judgement.
            baseline_pipeline: Pipeline whose perturbed runs are the references, instead of a baseline: the others are
                asked whether they are inside its numerical variability.
            variability: How they are judged by it.
            unit: What is exchanged: single runs, or whole series because the platform varies from week to week.
            baseline_series: How many series the baseline holds, the first of them as above. Those that belong to it
                are not judged.

        Returns:
            The report.

        Raises:
            ConfigurationError: Whole series are to be exchanged, and the baseline is to hold only one; or the series or
                the baseline does not exist, or the mask.
            LedgerError: A line of the experiment folder is damaged.
        """
        if unit == "series" and baseline_series < 2:
            raise ConfigurationError("When whole series are exchanged, the baseline must hold several; two at least.")
        how = _How(rules or Rules(), level, unit)
        rules = how.rules
        records = self.records()
        present = [record for record in records if record.series == series]
        if not present:
            raise ConfigurationError(f"{self.folder} has no series {series!r}.")
        parts: list[PipelineReport] = []
        pipelines = list(dict.fromkeys(record.pipeline for record in present))
        for pipeline in pipelines:
            mine = [record for record in present if record.pipeline == pipeline]
            runs = self.runs(mine)
            comparison = compare_runs(
                runs, rules=rules, failed=[record.name for record in mine if record.name not in runs]
            )
            part = PipelineReport(pipeline=pipeline, comparison=comparison)
            if baseline_pipeline is not None:
                if pipeline != baseline_pipeline:
                    name, references = self.perturbed(mine[0], baseline_pipeline)
                    judgement = judge_variability(references, runs, rules=rules, level=level, variability=variability)
                    part = part.model_copy(
                        update={"baseline": f"{baseline_pipeline}, {name}", "against_baseline": judgement}
                    )
                parts.append(part)
                continue
            base = self._baseline(records, mine[0], baseline, baseline_series)
            if base is not None and series not in base.series:
                timeline, evidence = _watched(list(self._timeline(records, mine[0], base, how)), level)
                part = part.model_copy(
                    update={
                        "baseline": base.name,
                        "against_baseline": timeline[-1].judgement,
                        "timeline": tuple(timeline),
                        "evidence": evidence,
                    }
                )
            if pipeline != pipelines[0]:
                first = self.runs(record for record in present if record.pipeline == pipelines[0])
                part = part.model_copy(update={"against_version": judge_runs(first, runs, rules=rules, level=level)})
            parts.append(part)
        return Report(
            title=title,
            series=series,
            created=datetime.now(UTC),
            level=level,
            pipelines=tuple(parts),
            runs=tuple(_summary(record) for record in present),
        )

    def perturbed(self, run: RunRecord, pipeline: str, *, before: str | None = None) -> tuple[str, dict[str, Path]]:
        """Find runs of a perturbed pipeline with the same settings and inputs as a run.

        Args:
            run: The run.
            pipeline: The perturbed pipeline.
            before: Only series that began before this one; all when None.

        Returns:
            Name of the series with the most good runs, the oldest of those, and its runs; no name when there is none.

        Raises:
            LedgerError: A line of the experiment folder is damaged.
        """
        found: tuple[str, dict[str, Path]] = ("", {})
        records = [r for r in self.records() if r.pipeline == pipeline and r.conditions == run.conditions]
        for name in dict.fromkeys(record.series for record in records if before is None or record.series < before):
            runs = self.runs(record for record in records if record.series == name)
            found = (name, runs) if len(runs) > len(found[1]) else found
        return found

    def _baseline(self, records: list[RunRecord], run: RunRecord, baseline: str | None, count: int) -> _Baseline | None:
        """The series by which a run is judged; None while there are not enough."""
        if baseline is not None and Path(baseline).expanduser().is_absolute():
            return _folder_baseline(Path(baseline).expanduser(), count)
        first = baseline or self._first_good(records, run)
        if first is None:
            return None
        chosen = [r for r in records if r.series == first and r.pipeline == run.pipeline]
        if baseline is not None and not chosen:
            # A new version is judged by the baseline of the old one.
            chosen = [
                r for r in records if r.series == first and r.pipeline.split("/")[0] == run.pipeline.split("/")[0]
            ]
        if not chosen:
            raise ConfigurationError(
                f"The baseline {baseline!r} of {self.folder} has no runs of {run.pipeline}. Name a series that has, or "
                "the absolute path of a folder whose sub-folders are reference runs."
            )
        pipeline, conditions = chosen[0].pipeline, chosen[0].conditions
        order = list(dict.fromkeys(r.series for r in records))
        later = [
            r
            for r in records
            if order.index(r.series) > order.index(first) and (r.pipeline, r.conditions) == (pipeline, conditions)
        ]
        found: dict[str, dict[str, Path]] = {}
        for name in dict.fromkeys(r.series for r in [*chosen, *later]):
            runs = self.runs(r for r in [*chosen, *later] if r.series == name)
            if name == first or len(runs) >= LEAST_REFERENCES:
                found[name] = runs
            if len(found) == count:
                return _Baseline.of(found)
        return None

    def _first_good(self, records: list[RunRecord], run: RunRecord) -> str | None:
        for name in dict.fromkeys(r.series for r in records):
            chosen = [
                r for r in records if r.series == name and r.pipeline == run.pipeline and r.conditions == run.conditions
            ]
            if len(self.runs(chosen)) >= LEAST_REFERENCES:
                return name
        return None

    def _timeline(
        self, records: list[RunRecord], run: RunRecord, base: _Baseline, how: _How
    ) -> Iterator[SeriesSummary]:
        known = {
            (line.series, line.pipeline): line.judgement
            for line in self._read(_JUDGEMENTS, _JudgementRecord)
            if (line.baseline, line.level, line.rules, line.method)
            == (base.name, how.level, how.rules.model_dump_json(), how.method)
        }
        of_pipeline = [
            r
            for r in records
            if r.pipeline == run.pipeline and (r.conditions == run.conditions or r.series in base.series)
        ]
        for series in dict.fromkeys(r.series for r in of_pipeline):
            mine = [r for r in of_pipeline if r.series == series]
            judgement = None if series in base.series else known.get((series, run.pipeline))
            if series not in base.series and judgement is None:
                judgement = how.judge(base, series, self.runs(mine))
                line = _JudgementRecord(
                    series=series,
                    pipeline=run.pipeline,
                    baseline=base.name,
                    level=how.level,
                    rules=how.rules.model_dump_json(),
                    method=how.method,
                    judgement=judgement,
                )
                with self._locked():
                    self._write(_JUDGEMENTS, [line])
            yield SeriesSummary(series=series, pipeline=run.pipeline, began=mine[0].began, judgement=judgement)
            if series == run.series:
                return

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=_LOCK_SECONDS):
                yield
        except Timeout:
            raise LedgerError(
                f"{self.folder} is locked by another process for more than {_LOCK_SECONDS:.0f} s. Wait for it, or stop "
                "it, and run this again."
            ) from None

    def _write(self, name: str, lines: Iterable[BaseModel]) -> None:
        content = b"".join(line.model_dump_json().encode() + b"\n" for line in lines)
        if not content:
            return
        with (self.folder / name).open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
                logger.warning("%s: half a line of %d bytes was cut off", self.folder / name, end - whole)
                file.truncate(whole)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, name: str, kind: type[Line]) -> Iterator[Line]:
        path = self.folder / name
        if not path.is_file():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    logger.warning("%s ends with half a line, which was never finished; it is left out", path)
                    return
                try:
                    yield kind.model_validate_json(line)
                except ValidationError as error:
                    if _is_of_a_later_version(line):
                        raise LedgerError(
                            f"{path}, line {number} was written by a later version of prefect-biomed. Update the "
                            "package on this machine. The file was left as it is."
                        ) from None
                    raise LedgerError(
                        f"{path}, line {number} is damaged ({error.error_count()} problems). It was left as it is. "
                        "Restore the file, or remove that line."
                    ) from None


def _is_of_a_later_version(line: bytes) -> bool:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and is_later_version(content.get("version"), _VERSION)


def _watched(timeline: list[SeriesSummary], level: float) -> tuple[list[SeriesSummary], Evidence | None]:
    """Add the evidence of a lasting change to each series, and sum it up."""
    monitor = Monitor(level)
    watched, judged = [], []
    for summary in timeline:
        judgement = summary.judgement
        # A series without a single good run shows nothing.
        if judgement is not None and not judgement.note:
            shown = Shown(summary.series, judgement.p, judgement.smallest_p, judgement.size)
            summary = summary.model_copy(update={"evidence": monitor.add(shown)})
            judged.append(summary.began)
        watched.append(summary)
    if not judged:
        return watched, None
    found = {}
    if monitor.alarm is not None:
        since, earliest, latest = monitor.start()
        found = {
            "alarm": judged[monitor.alarm],
            "since": judged[since],
            "earliest": judged[earliest],
            "latest": judged[latest],
        }
    return watched, Evidence(value=monitor.evidence[-1], threshold=monitor.threshold, **found)


def _summary(record: RunRecord) -> RunSummary:
    return RunSummary(
        name=record.name,
        pipeline=record.pipeline,
        repetition=record.repetition,
        execution=record.execution,
        status=record.status,
        succeeded=record.succeeded,
        url=record.url,
        started=record.started,
        ended=record.recorded,
        message=record.message,
    )
