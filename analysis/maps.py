"""Where an image has changed: one NIfTI map for each changed image, in spreads of the references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from prefect_biomed.analysis.comparators import Measure, blocks
from prefect_biomed.analysis.comparison import FileGroup, Runs, file_groups, opened
from prefect_biomed.analysis.models import Judgement, Rules
from prefect_biomed.clients.files import atomic_write

__all__ = ["write_maps"]

_MAX_MAPS = 4
_MAX_POINTS = 1 << 27


def write_maps(judgement: Judgement, references: Runs, runs: Runs, folder: Path, rules: Rules) -> tuple[Path, ...]:
    """Write where the changed images have changed. Safe to repeat: files appear whole and replace older ones.

    Each voxel holds the mean of the new runs less that of the references, in standard deviations of the references; NaN
    where the references do not vary and the new runs differ; 0 where all agree.

    Args:
        judgement: What has changed.
        references: Folders of the reference runs, by name.
        runs: Folders of the new runs, by name.
        folder: Where the maps go.
        rules: The rules of the judgement.

    Returns:
        The maps of the images that have changed most clearly, at most four.
    """
    wanted = list(dict.fromkeys(v.file for v in judgement.verdicts if v.changed and v.measure == "voxels"))[:_MAX_MAPS]
    if not wanted:
        return ()
    both = {f"r:{name}": path for name, path in references.items()} | {f"n:{name}": path for name, path in runs.items()}
    written = []
    with file_groups(both, rules) as groups:
        for group in groups:
            if group.name not in wanted or set(group.paths) != set(both):
                continue
            image = _map(group, len(references), rules)
            if image is not None:
                target = folder / f"where-{wanted.index(group.name) + 1}.nii"
                with atomic_write(target) as file:
                    file.write(image.to_bytes())
                written.append(target)
    return tuple(sorted(written))


def _map(group: FileGroup, references: int, rules: Rules) -> Any:
    with opened(group, rules) as contents:
        # References come first.
        measures = [content.measures.get("voxels") for _, content in sorted(contents.items(), key=lambda i: i[0] < "r")]
        known = [measure for measure in measures if measure is not None]
        first = known[0] if known else None
        if first is None or len(known) != len(measures) or len(first.shape) < 3 or first.size > _MAX_POINTS:
            return None
        if any(measure.shape != first.shape for measure in known):
            return None
        values = _spreads(known, references)
    affine = _affine(next(iter(group.paths.values())))
    image_type: Any = nibabel.Nifti1Image  # has no types
    image = image_type(values.reshape(first.shape, order="F" if first.order == "F" else "C"), affine)
    image.header["descrip"] = b"change in spreads of the references"
    return image


def _spreads(measures: Sequence[Measure], references: int) -> NDArray[np.float32]:
    found = np.zeros(measures[0].size, dtype=np.float32)
    for start, block in blocks(measures):
        old, new = block[:references], block[references:]
        with np.errstate(all="ignore"):
            difference = new.mean(axis=0) - old.mean(axis=0)
            found[start : start + block.shape[1]] = np.where(
                difference == 0.0, 0.0, np.where((spread := old.std(axis=0, ddof=1)) > 0.0, difference / spread, np.nan)
            )
    return found


def _affine(path: Path) -> NDArray[np.float64]:
    """Where the voxels are in space; voxels of one millimetre when the file does not say."""
    try:
        image: Any = nibabel.load(path)
        return np.asarray(image.affine, dtype=np.float64)
    except (OSError, ValueError, nibabel.filebasedimages.ImageFileError):
        return np.eye(4)
