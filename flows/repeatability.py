"""Flows that tell how repeatable results are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prefect.states import Completed
from pydantic import Field

from prefect_biomed import analysis
from prefect_biomed.analysis import Outcome, Report, Rules, Variability
from prefect_biomed.analysis.models import Baseline, PipelineReport
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import JobFailed
from prefect_biomed.clients.vip import SessionOptions, VipSession, judge
from prefect_biomed.clients.vip.bids import answers, questions
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.parameters import CancellableWaiting, Group, RefreshTime
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.flows.vip import PipelineRun, finish_session, kill_remote_workflows, session_on_inputs_of
from prefect_biomed.flows.vip_parameters import Outputs, Removal, SessionName, SessionUpload, Settings, Upload
from prefect_biomed.tasks import repeatability as experiments
from prefect_biomed.tasks import vip as steps
from prefect_biomed.tasks.run_names import flow_run_named

if TYPE_CHECKING:
    from prefect_biomed.analysis import Experiment

__all__ = ["Assessment", "compare_folders", "owner_of", "perturbed_to_run", "repeatability_experiment", "sessions_of"]

Repetitions = Annotated[int, Field(ge=1, le=100, title="Repetitions")]


class Assessment(Group):
    """How runs are compared, judged and reported."""

    title: str | None = Field(default=None, title="Title of the report")
    """Title of the report; one that says what the flow does when empty. Reports of one title are versions of one
    artifact."""
    level: float = Field(default=0.05, gt=0, lt=0.5, title="Probability of a false alarm")
    """Probability of a false alarm of each judgement."""
    unit: Literal["run", "series"] = Field(default="run", title="What is exchanged")
    """What is exchanged: single runs, or whole `series` where the platform itself varies from week to week. Then the
    baseline must hold several series."""
    baseline_series: int = Field(default=1, ge=1, le=100, title="Series of the baseline")
    """How many series the baseline holds. With one series as the unit of exchange it takes 19 to judge a single week at
    a level of 5 %; fewer leave the weeks to the evidence since the baseline."""
    rules: Rules = Field(default=Rules(), title="Rules of the comparison")
    """What is left out of the comparison, and tolerances by pattern of file names."""
    variability: Variability = Field(default=Variability(), title="Checks of perturbed references")
    """How runs are judged by a `baseline_pipeline`: mask, smoothing, normality, left-out references."""


@checked_flow(
    name="repeatability-experiment",
    needs=analysis.require_extra,
    flow_run_name=flow_run_named("session_name", "pipelines"),
    on_cancellation=[kill_remote_workflows],
)
def repeatability_experiment(
    credentials: VipCredentials,
    pipelines: Annotated[list[str], Field(min_length=1)],
    input_settings: Settings,
    experiment_dir: Path,
    input_dir: Path | None = None,
    repetitions: Repetitions = 5,
    baseline: str | None = None,
    baseline_pipeline: str | None = None,
    session_name: SessionName | None = None,
    refresh_time: RefreshTime = 30.0,
    upload: Upload | None = None,
    outputs: Outputs | None = None,
    removal: Removal | None = None,
    waiting: CancellableWaiting | None = None,
    assessment: Assessment | None = None,
) -> Report:
    """Run pipelines several times on the same input and tell what differs, and whether it differs more than before.

    One upload is shared by all runs. A retry of the same flow run takes up where it stopped and launches nothing twice.
    The state it ends with says `within the numerical noise …`, `changed: …` or `not judged: …`; of the latter two it is
    named `Changed` and `NotJudged`.

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
        baseline_pipeline: Pipeline that perturbs its arithmetic on purpose (a fuzzy one). Its runs are the references
            instead of a baseline, and the others are asked whether they are inside its numerical variability. It is run
            as often as they are, unless an earlier series has runs of it with the same settings and inputs.
        session_name: Name of the session that owns the inputs; made up when empty.
        refresh_time: Seconds between two looks at the runs.
        upload: Which inputs are sent, and where to; all of `input_dir` when empty.
        outputs: Which outputs are downloaded, in which shape, and what counts as success. What is left out is so: those
            of finished runs, packed as they are, and every job has to succeed.
        removal: What is removed from the platform at the end; everything when empty.
        waiting: How long to wait for capacity and for the runs, and whether a cancellation kills them; to the end, and
            it does not, when empty.
        assessment: Title of the report, probability of a false alarm, and rules of the comparison.

    Returns:
        What is reported; the files are in `reports/<series>` of the experiment folder.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        ConfigurationError: The extra `analysis` is not installed; nothing was sent.
        JobFailed: No run succeeded. The failed runs are written down and reported.
        DeadlineExceeded: The runs have not ended in time; a retry of this flow run goes on waiting.
    """
    upload, waiting = upload or Upload(), waiting or CancellableWaiting()
    owner = owner_of(
        input_dir=input_dir,
        output_dir=experiment_dir,
        session_name=session_name,
        upload=upload,
        outputs=outputs,
        removal=removal,
    )
    experiment = analysis.Experiment(owner.output_dir)
    series = experiment.open_series(owner.token)
    pipelines = [*pipelines, *perturbed_to_run(experiment, series, baseline_pipeline, input_settings, input_dir)]
    owner, sessions = sessions_of(owner, pipelines, input_settings, repetitions, experiment, series)
    steps.check_sessions(credentials, sessions, include=upload.include, exclude=upload.exclude)
    sessions = _upload_for_all(credentials, owner, sessions, upload)
    launched = _launch_in_turn(credentials, sessions, repetitions, waiting)
    for session in sessions:
        _collect(credentials, session, launched, experiment, series, assessment, refresh_time, waiting.timeout_seconds)
        finish_session(credentials, session)
    if input_dir is not None:
        finish_session(credentials, owner)
    return _report(experiment, series, sessions, baseline, baseline_pipeline, assessment)


@checked_flow(name="compare-folders", needs=analysis.require_extra, flow_run_name=flow_run_named("runs_dir"))
def compare_folders(
    runs_dir: Path, output_dir: Path, baseline_dir: Path | None = None, assessment: Assessment | None = None
) -> Report:
    """Compare runs that were made elsewhere, and judge them by reference runs when there are some.

    Args:
        runs_dir: Folder whose sub-folders hold one run each; one series each, with the runs in it, when whole series
            are exchanged.
        output_dir: Folder of the report.
        baseline_dir: Folder whose sub-folders hold one reference run each, or one series each.
        assessment: Title of the report, probability of a false alarm, unit of exchange, and rules of the comparison.

    Returns:
        What is reported.

    Raises:
        ConfigurationError: A folder does not exist or has no sub-folders.
    """
    assessment = assessment or Assessment()
    below = analysis.series_below if assessment.unit == "series" else analysis.runs_below
    runs = below(runs_dir)
    part = PipelineReport(pipeline=runs_dir.name, comparison=experiments.compare_runs(runs, assessment.rules))
    if baseline_dir is not None:
        references = below(baseline_dir)
        judgement = experiments.judge_runs(references, runs, assessment.rules, assessment.level, assessment.unit)
        part = part.model_copy(update={"baseline": str(baseline_dir), "against_baseline": judgement})
    report = Report(
        title=assessment.title or "Comparison of runs",
        series=runs_dir.name,
        created=datetime.now(UTC),
        level=assessment.level,
        pipelines=(part,),
    )
    baseline = {part.pipeline: below(baseline_dir)} if baseline_dir is not None else None
    target = output_dir.expanduser().absolute()
    experiments.write_report(report, target, {part.pipeline: runs}, assessment.rules, baseline)
    return _ended(report)


def owner_of(*, upload: Upload, **given: Any) -> VipSession:
    """Describe the session that owns the inputs of an experiment. Nothing is sent.

    Args:
        upload: Where inputs go.
        **given: As for `new_session`.

    Returns:
        The session.
    """
    # Every job counts; archives stay packed: they are evidence, and the comparison looks into them.
    options = SessionOptions(unzip=False, strict=True)
    return new_session(upload=SessionUpload(**upload.model_dump()), options=options, **given)


def perturbed_to_run(
    experiment: Experiment, series: str, pipeline: str | None, input_settings: Settings, input_dir: Path | None
) -> list[str]:
    """Tell whether the perturbed pipeline is to be run.

    Args:
        experiment: The experiment.
        series: The series that is made.
        pipeline: The perturbed pipeline; None for none.
        input_settings: Values of its parameters.
        input_dir: Local folder of the input files.

    Returns:
        The pipeline, unless an earlier series has enough runs of it; a retry finds the same.
    """
    if pipeline is None:
        return []
    now = datetime.now(UTC)
    asked = questions(input_settings, input_dir)
    files = answers(asked, input_dir) if asked else {}
    run = analysis.RunRecord(
        series=series,
        began=now,
        recorded=now,
        pipeline=pipeline,
        repetition=1,
        parameters={**input_settings, **files},
        inputs=analysis.inputs_digest(input_dir),
    )
    known = experiment.perturbed(run, pipeline, before=series)[1]
    return [] if len(known) >= analysis.LEAST_REFERENCES else [pipeline]


def _baselines(experiment: Experiment, report: Report) -> dict[str, dict[str, Path]]:
    """Folders of the runs that each pipeline was judged by."""
    records = experiment.records()
    return {
        part.pipeline: experiment.runs(r for r in records if (r.series, r.pipeline) == (part.baseline, part.pipeline))
        for part in report.pipelines
        if part.baseline
    }


def sessions_of(
    owner: VipSession,
    pipelines: Sequence[str],
    input_settings: Settings,
    repetitions: int,
    experiment: Experiment,
    series: str,
) -> tuple[VipSession, list[VipSession]]:
    """Describe the sessions of a series. Nothing is sent.

    Args:
        owner: The session that owns the inputs.
        pipelines: What is run.
        input_settings: Values of the parameters.
        repetitions: How often each is run.
        experiment: The experiment.
        series: The series.

    Returns:
        The owner with its folder, and one session for each pipeline.
    """
    runs = [
        PipelineRun(pipeline_id=pipeline, input_settings=input_settings, nb_runs=repetitions)
        for pipeline in dict.fromkeys(pipelines)
    ]
    sessions = [
        session_on_inputs_of(owner, number, run, experiment.output_dir(series, run.pipeline_id))
        for number, run in enumerate(runs, start=1)
    ]
    return owner.model_copy(update={"output_dir": experiment.folder / "series" / series}), sessions


def _upload_for_all(
    credentials: VipCredentials, owner: VipSession, sessions: Sequence[VipSession], upload: Upload
) -> list[VipSession]:
    if owner.input_dir is None:
        return list(sessions)
    steps.upload_inputs(
        credentials, owner, include=upload.include, exclude=upload.exclude, update_files=upload.update_files
    )
    return [steps.get_inputs(credentials, session, owner) for session in sessions]


def _launch_in_turn(
    credentials: VipCredentials, sessions: Sequence[VipSession], repetitions: int, waiting: CancellableWaiting
) -> dict[str, list[str]]:
    """Launch repetition by repetition, so that what changes on the platform meanwhile hits all pipelines alike."""
    launched: dict[str, list[str]] = {session.session_name: [] for session in sessions}
    for repetition in range(1, repetitions + 1):
        for session in sessions:
            workflow = steps.launch_pipeline(
                credentials, session, repetition, queue_timeout_seconds=waiting.queue_timeout_seconds
            )
            launched[session.session_name].append(workflow.identifier)
    return launched


def _collect(
    credentials: VipCredentials,
    session: VipSession,
    launched: Mapping[str, list[str]],
    experiment: Experiment,
    series: str,
    assessment: Assessment | None,
    refresh_time: float,
    timeout_seconds: float | None,
) -> None:
    """Wait for the runs of one pipeline, fetch what succeeded, write down everything."""
    rules = (assessment or Assessment()).rules
    workflow_ids = launched[session.session_name]
    workflows = steps.monitor_workflows(
        credentials,
        session,
        workflow_ids=workflow_ids,
        refresh_time=refresh_time,
        timeout_seconds=timeout_seconds,
        raise_on_failure=False,
    )
    downloaded = steps.download_outputs(credentials, session, workflow_ids=workflow_ids)
    with credentials.get_client() as client:
        outcomes = judge(client, session, workflows, fetched=True)
    problems = {one.workflow.identifier: "; ".join(one.problems) for one in outcomes}
    experiments.record_runs(experiment.folder, series, session, workflows, downloaded, credentials.url, rules, problems)


def _report(
    experiment: Experiment,
    series: str,
    sessions: Sequence[VipSession],
    baseline: str | None,
    baseline_pipeline: str | None,
    assessment: Assessment | None,
) -> Report:
    """Assess the series and write its report, also when no run has succeeded."""
    assessment = assessment or Assessment()
    title = assessment.title or "Repeatability experiment"
    report = experiments.assess_series(
        experiment.folder,
        series,
        title,
        Baseline(name=baseline, series=assessment.baseline_series, unit=assessment.unit),
        assessment.rules,
        assessment.level,
        baseline_pipeline,
        assessment.variability,
    )
    records = [record for record in experiment.records() if record.series == series]
    runs = {
        session.pipeline_id or "": experiment.runs(r for r in records if r.pipeline == session.pipeline_id)
        for session in sessions
    }
    experiments.write_report(
        report, experiment.report_dir(series), runs, assessment.rules, _baselines(experiment, report)
    )
    if not any(record.succeeded for record in records):
        raise JobFailed(
            f"None of the {len(records)} runs of series {series} succeeded: {records[0].message}. They are written "
            f"down in {experiment.folder}; start a new flow run when the cause is mended."
        )
    return _ended(report)


_STATES = {Outcome.WITHIN: "Completed", Outcome.CHANGED: "Changed", Outcome.NOT_JUDGED: "NotJudged"}


def _ended(report: Report) -> Report:
    """End the flow with what was found as the message of its state; Prefect hands the report in it to callers.

    The name of the state is that of the worst outcome: `Changed`, `NotJudged` or `Completed`.
    """
    judged = {part.pipeline: part.against_baseline for part in report.pipelines if part.against_baseline is not None}
    sentences = [
        ". ".join(
            [f"{part.pipeline} {part.against_baseline.sentence}", *([part.evidence.sentence] if part.evidence else [])]
        )
        for part in report.pipelines
        if part.against_baseline is not None
    ]
    outcomes = {judgement.outcome for judgement in judged.values()}
    worst = next((o for o in (Outcome.CHANGED, Outcome.NOT_JUDGED) if o in outcomes), Outcome.WITHIN)
    return Completed(  # type: ignore[return-value]  # Prefect takes a state for the result it holds
        name=_STATES[worst],
        message=". ".join(sentences or [f"{part.pipeline}: {part.comparison.sentence}" for part in report.pipelines]),
        data=report,
    )
