"""The Virtual Imaging Platform on loopback.

Profile `vip` behaves as VIP-portal 4.6, profile `carmin` as CARMIN-server. What goes wrong on the real platforms goes
wrong here, too: errors without a reason, deletions that take effect later, transfers that are reported as failed and
arrive all the same. `VipSwitches` tells what can be changed.

The pipelines work on the files that were uploaded:

========================  ==================================================================================
`GreyMatter/1.0`, `/1.1`  exact: equal content in every run, different bytes (time stamps of gzip and tar)
`GreyMatter/0.9`          hidden
`SkullStripNoisy/1.0`     numerically noisy; switches `noise_digits`, `math_library`, `math_library_shift`
`SkullStrip/1.0`          the same without noise
`AlwaysFails/1.0`         every job fails, with exit code, message and a log
`SlowSegmentation/1.0`    takes `duration` seconds; switch `duration_seconds`
`SliceStatistics/2.0`     one job for each combination of `image` and `slice`; `fail_on` makes one fail
`PairwiseDifference/1.0`  lists taken pairwise (`vip:dot`)
`Free Surf (x)/0.3.7`     a name to be quoted
`EveryType/1.0`           a parameter of every type
`MonteCarlo/2.3`          N makes jobs 0 ... N-1; no directory of its own for an execution
`FolderChecksums/1.0`     a folder stands for the files in it
`CopyFile/1.0`            gives back a file of any size
`HostileOutputs/1.0`      archives and paths that a client must refuse or handle with care
`CardioFlow/2.0`          of a group the main user is not in
========================  ==================================================================================

Finished executions can be made public: `publish`, or `GET /publications/<execution>[,<execution>].tar.gz`, which needs
no key.
"""

from __future__ import annotations

import asyncio
import io
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from prefect_biomed.sandbox._core import Platform
from prefect_biomed.sandbox.vip import _api, _carmin, _girder
from prefect_biomed.sandbox.vip._carmin import CarminServer
from prefect_biomed.sandbox.vip._engine import Engine
from prefect_biomed.sandbox.vip._girder import Girder
from prefect_biomed.sandbox.vip._model import GIRDER_STORAGE, Status, User, Users, VipSwitches
from prefect_biomed.sandbox.vip._pipelines import PIPELINES
from prefect_biomed.sandbox.vip._publication import PublicExecution, publish
from prefect_biomed.sandbox.vip._storage import Storage

__all__ = ["PIPELINES", "Status", "VipSandbox", "VipSwitches"]

_PUBLICATIONS = "/publications/"


class VipSandbox(Platform):
    """The Virtual Imaging Platform.

    Attributes:
        switches: see `VipSwitches`.
        users: the accounts.
        storage: the files.
        engine: the executions.
        carmin: files and executions of profile `carmin`.
        girder: the Girder beside it, under `/girder/api/v1`.
    """

    name = "vip"
    switches_type = VipSwitches
    switches: VipSwitches

    def __init__(self, *, seed: int = 0, directory: Path, **switches: Any) -> None:
        super().__init__(seed=seed, directory=directory, **switches)
        self.users = Users(seed, self.switches)
        self.carmin = CarminServer(seed, directory / "carmin", self.users, self.switches)
        self._carmin_api = _carmin.build(self.carmin)
        self.storage = Storage(directory / "storage", self.switches)
        for user in self.users:
            self.storage.add_user(user)
        self.girder = Girder(seed, directory / "girder", self.users)
        self.engine = Engine(seed, directory / "jobs", self.switches, self.storage, self.girder)
        self._api = _api.SecuredApi(
            self.users, _api.build(_api.Portal(self.users, self.storage, self.engine, self.switches, self.girder))
        )
        self._girder_api = _girder.build(self.girder)
        self.app = self._route

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if self.switches.profile == "carmin":
            await self._carmin_api(scope, receive, send)
            return
        if path == "/rest" or path.startswith("/rest/"):
            await self._api(scope, receive, send)
            return
        if path.startswith(_PUBLICATIONS) and scope["method"] == "GET":
            answer = await asyncio.to_thread(self._publication, path.removeprefix(_PUBLICATIONS))
            await answer(scope, receive, send)
            return
        if path.startswith(_girder.PREFIX):
            # Girder does not mind empty parts of a path, and the official VIP client sends some.
            plain = re.sub("/+", "/", path)
            await self._girder_api({**scope, "path": plain}, receive, send)
            return
        # What somebody gets who forgets /rest, or gives the address of something else.
        await HTMLResponse(_PORTAL, 200 if path == "/" else 404)(scope, receive, send)

    def publish(self, identifiers: Sequence[str], folder: Path) -> Path:
        """Write the bundle of public executions, as the portal does when its operators make executions public.

        Args:
            identifiers: of finished executions whose outputs are still on the platform.
            folder: a new or empty folder.

        Returns:
            the folder.

        Raises:
            FileNotFoundError: there is no such execution, it has not finished, or an output is gone.
        """
        executions = []
        for identifier in identifiers:
            execution = self.engine.find(identifier)
            if execution is None or not self.engine.finished(execution):
                raise FileNotFoundError(f"{identifier} is no finished execution")
            executions.append(
                PublicExecution(
                    identifier=identifier,
                    owner=execution.owner,
                    pipeline=execution.pipeline,
                    values=execution.values,
                    returned=self.engine.results(execution),
                    provenances={job.number: job.provenance for job in execution.jobs if job.provenance},
                )
            )
        publish(executions, folder, storage=self.storage, url=self.url, girder=(GIRDER_STORAGE, self.girder.url))
        return folder

    def _publication(self, name: str) -> Response:
        """Answer as an archive of publications does: a bundle, for everybody."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                bundle = self.publish(name.removesuffix(".tar.gz").split(","), Path(folder, "bundle"))
            except FileNotFoundError as error:
                return PlainTextResponse(str(error), 404)
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w:gz") as archive:
                archive.add(bundle, arcname="bundle")
        return Response(content.getvalue(), media_type="application/gzip")

    def start(self, url: str) -> None:
        """Tell Girder where it is, and run the example."""
        super().start(url)
        self.girder.url = url
        if self.switches.profile == "carmin":
            return
        self.storage.resume()
        self.engine.resume()
        if self.engine.examples():
            return
        owner = next(user for user in self.users if user.name == "examples")
        values = {"text": ["an example"], "results-directory": [f"/vip/{owner.groups[0]} (group)/examples"]}
        self.engine.add_example(owner, PIPELINES["EveryType/1.0"], values, "Example of every type")

    def stop(self) -> None:
        """Kill what runs."""
        self.engine.stop()
        self.carmin.stop()
        self.storage.stop()

    def constants(self) -> dict[str, object]:
        """Return pipelines and users by name."""
        pipelines: dict[str, object] = {f"pipeline {name}": pipeline for name, pipeline in PIPELINES.items()}
        return pipelines | {f"user {user.name}": user for user in self.users}

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Any]]:
        """Give executions, resources of Girder, and keys for external storages; the files are in the folder."""
        with (
            self.engine.frozen() as engine,
            self.girder.frozen() as girder,
            self.storage.frozen() as storage,
            self.carmin.frozen() as carmin,
        ):
            keys = {user.name: user.external_keys for user in self.users}
            yield {"engine": engine, "girder": girder, "storage": storage, "carmin": carmin, "external_keys": keys}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the state of an earlier process."""
        self.engine.restore(state["engine"])
        self.girder.restore(state["girder"])
        self.storage.restore(state["storage"])
        self.carmin.restore(state["carmin"])
        for user in self.users:
            user.external_keys.update(state["external_keys"][user.name])

    def came_back(self) -> None:
        """Go on; what was being launched when the portal went down is not launched."""
        self.engine.launching = asyncio.Lock()

    def ready(self) -> dict[str, Any]:
        """Return address, keys, users and pipelines. `url` is without `/rest`."""
        if self.switches.profile == "carmin":
            return {
                "url": self.url,
                "profile": "carmin",
                "api_key": self.users.key(self.users.main),
                "home": f"/{self.users.main.name}",
                "users": {user.name: self._facts(user) for user in self.users},
                "pipelines": list(self.carmin.pipelines),
            }
        return {
            "url": self.url,
            "profile": "vip",
            "api_key": self.users.key(self.users.main),
            "home": "/vip/Home",
            "users": {user.name: self._facts(user) for user in self.users},
            "pipelines": list(PIPELINES),
            "girder": {
                "api_url": self.girder.api_url,
                "api_key": self.girder.key(self.users.main),
                "storage_id": GIRDER_STORAGE,
                "folders": ["/collection/Sandbox/Inputs", "/collection/Sandbox/Results"],
            },
        }

    def _facts(self, user: User) -> dict[str, Any]:
        return {
            "api_key": self.users.key(user),
            "email": user.email,
            "password": self.users.password(user),
            "groups": list(user.groups),
            "girder_api_key": self.girder.key(user),
            "beginner": user.beginner,
            "locked": user.locked,
        }


_PORTAL = "<!doctype html><html><head><title>VIP</title></head><body><h1>VIP sandbox</h1></body></html>"
