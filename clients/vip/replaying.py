"""Replaying public executions: is everything there that the published run had, and is it the same?"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, JsonValue

from prefect_biomed.clients.errors import (
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    PreflightFailed,
)
from prefect_biomed.clients.files import digest, safe_join
from prefect_biomed.clients.vip.bundle import Bundle, PublishedExecution
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.download import Output, fetch_file
from prefect_biomed.clients.vip.local_files import stored_name
from prefect_biomed.clients.vip.models import InputValue, VipSession

__all__ = ["ReplayPlan", "prepare_replay", "replay_token"]

INPUTS = "inputs"
_SAYS_NOTHING = frozenset({"description", "author", "custom", "tags", "tests", "doi", "url", "online-platform-urls"})


class ReplayPlan(BaseModel):
    """How one published execution is run again.

    Attributes:
        workflow_id: The published execution.
        session: The session that runs it again, once.
        unchecked: Input files of which nothing tells the MD5 that they had.
        environment: What the platform's descriptor says otherwise than the published one, by field: then and now.
    """

    model_config = ConfigDict(frozen=True)

    workflow_id: str
    session: VipSession
    unchecked: tuple[str, ...] = ()
    environment: dict[str, tuple[str, str]] = {}


def replay_token(bundle: Bundle, execution: PublishedExecution, session_name: str, pipeline_id: str) -> str:
    """Make the token of the replay of one execution: the same for each replay of a bundle under one name.

    Args:
        bundle: The bundle.
        execution: One of its executions.
        session_name: Name of the session; another one is another intent.
        pipeline_id: What is run.

    Returns:
        Ten lower-case letters and digits.
    """
    named = f"{bundle.identity}/{execution.workflow_id}/{session_name}/{pipeline_id}"
    return hashlib.sha256(named.encode()).hexdigest()[:10]


def prepare_replay(
    client: VipClient,
    bundle: Bundle,
    session: VipSession,
    *,
    input_dir: Path | None = None,
    pipeline_id: str | None = None,
) -> list[ReplayPlan]:
    """Fetch and check the inputs of all executions of a bundle, and say how each is run again. Nothing is sent.

    An input is taken from `input_dir`, else from the folder `inputs` of the bundle, else from where it was: its path on
    the platform, or Girder. It is refused when its MD5 is not the one that the published run saw. Safe to repeat.

    Args:
        client: The account.
        bundle: The bundle.
        session: What names and places the sessions: each gets the number of its execution at its end.
        input_dir: Folder of the inputs here, as they were laid out or by their names alone.
        pipeline_id: What to run instead of the pipeline that was published.

    Returns:
        One plan for each execution.

    Raises:
        PreflightFailed: All problems at once, each beginning with `missing input`, `changed input` or `wrong version`.
        PlatformError: An input could not be fetched.
    """
    problems: list[str] = []
    plans = []
    for number, execution in enumerate(bundle.executions, start=1):
        runs = pipeline_id or execution.pipeline_id
        name = f"{session.session_name}-{number}"
        environment = _environment(client, execution, runs, problems)
        gathered = _Inputs(client, bundle, execution, session.output_dir / INPUTS / str(number), input_dir)
        settings = gathered.settings()
        problems += gathered.problems
        home = str(PurePosixPath(session.vip_dir).parent)
        mine = session.model_copy(
            update={
                "session_name": name,
                "pipeline_id": runs,
                "input_settings": settings,
                "input_dir": gathered.folder if execution.file_inputs else None,
                "output_dir": session.output_dir / "runs" / execution.workflow_id,
                "vip_input_dir": f"{home}/{name}/INPUTS",
                "vip_output_dir": f"{home}/{name}/OUTPUTS",
                "token": replay_token(bundle, execution, session.session_name, runs),
            }
        )
        plans.append(
            ReplayPlan(
                workflow_id=execution.workflow_id,
                session=mine,
                unchecked=tuple(gathered.unchecked),
                environment=environment,
            )
        )
    if problems:
        raise PreflightFailed(f"The replay of {bundle.folder.name}", list(dict.fromkeys(problems)))
    return plans


def _environment(
    client: VipClient, execution: PublishedExecution, pipeline_id: str, problems: list[str]
) -> dict[str, tuple[str, str]]:
    """What the platform would run otherwise; that it has no such version is a problem."""
    try:
        client.pipeline(pipeline_id)
    except AuthenticationError:
        raise
    except (NotFoundError, PermissionDeniedError) as error:
        application = pipeline_id.rpartition("/")[0]
        known = [one.identifier for one in client.pipelines() if one.identifier.rpartition("/")[0] == application]
        others = f" It has {', '.join(sorted(known))}." if known else ""
        problems.append(f"wrong version: {execution.workflow_id} was {execution.pipeline_id}. {error}{others}")
        return {}
    now = client.descriptor(pipeline_id)
    if now is None:
        return {"descriptor": ("published", "not told by the platform")}
    then = execution.descriptor
    return {
        field: (_short(then.get(field)), _short(now.get(field)))
        for field in sorted({*then, *now} - _SAYS_NOTHING)
        if then.get(field) != now.get(field)
    }


def _short(value: JsonValue) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


class _Inputs:
    """The input files of one execution on their way to a folder from which they are uploaded."""

    def __init__(
        self, client: VipClient, bundle: Bundle, execution: PublishedExecution, folder: Path, input_dir: Path | None
    ) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.unchecked: list[str] = []
        self._client, self._execution = client, execution
        self._here = [one for one in (input_dir, bundle.folder / INPUTS) if one is not None and one.is_dir()]
        paths = [value for name in execution.file_inputs for value in execution.inputs[name] if value.startswith("/")]
        # As the replayer of VIP has it: what all paths have in common is left out.
        self._above = os.path.commonpath([PurePosixPath(path).parent for path in paths]) if paths else ""

    def settings(self) -> dict[str, InputValue]:
        """Gather the files; values that name files become names below the folder."""
        found: dict[str, InputValue] = {}
        for name, values in self._execution.inputs.items():
            is_file = name in self._execution.file_inputs
            given = [self._gather(name, value) if is_file and value else value for value in values]
            found[name] = given[0] if len(given) == 1 else list(given)
        return found

    def _gather(self, parameter: str, value: str) -> str:
        """Bring one input here and look whether it is what the published run saw."""
        known = self._execution.input_digests.get(parameter, {})
        name = self._name(value, known)
        files = self._bring(value, name, known) if name else None
        if not name or not files:
            self.problems.append(
                f"missing input: {value} of {self._execution.workflow_id} is not in input_dir, not in the bundle, and "
                "cannot be had from where it was. Put it into input_dir."
            )
            return value
        for path in files:
            digests = known.get(path.name)
            if not digests:
                self.unchecked.append(path.relative_to(self.folder).as_posix())
            elif (seen := digest(path, "md5")) not in digests:
                # Or a repetition would take it for the right one.
                path.unlink()
                self.problems.append(
                    f"changed input: {path.name} of {self._execution.workflow_id} has the MD5 {seen}, the published "
                    f"run saw {' or '.join(sorted(digests))}."
                )
        return name

    def _name(self, value: str, known: Mapping[str, object]) -> str | None:
        """Under which name an input lies below the folder; None when nothing tells it."""
        if value.startswith("/"):
            return value.removeprefix(self._above).strip("/")
        identifier = self._on_girder(value)
        if identifier and self._client.girder is not None:
            (entry,) = self._client.girder.files([identifier])
            return entry.name if entry else None
        # The only file of the parameter must be the one that its jobs saw.
        return next(iter(known)) if len(known) == 1 else None

    def _on_girder(self, value: str) -> str | None:
        identifier = value.partition(":/")[2].strip("/")
        return identifier if self._execution.provider.storage_type == "GIRDER" and identifier else None

    def _bring(self, value: str, name: str, known: Mapping[str, object]) -> list[Path]:
        """The input as it lies below the folder now; nothing when it is nowhere."""
        target = safe_join(self.folder, name)
        source = self._found_here(name)
        if source is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
            return [path for path in [target, *target.rglob("*")] if path.is_file()]
        identifier = self._on_girder(value)
        if identifier:
            if self._client.girder is None:
                return []
            fetch_file(self._client, Output(f"girder:/{name}?fileId={identifier}", target, None))
            return [target]
        # The path is that of whoever published it. The same path of this account may be another file.
        if PurePosixPath(value).name not in known:
            return []
        return self._from_platform(value, target)

    def _from_platform(self, value: str, target: Path) -> list[Path]:
        try:
            entry = self._client.entry(value)
        except (NotFoundError, PermissionDeniedError):
            return []
        if not entry.exists or entry.is_directory:
            return []
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch_file(self._client, Output(value, target, entry.size))
        return [target]

    def _found_here(self, name: str) -> Path | None:
        """A file or folder of this name, or of one that the platform stores under this name."""
        for folder in self._here:
            for path in sorted(folder.rglob("*")):
                stored = "/".join(stored_name(part) for part in path.relative_to(folder).parts)
                if stored in {name, PurePosixPath(name).name}:
                    return path
        return None
