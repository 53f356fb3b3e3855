from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from itertools import combinations, count, pairwise
from pathlib import Path

import nibabel
import numpy as np
import pytest

from prefect_biomed.analysis import (
    Judgement,
    Outcome,
    Reason,
    Rules,
    StabilityTest,
    Tolerance,
    compare_runs,
    judge_runs,
)
from prefect_biomed.analysis.exchange import Evidence, Labellings, Scan, runs_needed, smallest_p
from prefect_biomed.analysis.stability import Measured
from prefect_biomed.clients.errors import ConfigurationError

REFERENCES = 10
LEVEL = 0.05
NOISE = 1e-6
Noise = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
Runs = dict[str, Path]
Making = Callable[[np.random.Generator], bytes]
Maker = Callable[[str, int, Callable[[np.random.Generator], bytes]], Runs]


NOISES: dict[str, Noise] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "t3": lambda generator, shape: generator.standard_t(3, shape),
    "float32": lambda generator, shape: (
        (np.linspace(50, 200, shape[1]) * (1 + 6e-8 * generator.standard_normal(shape))).astype("f4").astype("f8")
    ),
    "few values": lambda generator, shape: generator.integers(0, 3, shape).astype("f8"),
    "smooth": lambda generator, shape: np.cumsum(generator.standard_normal(shape), axis=1),
    "one odd run": lambda generator, shape: (
        generator.standard_normal(shape) * np.where(np.arange(shape[0]) == 1, 50.0, 1.0)[:, None]
    ),
}


def p_of(measures: list[np.ndarray], labellings: Labellings) -> float:
    """The p value of several measures together, each of shape (runs, points)."""
    evidence = Evidence(labellings)
    for values in measures:
        scan = Scan(labellings)
        scan.add(values)
        evidence.add(scan)
    assert evidence.p is not None
    return evidence.p


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


def metrics(generator: np.random.Generator, side: str = "L", count: int = 4) -> bytes:
    return json.dumps({"x": generator.random(), "side": side, "n": count}).encode()


def array(generator: np.random.Generator, lacking: int = 0) -> bytes:
    values = 100.0 + generator.standard_normal(600)
    values[:lacking] = np.nan
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def all_orders(references: int, runs: int) -> list[list[int]]:
    """The runs in all orders that differ in which of them are the new ones, and so come last."""
    everyone = range(references + runs)
    return [[i for i in everyone if i not in new] + list(new) for new in combinations(everyone, runs)]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("references", "runs"), [(3, 3), (5, 1), (4, 2)])
def test_p_is_exact_whatever_the_noise(noise: str, references: int, runs: int) -> None:
    """Of all the ways in which the same runs may have been called new, a share of at most p has a p value so small."""
    generator = np.random.default_rng([references, runs])
    measures = [NOISES[noise](generator, (references + runs, points)) for points in (1, 40, 300)]
    labellings = Labellings(references, runs)
    found = np.array([p_of([v[order] for v in measures], labellings) for order in all_orders(references, runs)])
    assert labellings.is_exact
    assert len(found) == len(labellings)
    for p in np.unique(found):
        assert np.mean(found <= p) <= p + 1e-12
    assert found.min() >= 1.0 / len(labellings)


def test_p_is_exact_when_series_are_exchanged() -> None:
    generator = np.random.default_rng(6)
    levels = np.repeat(3.0 * generator.standard_normal((6, 50)), 2, axis=0)
    values = levels + generator.standard_normal((12, 50))
    labellings = Labellings(10, 2, units=np.repeat(range(6), 2).tolist())
    found = []
    for last in range(6):
        order = [i for i in range(12) if i // 2 != last] + [2 * last, 2 * last + 1]
        found.append(p_of([values[order]], labellings))
    assert sorted(round(p * 6) for p in found) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="of one size"):
        Labellings(3, 2, units=[0, 0, 1, 1, 1])


def test_a_sample_of_labellings_counts_the_observed_one() -> None:
    labellings = Labellings(20, 20, limit=200)
    assert (len(labellings), labellings.is_exact) == (201, False)
    assert labellings.is_new[0].tolist() == [False] * 20 + [True] * 20
    generator = np.random.default_rng(1)
    values = generator.standard_normal((40, 100))
    values[20:] += 1.0
    assert p_of([values], labellings) == pytest.approx(1 / 201)


@pytest.mark.parametrize(("hidden", "outcome"), [(20, Outcome.NOT_JUDGED), (2, Outcome.WITHIN)])
def test_a_change_where_only_one_reference_has_numbers_is_not_within(
    make: Maker, hidden: int, outcome: Outcome
) -> None:
    def content(factor: float) -> Callable[[np.random.Generator], bytes]:
        number = count()

        def written(generator: np.random.Generator) -> bytes:
            values = 5.0 + NOISE * generator.standard_normal(1000)
            values[:hidden] = factor if next(number) == 0 else np.nan
            file = io.BytesIO()
            np.save(file, values)
            return file.getvalue()

        return written

    judgement = judge_runs(make("a.npy", 5, content(5.0)), make("a.npy", 5, content(35.0)))
    assert judgement.outcome is outcome
    # Along an edge that moves there are always some, and they are few.
    assert [left.reason for left in judgement.not_judged] == [Reason.NOT_FINITE] * (hidden > 10)


@pytest.mark.parametrize(("references", "runs"), [(5, 4), (30, 25)])
def test_a_scan_by_blocks_says_the_same_and_leaves_its_points_alone(references: int, runs: int) -> None:
    generator = np.random.default_rng(8)
    values = np.rint(8.0 * generator.standard_normal((references + runs, 600)))
    values[:, 100:250] = 7.0
    values[references:, 300:303] += 50.0
    before = values.copy()
    labellings = Labellings(references, runs, limit=500)
    whole, parts = Scan(labellings), Scan(labellings)
    whole.add(values)
    for start, stop in pairwise((0, 90, 200, 310, 600)):
        parts.add(values[:, start:stop], start, values[:, start:stop].sum(axis=0))
    assert (values == before).all()
    assert (whole.points, whole.outside) == (parts.points, parts.outside) and whole.points == 450
    assert whole.where == parts.where and set(whole.where[:3]) == {300, 301, 302}
    for name, numbers in whole.statistics().items():
        # The scale of a typical point is that of the first block.
        assert name == "largest" or parts.statistics()[name] == pytest.approx(numbers, abs=1e-9)
    # The statistic grows with the votes that a loop over all labellings counts.
    votes = np.array([_separated(values[is_new], values[~is_new]) for is_new in labellings.is_new])
    by_votes = whole.statistics()["separated points"][np.argsort(votes, kind="stable")]
    assert votes[0] >= 3 and (np.diff(by_votes) >= 0.0).all()
    assert np.unique(by_votes).size == np.unique(votes).size


def _separated(new: np.ndarray, old: np.ndarray) -> int:
    return int(np.count_nonzero((new.min(axis=0) > old.max(axis=0)) | (new.max(axis=0) < old.min(axis=0))))


@pytest.mark.parametrize(("references", "runs"), [(12, 6), (40, 40)])
def test_drawn_labellings_are_different_and_each_is_found(references: int, runs: int) -> None:
    labellings = Labellings(references, runs)
    assert not labellings.is_exact
    assert len({row.tobytes() for row in labellings.is_new}) == len(labellings)
    assert (labellings.find(labellings.is_new.T) == np.arange(len(labellings))).all()
    unknown = np.random.default_rng(4).random((1000, references + runs)) < 0.01
    assert (labellings.find(unknown.T) == -1).all()


CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], None]] = {
    "1 % of the points by 3 spreads": lambda new, generator: np.add.at(
        new, (slice(None), generator.choice(new.shape[1], new.shape[1] // 100, replace=False)), 3.0
    ),
    "all points by half a spread": lambda new, generator: np.add(new, 0.5, out=new),
    "one point by 100 spreads": lambda new, generator: np.add.at(new, (slice(None), 7), 100.0),
    "the spread by 1.5": lambda new, generator: np.multiply(new, 1.5, out=new),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("others", [0, pytest.param(29, marks=pytest.mark.slow)])
def test_changes_are_found_alone_and_among_other_measures(change: str, others: int) -> None:
    generator = np.random.default_rng(11)
    labellings = Labellings(5, 5)
    found = 0
    for _ in range(10):
        measures = [generator.standard_normal((10, 20_000)) for _ in range(others + 1)]
        CHANGES[change](measures[0][5:], generator)
        found += p_of(measures, labellings) <= LEVEL
    assert found >= 9


def test_the_smallest_p_and_the_runs_that_would_do() -> None:
    assert smallest_p(10, 1) == pytest.approx(1 / 11)
    assert smallest_p(5, 5) == pytest.approx(2 / 252)
    assert runs_needed(10, 1, LEVEL) == (2, 19)
    assert runs_needed(3, 3, LEVEL) == (4, 4)


def test_blocks_give_the_same_result_as_the_whole() -> None:
    generator = np.random.default_rng(4)
    runs = generator.standard_normal((8, 1000))
    runs[6:, 123] += 40.0
    runs[0, 3] = np.nan
    whole, parts = StabilityTest(6, 2), StabilityTest(6, 2)
    whole.add(runs[:6], runs[6:])
    for start in range(0, 1000, 300):
        parts.add(runs[:6, start : start + 300], runs[6:, start : start + 300], start)
    (one,), (other,) = whole.results(), parts.results()
    assert (one.points, one.outside, one.where) == (other.points, other.outside, other.where)
    assert one.p == other.p == pytest.approx(1 / 28)
    assert one.where[0] == 123


def test_a_reference_is_ranked_among_the_references() -> None:
    generator = np.random.default_rng(12)
    references = generator.standard_normal((5, 3000))
    references[2] *= 3.0
    test = StabilityTest(5, 1)
    test.add(references, references[:1] + 1.0)
    left_out = test.left_out()
    assert left_out[2] == pytest.approx(0.2)
    assert sorted(round(p * 5) for p in left_out) == [1, 2, 3, 4, 5]


def test_more_of_the_same_is_within_the_noise(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", REFERENCES, volume), make("a.nii", 3, volume))
    assert judgement.outcome is Outcome.WITHIN
    assert judgement.sentence.startswith("within the numerical noise of the 10 reference runs (p = ")
    assert judgement.sentence.endswith("; 1 file judged)")
    assert (judgement.tests, judgement.files, judgement.not_judged) == (1, 1, ())
    assert (judgement.labellings, judgement.exact, judgement.smallest_p) == (286, True, pytest.approx(1 / 286))


def test_a_shift_is_named_with_place_and_number(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", 5, volume), make("a.nii", 2, lambda g: volume(g, shift=1e-4)))
    assert judgement.outcome is Outcome.CHANGED
    assert judgement.changed_files == ("a.nii",)
    assert judgement.sentence.startswith("changed: a.nii, voxels (7600 of 7600 points stand out, most at voxel (")
    assert judgement.sentence.endswith("(p = 0.048)")
    verdict = judgement.verdicts[0]
    assert verdict.where[0].startswith("voxel (")
    assert verdict.p == judgement.p == pytest.approx(1 / 21)


@pytest.mark.parametrize(("references", "runs"), [(5, 1), (10, 1), (3, 3)])
def test_no_change_is_called_and_none_is_ruled_out_where_the_level_is_out_of_reach(
    make: Maker, references: int, runs: int
) -> None:
    old, new = make("a.nii", references, volume), make("a.nii", runs, lambda g: volume(g, shift=1e-4))
    judgement = judge_runs(old, new)
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert f"not judged: {references} reference runs and {runs} new run" in judgement.sentence
    assert "would do" in judgement.sentence


def test_a_change_out_of_all_proportion_is_told_with_too_few_runs_for_a_p(make: Maker) -> None:
    old, new = make("a.nii", 5, volume), make("a.nii", 1, lambda g: volume(g, shift=0.05))
    judgement = judge_runs(old, new)
    assert judgement.outcome is Outcome.CHANGED
    assert judgement.changed_files == ("a.nii",)
    assert judgement.p == pytest.approx(1 / 6)
    assert "more than 1,000 ranges of the references away at 7,600 of 7,600 points" in judgement.sentence
    assert "cannot give a p below 0.17" in judgement.sentence
    assert judge_runs(make("a.nii", 3, volume), new).outcome is Outcome.NOT_JUDGED, "three references may be one branch"
    for name in ("b.nii", "c.nii"):
        for folder, other in zip((old | {"new": new["run 1"]}).values(), make(name, 6, volume).values(), strict=True):
            (folder / name).write_bytes((other / name).read_bytes())
    assert judge_runs(old, new).outcome is Outcome.NOT_JUDGED, "one measure of three may have taken another branch"


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("references", [5, 10])
def test_no_noise_is_out_of_all_proportion(noise: str, references: int) -> None:
    generator = np.random.default_rng(3)
    for _ in range(100):
        measured = Measured(Labellings(references, 1), Tolerance())
        measured.add(NOISES[noise](generator, (references + 1, 500)))
        assert not measured.is_far


def test_a_header_that_was_the_same_is_named(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", 4, volume), make("a.nii", 4, lambda g: volume(g, description="v2")))
    assert judgement.sentence.startswith("changed: a.nii, header descrip (now ")
    assert judgement.p == pytest.approx(2 / 70)


def test_what_was_constant_and_is_not_is_a_change(make: Maker) -> None:
    references = make("a.json", 5, lambda g: b'{"n": [1, 2, 3], "t": "x"}')
    assert judge_runs(references, make("a.json", 2, lambda g: b'{"t": "x", "n": [1, 2, 3]}')).sentence == (
        "within the numerical noise of the 5 reference runs (no difference at all; 1 file judged)"
    )
    judgement = judge_runs(references, make("a.json", 2, lambda g: b'{"n": [1, 2, 4], "t": "x"}'))
    assert judgement.verdicts[0].where == ("$.n[2]",)
    assert judgement.sentence == ("changed: a.json, $.n[*] (1 of 1 points stand out, most at $.n[2]) (p = 0.048)")


def test_a_file_without_noise_from_which_one_run_differs_is_not_judged(make: Maker) -> None:
    references, runs = make("a.json", 5, lambda g: b'{"n": 1}'), make("a.json", 5, lambda g: b'{"n": 1}')
    (runs["run 3"] / "a.json").write_text('{"n": 2}')
    judgement = judge_runs(references, runs)
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert [(left.reason, left.detail) for left in judgement.not_judged] == [(Reason.CONSTANT, "differs in run 3")]
    assert "No change was found in the rest (p = 1)" in judgement.sentence


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("a.txt", lambda g: b"alpha", lambda g: b"beta", Reason.CONSTANT),
        ("a.bin", lambda g: b"\xff\x00a", lambda g: b"\xff\x00b", Reason.CONSTANT),
        ("a.json", lambda g: metrics(g), lambda g: metrics(g, side="R"), Reason.CONSTANT),
        ("a.json", lambda g: metrics(g), lambda g: metrics(g, count=5), Reason.CONSTANT),
        ("a.nii", lambda g: volume(g), lambda g: volume(g, description="other"), Reason.CONSTANT),
        ("a.nii", lambda g: volume(g), lambda g: volume(g, shift=50.0), Reason.ODD),
        ("a.npy", lambda g: array(g), lambda g: array(g, lacking=1), Reason.ODD),
        ("a.npy", lambda g: array(g), lambda g: array(g, lacking=600), Reason.ODD),
    ],
)
def test_what_some_new_runs_have_and_no_reference_shows_is_not_judged(
    make: Maker, name: str, old: Making, new: Making, reason: Reason
) -> None:
    references, runs, odd = make(name, 5, old), make(name, 5, old), make(name, 2, new)
    assert judge_runs(references, runs).outcome is Outcome.WITHIN
    judgement = judge_runs(references, dict(list(runs.items())[:3]) | {f"odd {run}": path for run, path in odd.items()})
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert [(left.reason, left.detail) for left in judgement.not_judged] == [
        (reason, "differs in odd run 1, odd run 2")
    ]


@pytest.mark.parametrize(("references", "runs"), [(3, 5), (4, 4), (10, 5)])
def test_a_run_that_is_far_away_is_told_with_few_references(references: int, runs: int) -> None:
    generator = np.random.default_rng(references)
    measured = Measured(Labellings(references, runs), Tolerance())
    values = generator.standard_normal((references + runs, 500))
    values[-1] += 40.0
    measured.add(values)
    assert measured.odd_runs.tolist() == [False] * (runs - 1) + [True]


@pytest.mark.parametrize("references", [3, 5])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_makes_no_run_odd(noise: str, references: int) -> None:
    labellings = Labellings(references, 5)
    for seed in range(20):
        values = NOISES[noise](np.random.default_rng([seed, references]), (references + 5, 500))
        measured = Measured(labellings, Tolerance())
        measured.add(values)
        assert not measured.odd_runs.any()


def test_missing_and_new_files_are_changes(make: Maker) -> None:
    judgement = judge_runs(make("a.txt", 5, lambda g: b"x"), make("b.txt", 5, lambda g: b"x"))
    assert judgement.changed_files == ("a.txt", "b.txt")
    assert "a.txt (now absent, in all references 'there')" in judgement.sentence


def test_a_file_that_some_runs_lack_is_not_judged(make: Maker) -> None:
    references, runs = make("a.txt", 5, lambda g: b"x"), make("a.txt", 5, lambda g: b"x")
    (runs["run 2"] / "a.txt").unlink()
    judgement = judge_runs(references, runs)
    assert [(left.reason, left.detail) for left in judgement.not_judged] == [(Reason.MISSING, "missing in run 2")]
    (references["run 2"] / "a.txt").unlink()
    assert [left.reason for left in judge_runs(references, runs).not_judged] == [Reason.ABSENT]


@pytest.mark.parametrize(
    ("name", "reason"), [("a.txt", Reason.WORDS), ("a.bin", Reason.OPAQUE), ("a.json", Reason.UNREADABLE)]
)
def test_what_varies_in_the_references_and_cannot_be_measured_is_not_judged(
    make: Maker, name: str, reason: Reason
) -> None:
    def random(generator: np.random.Generator) -> bytes:
        letters = bytes(generator.integers(97, 123, 30).tolist())
        return letters if name == "a.txt" else b"\xff\x00" + letters if name == "a.bin" else b"{" + letters

    references = make(name, 5, random)
    judgement = judge_runs(references, make(name, 5, random))
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert {left.reason for left in judgement.not_judged} == {reason}
    assert judgement.sentence.startswith(f"not judged: 1 of 1 files ({name}, ")
    # What some of the references say themselves is judged by them.
    known = make(name, 5, lambda g: (references["run 1"] / name).read_bytes())
    (known["run 2"] / name).write_bytes((references["run 2"] / name).read_bytes())
    assert not judge_runs(references, known).not_judged


def test_another_word_in_all_new_runs_is_a_change_though_the_references_differ(make: Maker) -> None:
    words = make("a.txt", 5, lambda g: b"alpha")
    (words["run 2"] / "a.txt").write_text("beta")
    judgement = judge_runs(words, make("a.txt", 5, lambda g: b"gamma"))
    assert judgement.sentence.startswith("changed: a.txt, line 1 (now 'gamma', in the references 'alpha' and 1 more)")


def test_another_shape_is_a_change_and_a_varying_one_is_not_judged(make: Maker) -> None:
    def table(generator: np.random.Generator) -> bytes:
        return b"x\n" + b"1.5\n" * int(generator.integers(1, 30))

    fixed = make("a.csv", 5, lambda g: b"x\n1.5\n")
    assert judge_runs(fixed, make("a.csv", 5, lambda g: b"x\n1.5\n2\n")).changed
    judgement = judge_runs(make("a.csv", 5, table), make("a.csv", 5, table))
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert Reason.SHAPE in {left.reason for left in judgement.not_judged}


def test_rows_that_some_runs_lack_are_not_judged(make: Maker) -> None:
    def table(last: float, chance: float) -> Callable[[np.random.Generator], bytes]:
        def written(generator: np.random.Generator) -> bytes:
            rows = [f"r{row},{10 + 0.1 * generator.standard_normal()!r}" for row in range(9)]
            rows += [f"odd,{last!r}"] if generator.random() < chance else []
            return "\n".join(["region,volume", *rows]).encode()

        return written

    references = make("t.csv", 5, table(10.0, 0.5))
    judgement = judge_runs(references, make("t.csv", 5, table(70.0, 0.5)))
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert [(left.part, left.reason) for left in judgement.not_judged] == [("column volume", Reason.ABSENT)]
    assert "such as odd" in judgement.not_judged[0].detail
    complete = make("t.csv", 5, table(10.0, 1.0))
    judgement = judge_runs(complete, make("t.csv", 5, table(10.0, 0.5)))
    assert [left.reason for left in judgement.not_judged] == [Reason.MISSING]
    assert judge_runs(complete, make("t.csv", 5, table(10.0, 0.0))).outcome is Outcome.CHANGED


def test_runs_without_files_are_not_judged(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("1", "2", "3", "4")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "run.log").write_text("started")
    judgement = judge_runs(folders, folders)
    assert judgement.outcome is Outcome.NOT_JUDGED
    assert judgement.sentence == "not judged: the runs hold no files, or none that the rules compare"


@pytest.mark.parametrize("kind", ["a link out of the run", "a link to nothing", "a linked folder", "a pipe"])
def test_what_is_there_and_cannot_be_looked_at_is_not_judged(make: Maker, tmp_path: Path, kind: str) -> None:
    """As in the runs of engines that link to their work, or of git-annex before its files were fetched."""
    references, runs = make("a.txt", 5, lambda g: b"x"), make("a.txt", 5, lambda g: b"x")
    assert judge_runs(references, runs).outcome is Outcome.WITHIN
    for number, run in enumerate([*references.values(), *runs.values()]):
        other, place = tmp_path / f"elsewhere {number}", run / "b.npy"
        if kind == "a linked folder":
            other.mkdir()
        elif kind == "a link out of the run":
            other.write_text(str(number))
        if kind == "a pipe":
            os.mkfifo(place)
        else:
            place.symlink_to(other)
        # Within a run they are met where they lead to.
        (run / "latest").symlink_to(".")
        (run / "again.txt").symlink_to("a.txt")
    judgement = judge_runs(references, runs)
    assert judgement.sentence == "not judged: 1 of 3 files (b.npy: it leads out of the run or is no file)"
    assert "b.npy" in compare_runs(runs).sentence
    assert judge_runs(references, runs, rules=Rules(ignore=("b.*",))).outcome is Outcome.WITHIN


def test_the_order_in_memory_is_no_difference(make: Maker) -> None:
    values = np.arange(1.0, 25.0).reshape(4, 6)

    def array(layout: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.random.Generator], bytes]:
        def content(generator: np.random.Generator) -> bytes:
            buffer = io.BytesIO()
            np.save(buffer, layout(values + 1e-3 * generator.standard_normal(values.shape)))
            return buffer.getvalue()

        return content

    references = make("a.npy", 5, array(np.ascontiguousarray))
    judgement = judge_runs(references, make("a.npy", 5, array(np.asfortranarray)))
    assert judgement.outcome is Outcome.WITHIN
    (largest,) = [verdict.effect.absolute_largest for verdict in judgement.verdicts if verdict.effect]
    assert largest is not None
    assert largest < 0.01


def test_tolerance_forgives(make: Maker) -> None:
    references, shifted = make("a.nii", 5, volume), make("a.nii", 2, lambda g: volume(g, shift=1e-4))
    rules = Rules(tolerances={"*.nii": Tolerance(relative=1e-3)})
    assert judge_runs(references, shifted).outcome is Outcome.CHANGED
    assert judge_runs(references, shifted, rules=rules).outcome is Outcome.WITHIN


def test_without_runs_or_references_there_is_no_judgement(make: Maker) -> None:
    runs = make("b", 2, lambda g: b"x")
    assert judge_runs(runs, {}).sentence == "not judged: no run succeeded"
    assert judge_runs({}, runs).sentence == "not judged: there are no reference runs"


def test_missing_values_in_a_noisy_measure() -> None:
    generator = np.random.default_rng(2)
    runs = generator.standard_normal((10, 50))
    runs[:, 3] = np.nan
    runs[1, 4] = np.nan
    same = StabilityTest(5, 5)
    same.add(runs[:5], runs[5:])
    assert same.results()[0].p != pytest.approx(2 / 252)
    runs[5:, 7] = np.inf
    test = StabilityTest(5, 5)
    test.add(runs[:5], runs[5:])
    assert test.results()[0].p == pytest.approx(2 / 252)


def test_series_are_exchanged_as_a_whole(make: Maker) -> None:
    references, runs = make("a.nii", 6, volume), make("a.nii", 3, volume)
    new = {f"new {name}": folder for name, folder in runs.items()}
    units = {name: str(number // 2) for number, name in enumerate(references)} | dict.fromkeys(new, "now")
    judgement = judge_runs(references, new, units=units)
    assert (judgement.unit, judgement.units, judgement.runs) == ("series", (3, 1), ("new run 1", "new run 2"))
    assert judgement.sentence == (
        "not judged: 3 reference series and 1 new series cannot give a p below 0.25, and the level is 0.05; "
        "4 new series, or 19 reference series, would do"
    )
    with pytest.raises(ConfigurationError, match="needs a series"):
        judge_runs(references, new, units={})


def test_judgements_survive_json(make: Maker) -> None:
    judgement = judge_runs(make("a.nii", 5, volume), make("a.nii", 2, lambda g: volume(g, shift=1.0)))
    assert Judgement.model_validate(json.loads(judgement.model_dump_json())) == judgement


@pytest.mark.parametrize("size", [1e300, 1e-310])
def test_numbers_are_judged_whose_squares_are_no_doubles(tmp_path: Path, size: float) -> None:
    generator = np.random.default_rng(2)

    def runs(side: str, factor: float) -> Runs:
        made = {}
        for number in range(5):
            made[f"run {number}"] = folder = tmp_path / side / str(number)
            folder.mkdir(parents=True)
            np.save(folder / "a.npy", size * factor * (1.0 + 1e-3 * generator.standard_normal(200)))
        return made

    references = runs("references", 1.0)
    assert judge_runs(references, runs("same", 1.0)).p is not None
    changed = judge_runs(references, runs("changed", 1.05))
    assert changed.outcome is Outcome.CHANGED
    assert Judgement.model_validate_json(changed.model_dump_json()).outcome is Outcome.CHANGED
