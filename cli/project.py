"""A lab's project: its files, and what is deployed from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from pydantic import BaseModel

from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.files import atomic_write
from prefect_biomed.deployments.setup import PREFIX, credentials_types, save_blocks

__all__ = ["Deployed", "Project", "deploy", "init"]

FILE_NAME = "prefect.yaml"


class Deployed(BaseModel):
    """What became of one deployment.

    Attributes:
        name: `flow/deployment`.
        what: `new`, `same`, or what changed.
        kept: What its users have set and that was left as it is.
    """

    name: str
    what: str
    kept: list[str] = []


class Project(BaseModel):
    """The files of a new project.

    Attributes:
        folder: Where they are.
        written: Names of those that were written.
        kept: Names of those that were there already and were left alone.
    """

    folder: Path
    written: list[str] = []
    kept: list[str] = []


def _packaged() -> dict[str, Any]:
    text = resources.files("prefect_biomed.deployments").joinpath(FILE_NAME).read_text()
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def init(folder: Path, names: Sequence[str] = ("vip-session",)) -> Project:
    """Make a project for a lab: deployments, a parameter file for each, variables of the credentials, a page of help.

    Safe to repeat: a file that is there is left alone.

    Args:
        folder: Where; made when missing.
        names: Names of deployments, such as `vip-session`.

    Returns:
        What was written.

    Raises:
        ConfigurationError: There is no such deployment.
        LocalStorageError: The folder cannot be written to.
    """
    known = {deployment["name"]: deployment for deployment in _packaged()["deployments"]}
    if unknown := sorted(set(names) - set(known)):
        raise ConfigurationError(f"There are no deployments {', '.join(unknown)}. There are {', '.join(known)}.")
    chosen = [known[name] for name in names]
    files = {
        FILE_NAME: _yaml({"name": folder.resolve().name, "pull": [], "deployments": chosen}),
        ".env.example": "\n".join(_variables(chosen)) + "\n",
        "README.md": _help(names),
    } | {f"{name}.yaml": _parameter_file(known[name]) for name in names}
    project = Project(folder=folder)
    for name, text in files.items():
        if (folder / name).exists():
            project.kept.append(name)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as file:
            file.write(text.encode())
        project.written.append(name)
    return project


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice: nobody edits an anchor by hand."""

    def ignore_aliases(self, data: Any) -> bool:
        """Tell that nothing is written as an alias."""
        return True


def _yaml(value: object) -> str:
    return yaml.dump(value, Dumper=_Plain, sort_keys=False)


def _variables(deployments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "# Copy to .env, fill in, and load it before `prefect-biomed deploy`. Never commit that copy."
    tags = {tag for deployment in deployments for tag in deployment["tags"]}
    for platform, kind in credentials_types().items():
        if platform in tags:
            yield f"# {kind.get_description()}"
            for field, about in kind.model_fields.items():
                mark = "" if about.is_required() else "# "
                yield f"{mark}{PREFIX}_{platform.upper()}_{field.upper()}="


def _parameter_file(deployment: Mapping[str, Any]) -> str:
    """Parameters of a flow, those that have to be given first; the rest as comments."""
    from prefect_biomed.cli.running import find_flow

    flow_name = deployment["entrypoint"].rpartition(".")[2].replace("_", "-")
    schema = find_flow(flow_name).parameters
    lines = [f"# {deployment['description']}", f"# prefect-biomed run {flow_name} -f {deployment['name']}.yaml"]
    for name, field in sorted(schema.properties.items(), key=lambda item: item[0] not in schema.required):
        about = " ".join(str(field.get("description") or field.get("title") or "").split())
        lines += ["", f"# {about}"] if about else [""]
        default = json.dumps(field.get("default"))
        lines.append(f"{name}:" if name in schema.required else f"# {name}: {default}")
    return "\n".join(lines) + "\n"


def _help(names: Sequence[str]) -> str:
    first = names[0]
    return f"""# Flows of this lab

    pip install 'prefect-biomed[all]'
    cp .env.example .env                      # fill in, then: set -a; . ./.env; set +a
    prefect-biomed deploy                     # saves credentials, deploys; run it again after each change
    prefect worker start --pool biomed &
    prefect-biomed run {first} -f {first}.yaml --key first

Deploying again keeps parameters, schedules and limits that were set in the user interface.
"""


def deploy(
    file: Path | None = None,
    names: Sequence[str] = (),
    *,
    pool: str = "biomed",
    block: str = "default",
    dry_run: bool = False,
) -> list[Deployed]:
    """Register block types and deployments; what users have set stays.

    Safe to repeat. Default parameters, schedules, the concurrency limit and whether a deployment is paused are those of
    the deployment once it is there; all else follows the file.

    Args:
        file: The deployments; those of the package when None.
        names: Only these; all of the file when empty.
        block: Name under which credentials that the environment describes are saved, as `deployments/setup.py` does.
        pool: Work pool that is made when there is none of this name.
        dry_run: Say what would be done, and do nothing.

    Returns:
        What became of each deployment.

    Raises:
        ConfigurationError: The file is no file of deployments, or Prefect refused it; with what it said.
    """
    path = file or Path(str(resources.files("prefect_biomed.deployments").joinpath(FILE_NAME)))
    wanted = _wanted(path, names)
    with get_client(sync_client=True) as client:
        before = {name: _read(client, name) for name in wanted}
        if dry_run:
            return [Deployed(name=name, what="new" if found is None else "there") for name, found in before.items()]
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        save_blocks(os.environ, block)
        _prefect_deploy(path, names)
        return [_settled(client, name, found) for name, found in before.items()]


def _wanted(path: Path, names: Sequence[str]) -> list[str]:
    try:
        entries = {entry["name"]: entry["entrypoint"] for entry in yaml.safe_load(path.read_text())["deployments"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is no file of deployments ({error}). `prefect-biomed init` makes one."
        ) from error
    if unknown := sorted(set(names) - set(entries)):
        raise ConfigurationError(f"{path} has no deployments {', '.join(unknown)}. It has {', '.join(entries)}.")
    chosen = names or list(entries)
    return [f"{entries[name].rpartition('.')[2].replace('_', '-')}/{name}" for name in chosen]


def _read(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _prefect_deploy(path: Path, names: Sequence[str]) -> None:
    which = [word for name in names for word in ("--name", name)] or ["--all"]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(path), *which]
    # The settings of this process, whatever they come from.
    environment = os.environ | get_current_settings().to_environment_variables(exclude_unset=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ConfigurationError(f"Prefect did not deploy {path}: {(done.stdout + done.stderr).strip()[-2000:]}")


def _settled(client: SyncPrefectClient, name: str, before: DeploymentResponse | None) -> Deployed:
    """Give back to a deployment what its users have set and Prefect's command has replaced."""
    now = _read(client, name)
    if now is None:
        raise BiomedError(f"{name} was deployed and is not there. Somebody may have deleted it; deploy again.")
    if before is None:
        return Deployed(name=name, what="new")
    kept = []
    if _limit(before) != _limit(now):
        client.update_deployment(now.id, DeploymentUpdate(concurrency_limit=_limit(before)))
        kept.append(f"concurrency limit {_limit(before) or 'none'}")
    if before.paused and not now.paused:
        client.pause_deployment(now.id)
        kept.append("paused")
    changed = [field for field in _FOLLOWS_THE_FILE if getattr(before, field) != getattr(now, field)]
    return Deployed(name=name, what=", ".join(changed) or "same", kept=kept)


_FOLLOWS_THE_FILE = ("entrypoint", "description", "tags", "work_pool_name", "work_queue_name", "job_variables")


def _limit(deployment: DeploymentResponse) -> int | None:
    limit = deployment.global_concurrency_limit
    return limit.limit if limit else None
