from __future__ import annotations

import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from prefect_biomed.analysis import compare_runs, judge_runs
from prefect_biomed.analysis.effects import Labels, hausdorff
from prefect_biomed.clients.errors import ConfigurationError


def volumes(folder: Path, name: str, images: list[np.ndarray], affine: np.ndarray | None = None) -> dict[str, Path]:
    made = {}
    for number, voxels in enumerate(images):
        made[f"{name} {number}"] = folder / name / str(number)
        made[f"{name} {number}"].mkdir(parents=True)
        image = nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
        nibabel.save(image, folder / name / str(number) / "a.nii.gz")
    return made


def parcels(side: int = 24, size: int = 4, largest: int = 12_000) -> np.ndarray:
    """Blocks of labels like those of a parcellation, with gaps between their numbers."""
    index = np.arange(side) // size
    count = side // size
    number = (index[:, None, None] * count + index[None, :, None]) * count + index
    return (number * (largest // count**3)).astype("f4")


def test_label_maps_of_many_labels_stored_as_floats_get_dice(tmp_path: Path) -> None:
    one = parcels()
    two = one.copy()
    two[:, :, 4] = two[:, :, 3]
    runs = volumes(tmp_path, "run", [one, one, two])
    (file,) = compare_runs(runs).files
    dice = file.measures[0].dice
    assert dice is not None
    assert len(dice) == 216
    # Of a parcel of 4 x 4 x 4 voxels 16 went to its neighbour.
    assert dice["0"] == pytest.approx(2 * 64 / (64 + 80))
    assert dice["55"] == pytest.approx(2 * 48 / (64 + 48))
    assert dice["110"] == 1.0


def test_what_does_not_vary_has_no_spread_and_no_difference(tmp_path: Path) -> None:
    """The mean of forty times 0.1 is rounded, and not as that of ten is."""
    generator = np.random.default_rng(0)
    base = np.full(600, 0.1) + np.arange(600) / 7
    runs = {}
    for number in range(50):
        runs[f"{number}"] = tmp_path / f"{number}"
        runs[f"{number}"].mkdir()
        exact = base * 1.01 if number >= 40 else base
        np.savez(
            tmp_path / f"{number}" / "a.npz",
            changed=exact,
            noisy=np.concatenate([base, [generator.standard_normal() + (number >= 40) * 50.0]]),
        )
    names = list(runs)
    judgement = judge_runs({n: runs[n] for n in names[:40]}, {n: runs[n] for n in names[40:]})
    effects = {verdict.file: verdict.effect for verdict in judgement.verdicts}
    changed, noisy = effects["a.npz/changed.npy"], effects["a.npz/noisy.npy"]
    assert changed is not None
    assert (changed.differing, changed.spreads, changed.bits_before) == (600, None, None)
    assert "spreads" not in changed.sentence
    assert noisy is not None
    assert (noisy.differing, noisy.points) == (1, 601)


def test_images_of_whole_numbers_are_no_label_maps() -> None:
    labels = Labels(2)
    noise = np.random.default_rng(0).integers(0, 4000, (2, 20_000)).astype(float)
    labels.add(noise)
    assert not labels.labels


def test_dice_of_fifty_runs_needs_no_pairs() -> None:
    base = np.repeat(np.arange(110.0) * 20, 2000)
    block = np.tile(base, (50, 1))
    block[:, 1000:] = np.where(np.arange(50)[:, None] == 7, block[:, :-1000], block[:, 1000:])
    labels = Labels(50)
    began = time.process_time()
    labels.add(block)
    assert labels.dice()["0"] < 1.0 == labels.dice(slice(0, 7))["0"]
    assert time.process_time() - began < 5.0


def test_the_effect_is_that_of_the_change(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    base = generator.uniform(50, 200, (10, 10, 10))
    noisy = [base * (1 + 1e-4 * generator.standard_normal(base.shape)) for _ in range(10)]
    references = volumes(tmp_path, "reference", noisy[:5])
    judgement = judge_runs(references, volumes(tmp_path, "run", [voxels * 1.05 for voxels in noisy[5:]]))
    effect = judgement.verdicts[0].effect
    assert judgement.changed
    assert effect is not None
    assert effect.relative == pytest.approx(0.05, rel=0.02)
    assert effect.absolute == pytest.approx(0.05 * np.median(base), rel=0.05)
    assert effect.digits == pytest.approx(1.3, abs=0.02)
    assert effect.spreads is not None
    assert 400 < effect.spreads < 700
    assert effect.now == pytest.approx(1.05 * (effect.before or 0.0), rel=1e-4)
    assert "; 5 % and 5 %;" in effect.sentence


def test_volumes_and_dice_of_structures_are_told_before_and_now(tmp_path: Path) -> None:
    before = np.zeros((20, 20, 20), "i2")
    before[5:15, 5:15, 5:15] = 17
    now = before.copy()
    now[14] = 0
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    references = volumes(tmp_path, "reference", [before] * 5, affine)
    effect = judge_runs(references, volumes(tmp_path, "run", [now] * 5, affine)).verdicts[0].effect
    assert effect is not None
    assert (effect.volumes_before or {})["17"] == 2000.0
    assert (effect.volumes or {})["17"] == 1800.0
    assert (effect.dice or {})["17"] == pytest.approx(2 * 900 / 1900)
    assert (effect.dice_before or {})["17"] == 1.0
    # One slice of voxels that are 2 mm thick.
    assert effect.hausdorff == {"0": 2.0, "17": 2.0}


def test_regions_of_an_atlas_get_their_means(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    base = generator.uniform(50, 200, (8, 8, 8))
    atlas = np.zeros((8, 8, 8), "u1")
    atlas[:4], atlas[4:] = 3, 9
    nibabel.save(nibabel.Nifti1Image(atlas, np.eye(4)), tmp_path / "atlas.nii.gz")
    noisy = [base + 1e-3 * generator.standard_normal(base.shape) for _ in range(10)]
    for voxels in noisy[5:]:
        voxels[4:] *= 1.1
    references = volumes(tmp_path, "reference", noisy[:5])
    judgement = judge_runs(references, volumes(tmp_path, "run", noisy[5:]), atlas=tmp_path / "atlas.nii.gz")
    effect = judgement.verdicts[0].effect
    assert effect is not None
    moved, still = effect.regions
    assert (moved.label, moved.points) == (9, 256)
    assert moved.relative == pytest.approx(0.1, rel=1e-3)
    assert moved.before == pytest.approx(base[4:].mean(), rel=1e-4)
    assert abs(still.relative or 0.0) < 1e-4


def test_an_atlas_must_be_one(tmp_path: Path) -> None:
    runs = volumes(tmp_path, "run", [np.ones((3, 3, 3)), np.ones((3, 3, 3))])
    with pytest.raises(ConfigurationError, match="is no file"):
        judge_runs(runs, runs, atlas=tmp_path / "none.nii")
    nibabel.save(nibabel.Nifti1Image(np.full((3, 3, 3), 0.5), np.eye(4)), tmp_path / "half.nii")
    with pytest.raises(ConfigurationError, match="is no label image"):
        judge_runs(runs, runs, atlas=tmp_path / "half.nii")


def test_hausdorff_is_the_largest_distance_to_the_other() -> None:
    one, other = np.zeros((2, 30, 30, 30), dtype=bool)
    one[5:10, 5:10, 5:10] = other[5:10, 5:10, 5:10] = True
    other[5, 5, 20] = True
    assert hausdorff(one, other, (1.0, 1.0, 2.0)) == 22.0
    assert hausdorff(other, one, (1.0, 1.0, 2.0)) == 22.0
    assert hausdorff(one, one, (1.0, 1.0, 1.0)) == 0.0
    assert hausdorff(one, np.zeros_like(one), (1.0, 1.0, 1.0)) is None
