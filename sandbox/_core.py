"""What every platform of the sandbox is made of: its switches, its journal, its faults, its life."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp

from prefect_biomed.sandbox._faults import FaultPlan
from prefect_biomed.sandbox._journal import Entry, Journal


class Switches(BaseModel):
    """What can be changed about a running platform; each platform adds its own.

    Attributes:
        latency_ms: added to each request of the platform, in milliseconds.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    latency_ms: float = Field(default=0.0, ge=0.0)


class Platform:
    """Base of one emulated platform.

    A subclass names itself and its `Switches`, builds `app` in its constructor, and may override
    `start`, `stop`, `went_down`, `came_back`, `constants`, `frozen`, `restore` and `ready`. The core
    wraps `app` with latency, journal and faults and serves it on a loopback port of its own.

    Attributes:
        name: what it is called in the ready line and on the command line.
        switches_type: model of its switches.
        app: what answers the requests.
        switches: may be changed at any time; what a change does is documented there.
        journal: the requests received.
        faults: the faults to apply.
        url: root under which it is served; empty until it is.
        directory: a folder of its own; empty, and removed at the end, unless the state is kept.
        seed: ids, keys and noise are derived from it.
    """

    name: ClassVar[str]
    switches_type: ClassVar[type[Switches]] = Switches
    app: ASGIApp
    switches: Switches

    def __init__(self, *, seed: int = 0, directory: Path, **switches: Any) -> None:
        self.seed = seed
        self.directory = directory
        self.switches = self.switches_type(**switches)
        self.journal = Journal()
        self.faults = FaultPlan()
        self.url = ""

    def start(self, url: str) -> None:
        """Begin background work; called once it is served.

        Args:
            url: root under which the platform is served, without a slash at the end.
        """
        self.url = url

    def stop(self) -> None:
        """End background work; called once nothing is served any more."""

    def went_down(self) -> None:
        """Take note that its server goes down while everything behind the server goes on."""

    def came_back(self) -> None:
        """Take note that its server is back, under the same URL."""

    def constants(self) -> dict[str, object]:
        """Return the objects that its state refers to and that a new process makes itself, by lasting names."""
        return {}

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        """Give what a new process needs to go on, with nothing changing it while the context is open."""
        yield None

    def restore(self, state: Any) -> None:
        """Go on from the state of an earlier process; called before `start`, with the files still in `directory`.

        Args:
            state: a copy of what `frozen` gave.
        """

    def ready(self) -> dict[str, Any]:
        """Return the facts a user needs: URL, keys, users, ids. Must be JSON."""
        return {"url": self.url}


def annotate(request: Request, note: str) -> None:
    """Write a remark into the journal entry of a request; a second one is appended.

    Args:
        request: as FastAPI hands it to the endpoint.
        note: the remark, without secrets.
    """
    entry: Entry = request.scope["sandbox_entry"]
    entry.note = note if entry.note is None else f"{entry.note}; {note}"
