"""Artifacts and events. None of them ever fails a job: what goes wrong here is logged and that is all."""

from __future__ import annotations

import base64
import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

__all__ = ["Progress", "artifact_key", "event", "image", "link", "markdown", "state_event", "table"]

logger = logging.getLogger(__name__)

_EVERY_SECONDS = 5.0


def artifact_key(*parts: object) -> str:
    """Make an artifact key, which may hold lower-case letters, digits and hyphens.

    Args:
        *parts: What the key is made of.

    Returns:
        The key.
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


def link(key: str, url: str, text: str) -> None:
    """Leave a link, for instance to a job that has just been launched."""
    _guarded(create_link_artifact, key=key, link=url, link_text=text)


def image(key: str, png: bytes, description: str) -> None:
    """Leave a small picture, which becomes part of the artifact."""
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    _guarded(create_image_artifact, image_url=url, key=key, description=description)


def markdown(key: str, text: str, description: str) -> None:
    """Leave a text in Markdown."""
    _guarded(create_markdown_artifact, markdown=text, key=key, description=description)


def table(key: str, rows: Iterable[dict[str, Any]], description: str) -> None:
    """Leave a table."""
    _guarded(create_table_artifact, table=list(rows), key=key, description=description)


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
