"""Flows that tell how repeatable results are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.states import Completed
from pydantic import Field

from prefect_biomed.analysis import Experiment, Report, Rules
from prefect_biomed.analysis.models import PipelineReport
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError, JobFailed
from prefect_biomed.clients.vip import VipSession, Workflow
from prefect_biomed.clients.vip.session_file import VIP_HOME
from prefect_biomed.flows.vip import RefreshTime, SessionName, Settings, Timeout, kill_remote_workflows
from prefect_biomed.tasks import repeatability as experiments
from prefect_biomed.tasks import vip as steps

__all__ = ["compare_folders", "repeatability_experiment"]

Repetitions = Annotated[int, Field(ge=1, le=100, title="Repetitions")]
Level = Annotated[float, Field(gt=0, lt=0.5, title="Level")]


@flow(name="repeatability-experiment", on_cancellation=[kill_remote_workflows])
def repeatability_experiment(
    credentials: VipCredentials,
    pipelines: Annotated[list[str], Field(min_length=1)],
    input_settings: Settings,
    experiment_dir: Path,
    input_dir: Path | None = None,
    repetitions: Repetitions = 5,
    baseline: str | None = None,
    title: str = "Repeatability experiment",
    level: Level = 0.05,
    rules: Rules = Rules(),  # noqa: B008  # frozen, and so the form shows the defaults
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    session_name: SessionName | None = None,
    refresh_time: RefreshTime = 30.0,
    timeout_seconds: Timeout | None = None,
    queue_timeout_seconds: Timeout | None = None,
    finish: bool = True,
    cancel_remote: bool = False,
    vip_home: str = VIP_HOME,
) -> Report:
    """Run pipelines several times on the same input and tell what differs, and whether it differs more than before.

    One upload is shared by all runs. A retry of the same flow run takes up where it stopped and launches nothing twice.
    The state it ends with says `within the numerical noise …` or `changed: …`.

    Args:
        credentials: The account.
        pipelines: Pipelines to run, `Application/version`. Two versions of one are compared with each other, too.
        input_settings: Values of the pipelines' parameters, the same for all. Files are named relative to `input_dir`,
            or by their path on the platform.
        experiment_dir: Folder in which everything is kept, week after week. An absolute path.
        input_dir: Local folder of input files; empty when all inputs are on the platform.
        repetitions: How often each pipeline is run.
        baseline: Series that later ones are judged by: the name of one, or an absolute path of a folder whose
            sub-folders are reference runs. When empty, the first with the same settings and inputs and at least three
            runs that succeeded.
        title: Title of the report. Reports of one title are versions of one artifact.
        level: Probability of a false alarm of each judgement.
        rules: What is left out of the comparison, and tolerances by pattern of file names.
        include: Patterns of files to upload, relative to `input_dir`; all when empty.
        exclude: Patterns of files not to upload.
        session_name: Name of the session that owns the inputs; made up when empty.
        refresh_time: Seconds between two looks at the runs.
        timeout_seconds: Stop waiting for the runs after this time; they go on.
        queue_timeout_seconds: Stop waiting for capacity after this time.
        finish: Whether the folders on the platform are removed at the end.
        cancel_remote: Whether cancelling this flow run kills what it has launched.
        vip_home: Folder on the platform that holds the folders of sessions.

    Returns:
        What is reported; the files are in `reports/<series>` of the experiment folder.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        JobFailed: No run succeeded. The failed runs are written down and reported.
        DeadlineExceeded: The runs have not ended in time; a retry of this flow run goes on waiting.
    """
    owner = steps.new_session(
        input_dir=input_dir, output_dir=experiment_dir, session_name=session_name, vip_home=vip_home
    )
    experiment = Experiment(owner.output_dir)
    series = experiment.open_series(owner.token)
    sessions = [
        owner.model_copy(
            update={
                "session_name": f"{owner.session_name}-{number}",
                "pipeline_id": pipeline,
                "input_settings": input_settings,
                "nb_runs": repetitions,
                "output_dir": experiment.output_dir(series, pipeline),
                "vip_output_dir": f"{vip_home}/{owner.session_name}-{number}/OUTPUTS",
            }
        )
        for number, pipeline in enumerate(dict.fromkeys(pipelines), start=1)
    ]
    owner = owner.model_copy(update={"output_dir": experiment.folder / "series" / series})
    steps.check_sessions(credentials, sessions, include=include, exclude=exclude)
    if input_dir is not None:
        steps.upload_inputs(credentials, owner, include=include, exclude=exclude)
        sessions = [steps.get_inputs(credentials, session, owner) for session in sessions]
    # Repetition by repetition, so that what changes on the platform meanwhile hits all pipelines alike.
    launched: dict[str, list[Workflow]] = {session.session_name: [] for session in sessions}
    for repetition in range(1, repetitions + 1):
        for session in sessions:
            launched[session.session_name].append(
                steps.launch_pipeline(credentials, session, repetition, queue_timeout_seconds=queue_timeout_seconds)
            )
    for session in sessions:
        _collect(
            credentials,
            session,
            launched[session.session_name],
            experiment=experiment,
            series=series,
            rules=rules,
            refresh_time=refresh_time,
            timeout_seconds=timeout_seconds,
            finish=finish,
        )
    if finish and input_dir is not None:
        steps.finish(credentials, owner)
    report = experiments.assess_series(experiment.folder, series, title, baseline, rules, level)
    records = [record for record in experiment.records() if record.series == series]
    runs = {
        session.pipeline_id or "": experiment.runs(r for r in records if r.pipeline == session.pipeline_id)
        for session in sessions
    }
    experiments.write_report(report, experiment.report_dir(series), runs, rules)
    if not any(record.succeeded for record in records):
        raise JobFailed(
            f"None of the {len(records)} runs of series {series} succeeded: {records[0].message}. They are written "
            f"down in {experiment.folder}; start a new flow run when the cause is mended."
        )
    return _ended(report)


@flow(name="compare-folders")
def compare_folders(
    runs_dir: Path,
    output_dir: Path,
    baseline_dir: Path | None = None,
    title: str = "Comparison of runs",
    level: Level = 0.05,
    rules: Rules = Rules(),  # noqa: B008  # frozen, and so the form shows the defaults
) -> Report:
    """Compare runs that were made elsewhere, and judge them by reference runs when there are some.

    Args:
        runs_dir: Folder whose sub-folders hold one run each.
        output_dir: Folder of the report.
        baseline_dir: Folder whose sub-folders hold one reference run each; at least three of them.
        title: Title of the report.
        level: Probability of a false alarm of the judgement.
        rules: What is left out of the comparison, and tolerances by pattern of file names.

    Returns:
        What is reported.

    Raises:
        ConfigurationError: A folder does not exist or has no sub-folders.
    """
    runs = _sub_folders(runs_dir)
    comparison = experiments.compare_runs(runs, rules)
    part = PipelineReport(pipeline=runs_dir.name, comparison=comparison)
    if baseline_dir is not None:
        judgement = experiments.judge_runs(_sub_folders(baseline_dir), runs, rules, level)
        part = part.model_copy(update={"baseline": str(baseline_dir), "against_baseline": judgement})
    now = datetime.now(UTC)
    report = Report(title=title, series=runs_dir.name, created=now, level=level, pipelines=(part,))
    experiments.write_report(report, output_dir.expanduser().absolute(), {part.pipeline: runs}, rules)
    return _ended(report)


def _collect(
    credentials: VipCredentials,
    session: VipSession,
    launched: Sequence[Workflow],
    *,
    experiment: Experiment,
    series: str,
    rules: Rules,
    refresh_time: float,
    timeout_seconds: float | None,
    finish: bool,
) -> None:
    """Wait for the runs of one pipeline, fetch what succeeded, write down everything, leave nothing behind."""
    ids = [workflow.identifier for workflow in launched]
    workflows = steps.monitor_workflows(
        credentials,
        session,
        workflow_ids=ids,
        refresh_time=refresh_time,
        timeout_seconds=timeout_seconds,
        raise_on_failure=False,
    )
    # Archives stay packed: they are evidence, and the comparison looks into them.
    downloaded = steps.download_outputs(credentials, session, workflow_ids=ids, unzip=False)
    experiments.record_runs(experiment.folder, series, session, workflows, downloaded, credentials.url, rules)
    if finish:
        steps.finish(credentials, session)


def _sub_folders(folder: Path) -> dict[str, Path]:
    folder = folder.expanduser().absolute()
    found = {path.name: path for path in sorted(folder.glob("*")) if path.is_dir() and not path.name.startswith(".")}
    if not found:
        raise ConfigurationError(f"{folder} has no sub-folders. Each is to be one run.")
    return found


def _ended(report: Report) -> Report:
    """End the flow with what was found as the message of its state; Prefect hands the report in it to callers."""
    judged = [part for part in report.pipelines if part.against_baseline is not None]
    sentences = [f"{part.pipeline} {part.against_baseline.sentence}" for part in judged if part.against_baseline]
    return Completed(  # type: ignore[return-value]  # Prefect takes a state for the result it holds
        message=". ".join(sentences or [f"{part.pipeline}: {part.comparison.sentence}" for part in report.pipelines]),
        data=report,
    )
