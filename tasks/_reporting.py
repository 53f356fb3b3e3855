"""Artifacts and events. None of them ever fails a job: what goes wrong here is logged and that is all."""

from __future__ import annotations

import base64
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, MutableMapping
from typing import Any
from urllib.parse import quote
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from prefect_biomed.clients.texts import inline, logger_of, one_line, shown

__all__ = [
    "Progress",
    "Table",
    "artifact_key",
    "event",
    "image",
    "link",
    "markdown",
    "run_logger",
    "state_event",
    "table",
]

logger = logger_of(__name__)

_EVERY_SECONDS = 5.0
_MOST_ROWS = 100


def artifact_key(*parts: object) -> str:
    """Make an artifact key, which may hold lower-case letters, digits and hyphens.

    Args:
        *parts: What the key is made of.

    Returns:
        The key.
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


class _ShownAdapter(logging.LoggerAdapter[Any]):
    """A logger of a run that shows no argument of its lines raw."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        super().log(level, msg, *map(shown, args), **kwargs)


def run_logger() -> logging.LoggerAdapter[Any]:
    """Get the logger of the running task or flow, which shows no argument of its lines raw."""
    return _ShownAdapter(get_run_logger())


def link(key: str, url: str, text: str) -> None:
    """Leave a link, for instance to a job that has just been launched."""
    _guarded(create_link_artifact, key=key, link=quote(url, safe="%/:?#&=+,;@~"), link_text=inline(text))


def image(key: str, png: bytes, description: str) -> None:
    """Leave a small picture, which becomes part of the artifact."""
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    _guarded(create_image_artifact, image_url=url, key=key, description=inline(description))


def markdown(key: str, text: str, description: str) -> None:
    """Leave a text in Markdown, of which everything that came from elsewhere went through `clients.texts`."""
    _guarded(create_markdown_artifact, markdown=text, key=key, description=inline(description))


def table(key: str, rows: Iterable[dict[str, Any]], description: str) -> None:
    """Leave a table."""
    harmless = [{one_line(name): shown(value) for name, value in row.items()} for row in rows]
    _guarded(create_table_artifact, table=harmless, key=key, description=inline(description))


class Table:
    """A table of things that change, written when a row has changed, at most every five seconds, and at the end.

    Many rows become a summary: how many are in which state, and those that are not as they should be.

    Args:
        key: Key of the artifact.
        description: What is in the table.
        state: The column that tells in which state a row is.
        usual: States that need nobody's attention.
    """

    def __init__(self, key: str, description: str, *, state: str, usual: Container[object]) -> None:
        self._key, self._description, self._state, self._usual = key, description, state, usual
        self._shown: list[dict[str, Any]] | None = None
        self._shown_at = float("-inf")

    def show(self, rows: Iterable[dict[str, Any]], *, last: bool = False) -> None:
        """Show the rows as they are now.

        Args:
            rows: One for each thing.
            last: Whether no further ones come.
        """
        now = list(rows)
        if now == self._shown or (time.monotonic() - self._shown_at < _EVERY_SECONDS and not last):
            return
        self._shown, self._shown_at = now, time.monotonic()
        table(self._key, now if len(now) <= _MOST_ROWS else self._summary(now), self._description)

    def _summary(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        columns = list(rows[0])
        counts = Counter(str(row[self._state]) for row in rows)
        summary = [{columns[0]: f"{count} of {len(rows)}", self._state: state} for state, count in counts.most_common()]
        others = [row for row in rows if row[self._state] not in self._usual]
        folded = len(others) - _MOST_ROWS
        if folded > 0:
            summary.append({columns[0]: f"{folded} more are not shown", self._state: ""})
        return [dict.fromkeys(columns, "") | row for row in [*summary, *others[:_MOST_ROWS]]]


def state_event(platform: str, kind: str, identifier: str, state: str, **payload: Any) -> None:
    """Emit `biomed.<platform>.<kind>.<state>` about one remote object."""
    event(f"biomed.{platform}.{kind}.{state.lower()}", f"{platform}.{kind}.{identifier}", identifier, **payload)


def event(name: str, resource: str, title: str | None = None, /, **payload: Any) -> None:
    """Emit an event about a resource, whose title is its identifier when None."""
    described = {"prefect.resource.id": resource, "prefect.resource.name": title or resource}
    _guarded(emit_event, event=name, resource=described, payload=payload)


class Progress:
    """A progress artifact that is updated at most every five seconds, and at the end.

    Args:
        key: Key of the artifact.
        description: What is in progress.
    """

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._id: UUID | None = None
        self._shown_at = 0.0
        self._failed = False

    def __call__(self, done: float, total: float, note: str | None = None) -> None:
        """Show the progress.

        Args:
            done: How much is done.
            total: How much there is in all.
            note: Replaces the description, for instance to tell rate and time left.
        """
        finished = done >= total
        if self._failed or (time.monotonic() - self._shown_at < _EVERY_SECONDS and not finished):
            return
        self._shown_at = time.monotonic()
        percent = 100.0 * done / total if total else 100.0
        if self._id is None:
            self._id = _guarded(
                create_progress_artifact, progress=percent, key=self._key, description=note or self._description
            )
            self._failed = self._id is None
        else:
            _guarded(
                update_progress_artifact,
                artifact_id=self._id,
                progress=percent,
                description=note or self._description,
            )


def _guarded(report: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return report(**arguments)
    except Exception as error:
        logger.warning("%s failed, which changes nothing for the job: %s", report.__name__, error)
        return None
