"""Lower resolutions of a channel, which the Boss makes itself when it is asked to."""

from __future__ import annotations

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.errors import JobFailed, PlatformError, is_transient
from prefect_biomed.clients.polling import PollSettings, poll
from prefect_biomed.clients.texts import logger_of

__all__ = ["downsample"]

logger = logger_of(__name__)

_MADE, _FAILED, _NOT_MADE = "DOWNSAMPLED", "FAILED", "NOT_DOWNSAMPLED"


def downsample(client: BossClient, channel_path: str, settings: PollSettings | None = None) -> int:
    """Ask the Boss for the lower resolutions of a channel, and wait until they are made.

    Endpoints: `GET` and `POST /downsample/…`. Safe to repeat: the state of the channel is looked at first, what is
    being made is waited for, what is made is left alone. It is asked once in a call; an answer that was lost is settled
    by looking, since the Boss refuses a second one.

    Args:
        client: Client of the Boss.
        channel_path: `collection/experiment/channel`.
        settings: Interval and deadline; 1 to 60 s and a day by default.

    Returns:
        Number of resolutions of the experiment, the finest included; with 1 there is nothing to make, and nothing is
        asked.

    Raises:
        JobFailed: The Boss says that it has failed.
        DeadlineExceeded: Not made in time; the Boss goes on.
        BiomedError: As for `BossClient.counts`.
    """
    levels = client.downsampling(channel_path)[1]
    if levels < 2:
        return levels
    looks = poll(
        _Asking(client, channel_path).look,
        settings or PollSettings(1, 1.3, 60, deadline_seconds=24 * 3600, error_budget=20),
        done=lambda status: status == _MADE,
        what=f"Lower resolutions of {channel_path}",
        take_up_again="Ask for them again later: what is being made is waited for.",
    )
    for status in looks:
        logger.debug("%s: %s", channel_path, status)
    return levels


class _Asking:
    """Looks at the state of a channel, and asks once."""

    def __init__(self, client: BossClient, channel_path: str) -> None:
        self._client, self._path = client, channel_path
        self._has_asked = False

    def look(self) -> str:
        """The state; asks when nothing has been made and nobody makes it."""
        status, _ = self._client.downsampling(self._path)
        if status == _FAILED and self._has_asked:
            raise JobFailed(f"{self._path}: the Boss could not make lower resolutions. Ask its administrators why.")
        if status in (_NOT_MADE, _FAILED) and not self._has_asked:
            self._has_asked = True
            self._ask()
        return status

    def _ask(self) -> None:
        try:
            self._client.start_downsampling(self._path)
        except PlatformError as error:
            if not is_transient(error) and self._client.downsampling(self._path)[0] in (_NOT_MADE, _FAILED):
                raise
            logger.info("%s: the answer to the request for lower resolutions was %s; looking", self._path, error)
