"""Groups of parameters of the flows for vantage6 that most runs leave alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, JsonValue

from prefect_biomed.clients.vantage6 import OfflineNodes, SessionScope
from prefect_biomed.flows.parameters import CancellableWaiting, Group, RefreshTime, Seconds

__all__ = [
    "AnalysisWaiting",
    "FederatedOutputs",
    "FederatedWaiting",
    "Learning",
    "RoundsOutputs",
    "RoundsWaiting",
    "SessionDetails",
    "TaskDetails",
]


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
