"""Jobs as Prefect's own collections have them: a block that is triggered, and a run that is waited for and read.

    pipeline = VipPipeline.load("grey-matter")
    execution = pipeline.trigger()
    execution.wait_for_completion()
    result = execution.fetch_result()

They do what the flows do, with the same steps: in a flow, a retry takes up what was triggered before and launches
nothing twice. `prefect block register -m prefect_biomed.flows.jobs` makes forms of them. The methods are synchronous;
asynchronous code calls them by `asyncio.to_thread`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from prefect.blocks.abstract import JobBlock, JobRun
from pydantic import Field, HttpUrl

from prefect_biomed.blocks._fields import KnownFields
from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.storage import StorageCredentials
from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.boss import (
    IngestConfig,
    IngestIncomplete,
    IngestJob,
    UploadReport,
    UploadSettings,
    VerifySettings,
)
from prefect_biomed.clients.vantage6 import DatabaseInput, Task
from prefect_biomed.clients.vip import SessionResult, VipSession, Workflow
from prefect_biomed.flows import boss as boss_flows
from prefect_biomed.flows import sessions as naming
from prefect_biomed.flows.boss_parameters import IngestJobWaiting
from prefect_biomed.flows.parameters import RefreshTime, Runs, Waiting
from prefect_biomed.flows.vantage6 import ANALYSIS, Analysis, collect_results, request_of
from prefect_biomed.flows.vantage6_parameters import AnalysisWaiting, FederatedOutputs, TaskDetails
from prefect_biomed.flows.vip import end_session
from prefect_biomed.flows.vip_parameters import Outputs, PipelineId, Removal, SessionName, SessionUpload, Settings
from prefect_biomed.tasks import boss as boss_steps
from prefect_biomed.tasks import vantage6 as vantage6_steps
from prefect_biomed.tasks import vip as vip_steps
from prefect_biomed.tasks.policies import intent_token

__all__ = [
    "BossIngest",
    "BossIngestRun",
    "Vantage6Algorithm",
    "Vantage6Run",
    "VipExecution",
    "VipPipeline",
]


class VipExecution(JobRun[SessionResult]):
    """Runs of a pipeline on VIP that were launched.

    Attributes:
        session: The session.
        workflows: Its runs as they were launched.

    Args:
        pipeline: What they are runs of.
        session: The session.
        workflows: Its runs.
    """

    def __init__(self, pipeline: VipPipeline, session: VipSession, workflows: list[Workflow]) -> None:
        self._pipeline = pipeline
        self.session = session
        self.workflows = tuple(workflows)

    # The engine's own type is that of an asynchronous method, which its collections do not keep to either.
    def wait_for_completion(self) -> None:  # type: ignore[override]  # Prefect types it as asynchronous
        """Wait until all runs have ended. Safe to repeat: it only reads (`GET /executions`).

        Raises:
            WorkflowFailed: Some runs failed.
            DeadlineExceeded: Not all have ended in time; they go on.
        """
        vip_steps.monitor_workflows(
            self._pipeline.credentials,
            self.session,
            workflow_ids=self._ids,
            refresh_time=self._pipeline.refresh_time,
            timeout_seconds=self._pipeline.waiting.timeout_seconds,
        )

    def fetch_result(self) -> SessionResult:  # type: ignore[override]  # Prefect types it as asynchronous
        """Wait for the end if need be, download, judge, and remove the session from the platform. Safe to repeat.

        Returns:
            The runs and the local files.

        Raises:
            WorkflowFailed: Some runs failed. What succeeded is downloaded, nothing is removed from the platform.
            DeadlineExceeded: Not all have ended in time; they go on.
        """
        return end_session(
            self._pipeline.credentials, self.session, self._ids, self._pipeline.refresh_time, self._pipeline.waiting
        )

    @property
    def _ids(self) -> list[str]:
        return [workflow.identifier for workflow in self.workflows]


class VipPipeline(KnownFields, JobBlock[SessionResult]):
    """A pipeline on VIP with its settings; the fields are the parameters of `vip_session`.

    Attributes:
        credentials: The account.
        pipeline_id: Pipeline to run, `Application/version`.
        input_settings: Values of its parameters.
        input_dir: Local folder of input files; empty when all inputs are on the platform.
        output_dir: Local folder of the outputs; `vip_outputs/<session_name>` when empty.
        session_name: Name of the session; made up when empty.
        nb_runs: How often it is run with the same settings.
        refresh_time: Seconds between two looks at the runs.
        upload: Which inputs are sent.
        outputs: Which outputs are downloaded.
        removal: What is removed at the end.
        waiting: How long to wait.

    Example:
        ```python
        from prefect_biomed.flows.jobs import VipPipeline

        execution = VipPipeline.load("BLOCK_NAME").trigger()
        execution.wait_for_completion()
        print(execution.fetch_result().files)
        ```
    """

    _block_type_name: ClassVar[str] = "VIP Pipeline"
    _block_type_slug: ClassVar[str] = "vip-pipeline"
    _logo_url: ClassVar[HttpUrl | None] = VipCredentials._logo_url
    _description: ClassVar[str] = "A pipeline on the Virtual Imaging Platform with its settings."

    credentials: VipCredentials
    pipeline_id: PipelineId
    input_settings: Settings
    input_dir: Path | None = None
    output_dir: Path | None = None
    session_name: SessionName | None = None
    nb_runs: Runs = 1
    refresh_time: RefreshTime = 30.0
    upload: SessionUpload = Field(default_factory=SessionUpload)
    outputs: Outputs = Field(default_factory=Outputs)
    removal: Removal = Field(default_factory=Removal)
    waiting: Waiting = Field(default_factory=Waiting)

    def trigger(self) -> VipExecution:  # type: ignore[override]  # Prefect types it as asynchronous
        """Check everything, upload the inputs, and launch the runs, each once and never twice.

        Returns:
            The runs.

        Raises:
            PreflightFailed: All problems found before anything was sent.
            LaunchInDoubt: It is not known whether a run was launched; a retry looks first.
        """
        session = naming.new_session(
            pipeline_id=self.pipeline_id,
            input_settings=self.input_settings,
            input_dir=self.input_dir,
            output_dir=self.output_dir,
            session_name=self.session_name,
            nb_runs=self.nb_runs,
            upload=self.upload,
            outputs=self.outputs,
            removal=self.removal,
        )
        vip_steps.upload_inputs(
            self.credentials,
            session,
            include=self.upload.include,
            exclude=self.upload.exclude,
            update_files=self.upload.update_files,
        )
        launched = [
            vip_steps.launch_pipeline(
                self.credentials, session, repetition, queue_timeout_seconds=self.waiting.queue_timeout_seconds
            )
            for repetition in range(1, session.nb_runs + 1)
        ]
        return VipExecution(self, session, launched)


class Vantage6Run(JobRun[Analysis]):
    """A task on vantage6 that was created.

    Attributes:
        task: The task as it was created.

    Args:
        algorithm: What it is a run of.
        task: The task.
    """

    def __init__(self, algorithm: Vantage6Algorithm, task: Task) -> None:
        self._algorithm = algorithm
        self.task = task

    def wait_for_completion(self) -> None:  # type: ignore[override]  # Prefect types it as asynchronous
        """Wait until every organization has ended. Safe to repeat: it only reads (`GET task`, `GET run`).

        Raises:
            TaskFailed: Runs ended without success.
            DeadlineExceeded: Not all have ended in time; they go on.
        """
        vantage6_steps.wait_for_results(
            self._algorithm.credentials,
            self.task,
            partial=self._algorithm.outputs.partial,
            timeout_seconds=self._algorithm.waiting.timeout_seconds,
            refresh_time=self._algorithm.refresh_time,
            follow_logs=self._algorithm.waiting.follow_logs,
        )

    def fetch_result(self) -> Analysis:  # type: ignore[override]  # Prefect types it as asynchronous
        """Wait for the end if need be, and fetch the results. Safe to repeat.

        Returns:
            The task, its results and its failures.

        Raises:
            TaskFailed: Runs ended without success.
            DeadlineExceeded: Not all have ended in time; they go on.
            ResultUnavailable: A result is empty, expired, cut short, a pickle, or encrypted for others.
        """
        one = self._algorithm
        return collect_results(one.credentials, self.task, one.refresh_time, one.outputs, one.waiting)


class Vantage6Algorithm(KnownFields, JobBlock[Analysis]):
    """A function of an algorithm at organizations; the fields are the parameters of `federated_analysis`.

    Attributes:
        credentials: The account.
        collaboration: Exact name or id.
        image: Docker image of the algorithm.
        method: Function to call.
        organizations: Exact names or ids; all when empty.
        arguments: Keyword arguments of the function.
        databases: What it reads.
        refresh_time: Seconds between the first looks at the task.
        details: How the task is named, what it belongs to, and what its function needs.
        outputs: Which results are enough, and where large ones go.
        waiting: How to wait for nodes and for results.

    Example:
        ```python
        from prefect_biomed.flows.jobs import Vantage6Algorithm

        run = Vantage6Algorithm.load("BLOCK_NAME").trigger()
        run.wait_for_completion()
        print(run.fetch_result().results)
        ```
    """

    _block_type_name: ClassVar[str] = "vantage6 Algorithm"
    _block_type_slug: ClassVar[str] = "vantage6-algorithm"
    _logo_url: ClassVar[HttpUrl | None] = Vantage6Credentials._logo_url
    _description: ClassVar[str] = "A function of an algorithm, at organizations of a vantage6 collaboration."

    credentials: Vantage6Credentials
    collaboration: str | int
    image: str
    method: str
    organizations: list[str | int] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    databases: DatabaseInput = None
    refresh_time: RefreshTime = 0.5
    details: TaskDetails = Field(default_factory=TaskDetails)
    outputs: FederatedOutputs = Field(default_factory=FederatedOutputs)
    waiting: AnalysisWaiting = Field(default_factory=AnalysisWaiting)

    def trigger(self) -> Vantage6Run:  # type: ignore[override]  # Prefect types it as asynchronous
        """Check everything, and create the task, once and never twice.

        Returns:
            The task.

        Raises:
            PreflightFailed: All problems found before anything was sent.
            LaunchInDoubt: It is not known whether the task was created; a retry looks first.
        """
        request = request_of(
            collaboration=self.collaboration,
            image=self.image,
            method=self.method,
            organizations=self.organizations,
            arguments=self.arguments,
            databases=self.databases,
            **self.details.model_dump(),
        )
        task = vantage6_steps.create_task(
            self.credentials,
            request,
            offline_nodes=self.waiting.offline_nodes,
            waiting_seconds=self.waiting.queue_timeout_seconds,
            token=intent_token(ANALYSIS),
        )
        return Vantage6Run(self, task)


class BossIngestRun(JobRun[UploadReport]):
    """An ingest job of the Boss that was made.

    Attributes:
        job: The job as it was made.

    Args:
        ingest: What it is a run of.
        config: What it was made with.
        job: The job.
    """

    def __init__(self, ingest: BossIngest, config: IngestConfig, job: IngestJob) -> None:
        self._ingest = ingest
        self._config = config
        self.job = job

    def wait_for_completion(self) -> None:  # type: ignore[override]  # Prefect types it as asynchronous
        """Upload the tiles, complete the job, and wait until the Boss has verified it. Safe to repeat.

        Raises:
            IngestIncomplete: Some tiles are not in the Boss. The job stays open where it can be.
            JobFailed: The job was cancelled.
            DeadlineExceeded: The Boss took longer; it goes on.
        """
        one = self._ingest
        if boss_steps.ingest_status(one.credentials, self.job.id).status.is_success:
            return
        boss_steps.wait_until_ready(one.credentials, self.job.id, one.waiting.ready_timeout_seconds)
        boss_flows.work_on_job(
            one.credentials,
            self._config,
            self.job.id,
            one.processes,
            one.upload,
            one.waiting,
            one.verification,
            one.storage,
            complete=True,
        )

    def fetch_result(self) -> UploadReport:  # type: ignore[override]  # Prefect types it as asynchronous
        """Account for every tile of the job, once it is complete. Safe to repeat: it only reads (`GET /cutout/…`).

        Returns:
            What was done, with every hole named.

        Raises:
            IngestIncomplete: The job is not complete yet, or something is not in the Boss.
        """
        one = self._ingest
        status = boss_steps.ingest_status(one.credentials, self.job.id).status
        if not status.is_success:
            raise IngestIncomplete(f"Ingest job {self.job.id} is {status.name}. Call wait_for_completion first.")
        return boss_flows.account_for_job(
            one.credentials, self._config, self.job.id, one.upload, one.verification, one.storage
        )


class BossIngest(KnownFields, JobBlock[UploadReport]):
    """An ingest into the Boss; the fields are the parameters of `boss_ingest`.

    Attributes:
        credentials: The account.
        config: Path of the configuration, version 0.1 or 0.2.
        processes: Processes at once on this machine.
        upload: How to upload.
        new_resources: Makes collection, coordinate frame, experiment and channel where they are missing.
        waiting: How long to wait.
        verification: How much is compared with the source at the end.
        storage: Keys of the sources.

    Example:
        ```python
        from prefect_biomed.flows.jobs import BossIngest

        run = BossIngest.load("BLOCK_NAME").trigger()
        run.wait_for_completion()
        print(run.fetch_result().summary())
        ```
    """

    _block_type_name: ClassVar[str] = "Boss Ingest"
    _block_type_slug: ClassVar[str] = "boss-ingest"
    _logo_url: ClassVar[HttpUrl | None] = BossCredentials._logo_url
    _description: ClassVar[str] = "An ingest of images into the Boss."

    credentials: BossCredentials
    config: Path
    processes: int = Field(default=1, ge=1, le=64)
    upload: UploadSettings = Field(default_factory=UploadSettings)
    new_resources: boss_steps.NewResources | None = None
    waiting: IngestJobWaiting = Field(default_factory=IngestJobWaiting)
    verification: VerifySettings = Field(default_factory=VerifySettings)
    storage: StorageCredentials | None = None

    def trigger(self) -> BossIngestRun:  # type: ignore[override]  # Prefect types it as asynchronous
        """Check everything, and make the job, once and never twice.

        Returns:
            The job.

        Raises:
            PreflightFailed: All problems found before anything was sent.
            LaunchInDoubt: It is not known whether the job was made; a retry looks first.
        """
        config = IngestConfig.load(self.config)
        token = intent_token("boss-ingest")
        job = boss_steps.create_ingest_job(
            self.credentials, config, token, self.new_resources, settings=self.upload, storage=self.storage
        )
        return BossIngestRun(self, config, job)
