from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import stats

from prefect_biomed.analysis import Judgement, Rules, StabilityTest, Tolerance, judge_runs

REFERENCES = 10
LEVEL = 0.05
NOISE = 1e-6
Runs = dict[str, Path]
Maker = Callable[[str, int, Callable[[np.random.Generator], bytes]], Runs]


def band(experiments: int, probability: float) -> tuple[int, int]:
    """The binomial 95 % band."""
    low, high = stats.binom.interval(0.95, experiments, probability)
    return int(low), int(high)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Write the same file in several runs."""
    generator = np.random.default_rng(5)

    def made(name: str, count: int, content: Callable[[np.random.Generator], bytes]) -> Runs:
        group = len(list(tmp_path.iterdir()))
        runs = {f"run {number}": tmp_path / f"{group}" / str(number) for number in range(1, count + 1)}
        for folder in runs.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content(generator))
        return runs

    return made


def volume(generator: np.random.Generator, shift: float = 0.0, description: str = "") -> bytes:
    base = np.linspace(50.0, 200.0, 8000).reshape(20, 20, 20)
    base[:, :, 0] = 0.0
    noise = NOISE * generator.standard_normal(base.shape)
    image = nibabel.Nifti1Image(base * (1.0 + noise) * (1.0 + shift), np.eye(4))
    image.header["descrip"] = description
    return bytes(image.to_bytes())


def brain(path: Path) -> np.ndarray:
    """The voxels that the noisy pipeline of the sandbox keeps, of a real volume."""
    voxels = np.asarray(nibabel.load(path).dataobj, dtype=np.float64)
    total = voxels.copy()
    for axis in range(3):
        total += np.roll(voxels, 1, axis) + np.roll(voxels, -1, axis)
    return voxels[total / 7.0 > voxels.mean()]


@pytest.mark.slow
def test_false_alarms_and_shifts_over_200_experiments(volume: Path) -> None:
    generator = np.random.default_rng(2307)
    voxels = brain(volume)
    spread = NOISE * voxels
    alarms = found = left_out = 0
    for _ in range(200):
        runs = voxels + spread * generator.standard_normal((REFERENCES + 2, voxels.size))
        moved = generator.choice(voxels.size, voxels.size // 100, replace=False)
        runs[-1, moved] += 3.0 * spread[moved]
        test = StabilityTest(REFERENCES, 2)
        test.add(runs[:REFERENCES], runs[REFERENCES:])
        same, shifted = test.results()
        assert same.p is not None
        assert shifted.p is not None
        alarms += same.p <= LEVEL
        found += shifted.p <= LEVEL
        left_out += sum(p is not None and p <= LEVEL for p in test.left_out())
    low, high = band(200, LEVEL)
    assert low <= alarms <= high
    assert found >= 190
    # The references of one experiment share their noise, so this is no binomial; the rate is what the verdict carries.
    assert 0.01 < left_out / (200 * REFERENCES) < 0.08


def documented() -> Iterator[tuple[int, int, float]]:
    """References, points and the share of shifts found, as the documentation states them."""
    text = (Path(__file__).parents[2] / "docs" / "repeatability.md").read_text()
    sizes = [int(size) for size in re.findall(r"(\d+) points", text[text.index("| references |") :])]
    for row in re.findall(r"^\| (\d+) \|((?: \d+ % \|)+)$", text, re.MULTILINE):
        for size, share in zip(sizes, re.findall(r"\d+", row[1]), strict=True):
            yield int(row[0]), size, int(share) / 100


@pytest.mark.parametrize("sizes", [(1000, 3000), pytest.param((10000, 20000), marks=pytest.mark.slow)])
def test_the_documentation_states_how_often_a_shift_is_found(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(3)
    experiments = 60
    cells = [cell for cell in documented() if cell[1] in sizes]
    assert len(cells) == 10
    for references, size, share in cells:
        found = 0
        for _ in range(experiments):
            runs = generator.standard_normal((references + 1, size))
            runs[-1, generator.choice(size, size // 100, replace=False)] += 3.0
            test = StabilityTest(references, 1)
            test.add(runs[:references], runs[references:])
            p = test.results()[0].p
            found += p is not None and p <= LEVEL
        print(f"{references} references, {size} points: {found / experiments:.0%} found, {share:.0%} stated")
        low, high = stats.binom.interval(0.999, experiments, min(max(share, 0.01), 0.99))
        assert low <= found <= high, (references, size)


@pytest.mark.parametrize("references", [3, 5])
def test_few_references_raise_no_more_alarms(references: int) -> None:
    generator = np.random.default_rng(references)
    alarms = 0
    for _ in range(200):
        runs = generator.standard_normal((references + 1, 3000))
        test = StabilityTest(references, 1)
        test.add(runs[:references], runs[references:])
        p = test.results()[0].p
        alarms += p is not None and p <= LEVEL
    assert alarms <= band(200, LEVEL)[1]


def test_neighbours_that_move_together_raise_no_more_alarms() -> None:
    generator = np.random.default_rng(8)
    alarms = 0
    for _ in range(100):
        coarse = generator.standard_normal((REFERENCES + 1, 60))
        runs = np.repeat(coarse, 100, axis=1) + 0.3 * generator.standard_normal((REFERENCES + 1, 6000))
        test = StabilityTest(REFERENCES, 1)
        test.add(runs[:REFERENCES], runs[REFERENCES:])
        p = test.results()[0].p
        alarms += p is not None and p <= LEVEL
    assert alarms <= band(100, LEVEL)[1]


def test_blocks_give_the_same_result_as_the_whole() -> None:
    generator = np.random.default_rng(4)
    runs = generator.standard_normal((7, 1000))
    runs[6, 123] = 40.0
    whole, parts = StabilityTest(6, 1), StabilityTest(6, 1)
    whole.add(runs[:6], runs[6:])
    for start in range(0, 1000, 300):
        parts.add(runs[:6, start : start + 300], runs[6:, start : start + 300], start)
    assert whole.results() == parts.results()
    assert whole.left_out() == parts.left_out()
    assert whole.results()[0].where[0] == 123


def test_leaving_one_out_is_judging_it_by_the_others() -> None:
    generator = np.random.default_rng(12)
    references = generator.standard_normal((5, 3000))
    # Points where one run is odd, and nearly so.
    references[1:, :40] = 1.0
    references[2:, 40:80] = 1.0 + 1e-12 * generator.standard_normal((3, 40))
    test = StabilityTest(5, 1)
    test.add(references, references[:1])
    for number, counts in enumerate(test._left_out):
        alone = StabilityTest(4, 1)
        alone.add(np.delete(references, number, axis=0), references[number : number + 1])
        found = alone.results()[0]
        assert (counts.points, counts.outside, counts.odd) == (found.points, found.outside, found.constant_changed)


def test_an_outlier_in_one_point_is_the_prediction_interval() -> None:
    references = np.array([[1.0], [2.0], [3.0], [4.0]])
    test = StabilityTest(4, 1)
    test.add(references, np.array([[12.0]]))
    deviation = (12.0 - 2.5) / (references.std(ddof=1) * np.sqrt(1.25))
    expected = 2 * stats.t.sf(deviation, 3) / 0.45
    assert test.results()[0].p == pytest.approx(expected)


def test_more_of_the_same_is_within_the_noise(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", REFERENCES, volume), make("a.nii", 3, volume))
    assert not judgement.changed
    assert judgement.sentence.startswith("within the numerical noise of the 10 reference runs (p = ")
    assert (judgement.tests, judgement.false_positives) == (3, 0)


def test_a_shift_is_named_with_place_and_number(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", 5, volume), make("a.nii", 2, lambda g: volume(g, shift=1e-4)))
    assert judgement.changed
    assert judgement.changed_files == ("a.nii",)
    assert judgement.sentence.startswith("changed: a.nii, voxels (7600 of 7600 points outside, 76 expected, p = ")
    assert "differs" not in judgement.sentence
    verdict = judgement.verdicts[0]
    assert (verdict.references, verdict.level) == (5, LEVEL / 2)
    assert verdict.where[0].startswith("voxel (")
    assert verdict.p is not None
    assert verdict.p < 1e-4


def test_a_header_that_was_the_same_is_named(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", 4, volume), make("a.nii", 1, lambda g: volume(g, description="v2")))
    assert judgement.sentence.startswith("changed: a.nii, header descrip (now ")


def test_what_was_constant_and_is_not_is_a_change(make: Maker) -> None:
    references = make("a.json", 4, lambda g: b'{"n": [1, 2, 3], "t": "x"}')
    assert judge_runs(references, make("a.json", 2, lambda g: b'{"t": "x", "n": [1, 2, 3]}')).sentence == (
        "within the numerical noise of the 4 reference runs (no difference at all)"
    )
    judgement = judge_runs(references, make("a.json", 1, lambda g: b'{"n": [1, 2, 4], "t": "x"}'))
    assert judgement.verdicts[0].where == ("$.n[2]",)
    assert judgement.sentence == ("changed: a.json, $.n[*] (1 of 3 points differ, and all 4 references are the same)")


def test_missing_and_new_files_are_changes(make: Maker) -> None:
    judgement = judge_runs(make("a.txt", 3, lambda g: b"x"), make("b.txt", 1, lambda g: b"x"))
    assert judgement.changed_files == ("a.txt", "b.txt")
    assert "missing, and all references have it" in judgement.sentence


def test_what_varies_in_words_among_the_references_is_not_judged(make: Maker) -> None:
    words = make("a.txt", 3, lambda g: b"alpha" if g.random() < 2 else b"")
    (words["run 2"] / "a.txt").write_text("beta")
    assert not judge_runs(words, make("a.txt", 1, lambda g: b"gamma")).changed


def test_tolerance_forgives(make: Maker) -> None:
    references, shifted = make("a.nii", 5, volume), make("a.nii", 1, lambda g: volume(g, shift=1e-4))
    rules = Rules(tolerances={"*.nii": Tolerance(relative=1e-3)})
    assert judge_runs(references, shifted).changed
    assert not judge_runs(references, shifted, rules=rules).changed


def test_too_few_references_are_no_judgement(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", 2, volume), make("a.nii", 1, volume))
    assert not judgement.changed
    assert judgement.sentence == (
        "not judged: a.nii, voxels differs, but 2 reference runs are too few to tell a change from noise. "
        "At least 3 are needed"
    )
    assert judge_runs(make("b", 2, lambda g: b"x"), {}).sentence == "not judged: no run succeeded"


def test_missing_values_in_a_noisy_measure() -> None:
    generator = np.random.default_rng(2)
    runs = generator.standard_normal((6, 50))
    runs[:, 3] = np.nan
    test = StabilityTest(5, 1)
    test.add(runs[:5], runs[5:])
    assert test.results()[0].constant_changed == 0
    runs[5, 7] = np.inf
    test = StabilityTest(5, 1)
    test.add(runs[:5], runs[5:])
    assert test.results()[0].p == 0.0


def test_judgements_survive_json(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", 3, volume), make("a.nii", 1, lambda g: volume(g, shift=1.0)))
    assert Judgement.model_validate(json.loads(judgement.model_dump_json())) == judgement
