"""Tasks between the platforms: what one has derived becomes what the next one works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.tasks._reporting import artifact_key, run_logger, table
from prefect_biomed.tasks.policies import RETRY
from prefect_biomed.tasks.run_names import task_run_named

if TYPE_CHECKING:
    from prefect_biomed.analysis.derived import Slices

__all__ = ["publish_measures", "slice_volume"]


@task(task_run_name=task_run_named("Publish measures"), **RETRY)
def publish_measures(
    files: Sequence[Path],
    images: Sequence[str],
    tables: Mapping[str, Path],
    sites: Mapping[str, Sequence[str]],
    pattern: str = "measures.csv",
) -> dict[str, int]:
    """Turn the measures of images into the tables that federated nodes read: one row for each image.

    Safe to repeat: a table is replaced whole by the same one.

    Args:
        files: Local output files of runs.
        images: Names of the images that were measured. A file belongs to the image whose name its path has.
        tables: CSV file that the node of each site reads.
        sites: Patterns of the images of each site; a table gets all images when its site has no entry.
        pattern: Name of the files that hold measures.

    Returns:
        Number of rows of each table.

    Raises:
        ConfigurationError: A file belongs to no image, an image has no measures, or a site has no images.
    """
    from prefect_biomed.analysis.derived import read_measures, write_table

    rows: dict[str, dict[str, str | float]] = {}
    stems = {image: Path(image).name.removesuffix(".gz").rpartition(".")[0] for image in images}
    for path in sorted(path for path in files if path.match(pattern)):
        owners = [image for image, stem in stems.items() if any(_begins(part, stem) for part in path.parts)]
        if len(owners) != 1:
            raise ConfigurationError(
                f"{path} belongs to {owners or 'none'} of the images. Give them names of their own."
            )
        rows[owners[0]] = {"image": owners[0], **read_measures(path)}
    if missing := sorted(set(images) - rows.keys()):
        raise ConfigurationError(f"There are no measures of {', '.join(missing)} in files named {pattern}.")
    counts = {}
    for site, target in tables.items():
        chosen = [rows[image] for image in sorted(rows) if _at(image, sites.get(site))]
        if not chosen:
            raise ConfigurationError(f"No image is from {site}. The images are {', '.join(sorted(rows))}.")
        write_table(chosen, target)
        counts[site] = len(chosen)
        table(artifact_key("measures", site), [dict(row) for row in chosen], f"Measures of {site}")
        run_logger().info("%d rows for %s in %s", len(chosen), site, target)
    return counts


@task(task_run_name=task_run_named("Slice", "volume"), **RETRY)
def slice_volume(volume: Path, folder: Path) -> Slices:
    """Cut a derived volume into images that can be ingested.

    Safe to repeat: images are replaced by the same ones.

    Args:
        volume: A file nibabel reads, with three dimensions.
        folder: Where the images go.

    Returns:
        The stack.

    Raises:
        ConfigurationError: The file is no volume.
    """
    from prefect_biomed.analysis import derived

    return derived.slice_volume(volume, folder)


def _begins(part: str, stem: str) -> bool:
    """Whether a name is made of an image's name and an addition."""
    return part == stem or part.startswith((f"{stem}_", f"{stem}.", f"{stem}-"))


def _at(image: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(image, pattern) for pattern in patterns)
