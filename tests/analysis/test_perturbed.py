from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from prefect_biomed.analysis import Outcome, Reason, Variability, judge_variability
from prefect_biomed.analysis.perturbed import SelfTest, band
from prefect_biomed.clients.errors import ConfigurationError

SHAPE = (12, 12, 12)
Runs = dict[str, Path]
Maker = Callable[..., Runs]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Write runs of one image: a base, noise of a size, and a shift of its inner part."""
    generator = np.random.default_rng(17)
    base = generator.uniform(50, 200, SHAPE)

    def made(group: str, count: int, noise: float, shift: float = 0.0, odd: int = 0, edge: float = 0.0) -> Runs:
        runs = {}
        for number in range(1, count + 1):
            values = base + noise * generator.standard_normal(SHAPE)
            values[4:8, 4:8, 4:8] += shift
            values[0] += edge
            if number <= odd:
                values.flat[number] += 1000.0 * noise
            folder = tmp_path / group / str(number)
            folder.mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "brain.nii")
            runs[f"{group} {number}"] = folder
        return runs

    return made


def test_a_plain_run_is_inside_what_perturbations_do(make: Maker) -> None:
    judgement = judge_variability(make("fuzzy", 19, 0.01), make("plain", 1, 0.0))
    assert judgement.outcome is Outcome.WITHIN
    assert judgement.question == "inside"
    assert judgement.sentence.startswith("within the numerical variability of the 19 reference runs (p = ")
    # It is nearer to the centre than any perturbed run.
    assert judgement.p == pytest.approx(1.0)
    assert judgement.left_out_failures is not None
    assert judgement.left_out_failures <= band(19, 0.05)


def test_a_run_that_is_further_out_than_all_references_is_outside(make: Maker) -> None:
    judgement = judge_variability(make("fuzzy", 19, 0.01), make("plain", 1, 0.0, shift=0.5))
    assert judgement.outcome is Outcome.CHANGED
    assert judgement.p == pytest.approx(0.05)
    assert judgement.changed_files == ("brain.nii",)


def test_few_references_cannot_tell(make: Maker) -> None:
    judgement = judge_variability(make("fuzzy", 10, 0.01), make("plain", 1, 0.0, shift=9.0))
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert "10 perturbed reference runs cannot give a p below 0.091" in judgement.sentence
    assert "19 would do" in judgement.sentence


def test_references_that_fail_their_own_test_veto_the_verdict(make: Maker) -> None:
    references, plain = make("fuzzy", 19, 0.01, odd=8), make("plain", 1, 0.0, shift=0.5)
    judgement = judge_variability(references, plain)
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert judgement.left_out_failures == 8
    assert judgement.not_judged[0].reason is Reason.LEFT_OUT
    assert "the references fail their own test" in judgement.sentence
    judgement = judge_variability(references, plain, variability=Variability(left_out=False))
    assert judgement.left_out_failures is None


def test_what_is_outside_the_mask_does_not_count(make: Maker, tmp_path: Path) -> None:
    mask = np.ones(SHAPE, dtype=np.uint8)
    mask[0] = 0
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / "mask.nii.gz")
    references, plain = make("fuzzy", 19, 0.01), make("plain", 1, 0.01, edge=5.0)
    assert judge_variability(references, plain).outcome is Outcome.CHANGED
    checks = Variability(mask=tmp_path / "mask.nii.gz", smoothing=2.0, normality=True)
    judgement = judge_variability(references, plain, variability=Variability(mask=checks.mask))
    assert judgement.outcome is Outcome.WITHIN
    assert judge_variability(references, plain, variability=checks).not_normal == pytest.approx(0.05, abs=0.05)
    with pytest.raises(ConfigurationError, match="does not exist"):
        judge_variability(references, plain, variability=Variability(mask=tmp_path / "nothing.nii"))


def test_the_self_test_of_normal_references_fails_no_more_often_than_stated() -> None:
    generator = np.random.default_rng(5)
    failures = 0
    for _ in range(100):
        test = SelfTest(10, Variability())
        test.add(generator.standard_normal((10, 300)))
        failures += test.failures(0.05)
    assert failures <= 1000 * 0.05 * 1.3
    assert band(10, 0.05) == 2
