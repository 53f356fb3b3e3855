"""Tasks of repeatability experiments: write down what was run, compare it, report it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prefect import runtime, task

from prefect_biomed import analysis
from prefect_biomed.analysis import Comparison, Judgement, Report, Rules, Variability
from prefect_biomed.analysis.models import Baseline, PipelineReport, ReportFiles
from prefect_biomed.clients.texts import inline_code
from prefect_biomed.clients.vip import DownloadSummary, VipSession, Workflow
from prefect_biomed.tasks._reporting import artifact_key, event, image, markdown, run_logger
from prefect_biomed.tasks.policies import RETRY
from prefect_biomed.tasks.run_names import task_run_named

if TYPE_CHECKING:
    from prefect_biomed.analysis import RunRecord

__all__ = ["assess_series", "compare_runs", "judge_runs", "record_runs", "write_report"]

_MAX_IMAGE_BYTES = 512 * 1024


@task(task_run_name=task_run_named("Compare runs"), **RETRY)
def compare_runs(
    runs: dict[str, Path] | list[Path], rules: Rules | None = None, failed: Sequence[str] = ()
) -> Comparison:
    """Compare the files of several runs with each other, whoever made them.

    Safe to repeat: it only reads.

    Args:
        runs: One folder for each run, by name or alone.
        rules: What is compared and how; sensible ones when None.
        failed: Names of runs that failed, to be said in the result.

    Returns:
        The comparison.

    Raises:
        ConfigurationError: A folder does not exist.
    """
    comparison = analysis.compare_runs(runs, rules=rules, failed=failed)
    run_logger().info("%s", comparison.sentence)
    return comparison


@task(task_run_name=task_run_named("Judge runs"), **RETRY)
def judge_runs(
    references: dict[str, Path] | list[Path],
    runs: dict[str, Path] | list[Path],
    rules: Rules | None = None,
    level: float = 0.05,
    unit: Literal["run", "series"] = "run",
) -> Judgement:
    """Judge new runs by the numerical noise of reference runs.

    Safe to repeat: it only reads.

    Args:
        references: Folders of the reference runs.
        runs: Folders of the new runs.
        rules: What is compared and how; sensible ones when None.
        level: Probability of calling something changed when nothing is.
        unit: What is exchanged. With `series` runs are named `<series>/<run>`.

    Returns:
        The judgement.

    Raises:
        ConfigurationError: A folder does not exist, or a series holds references and new runs.
    """
    old, new = analysis.named_runs(references), analysis.named_runs(runs)
    units = analysis.series_of(old, new) if unit == "series" else None
    judgement = analysis.judge_runs(old, new, rules=rules, level=level, units=units, unit=unit)
    run_logger().info("%s", judgement.sentence)
    return judgement


@task(task_run_name=task_run_named("Record runs", "session"), **RETRY)
def record_runs(
    experiment_dir: Path,
    series: str,
    session: VipSession,
    workflows: Sequence[Workflow],
    downloaded: DownloadSummary,
    url: str = "",
    rules: Rules | None = None,
    problems: dict[str, str] | None = None,
) -> list[RunRecord]:
    """Write down the runs of one pipeline of a series: parameters, platform answers, digests, times.

    Safe to repeat: runs that are there already are not added again.

    Args:
        experiment_dir: The experiment folder.
        series: The series.
        session: The session that ran the pipeline.
        workflows: Its executions, ended, in the order of the repetitions.
        downloaded: Their outputs.
        url: Where the executions can be looked at.
        rules: What is left out of the digests.
        problems: Why executions do not count as success, by identifier, as `outcome` says.

    Returns:
        The runs.

    Raises:
        LedgerError: The experiment folder is damaged, or locked for long.
    """
    experiment = analysis.Experiment(experiment_dir)
    now = datetime.now(UTC)
    began = min((w.start_date for w in workflows if w.start_date is not None), default=now)
    inputs = analysis.inputs_digest(session.input_dir)
    records = []
    for repetition, workflow in enumerate(workflows, start=1):
        folder = _folder_of(session, repetition, workflow, downloaded.files.get(workflow.identifier, ()))
        message = _failure(workflow, folder, (problems or {}).get(workflow.identifier))
        records.append(
            analysis.RunRecord(
                series=series,
                began=began,
                pipeline=session.pipeline_id or "",
                repetition=repetition,
                parameters=dict(session.input_settings),
                inputs=inputs,
                execution=workflow.identifier,
                status=workflow.status.value,
                succeeded=not message,
                message=message,
                answer=workflow.model_dump(mode="json"),
                folder=folder.relative_to(experiment_dir).as_posix() if folder else None,
                digests=analysis.inventory(folder, rules) if folder else {},
                started=workflow.start_date,
                recorded=now,
                url=url,
                flow_run=str(runtime.flow_run.id or ""),
            )
        )
    new = experiment.append(records)
    failed = [record for record in records if not record.succeeded]
    run_logger().info(
        "%s: %d runs written down, %d of them failed", session.pipeline_id, len(new), sum(r in failed for r in new)
    )
    return records


@task(task_run_name=task_run_named("Assess", "series"), **RETRY)
def assess_series(
    experiment_dir: Path,
    series: str,
    title: str = "Repeatability experiment",
    baseline: str | Baseline | None = None,
    rules: Rules | None = None,
    level: float = 0.05,
    baseline_pipeline: str | None = None,
    variability: Variability | None = None,
) -> Report:
    """Compare the runs of a series with each other, with the baseline, and with all series since.

    Safe to repeat: what was judged before is read again.

    Args:
        experiment_dir: The experiment folder.
        series: The series.
        title: Title of the report.
        baseline: Series of the reference runs, or an absolute folder whose sub-folders are reference runs, alone or
            with the number of series and the unit of exchange; when None the first series that fits.
        rules: What is compared and how; sensible ones when None.
        level: Probability of calling something changed when nothing is.
        baseline_pipeline: Pipeline whose perturbed runs are the references, instead of a baseline.
        variability: How runs are judged by those.

    Returns:
        What there is to report.

    Raises:
        ConfigurationError: The baseline does not exist.
        LedgerError: The experiment folder is damaged.
    """
    chosen = baseline if isinstance(baseline, Baseline) else Baseline(name=baseline)
    return analysis.Experiment(experiment_dir).report(
        series,
        title=title,
        baseline=chosen.name,
        rules=rules,
        level=level,
        baseline_pipeline=baseline_pipeline,
        variability=variability,
        unit=chosen.unit,
        baseline_series=chosen.series,
    )


@task(task_run_name=task_run_named("Write report", "folder"), **RETRY)
def write_report(
    report: Report,
    folder: Path,
    runs: dict[str, dict[str, Path]] | None = None,
    rules: Rules | None = None,
    references: dict[str, dict[str, Path]] | None = None,
) -> ReportFiles:
    """Write a report as HTML, Markdown, JSON and PNG, leave its short form as artifacts, and announce what was found.

    Emits `biomed.repeatability.within`, `.changed` or `.not_judged` for each pipeline that was judged, and
    `biomed.repeatability.drift`. Safe to repeat: files appear whole and replace older ones. A repetition announces them
    again.

    Args:
        report: What to say.
        folder: Where to write.
        runs: Folders of the runs by pipeline and name, for maps of significant digits.
        rules: The rules of the comparison.
        references: Folders of the runs of the baselines, likewise, for maps of where images have changed.

    Returns:
        The files.
    """
    files = analysis.write_report(report, folder, runs=runs, references=references, rules=rules)
    key = artifact_key("repeatability", report.title)
    markdown(key, f"{files.markdown.read_text()}\n\nThe whole report: {inline_code(files.html)}\n", report.title)
    for path in files.images:
        content = path.read_bytes()
        if len(content) <= _MAX_IMAGE_BYTES:
            image(artifact_key(key, path.stem), content, f"{report.title}, {path.stem}")
    logger = run_logger()
    for sentence in report.sentences:
        logger.info("%s", sentence)
    logger.info("The report is %s", files.html)
    for part in report.pipelines:
        _announce(report, part, files)
    return files


def _announce(report: Report, part: PipelineReport, files: ReportFiles) -> None:
    """Emit the outcome of a pipeline, and its drift."""
    judgement = part.against_baseline
    if judgement is None:
        return
    names = [judgement.outcome.name.lower(), *(["drift"] if part in report.drifted else [])]
    for name in names:
        event(
            f"biomed.repeatability.{name}",
            f"repeatability.{artifact_key(report.title, part.pipeline)}",
            pipeline=part.pipeline,
            series=report.series,
            baseline=part.baseline,
            sentence=judgement.sentence,
            changed_files=list(judgement.changed_files),
            not_judged_files=judgement.not_judged_files,
            evidence=part.evidence.value if part.evidence else None,
            since=part.evidence.since.isoformat() if part.evidence and part.evidence.since else None,
            report=str(files.html),
        )


def _folder_of(session: VipSession, repetition: int, workflow: Workflow, files: Sequence[Path]) -> Path | None:
    """Folder of a run's outputs, below the folder that the platform names after the time of the launch."""
    if not files:
        return None
    folder = session.output_dir / Path(session.run_dir(repetition)).name
    if not folder.is_dir():
        folder = session.output_dir / workflow.identifier
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _failure(workflow: Workflow, folder: Path | None, problem: str | None) -> str:
    codes = "; ".join(
        f"job {job.id}: {job.exit_message or job.status.value}, exit code {job.exit_code}"
        for job in (*workflow.failed_jobs, *workflow.open_jobs)[:3]
    )
    if problem is None:
        # Nobody has judged it, so only what succeeded altogether counts.
        problem = "" if workflow.status.is_success and not codes else workflow.status.value
    if problem:
        return f"{problem} {codes}".strip()
    return "" if folder else "it left no outputs"
