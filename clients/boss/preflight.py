"""What is checked, and made where it is missing, before a job is created."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from prefect_biomed.clients.boss import images
from prefect_biomed.clients.boss._keys import CUBOID_X
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.inspection import inspect_sources
from prefect_biomed.clients.boss.models import Channel, UploadSettings
from prefect_biomed.clients.errors import BiomedError, PreflightFailed
from prefect_biomed.clients.texts import logger_of

__all__ = ["create_resources", "hierarchy_levels", "missing_resources", "preflight"]

logger = logger_of(__name__)

Axis: TypeAlias = Literal["x", "y", "z"]

_AXES: tuple[Axis, ...] = ("x", "y", "z")


def preflight(client: BossClient, config: IngestConfig, settings: UploadSettings | None = None) -> Channel:
    """Compare a configuration with what the server has, and look at its sources.

    Args:
        client: Client of the Boss.
        config: To be posted.
        settings: How it will be uploaded. With the policy `fail` for bad sources, each one that is found is a problem;
            otherwise, and without settings, only when nothing can be read.

    Returns:
        The channel that it writes to.

    Raises:
        PreflightFailed: With one sentence for each problem.
    """
    names = config.database
    missing = _missing(client, names.collection, names.experiment, names.channel)
    if missing:
        raise PreflightFailed(f"Ingest into {config.channel_path}", [missing])
    channel = client.channel(names.collection, names.experiment, names.channel)
    problems = _problems(config, channel)
    if not problems:
        # Plugins are another's code and files: they are looked at only for a job that could be made.
        inspection = inspect_sources(config, channel.datatype, settings)
        strict = settings is not None and settings.on_bad_source == "fail"
        problems = [*inspection.problems, *(inspection.holes if strict else ())]
        for hole in inspection.holes:
            logger.warning("%s", hole)
    if problems:
        raise PreflightFailed(f"Ingest into {config.channel_path}", problems)
    if config.client.backend.host != client.host:
        logger.warning(
            "The configuration was written for %s; requests go to %s, the host of the credentials",
            config.client.backend.host,
            client.host,
        )
    if channel.base_resolution != config.ingest_job.resolution:
        logger.warning(
            "The configuration says resolution %d; the Boss writes to the channel's base resolution %d",
            config.ingest_job.resolution,
            channel.base_resolution,
        )
    for note in config.warnings:
        logger.warning("%s", note)
    return channel


def create_resources(
    client: BossClient,
    config: IngestConfig,
    *,
    datatype: str,
    kind: Literal["image", "annotation"] = "image",
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0),
    voxel_unit: str = "nanometers",
    bounds: Mapping[Axis, tuple[int, int]] | None = None,
    time_samples: int | None = None,
    levels: int | None = None,
) -> list[str]:
    """Make collection, coordinate frame, experiment and channel of a configuration where they are missing.

    Endpoints: `GET`, then `POST` to the address of each. Safe to repeat: what exists is left as it is, and has to be
    what was asked for.

    Args:
        client: Client of the Boss.
        config: Names them, and gives the default bounds.
        datatype: dtype of the channel.
        kind: Type of the channel.
        voxel_size: Size of a voxel in x, y, z.
        voxel_unit: Unit of these.
        bounds: Half-open ranges of the coordinate frame; the extent of the job, from 0, by default.
        time_samples: Samples of the experiment; those of the extent by default.
        levels: Resolutions that the experiment is to have; so many as bring its longer side to one cuboid by default.

    Returns:
        What was made, as `kind name`.

    Raises:
        PreflightFailed: A frame of that name or the channel exists and is of another kind; what is missing after it was
            not made.
        PermissionDeniedError: The role `resource-manager` is missing.
        PlatformError: The server refused one.
    """
    names, extent = config.database, config.ingest_job.extent
    ranges = bounds or {"x": (0, extent.x[1]), "y": (0, extent.y[1]), "z": (0, extent.z[1])}
    frame_name = f"{names.experiment}-frame"
    frame: dict[str, Any] = {"voxel_unit": voxel_unit, "description": ""}
    for axis, size in zip(_AXES, voxel_size, strict=True):
        low, high = ranges[axis]
        frame |= {f"{axis}_start": low, f"{axis}_stop": high, f"{axis}_voxel_size": size}
    experiment = {
        "coord_frame": frame_name,
        "num_hierarchy_levels": levels or hierarchy_levels(ranges),
        "hierarchy_method": "isotropic" if len(set(voxel_size)) == 1 else "anisotropic",
        "num_time_samples": time_samples or extent.t[1],
        "description": "",
    }
    channel = {"type": kind, "datatype": datatype, "description": ""}
    made = []
    if client.make(names.collection, about={"description": ""}):
        made.append(f"collection {names.collection}")
    # An experiment that exists has its own frame.
    if not client.exists(names.collection, names.experiment):
        if client.make_frame(frame_name, frame):
            made.append(f"coordinate frame {frame_name}")
        else:
            there = client.frame(frame_name).model_dump()
            _refuse_others(f"The coordinate frame {frame_name}", frame, there, "Choose another name of the experiment")
        if client.make(names.collection, names.experiment, about=experiment):
            made.append(f"experiment {names.experiment}")
    if client.make(names.collection, names.experiment, names.channel, about=channel):
        made.append(f"channel {names.channel}")
    else:
        found = client.channel(names.collection, names.experiment, names.channel).model_dump()
        _refuse_others(f"The channel {config.channel_path}", channel, found, "Choose another channel, or its dtype")
    return made


def missing_resources(client: BossClient, config: IngestConfig) -> list[str]:
    """Tell what `create_resources` would make. It only reads.

    Args:
        client: Client of the Boss.
        config: Names them.

    Returns:
        What is missing, as `kind name`.
    """
    names = config.database
    path = (names.collection, names.experiment, names.channel)
    kinds = ("collection", "experiment", "channel")
    return [f"{kind} {path[number]}" for number, kind in enumerate(kinds) if not client.exists(*path[: number + 1])]


def hierarchy_levels(bounds: Mapping[Axis, tuple[int, int]]) -> int:
    """Tell how many resolutions bring the longer side of a slice to one cuboid.

    Args:
        bounds: Half-open ranges of the coordinate frame.
    """
    longest = max(high - low for low, high in (bounds["x"], bounds["y"]))
    return 1 + max(0, (-(-longest // CUBOID_X) - 1).bit_length())


def _refuse_others(what: str, wanted: Mapping[str, Any], there: Mapping[str, Any], advice: str) -> None:
    differing = [
        f"{what} exists, and its {name} is {there[name]!r}, not {value!r}. {advice}."
        for name, value in wanted.items()
        if name != "description" and there[name] != value
    ]
    if differing:
        raise PreflightFailed(what, differing)


def _problems(config: IngestConfig, channel: Channel) -> list[str]:
    extent = config.ingest_job.extent
    found = []
    for axis, (low, high) in (("x", extent.x), ("y", extent.y), ("z", extent.z)):
        start, stop = channel.bounds[axis]
        if low < start or high > stop:
            found.append(
                f"extent.{axis} [{low}, {high}) leaves the coordinate frame [{start}, {stop}); what lies outside could "
                "never be read."
            )
    if extent.t[1] > channel.time_samples:
        found.append(
            f"extent.t ends at {extent.t[1]}, but the experiment has {channel.time_samples} time samples; the others "
            "could never be read."
        )
    reason = None if config.volumetric else images.check_datatype(channel.datatype)
    if reason:
        found.append(reason[0].upper() + reason[1:] + ".")
    return found


def _missing(client: BossClient, *names: str) -> str | None:
    """The first of collection, experiment and channel that does not exist, in words."""
    for depth, kind in enumerate(("collection", "experiment", "channel")):
        if not client.exists(*names[: depth + 1]):
            return f"There is no {kind} {names[depth]!r}{_nearest(client, names[:depth], names[depth])}"
    return None


def _nearest(client: BossClient, parents: tuple[str, ...], name: str) -> str:
    try:
        there = client.children(*parents)
    except BiomedError:
        return "."
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.4) or sorted(there)[:5]
    return f". The nearest are: {', '.join(near)}." if near else " and no other either. create_resources makes it."
