"""The ways of CARMIN platforms other than VIP, and what CARMIN-server as published cannot do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from operator import attrgetter
from pathlib import Path

import requests

from prefect_biomed.clients.errors import PlatformError, UnexpectedResponse
from prefect_biomed.clients.files import digest
from prefect_biomed.clients.rest import pages_of
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.errors import ListUnavailable
from prefect_biomed.clients.vip.models import InputValue, PathEntry, Pipeline, Workflow

__all__ = ["ENDED", "PLAYED_ALREADY", "compare_digest", "list_pages", "name_files_by_url", "workflow_from_results"]

logger = logger_of(__name__)

ENDED = frozenset({145, 150})
"""Error codes of a kill that comes after the end."""
PLAYED_ALREADY = 135
"""Error code of a second play."""
_STILL_RUNNING = 155
_PAGE_SIZE = 50
# Each look at an account with more would take hundreds of requests.
_MOST = 10_000


def list_pages(page: Callable[..., list[Workflow]], count: Callable[[], int], newest: int | None) -> list[Workflow]:
    """List executions page by page, until a page is empty: a server may give fewer at a time than it is asked for.

    Args:
        page: Returns the executions from `offset` on, at most `limit` of them.
        count: Tells how many there are; asked of a server that gives known ones again, as one that knows no offset.
        newest: How many to ask for; None for all.

    Returns:
        The executions, in the order of the pages.

    Raises:
        ListUnavailable: The platform cannot list its executions at all.
        UnexpectedResponse: It does so without end, or gives the same ones again although there are more.
    """
    seen: set[str] = set()
    read = 0

    def following(_: int) -> tuple[list[Workflow], bool]:
        nonlocal read
        entries = page(offset=read, limit=_PAGE_SIZE)
        read += len(entries)
        fresh = {workflow.identifier for workflow in entries} - seen
        seen.update(fresh)
        return entries, bool(fresh) or (bool(entries) and count() != len(seen))

    try:
        return list(
            islice(
                pages_of(following, identity=attrgetter("identifier"), what="The list of executions", most=_MOST),
                newest,
            )
        )
    except PlatformError as error:
        if error.status != requests.codes.internal_server_error:
            raise
        raise ListUnavailable(
            f"The platform cannot list its executions ({error}). CARMIN-server as published cannot once one of "
            "them has ended. Delete the ended ones, or ask its administrators.",
            status=error.status,
            code=error.code,
            url=error.url,
        ) from error


def workflow_from_results(identifier: str, results: Callable[[str], list[PathEntry]], cause: PlatformError) -> Workflow:
    """Describe an execution by its results.

    CARMIN-server as published cannot describe a completed execution; whether it has results still tells.

    Args:
        identifier: The execution.
        results: Lists the outputs of an execution.
        cause: How its description failed.

    Returns:
        The execution, Running or Finished.

    Raises:
        UnexpectedResponse: Its results cannot be listed either.
    """
    try:
        outputs = results(identifier)
    except PlatformError as error:
        if error.code == _STILL_RUNNING:
            return Workflow.model_validate({"identifier": identifier, "status": "Running"})
        raise UnexpectedResponse(
            f"Execution {identifier} can neither be described ({cause}) nor its results be listed ({error}). "
            "Ask the administrators of the platform.",
            status=error.status,
            code=error.code,
            url=error.url,
        ) from error
    return Workflow.model_validate(
        {"identifier": identifier, "status": "Finished", "outputs": tuple(entry.path for entry in outputs)}
    )


def name_files_by_url(
    values: dict[str, InputValue], pipeline: Pipeline, url_of: Callable[[str], str]
) -> dict[str, InputValue]:
    """Turn the paths among the values of a launch into URLs.

    Args:
        values: Values by parameter key, files as paths on the platform.
        pipeline: The pipeline, whose parameters tell which values are files.
        url_of: Names a path as a URL.

    Returns:
        The values with URLs for paths.
    """
    files = {parameter.key for parameter in pipeline.inputs if parameter.is_file}
    return {key: url_of(str(value)) if key in files else value for key, value in values.items()}


def compare_digest(local: Path, path: str, md5: Callable[[str], str]) -> None:
    """Compare a file with its copy on the platform, which may have dropped what is not text.

    Args:
        local: The file that was sent.
        path: Where it is on the platform.
        md5: Reads the MD5 of a path; a platform that offers none raises PlatformError, and nothing is compared.

    Raises:
        UnexpectedResponse: The copy differs.
    """
    expected = digest(local, "md5")
    try:
        found = md5(path)
    except PlatformError as error:
        if error.transient:
            raise
        logger.warning("%s has no digest to compare: %s", path, error)
        return
    if found != expected:
        raise UnexpectedResponse(f"{path} has MD5 {found} on the platform, the local file {expected}. Send it again.")
