"""The steps of a session on VIP, each in a word or two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.clients.errors import PlatformError
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    UploadSummary,
    VipClient,
    VipSession,
    Workflow,
    launch,
    monitor,
    preflight,
    upload,
)
from prefect_biomed.sandbox import Entry, Sandbox

QUICK = PollSettings(interval_seconds=0.05, deadline_seconds=20.0)
EXECUTIONS = r"/executions$"


def send(client: VipClient, session: VipSession, **settings: Any) -> UploadSummary:
    """Check a session and bring its files to the platform."""
    return upload(client, session, preflight(client, session), **{"settle_seconds": 5.0, **settings})


def start(client: VipClient, session: VipSession, **settings: Any) -> list[Workflow]:
    """Launch all runs of a session."""
    settings = {"capacity": QUICK, "settle_seconds": 5.0, **settings}
    return [launch(client, session, repetition, **settings) for repetition in range(1, session.nb_runs + 1)]


def wait(client: VipClient, session: VipSession, **settings: Any) -> list[Workflow]:
    """Watch a session to its end."""
    return list(monitor(client, session, QUICK, **settings))[-1]


def run(client: VipClient, session: VipSession) -> list[Workflow]:
    """All steps up to the end of the executions."""
    send(client, session)
    start(client, session)
    return wait(client, session)


def launch_others(client: VipClient, number: int) -> None:
    """Executions of other people's work on the same account, which end at once."""

    def one(index: int) -> None:
        client.launch(
            name=f"other {index}",
            pipeline_id="EveryType/1.0",
            input_values={"text": "x"},
            results_location="/vip/Home/x",
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(number)))


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something that happens on the platform."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def methods(entries: Sequence[Entry]) -> list[str]:
    """The verbs of some requests."""
    return [entry.method for entry in entries]


def effects(vip: Sandbox) -> list[Entry]:
    """The requests that would change something; asking for the platform is not one of them."""
    return [entry for entry in vip.vip.journal if entry.method != "GET" and not entry.path.endswith("/platform")]


def files_in(folder: Path) -> dict[str, bytes]:
    """Content of all files a user sees in a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "session_data.json" and ".locks" not in path.parts
    }


@contextmanager
def refused(
    code: int, status: int = 400, *, kind: type[PlatformError] = PlatformError, match: str | None = None
) -> Iterator[None]:
    """Expect the platform to answer with one of its error codes."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert (caught.value.status, caught.value.code) == (status, code)
