"""What pipelines derive from images, made ready for the next platform: measures as a table, volumes as slices."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.files import atomic_write

__all__ = ["Slices", "read_measures", "slice_volume", "write_table"]

Row = Mapping[str, str | float]


class Slices(BaseModel):
    """A volume as a stack of images.

    Attributes:
        folder: Where they are, as `0000.png` and so on.
        width: Pixels in x.
        height: Pixels in y.
        depth: Number of slices.
    """

    model_config = ConfigDict(frozen=True)

    folder: Path
    width: int
    height: int
    depth: int


def read_measures(path: Path) -> dict[str, float]:
    """Read the measures of one image.

    Args:
        path: A CSV file: one row of named columns, or rows of `measure` and `value`.

    Returns:
        The numbers by name; what is no number is left out.

    Raises:
        ConfigurationError: The file has another shape.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and {"measure", "value"} <= rows[0].keys():
        pairs = [(row["measure"], row["value"]) for row in rows]
    elif len(rows) == 1:
        pairs = list(rows[0].items())
    else:
        raise ConfigurationError(
            f"{path} has {len(rows)} rows. Measures of one image are one row, or rows of 'measure' and 'value'."
        )
    return {name: number for name, value in pairs if (number := _number(value)) is not None}


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV. The file appears whole or not at all, since a node may read it at any moment.

    Args:
        rows: Rows with the same columns.
        path: Where it goes.

    Raises:
        ConfigurationError: There are no rows, or their columns differ.
    """
    columns = list(rows[0]) if rows else []
    if not rows or any(list(row) != columns for row in rows):
        raise ConfigurationError(f"The table for {path} has no rows, or rows with different columns.")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def slice_volume(volume: Path, folder: Path) -> Slices:
    """Cut a volume into 8-bit images, one for each z. Safe to repeat.

    Labels of at most 255 are kept as they are; other values are spread over 0 to 255.

    Args:
        volume: A file nibabel reads, with three dimensions.
        folder: Where the images go.

    Returns:
        The stack.

    Raises:
        ConfigurationError: The file is no volume.
    """
    try:
        image: Any = nibabel.load(volume)
        voxels = np.asarray(image.dataobj)
    except Exception as error:  # nibabel raises many kinds for files that are no images
        raise ConfigurationError(f"{volume} is not a volume that can be read: {error}") from error
    if voxels.ndim != 3:
        raise ConfigurationError(f"{volume} has {voxels.ndim} dimensions; three are needed.")
    low, high = float(voxels.min()), float(voxels.max())
    if not (np.issubdtype(voxels.dtype, np.integer) and low >= 0 and high <= 255):
        voxels = np.rint((voxels - low) * (255.0 / ((high - low) or 1.0)))
    folder.mkdir(parents=True, exist_ok=True)
    width, height, depth = voxels.shape
    for z in range(depth):
        with atomic_write(folder / f"{z:04d}.png") as file:
            Image.fromarray(np.ascontiguousarray(voxels[:, :, z].T.astype(np.uint8))).save(file, "PNG")
    return Slices(folder=folder, width=width, height=height, depth=depth)


def _number(value: str | None) -> float | None:
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None
