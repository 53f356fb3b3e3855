"""Parameters of the flows for VIP, and the groups of those that most runs leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, JsonValue

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vip import InputSettings, Outcome, SessionOptions
from prefect_biomed.clients.vip.session_file import VIP_HOME
from prefect_biomed.flows.parameters import CancellableWaiting, Group

__all__ = [
    "Girder",
    "GirderFolder",
    "GirderSession",
    "Outputs",
    "PipelineId",
    "Removal",
    "SessionName",
    "SessionUpload",
    "SessionWaiting",
    "Settings",
    "Status",
    "Upload",
    "VipHome",
    "accepting",
    "chosen",
]


def _folder_of_sessions(path: str) -> str:
    if not path.startswith("/") or {".", ".."} & set(path.split("/")) or not path.isprintable():
        raise ValueError("must be an absolute path on the platform, without . or .. and control characters")
    if not path.strip("/"):
        raise ConfigurationError(
            f"vip_home is {path!r}, the root of the platform, where sessions cannot be: they are removed at the end. "
            f"Give a folder below it that the account may write to, as {VIP_HOME} on VIP."
        )
    return path.rstrip("/")


PipelineId = Annotated[str, Field(min_length=1, pattern=r"\S", title="Pipeline")]
VipHome = Annotated[str, AfterValidator(_folder_of_sessions)]
SessionName = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$", max_length=200, title="Session name")]
Settings = InputSettings
GirderFolder = Annotated[str, Field(pattern=r"^(girder:)?/(collection|user)/[^/]+(/[^/]+)*/?$")]
Status = Literal["Finished", "ExecutionFailed", "Killed"]


class Upload(Group):
    """Which inputs are sent to VIP, and where to."""

    include: tuple[str, ...] = Field(default=(), title="Files to send")
    """Patterns of files to upload, relative to `input_dir`; all when empty."""
    exclude: tuple[str, ...] = Field(default=(), title="Files not to send")
    """Patterns of files not to upload."""
    update_files: bool = Field(default=True, title="Compare what is there already")
    """Whether inputs that are on the platform already are compared with the local files. Else they are taken as they
    are, and one that is not there ends the run."""
    vip_home: VipHome = Field(default=VIP_HOME, title="Folder on VIP")
    """Folder on the platform that holds the folders of sessions, for inputs and outputs."""


class SessionUpload(Upload):
    """Which inputs a session uses, and where the session is kept."""

    inputs_of: Path | None = Field(default=None, title="Inputs of another session")
    """Local folder of another session whose uploaded inputs are used."""
    backup_location: Literal["local", "vip"] | None = Field(default="local", title="Place of the session file")
    """Where the session file is kept, by which the session is resumed: `local`, `vip`, or nowhere when empty."""


class Outputs(Group):
    """Which outputs are downloaded, in which shape, and what counts as success."""

    get_status: tuple[Status, ...] = Field(default=("Finished",), title="Wanted statuses")
    """Statuses whose outputs are downloaded and that count as success."""
    unzip: bool = Field(default=True, title="Unpack archives")
    """Whether archives are replaced by a folder with their content."""
    keep_archives: bool = Field(default=False, title="Keep archives")
    """Whether archives stay beside that folder."""
    strict: bool = Field(default=False, title="Every job has to succeed")
    """Whether a run of which some jobs failed makes the session fail."""
    accept_incomplete: bool = Field(default=False, title="Outputs may lack")
    """Whether a run counts as success although it lacks outputs that the pipeline always has, as to take what there is
    and remove the session."""


class Removal(Group):
    """What is removed from VIP at the end. After a failure everything stays."""

    finish: bool = Field(default=True, title="Remove at the end")
    """Whether the session's folders are removed from the platform at the end."""
    keep_input: bool = Field(default=False, title="Keep inputs")
    """Whether the inputs stay on the platform all the same."""
    keep_output: bool = Field(default=False, title="Keep outputs")
    """Whether the outputs stay on the platform all the same."""
    delete_records: bool = Field(default=False, title="Remove the records of runs too")
    """Whether the platform's records of the runs, with their logs, are removed too. On platforms other than VIP they
    hold the outputs and go with them."""


def chosen(options: SessionOptions, *groups: Outputs | Removal | None) -> SessionOptions:
    """Let parameters of a flow take the place of options.

    Args:
        options: The options as they are.
        *groups: What was given; fields that were left out change nothing.

    Returns:
        The options that count.
    """
    given = {name: getattr(group, name) for group in groups if group for name in group.model_fields_set}
    return options.model_copy(update=given)


def accepting(failed: Sequence[Outcome], options: SessionOptions) -> dict[str, object] | None:
    """Tell by which `outputs` runs that failed would count as success.

    Args:
        failed: What came of them.
        options: By which they were judged.

    Returns:
        The fields to be given; None when no fields make it so.
    """
    accepted = (*options.get_status, *sorted({one.status.value for one in failed} - {*options.get_status}))
    if any(one.unfetched for one in failed) or not {*accepted} <= {*get_args(Status)}:
        return None
    fields: dict[str, object] = {}
    if accepted != options.get_status:
        fields["get_status"] = list(accepted)
    if options.strict and any(one.succeeded_jobs < max(one.jobs, 1) for one in failed):
        fields["strict"] = False
    if any(one.missing for one in failed):
        fields["accept_incomplete"] = True
    return fields


class Girder(Group):
    """Outputs that go to Girder."""

    output: GirderFolder | None = Field(default=None, title="Folder on Girder")
    """Folder on Girder, `/collection/…`, in which the session gets a folder for its outputs, with one in it for each
    run. They go to VIP when empty."""
    metadata: dict[str, JsonValue] = Field(default_factory=dict, title="Metadata of the runs")
    """Metadata for the folder of each run on Girder."""
    download: bool = Field(default=False, title="Download too")
    """Whether outputs on Girder are downloaded to `output_dir` too."""


class GirderSession(Group):
    """A session whose outputs are on Girder."""

    folder: GirderFolder | None = Field(default=None, title="Folder of the session")
    """Folder of the session on Girder; enough alone when its outputs are there."""
    download: bool = Field(default=False, title="Download too")
    """Whether outputs on Girder are downloaded too, also when they were not wanted before."""


class SessionWaiting(CancellableWaiting):
    """Whether and how long to wait for capacity and for the runs, and what a cancellation does."""

    wait: bool | Literal["suspend"] = Field(default=True, title="Wait for the end")
    """True watches the runs. False launches now; collect later with the deployment vip-collect or vip-resume. `suspend`
    gives the worker slot back after the launch; vip-collect resumes this flow run when all runs have ended. Without a
    schedule of vip-collect nobody does. The time of a suspension does not count for `timeout_seconds`."""
