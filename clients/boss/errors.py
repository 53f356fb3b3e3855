"""What can go wrong with the Boss beyond what every platform has."""

from __future__ import annotations

from typing import Any

from prefect_biomed.clients.boss.models import JobStatus, UploadReport
from prefect_biomed.clients.boss.proofs import Verification
from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    JobFailed,
    LocalStorageError,
    PlatformError,
    SourceUnreadable,
)

__all__ = [
    "ChunkDamaged",
    "ChunkFailed",
    "ClockOff",
    "IngestIncomplete",
    "NotYetComplete",
    "ProcessFailed",
    "QueueGone",
    "SourceTooSmall",
    "VerificationFailed",
    "refuse_over",
]


class QueueGone(JobFailed):
    """The queue was deleted: somebody completed or cancelled the job."""


class ClockOff(ConfigurationError):
    """The clock of this machine is so wrong that AWS refuses every signature."""


class ChunkDamaged(LocalStorageError):
    """A chunk of a volume is there and cannot be decoded."""


class SourceTooSmall(SourceUnreadable):
    """A source does not cover its part of the extent. The conversion `pad` allows to fill up the rest."""


class ChunkFailed(BiomedError):
    """Cuboids of a chunk were refused for good."""


class NotYetComplete(PlatformError):
    """The Boss wants to be asked again later to complete a job.

    Attributes:
        wait_seconds: How much later.
    """

    def __init__(self, message: str, *, wait_seconds: float = 0.0, **about: Any) -> None:
        super().__init__(message, **about)
        self.wait_seconds = wait_seconds


class ProcessFailed(BiomedError):
    """One of several processes of an upload failed; the others finished what they had in hand."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class IngestIncomplete(JobFailed):
    """Some tiles are not in the Boss.

    Attributes:
        report: Which, and why; None where only the message was handed on.
    """

    def __init__(self, message: str, report: UploadReport | None = None) -> None:
        super().__init__(message)
        self.report = report

    @classmethod
    def of(cls, report: UploadReport, reason: str = "") -> IngestIncomplete:
        """Make the error of a report.

        Args:
            report: Which tiles, and why.
            reason: What it means and what to do; that the sources need to be mended when empty.

        Returns:
            An error whose message names the first tiles.
        """
        shown = [f"  - {tile}: {why}" for tile, why in list(report.failed.items())[:20]]
        shown += [f"  - {tile}: not there" for tile in report.holes[:20]]
        shown += [f"  - {tile}: skipped" for tile in report.skipped[:20]]
        reason = reason or (
            "The sources of these tiles are missing or damaged; all others were uploaded. Mend them and run it again, "
            "or choose another on_bad_source. The job stays open."
        )
        return cls(f"{report.summary()} {reason}\n" + "\n".join(shown), report)


class VerificationFailed(JobFailed):
    """What is in the Boss is not what the sources have, or none of it could be compared with them.

    Attributes:
        verification: What was found; None where only the message was handed on.
    """

    def __init__(self, message: str, verification: Verification | None = None) -> None:
        super().__init__(message)
        self.verification = verification

    @classmethod
    def of(cls, verification: Verification) -> VerificationFailed:
        """Make the error of a look; its message names the first tiles.

        Args:
            verification: What was found.
        """
        if not verification.wrong:
            advice = "Run this where the sources can be read." if verification.unreadable else "Compare something."
            shown = "".join(f"\n  - {tile}: {reason}" for tile, reason in [*verification.unreadable.items()][:20])
            return cls(f"{verification.summary()} {advice}{shown}", verification)
        shown = "\n".join(f"  - {tile}" for tile in verification.wrong[:20])
        advice = "Run boss-verify with heal=True, which ingests these chunks again and proves them."
        return cls(f"{verification.summary()} {advice}\n{shown}", verification)


def refuse_over(job_id: int, status: JobStatus) -> None:
    """Refuse to go on with a job that is over.

    Args:
        job_id: Number of the job.
        status: Its state.

    Raises:
        JobFailed: Nothing can be uploaded any more.
    """
    if status == JobStatus.COMPLETE:
        raise JobFailed(f"Ingest job {job_id} is complete: there is nothing left to upload.")
    if status.is_terminal:
        raise JobFailed(f"Ingest job {job_id} is {status.name}. Create another one.")
