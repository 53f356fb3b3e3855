"""Parameters of flows: the types of single ones, and the groups of those that most runs leave alone.

Each group is an optional parameter of a flow and folded in its form; nothing given means the defaults. What is left out
of a group has its default too. A group has the same name on every flow that has it. Those of one platform are in a
module of its own, so that the flows of one import nothing of another.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CancellableWaiting", "Group", "RefreshTime", "Runs", "Seconds", "Waiting"]

_SECONDS = {"unit": "s"}
Runs = Annotated[int, Field(ge=1, le=1000, title="Number of runs")]
RefreshTime = Annotated[
    float, Field(gt=0, le=86400, allow_inf_nan=False, title="Refresh time (s)", json_schema_extra=_SECONDS)
]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, json_schema_extra=_SECONDS)]


class Group(BaseModel):
    """Parameters that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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
