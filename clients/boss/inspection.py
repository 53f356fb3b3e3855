"""The sources of a job, looked at before it is made: a job takes minutes to fill its queue, a listing takes none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefect_biomed.clients.boss._keys import Position
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.models import UploadSettings
from prefect_biomed.clients.boss.sources import ChunkSource, TileSource, open_source
from prefect_biomed.clients.errors import BiomedError, ConfigurationError, SourceUnreadable

__all__ = ["Inspection", "inspect_sources"]

_MOST_LISTED = 1_000_000
_SHOWN = 3


@dataclass(frozen=True)
class Inspection:
    """What a look at the sources has shown.

    Attributes:
        problems: Nothing could be uploaded, whatever the policy for bad sources: no plugin, no folder, nothing that
            can be read.
        holes: Some sources are missing or bad; the policy decides what becomes of their tiles.
    """

    problems: tuple[str, ...] = ()
    holes: tuple[str, ...] = ()


def inspect_sources(config: IngestConfig, datatype: str, settings: UploadSettings | None = None) -> Inspection:
    """Load the plugins, list the folders, and read the first, the last and a middle tile (chunk) as they will be sent.

    Args:
        config: Configuration of the job.
        datatype: dtype of the channel.
        settings: How tiles will be made.

    Returns:
        What is wrong.
    """
    try:
        source = open_source(config, datatype, settings or UploadSettings())
        missing = _missing(source, config)
    except (ConfigurationError, SourceUnreadable) as error:
        return Inspection((str(error),))
    samples = _samples(config)
    bad = [said for position in samples for said in _unreadable(source, position)]
    if len(bad) == len(samples):
        return Inspection(tuple(dict.fromkeys(bad[:_SHOWN])))
    holes = list(dict.fromkeys(bad))
    if missing:
        names = ", ".join(missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        holes.append(f"{len(missing)} source files are not there: {names}{more}.")
    return Inspection(holes=tuple(holes))


def _missing(source: TileSource | ChunkSource, config: IngestConfig) -> list[str]:
    """Files that are named and not in their folder; each folder is listed once."""
    folders: dict[str, frozenset[str]] = {}
    missing: dict[str, dict[str, Position]] = {}
    if not source.names_files or config.tile_count > _MOST_LISTED:
        return []
    for position in config.positions():
        folder, name = os.path.split(source.path(position))
        if folder not in folders:
            try:
                folders[folder] = frozenset(entry.name for entry in os.scandir(folder or "."))
            except FileNotFoundError:
                folders[folder] = frozenset()
            except OSError as error:
                raise SourceUnreadable(f"{folder}: the folder cannot be listed ({error.strerror}).") from None
        if name not in folders[folder]:
            missing.setdefault(folder, {}).setdefault(name, position)
    # A tile processor may know what to do without a file: the first of each folder tells.
    return [
        str(Path(folder) / name)
        for folder, names in missing.items()
        if any(_unreadable(source, next(iter(names.values()))))
        for name in names
    ]


def _samples(config: IngestConfig) -> list[Position]:
    """The first, a middle and the last tile."""
    size, extent = config.piece_size, config.ingest_job.extent
    spans = ((extent.x, size["x"]), (extent.y, size["y"]), (extent.z, size["z"]), (extent.t, 1))
    ends = [(low // step, (high - 1) // step) for (low, high), step in spans]
    middle = Position(*((first + last) // 2 for first, last in ends))
    first, last = (Position(*indices) for indices in zip(*ends, strict=True))
    return list(dict.fromkeys((first, middle, last)))


def _unreadable(source: TileSource | ChunkSource, position: Position) -> Iterator[str]:
    try:
        source.read(position)
    except BiomedError as error:
        yield str(error)
