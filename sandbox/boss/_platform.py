"""The Boss as one of the sandbox's platforms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from prefect_biomed.sandbox._core import Platform, Switches
from prefect_biomed.sandbox.boss._jobs import Job
from prefect_biomed.sandbox.boss._rest import BossApp
from prefect_biomed.sandbox.boss._service import INGEST_BUCKET, TILE_BUCKET, BossSwitches, Service
from prefect_biomed.sandbox.boss._volumes import Array, Range


class BossSandbox(Platform):
    """An emulated Boss.

    What it does is what the Boss's server, lambdas and AWS do together: jobs go through all their
    states, uploaded tiles are indexed, assembled and can be read back, and mistakes that the Boss
    does not notice are not noticed here either.

    Attributes:
        service: All its state, for tests that reach behind the interface.
    """

    name: ClassVar[str] = "boss"
    switches_type: ClassVar[type[Switches]] = BossSwitches
    switches: BossSwitches

    def __init__(self, *, seed: int = 0, directory: Path, **switches: Any) -> None:
        super().__init__(seed=seed, directory=directory, **switches)
        self.service = Service(directory, self.switches, seed)
        self.app = BossApp(self.service)

    def start(self, url: str) -> None:
        """Begin to serve under `url`."""
        super().start(url)
        self.service.url = url
        self.service.start()

    def stop(self) -> None:
        """Stop the lambdas and drop what was uploaded."""
        self.service.stop()

    def constants(self) -> dict[str, object]:
        """What lambdas that are to run later belong to."""
        return {"service": self.service}

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        """All jobs, queues, keys, resources and what was ingested; the objects are in the folder."""
        with self.service.frozen() as state:
            yield state

    def restore(self, state: Any) -> None:
        """Go on from the state of an earlier process."""
        self.service.restore(state)

    def ready(self) -> dict[str, Any]:
        """URL, tokens of the users, names of what is there, and how far each job is."""
        resources = self.service.resources
        return {
            "url": self.url,
            "host": self.url.removeprefix("http://"),
            "protocol": "http",
            "aws_endpoint_url": self.url,
            "tokens": self.service.tokens,
            "channels": ["/".join(path) for path in resources.channels],
            "buckets": [TILE_BUCKET, INGEST_BUCKET],
            "jobs": {number: _progress(job) for number, job in self.service.jobs.items()},
        }

    def job(self, number: int) -> Job:
        """One job with everything that was observed of it."""
        return self.service.jobs[number]

    def cutout(
        self,
        channel: str,
        *,
        x: Range,
        y: Range,
        z: Range,
        t: Range = (0, 1),
    ) -> Array:
        """Read ingested pixels back.

        Args:
            channel: `collection/experiment/channel`.
            x: Half-open range in voxels; `y` and `z` likewise.
            y: See `x`.
            z: See `x`.
            t: Half-open range in samples.

        Returns:
            Array of shape (t, z, y, x) in the channel's dtype, zero where nothing was ingested.
        """
        collection, experiment, name = channel.split("/")
        return self.service.cutout((collection, experiment, name), x, y, z, t)


def _progress(job: Job) -> dict[str, Any]:
    observed = job.observed
    return {
        "status": job.status.name,
        "tile_count": job.tile_count,
        "puts": sum(observed.puts.values()),
        "distinct_puts": len(observed.puts),
        "indexed": sum(observed.indexed.values()),
        "distinct_indexed": len(observed.indexed),
        "late_indexed": len(observed.late_indexed),
        "deleted": observed.deleted,
        "seconds": observed.last_put - observed.first_put,
    }
