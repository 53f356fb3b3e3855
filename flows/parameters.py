"""Parameters of flows: the types of single ones, and the groups of those that most runs leave alone.

Each group is an optional parameter of a flow and folded in its form; nothing given means the defaults. What is left out
of a group has its default too. A group has the same name on every flow that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vantage6 import OfflineNodes, SessionScope
from prefect_biomed.clients.vip import InputSettings, Outcome, SessionOptions
from prefect_biomed.clients.vip.session_file import VIP_HOME

__all__ = [
    "AnalysisWaiting",
    "CancellableWaiting",
    "FederatedOutputs",
    "FederatedWaiting",
    "Girder",
    "GirderSession",
    "Group",
    "IngestJobWaiting",
    "IngestWaiting",
    "Learning",
    "Outputs",
    "PipelineId",
    "RefreshTime",
    "Removal",
    "RoundsOutputs",
    "RoundsWaiting",
    "Runs",
    "Seconds",
    "SessionDetails",
    "SessionName",
    "SessionUpload",
    "SessionWaiting",
    "Settings",
    "TaskDetails",
    "Upload",
    "VipHome",
    "Waiting",
    "accepting",
    "chosen",
]

_SECONDS = {"unit": "s"}

Runs = Annotated[int, Field(ge=1, le=1000, title="Number of runs")]


def _folder_of_sessions(path: str) -> str:
    if not path.startswith("/") or {".", ".."} & set(path.split("/")) or not path.isprintable():
        raise ValueError("must be an absolute path on the platform, without . or .. and control characters")
    if not path.strip("/"):
        raise ConfigurationError(
            f"vip_home is {path!r}, the root of the platform, where sessions cannot be: they are removed at the end. "
            f"Give a folder below it that the account may write to, as {VIP_HOME} on VIP."
        )
    return path.rstrip("/")


RefreshTime = Annotated[
    float, Field(gt=0, le=86400, allow_inf_nan=False, title="Refresh time (s)", json_schema_extra=_SECONDS)
]
PipelineId = Annotated[str, Field(min_length=1, pattern=r"\S", title="Pipeline")]
VipHome = Annotated[str, AfterValidator(_folder_of_sessions)]
SessionName = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$", max_length=200, title="Session name")]
Settings = InputSettings
GirderFolder = Annotated[str, Field(pattern=r"^(girder:)?/(collection|user)/[^/]+(/[^/]+)*/?$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, json_schema_extra=_SECONDS)]
Status = Literal["Finished", "ExecutionFailed", "Killed"]


class Group(BaseModel):
    """Parameters that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Upload(Group):
    """Which inputs are sent to VIP, and where to."""

    include: tuple[str, ...] = Field(default=(), title="Files to send")
    """Patterns of files to upload, relative to `input_dir`; all when empty."""
    exclude: tuple[str, ...] = Field(default=(), title="Files not to send")
    """Patterns of files not to upload."""
    update_files: bool = Field(default=True, title="Compare what is there already")
    """Whether inputs that are on the platform already are compared with the local files. Else they are taken as they
    are, and one that is not there ends the run."""
    vip_home: VipHome = Field(default=VIP_HOME, title="Folder on VIP")
    """Folder on the platform that holds the folders of sessions, for inputs and outputs."""


class SessionUpload(Upload):
    """Which inputs a session uses, and where the session is kept."""

    inputs_of: Path | None = Field(default=None, title="Inputs of another session")
    """Local folder of another session whose uploaded inputs are used."""
    backup_location: Literal["local", "vip"] | None = Field(default="local", title="Place of the session file")
    """Where the session file is kept, by which the session is resumed: `local`, `vip`, or nowhere when empty."""


class Outputs(Group):
    """Which outputs are downloaded, in which shape, and what counts as success."""

    get_status: tuple[Status, ...] = Field(default=("Finished",), title="Wanted statuses")
    """Statuses whose outputs are downloaded and that count as success."""
    unzip: bool = Field(default=True, title="Unpack archives")
    """Whether archives are replaced by a folder with their content."""
    keep_archives: bool = Field(default=False, title="Keep archives")
    """Whether archives stay beside that folder."""
    strict: bool = Field(default=False, title="Every job has to succeed")
    """Whether a run of which some jobs failed makes the session fail."""
    accept_incomplete: bool = Field(default=False, title="Outputs may lack")
    """Whether a run counts as success although it lacks outputs that the pipeline always has, as to take what there is
    and remove the session."""


class Removal(Group):
    """What is removed from VIP at the end. After a failure everything stays."""

    finish: bool = Field(default=True, title="Remove at the end")
    """Whether the session's folders are removed from the platform at the end."""
    keep_input: bool = Field(default=False, title="Keep inputs")
    """Whether the inputs stay on the platform all the same."""
    keep_output: bool = Field(default=False, title="Keep outputs")
    """Whether the outputs stay on the platform all the same."""
    delete_records: bool = Field(default=False, title="Remove the records of runs too")
    """Whether the platform's records of the runs, with their logs, are removed too. On platforms other than VIP they
    hold the outputs and go with them."""


def chosen(options: SessionOptions, *groups: Outputs | Removal | None) -> SessionOptions:
    """Let parameters of a flow take the place of options.

    Args:
        options: The options as they are.
        *groups: What was given; fields that were left out change nothing.

    Returns:
        The options that count.
    """
    given = {name: getattr(group, name) for group in groups if group for name in group.model_fields_set}
    return options.model_copy(update=given)


def accepting(failed: Sequence[Outcome], options: SessionOptions) -> dict[str, object] | None:
    """Tell by which `outputs` runs that failed would count as success.

    Args:
        failed: What came of them.
        options: By which they were judged.

    Returns:
        The fields to be given; None when no fields make it so.
    """
    accepted = (*options.get_status, *sorted({one.status.value for one in failed} - {*options.get_status}))
    if any(one.unfetched for one in failed) or not {*accepted} <= {*get_args(Status)}:
        return None
    fields: dict[str, object] = {}
    if accepted != options.get_status:
        fields["get_status"] = list(accepted)
    if options.strict and any(one.succeeded_jobs < max(one.jobs, 1) for one in failed):
        fields["strict"] = False
    if any(one.missing for one in failed):
        fields["accept_incomplete"] = True
    return fields


class Girder(Group):
    """Outputs that go to Girder."""

    output: GirderFolder | None = Field(default=None, title="Folder on Girder")
    """Folder on Girder, `/collection/…`, in which the session gets a folder for its outputs, with one in it for each
    run. They go to VIP when empty."""
    metadata: dict[str, JsonValue] = Field(default_factory=dict, title="Metadata of the runs")
    """Metadata for the folder of each run on Girder."""
    download: bool = Field(default=False, title="Download too")
    """Whether outputs on Girder are downloaded to `output_dir` too."""


class GirderSession(Group):
    """A session whose outputs are on Girder."""

    folder: GirderFolder | None = Field(default=None, title="Folder of the session")
    """Folder of the session on Girder; enough alone when its outputs are there."""
    download: bool = Field(default=False, title="Download too")
    """Whether outputs on Girder are downloaded too, also when they were not wanted before."""


class Waiting(Group):
    """How long to wait for the launch and for the end."""

    timeout_seconds: Seconds | None = Field(default=None, title="Stop watching after (s)")
    """Seconds after which this flow stops waiting; what it has launched goes on. Never when empty."""
    queue_timeout_seconds: Seconds | None = Field(default=None, title="Stop waiting to launch after (s)")
    """Seconds after which a launch stops waiting: on VIP for capacity, on vantage6 for nodes and dataframes; it is not
    made then. Never when empty."""


class CancellableWaiting(Waiting):
    """How long to wait for the launch and for the end, and what a cancellation does."""

    cancel_remote: bool = Field(default=False, title="Cancel on the platform too")
    """Whether cancelling this flow run ends what it has launched, too."""


class SessionWaiting(CancellableWaiting):
    """Whether and how long to wait for capacity and for the runs, and what a cancellation does."""

    wait: bool | Literal["suspend"] = Field(default=True, title="Wait for the end")
    """True watches the runs. False launches now; collect later with the deployment vip-collect or vip-resume. `suspend`
    gives the worker slot back after the launch; vip-collect resumes this flow run when all runs have ended. Without a
    schedule of vip-collect nobody does. The time of a suspension does not count for `timeout_seconds`."""


class FederatedWaiting(CancellableWaiting):
    """How to wait for nodes and for results, and what a cancellation does."""

    offline_nodes: OfflineNodes = Field(default="warn", title="With an offline node")
    """With an offline node: create the task all the same, wait for the node, or refuse."""
    follow_logs: bool = Field(default=True, title="Show what algorithms print")
    """Whether the log shows what the algorithms print."""


class RoundsWaiting(FederatedWaiting):
    """How to wait for nodes and for each round, how many answers are enough, and what a cancellation does."""

    timeout_seconds: Seconds | None = Field(default=None, title="Stop watching after (s)")
    """Seconds after which no further round begins; the run goes on from there when it is called again. Never when
    empty."""
    round_timeout_seconds: Seconds | None = Field(default=None, title="Close a round after (s)")
    """Seconds after which a round is aggregated without those who have not answered, when `min_organizations` have; it
    fails otherwise. Never when empty."""
    min_organizations: int | None = Field(default=None, ge=1, title="Answers that are enough")
    """So many answers are enough for a round, when others fail or are late; all when empty."""
    refresh_time: RefreshTime = 0.5
    """Seconds between the first looks at the task of a round; it grows with the time waited."""


class Learning(Group):
    """How answers are aggregated, and when to stop early."""

    aggregation_arguments: dict[str, JsonValue] = Field(default_factory=dict, title="Arguments of the aggregation")
    """Further keyword arguments of the aggregation."""
    metric: str = Field(default="change", title="Metric to watch")
    """Metric that decides an early end; the aggregation gives it."""
    below: float | None = Field(default=None, title="Stop below")
    """Stop when the metric is smaller than this."""
    patience: int | None = Field(default=None, ge=1, title="Stop after so many rounds without improvement")
    """Stop after so many rounds in a row without improvement."""
    min_delta: float = Field(default=0.0, ge=0, title="What counts as improvement")
    """By how much the metric has to become smaller to count as improved."""


class RoundsOutputs(Group):
    """Where the states of rounds are kept."""

    output_dir: Path | None = Field(default=None, title="Folder of large results")
    """Folder that gets a sub-folder for each run, with the state after each round and results too large for memory;
    `vantage6_rounds` when empty. On storage that all workers share, a run goes on anywhere without asking for a result
    twice."""


class AnalysisWaiting(FederatedWaiting):
    """Whether and how to wait for nodes and for results, and what a cancellation does."""

    wait: bool = Field(default=True, title="Wait for the end")
    """False returns once the task is created; `task_id` fetches its results later."""


class IngestWaiting(Group):
    """How long to wait for the Boss."""

    ready_timeout_seconds: Seconds = Field(default=3600.0, title="Stop waiting for the queue after (s)")
    """Seconds after which this flow stops waiting for the Boss to fill the queue of the job, which takes minutes."""
    completion_timeout_seconds: Seconds = Field(default=6 * 3600.0, title="Stop waiting for the verification after (s)")
    """Seconds after which this flow stops waiting for the Boss to verify a job that is uploaded."""


class IngestJobWaiting(IngestWaiting):
    """How long to wait for the Boss, and what a cancellation does."""

    cancel_remote: bool = Field(default=False, title="Cancel on the platform too")
    """Whether cancelling this flow run ends what it has launched, too."""


class FederatedOutputs(Group):
    """Which results are enough, and where large ones go."""

    output_dir: Path | None = Field(default=None, title="Folder of large results")
    """Folder for results too large for memory; `vantage6_results` when empty."""
    partial: bool = Field(default=False, title="Results of some are enough")
    """Whether the results of some organizations are enough when others fail, or have not ended at the deadline."""


class _Details(Group):
    name: str = Field(default="", title="Name of the task")
    """Name of the task; the method when empty. A token is appended."""
    description: str = Field(default="", title="What it is for")
    """What the task is for; at most 1024 characters."""
    study: str | int | None = Field(default=None, title="Study (name or id)")
    """Exact name or id of a study."""
    store: int | None = Field(default=None, title="Algorithm store (id)")
    """Id of the algorithm store that vouches for the image."""
    central: bool | None = Field(default=None, title="Central function")
    """Whether the function coordinates others. It then needs exactly one organization to run at. When empty, what the
    algorithm store tells of it; without a `store` it does not."""
    columns: tuple[str, ...] = Field(default=(), title="Columns it needs")
    """Columns the function needs, checked against those that nodes tell."""


class TaskDetails(_Details):
    """How a task is named, what it belongs to, and what its function needs."""

    session: int | None = Field(default=None, title="Session (id)")
    """Id of the session, on generation 5."""


class SessionDetails(_Details):
    """How session and computation are named and shared, and what the function needs."""

    scope: SessionScope = Field(default=SessionScope.OWN, title="Who may use the session")
    """Who may use the session."""
    compute_at: list[str | int] | None = Field(default=None, min_length=1, title="Where to compute")
    """Organizations where to compute, by exact name or id; those of the extraction when empty. A central function needs
    one."""
