"""The one loop that watches remote jobs: growing interval with jitter, error budget, monotonic deadline."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    DeadlineExceeded,
    PollingFailed,
    is_transient,
)

__all__ = ["PollSettings", "poll", "sleep"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Short naps let a timeout or a cancellation that arrives as an asynchronous exception end the wait.
_NAP_SECONDS = 1.0


@dataclass(frozen=True)
class PollSettings:
    """How to watch a remote job.

    Attributes:
        interval_seconds: Time between the first looks.
        growth: Factor on the interval after each look.
        max_interval_seconds: The interval never grows beyond this; None leaves it constant.
        deadline_seconds: Stop waiting after this time; None waits for ever.
        error_budget: So many looks in a row may fail for a transient reason; one more ends the wait.
    """

    interval_seconds: float = 30.0
    growth: float = 1.0
    max_interval_seconds: float | None = None
    deadline_seconds: float | None = None
    error_budget: int = 10

    def __post_init__(self) -> None:
        """Refuse settings that would poll without a pause."""
        if self.interval_seconds <= 0 or self.growth < 1:
            raise ConfigurationError("Polling needs an interval above 0 s and a growth of 1 or more.")


def sleep(seconds: float) -> None:
    """Sleep in naps of at most one second.

    Args:
        seconds: Time to sleep.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _NAP_SECONDS))


def poll(
    look: Callable[[], T],
    settings: PollSettings,
    *,
    what: str,
    take_up_again: str,
) -> Iterator[T]:
    """Look again and again until the caller stops.

    Args:
        look: One observation, for instance of the states of all jobs.
        settings: Interval, deadline and error budget.
        what: What is being watched, for messages.
        take_up_again: What a user does to go on waiting later, for messages.

    Yields:
        Each observation that succeeded. The caller leaves the loop when it has seen enough.

    Raises:
        DeadlineExceeded: The deadline passed; the last look was made after it.
        PollingFailed: More looks in a row failed than the budget allows.
        BiomedError: A look failed for a reason that waiting does not mend.
    """
    start = time.monotonic()
    interval = settings.interval_seconds
    failures = 0
    while True:
        late = settings.deadline_seconds is not None and time.monotonic() - start >= settings.deadline_seconds
        try:
            observation = look()
        except BiomedError as error:
            if not is_transient(error):
                raise
            failures += 1
            logger.warning("Look %d in a row at %s failed: %s", failures, what, error)
            if failures > settings.error_budget:
                raise PollingFailed(
                    f"{what}: {failures} looks in a row failed, the last one so: {error} "
                    f"Nothing was stopped remotely. {take_up_again}"
                ) from error
        else:
            failures = 0
            yield observation
        if late:
            raise DeadlineExceeded(
                f"{what}: not finished after {settings.deadline_seconds:.0f} s. "
                f"Nothing was stopped remotely. {take_up_again}"
            )
        pause = interval * random.uniform(0.9, 1.1)
        if failures:
            pause = min(pause * 2 ** min(failures, 6), max(pause, 300.0))
        if settings.deadline_seconds is not None:
            left = settings.deadline_seconds - (time.monotonic() - start)
            pause = min(pause, max(left, 0.0))
        sleep(pause)
        interval = min(interval * settings.growth, settings.max_interval_seconds or settings.interval_seconds)
