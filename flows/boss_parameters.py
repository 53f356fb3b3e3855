"""Groups of parameters of the flows for the Boss that most runs leave alone."""

from __future__ import annotations

from pydantic import Field

from prefect_biomed.flows.parameters import Group, Seconds

__all__ = ["IngestJobWaiting", "IngestWaiting"]


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
