"""The only place that waits: long watches of remote jobs, short waits for something to appear, and pauses.

A watch has a growing interval with jitter, an error budget and a deadline by the monotonic clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    DeadlineExceeded,
    PollingFailed,
    is_transient,
)
from prefect_biomed.clients.texts import logger_of

__all__ = ["PollSettings", "Uptime", "looks", "now", "passed", "poll", "sleep", "tries", "uptime"]

logger = logger_of(__name__)

T = TypeVar("T")

# Short naps let a timeout or a cancellation that arrives as an asynchronous exception end the wait.
_NAP_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 300.0
# Clocks of machines, or of one before and after a boot, may differ by so much.
_CLOCKS_DIFFER_SECONDS = 3600.0


@dataclass(frozen=True)
class PollSettings:
    """How to watch a remote job.

    Attributes:
        interval_seconds: Time between the first looks.
        growth: Factor on the interval after each look.
        max_interval_seconds: The interval never grows beyond this; None leaves it constant.
        deadline_seconds: Stop waiting after this time; None waits for ever.
        error_budget: So many looks in a row may fail for a transient reason; one more ends the wait.
        part_of_wait: The interval is never shorter than this part of the time waited so far, up to `longest_seconds`.
        longest_seconds: Bound of what `part_of_wait` makes of the interval.
    """

    interval_seconds: float = 30.0
    growth: float = 1.0
    max_interval_seconds: float | None = None
    deadline_seconds: float | None = None
    error_budget: int = 10
    part_of_wait: float = 0.0
    longest_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuse settings that would poll without a pause."""
        if self.interval_seconds <= 0 or self.growth < 1:
            raise ConfigurationError("Polling needs an interval above 0 s and a growth of 1 or more.")

    def after(self, interval: float) -> float:
        """Tell the interval that follows another one.

        Args:
            interval: Seconds between the looks so far.

        Returns:
            Seconds until the next but one.
        """
        return min(interval * self.growth, self.max_interval_seconds or self.interval_seconds)

    def pause(self, interval: float, waited: float) -> float:
        """Tell how long to wait before the next look.

        Args:
            interval: Seconds, as `after` makes them grow.
            waited: Seconds since the first look.
        """
        return max(interval, min(self.part_of_wait * waited, self.longest_seconds))


def now() -> datetime:
    """Tell the time of day, for what is written down and read by another process."""
    return datetime.fromtimestamp(time.time(), UTC)


@dataclass(frozen=True)
class Uptime:
    """A moment by a clock that nobody can set, which another process of the same boot understands.

    Attributes:
        boot: Names the boot.
        seconds: Since some moment that is the same during a boot.
    """

    boot: str
    seconds: float


def uptime() -> Uptime | None:
    """Tell the time since this machine was booted; None where the system does not name its boots."""
    boot = _boot()
    return None if boot is None else Uptime(boot, time.monotonic())


def passed(since: datetime, by_uptime: Uptime | None) -> float:
    """Tell how much time has passed at least since a moment that was written down, perhaps by another process.

    Args:
        since: The moment by the clock of that machine.
        by_uptime: The same moment by its uptime, where that is known.

    Returns:
        Seconds. The clock may have been set meanwhile, forward or back; where the uptime cannot tell, it is allowed to
        be an hour fast.
    """
    here = uptime()
    if here is not None and by_uptime is not None and here.boot == by_uptime.boot:
        return here.seconds - by_uptime.seconds
    return (now() - since).total_seconds() - _CLOCKS_DIFFER_SECONDS


@cache
def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


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
    done: Callable[[T], bool],
    what: str,
    take_up_again: str,
    at_deadline: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Look again and again until something is done.

    Args:
        look: One observation, for instance of the states of all jobs.
        settings: Interval, deadline and error budget.
        done: Whether an observation ends the watch.
        what: What is being watched, for messages.
        take_up_again: What a user does to go on waiting later, for messages.
        at_deadline: Called once when the deadline has passed, for instance to kill what still runs; returns a sentence
            for the message. An error of ours that it raises is told in the message instead.

    Yields:
        Each observation that succeeded, the one that is done included.

    Raises:
        DeadlineExceeded: The deadline passed; one look more was made after it. Also when no answer came by then: the
            message says what the platform said last.
        PollingFailed: More looks in a row failed than the budget allows, before the deadline.
        BiomedError: A look failed for a reason that waiting does not mend.
    """
    watch = _Watch(settings)
    while True:
        late = watch.is_late
        try:
            observation = look()
        except BiomedError as error:
            if not is_transient(error):
                raise
            watch.failed(error)
            logger.warning("Look %d in a row at %s failed: %s", watch.failures, what, error)
            if watch.failures > settings.error_budget and not late:
                raise PollingFailed(
                    f"{what}: {watch.failures} looks in a row failed, the last one so: {error} "
                    f"Nothing was stopped remotely. {take_up_again}"
                ) from error
        else:
            watch.succeeded()
            yield observation
            if done(observation):
                return
        if late:
            raise DeadlineExceeded(_after_deadline(what, watch, at_deadline, take_up_again)) from watch.error
        watch.pause()


def looks(
    look: Callable[[], T | None],
    *,
    seconds: float,
    what: str,
    interval_seconds: float = 0.5,
    max_interval_seconds: float = 10.0,
) -> T | None:
    """Look until something is to be seen, for a short time. The last look is made after that time has passed.

    Args:
        look: Returns what it saw, or None when there is nothing yet.
        seconds: How long nothing means *not yet*; 0 looks once.
        what: What is looked for, for messages.
        interval_seconds: First pause; each is twice the one before.
        max_interval_seconds: No pause is longer.

    Returns:
        What was seen; None when the last look was answered and saw nothing.

    Raises:
        BiomedError: The last look failed, so that nothing is known; or one failed for a reason that waiting does not
            mend.
    """
    watch = _Watch(PollSettings(interval_seconds, 2.0, max_interval_seconds, seconds))
    while True:
        late = watch.is_late
        try:
            seen = look()
        except BiomedError as error:
            if late or not is_transient(error):
                raise
            logger.warning("Look for %s failed: %s", what, error)
        else:
            if seen is not None or late:
                return seen
        watch.pause()


def tries(
    attempt: Callable[[], T],
    pauses: Sequence[float],
    *,
    what: str,
    again: Callable[[BiomedError], bool] = is_transient,
) -> T:
    """Try again after some pauses. For transfers, each try of which takes long itself; others have a deadline.

    Args:
        attempt: One try, safe to repeat.
        pauses: Seconds before each further try.
        what: What is tried, for messages.
        again: Whether an error may be another one next time.

    Returns:
        What the first try that succeeded returned.

    Raises:
        BiomedError: The last try failed, or one for which `again` says no.
    """
    for pause in pauses:
        try:
            return attempt()
        except BiomedError as error:
            if not again(error):
                raise
            logger.warning("%s, trying again in %.0f s: %s", what, pause, error)
            sleep(pause)
    return attempt()


class _Watch:
    """The clock of one watch."""

    def __init__(self, settings: PollSettings) -> None:
        self._settings = settings
        self._start = time.monotonic()
        self._interval = settings.interval_seconds
        self.failures = 0
        self.error: BiomedError | None = None

    @property
    def is_late(self) -> bool:
        deadline = self._settings.deadline_seconds
        return deadline is not None and time.monotonic() - self._start >= deadline

    def failed(self, error: BiomedError) -> None:
        self.failures += 1
        self.error = error

    def succeeded(self) -> None:
        self.failures = 0
        self.error = None

    def pause(self) -> None:
        waited = time.monotonic() - self._start
        pause = self._settings.pause(self._interval, waited) * random.uniform(0.9, 1.1)
        if self.failures:
            pause = min(pause * 2 ** min(self.failures, 6), max(pause, _LONGEST_PAUSE_SECONDS))
        if self._settings.deadline_seconds is not None:
            left = self._settings.deadline_seconds - waited
            pause = min(pause, max(left, 0.0))
        sleep(pause)
        self._interval = self._settings.after(self._interval)


def _after_deadline(what: str, watch: _Watch, at_deadline: Callable[[], str] | None, take_up_again: str) -> str:
    seconds = watch._settings.deadline_seconds or 0.0
    said = f"{what}: not finished after {seconds:.0f} s."
    if watch.error is not None:
        said += f" The platform could not be asked then, so this is not sure ({watch.error})."
    if at_deadline is None:
        return f"{said} Nothing was stopped remotely. {take_up_again}"
    try:
        return f"{said} {at_deadline()} {take_up_again}"
    except BiomedError as error:
        return f"{said} What was to be done at the deadline could not be done: {error} {take_up_again}"
