"""Telling a change from numerical noise.

The idea is that of Chatelain et al., "A numerical variability approach to results stability tests and its application
to neuroimaging" (arXiv 2307.01373): repetitions of a reference give bounds within which results may vary, and the test
is itself tested by leaving each reference out. The statistics are for a handful of references:

- Each point has the prediction interval of Student's t for one more value, `mean ± t(N-1) · spread · sqrt(1 + 1/N)`.
- A measure is changed when one point is further out than all points together allow (Šidák), when more points are
  outside their intervals than the references have outside theirs when each is judged by the others, or when points
  that are constant in all references are not any more. The level is shared among these three.
- The level is shared again (Bonferroni) by all measures and new runs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from prefect_biomed.analysis.comparators import BLOCK, Content, Measure
from prefect_biomed.analysis.comparison import FileGroup, Runs, file_groups, opened
from prefect_biomed.analysis.models import Judgement, Rules, Tolerance, Verdict

__all__ = ["LEAST_REFERENCES", "StabilityTest", "Tested", "judge_runs"]

LEAST_REFERENCES = 3
"""With fewer the spread of a point is not known well enough to test anything."""

_POINT_LEVEL = 0.01
# Shares of the level: extreme points, number of points outside, points that were constant.
_EXTREME, _COUNT, _CONSTANT = 0.45, 0.45, 0.10
# Below this the number of points outside is too coarse a measure.
_LEAST_EXPECTED = 10.0
_MAX_WHERE = 5
_MAX_VERDICTS = 200

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tested:
    """What the test found for one run.

    Attributes:
        p: Probability of a result at least as extreme when nothing has changed; None when nothing could be tested.
        points: Points that vary in the references.
        outside: Points outside their prediction interval.
        constant_changed: Points that are constant in the references and not here.
        where: Positions of the largest deviations.
    """

    p: float | None
    points: int
    outside: int
    constant_changed: int
    where: tuple[int, ...] = ()


class _Counts:
    """What is counted for one run while its points pass by."""

    def __init__(self) -> None:
        self.points = self.outside = self.odd = 0
        self.extreme = 0.0
        self.largest: list[tuple[float, int]] = []

    def add(self, deviations: Floats, critical: float, positions: NDArray[np.intp] | None = None) -> None:
        self.points += deviations.size
        self.outside += int(np.count_nonzero(deviations > critical))
        self.extreme = max(self.extreme, float(deviations.max(initial=0.0)))
        if positions is not None and deviations.size:
            for index in np.argsort(deviations)[-_MAX_WHERE:]:
                self.largest.append((float(deviations[index]), int(positions[index])))
            self.largest = heapq.nlargest(_MAX_WHERE, self.largest)

    def add_odd(self, positions: NDArray[np.intp]) -> None:
        self.odd += positions.size
        self.largest += [(math.inf, int(index)) for index in positions[:_MAX_WHERE]]
        self.largest = heapq.nlargest(_MAX_WHERE, self.largest)


class StabilityTest:
    """Judges one measure of new runs by the same measure of reference runs, block by block.

    Args:
        references: Number of reference runs, at least three.
        runs: Number of new runs.
        point_level: Level of the prediction interval of each point.
        tolerance: Deviations from the mean of the references within it never count.
    """

    def __init__(
        self, references: int, runs: int, *, point_level: float = _POINT_LEVEL, tolerance: Tolerance | None = None
    ) -> None:
        if references < LEAST_REFERENCES:
            raise ValueError(f"{references} references, at least {LEAST_REFERENCES} are needed")
        self.point_level = point_level
        self._references = references
        self._tolerance = tolerance or Tolerance()
        self._critical = float(stats.t.isf(point_level / 2, references - 1))
        self._critical_left_out = float(stats.t.isf(point_level / 2, references - 2))
        self._new = [_Counts() for _ in range(runs)]
        self._left_out = [_Counts() for _ in range(references)]

    def add(self, references: Floats, runs: Floats, start: int = 0) -> None:
        """Take in some points.

        Args:
            references: Values of the references, shape (references, points).
            runs: Values of the new runs, shape (runs, points).
            start: Number of the first point.
        """
        first = references[0]
        constant = ((references == first) | (np.isnan(references) & np.isnan(first))).all(axis=0)
        testable = ~constant & np.isfinite(references).all(axis=0)
        positions = np.flatnonzero(testable)
        sample = references[:, testable]
        mean = sample.mean(axis=0)
        spread = sample.std(axis=0, ddof=1) * math.sqrt(1.0 + 1.0 / self._references)
        for counts, run in zip(self._new, runs, strict=True):
            same = (run == first) | (np.isnan(run) & np.isnan(first)) | self._tolerated(run, first)
            counts.add_odd(np.flatnonzero(constant & ~same) + start)
            values = run[testable]
            with np.errstate(invalid="ignore"):
                deviations = np.abs(values - mean) / spread
            deviations[~np.isfinite(values)] = math.inf
            deviations[self._tolerated(values, mean)] = 0.0
            counts.add(deviations, self._critical, positions + start)
        self._leave_out(sample, sample - mean)

    def _tolerated(self, values: Floats, expected: Floats) -> NDArray[np.bool_]:
        if self._tolerance.absolute == 0.0 and self._tolerance.relative == 0.0:
            return np.zeros(values.shape, dtype=np.bool_)
        with np.errstate(invalid="ignore"):
            allowed = self._tolerance.absolute + self._tolerance.relative * np.maximum(abs(values), abs(expected))
            within: NDArray[np.bool_] = np.abs(values - expected) <= allowed
        return within

    def _leave_out(self, sample: Floats, deviations: Floats) -> None:
        """Judge each reference by the others, whose mean and spread follow from those of all."""
        others = self._references - 1
        squares = (deviations**2).sum(axis=0)
        widening = math.sqrt(1.0 + 1.0 / others)
        for number, counts in enumerate(self._left_out):
            own = deviations[number]
            left = squares - own**2 * self._references / others
            # Where one run is all the spread there is, nothing but rounding is left of the difference.
            exact = left <= 1e-8 * squares
            distance = np.abs(own[~exact]) * (self._references / others)
            counts.add(distance / (np.sqrt(left[~exact] / (others - 1)) * widening), self._critical_left_out)
            if not exact.any():
                continue
            rest, value = np.delete(sample[:, exact], number, axis=0), sample[number, exact]
            alike = (rest == rest[0]).all(axis=0)
            counts.odd += int(np.count_nonzero(alike))
            rest, value = rest[:, ~alike], value[~alike]
            spread = rest.std(axis=0, ddof=1) * widening
            counts.add(np.abs(value - rest.mean(axis=0)) / spread, self._critical_left_out)

    def results(self) -> list[Tested]:
        """Judge the new runs.

        Returns:
            One for each.
        """
        odd = sum(counts.odd for counts in self._left_out)
        rates = [_rate(counts) for counts in self._left_out]
        return [
            Tested(
                p=self._p(counts, self._references, odd, rates),
                points=counts.points,
                outside=counts.outside,
                constant_changed=counts.odd,
                where=tuple(position for _, position in counts.largest),
            )
            for counts in self._new
        ]

    def left_out(self) -> list[float | None]:
        """Judge each reference by the others.

        Returns:
            The p value of each; None where nothing could be tested.
        """
        odd = sum(counts.odd for counts in self._left_out)
        rates = [_rate(counts) for counts in self._left_out]
        return [
            self._p(counts, self._references - 1, odd - counts.odd, rates[:number] + rates[number + 1 :])
            for number, counts in enumerate(self._left_out)
        ]

    def _p(self, counts: _Counts, references: int, odd: int, rates: Sequence[float]) -> float | None:
        if not counts.points and not odd:
            return None
        found = [1.0]
        if counts.points:
            single = 2.0 * float(stats.t.sf(counts.extreme, references - 1))
            found.append(-math.expm1(counts.points * math.log1p(-min(single, 1.0 - 1e-16))) / _EXTREME)
        if counts.points * self.point_level >= _LEAST_EXPECTED:
            found.append(self._p_of_count(counts, rates) / _COUNT)
        if counts.odd:
            found.append(float(stats.binom.sf(counts.odd - 1, odd + counts.odd, 1.0 / (references + 1))) / _CONSTANT)
        return min(found)

    def _p_of_count(self, counts: _Counts, rates: Sequence[float]) -> float:
        """Prediction interval of the share of points outside, from the shares of the references left out in turn.

        Neighbouring points are rarely independent, so its spread is taken from the references, not from theory; a few
        references that agree by chance must not make it vanish.
        """
        expected = sum(rates) / len(rates)
        theory = max(expected, self.point_level) * (1.0 - expected) / counts.points
        variance = max(float(np.var(rates, ddof=1)), 0.25 * theory)
        deviation = (_rate(counts) - expected) / math.sqrt(variance * (1.0 + 1.0 / len(rates)))
        return float(stats.t.sf(deviation, len(rates) - 1))


def _rate(counts: _Counts) -> float:
    return counts.outside / counts.points if counts.points else 0.0


class _Findings:
    """Collects verdicts while the files pass by; who has changed can be said only when all tests are counted."""

    def __init__(self, references: Sequence[str], runs: Sequence[str], level: float) -> None:
        self.references, self.runs, self.level = references, runs, level
        self.tested: list[tuple[Verdict, list[float | None]]] = []
        self.certain: list[Verdict] = []
        self.points = self.outside = 0
        self.untestable: list[str] = []

    def certainly(self, file: str, measure: str, run: str, reason: str, **numbers: object) -> None:
        """Note a change that needs no test, because all references agree."""
        known = {"file": file, "measure": measure, "run": run, "reason": reason, **numbers}
        self.certain.append(
            Verdict.model_validate(known | {"level": self.level, "references": len(self.references), "changed": True})
        )


def judge_runs(
    references: Runs, runs: Runs, *, rules: Rules | None = None, level: float = 0.05, minimum: int = LEAST_REFERENCES
) -> Judgement:
    """Judge new runs by the numerical noise of reference runs.

    Args:
        references: Folders of the reference runs, by name. What one of them lacks or says differently is not judged.
        runs: Folders of the new runs, by name.
        rules: What is compared and how; sensible ones when None.
        level: Probability of calling something changed when nothing is, for all tests together.
        minimum: Fewest references with which a measure that varies is tested; at least three.

    Returns:
        The judgement. With too few references it says so as soon as anything differs.
    """
    rules = rules or Rules()
    findings = _Findings(list(references), list(runs), level)
    # Prefixes keep a run that is named like a reference apart from it.
    both = {f"r:{name}": folder for name, folder in references.items()} | {
        f"n:{name}": folder for name, folder in runs.items()
    }
    with file_groups(both, rules) as groups:
        for group in groups:
            _judge_file(group, rules, findings, max(minimum, LEAST_REFERENCES))
    return _conclude(findings)


def _judge_file(group: FileGroup, rules: Rules, findings: _Findings, minimum: int) -> None:
    has_references = [name for name in findings.references if f"r:{name}" in group.paths]
    has_runs = [name for name in findings.runs if f"n:{name}" in group.paths]
    if not has_references:
        for run in has_runs:
            findings.certainly(group.name, "", run, "a file that no reference has")
        return
    if len(has_references) < len(findings.references):
        return
    for run in findings.runs:
        if run not in has_runs:
            findings.certainly(group.name, "", run, "missing, and all references have it")
    with opened(group, rules) as contents:
        base = [contents[f"r:{name}"] for name in findings.references]
        new = {run: contents[f"n:{run}"] for run in has_runs}
        _judge_facts(group.name, base, new, findings)
        for name in base[0].measures:
            known = [content.measures.get(name) for content in base]
            first = base[0].measures[name]
            if any(measure is None or measure.shape != first.shape for measure in known):
                continue
            fitting = {}
            for run, content in new.items():
                measure = content.measures.get(name)
                if measure is None or measure.shape != first.shape:
                    shape = "absent" if measure is None else f"of shape {measure.shape}"
                    findings.certainly(group.name, name, run, f"{shape}, in all references of shape {first.shape}")
                else:
                    fitting[run] = measure
            if fitting:
                stack = [measure for measure in known if measure is not None]
                _judge_measure(group.name, stack, fitting, rules.tolerance(group.name), findings, minimum)


def _judge_facts(file: str, base: Sequence[Content], new: Mapping[str, Content], findings: _Findings) -> None:
    for field, value in base[0].words.items():
        if any(content.words.get(field) != value for content in base):
            continue
        for run, content in new.items():
            found = content.words.get(field)
            if found != value:
                says = "absent" if found is None else f"now {found[:60]!r}"
                findings.certainly(file, field, run, f"{says}, in all references {value[:60]!r}")


def _judge_measure(
    file: str,
    references: Sequence[Measure],
    runs: Mapping[str, Measure],
    tolerance: Tolerance,
    findings: _Findings,
    minimum: int,
) -> None:
    if len(references) < minimum:
        if _anything_differs([*references, *runs.values()]):
            findings.untestable.append(f"{file}, {references[0].name}")
        return
    test = StabilityTest(len(references), len(runs), tolerance=tolerance)
    for start in range(0, references[0].size, BLOCK):
        stop = start + BLOCK
        test.add(
            np.stack([measure.read(start, stop) for measure in references]),
            np.stack([measure.read(start, stop) for measure in runs.values()]),
            start,
        )
    left_out = test.left_out()
    for run, tested in zip(runs, test.results(), strict=True):
        where = tuple(references[0].where(position) for position in tested.where)
        findings.points += tested.points
        findings.outside += tested.outside
        if tested.p is None:
            if tested.constant_changed:
                reason = (
                    f"{tested.constant_changed} of {references[0].size} points differ, and all "
                    f"{len(references)} references are the same"
                )
                findings.certainly(
                    file, references[0].name, run, reason, constant_changed=tested.constant_changed, where=where
                )
            continue
        verdict = Verdict(
            file=file,
            measure=references[0].name,
            run=run,
            level=findings.level,
            references=len(references),
            points=tested.points,
            point_level=test.point_level,
            outside=tested.outside,
            expected=tested.points * test.point_level,
            constant_changed=tested.constant_changed,
            p=min(1.0, tested.p),
            changed=False,
            where=where,
        )
        findings.tested.append((verdict, left_out))


def _anything_differs(measures: Sequence[Measure]) -> bool:
    for start in range(0, measures[0].size, BLOCK):
        first = measures[0].read(start, start + BLOCK)
        for measure in measures[1:]:
            if not np.array_equal(first, measure.read(start, start + BLOCK), equal_nan=True):
                return True
    return False


def _conclude(findings: _Findings) -> Judgement:
    references = len(findings.references)
    note = ""
    if not findings.runs:
        note = "no run succeeded"
    elif not references:
        note = "there are no reference runs"
    elif references < LEAST_REFERENCES and (findings.untestable or findings.certain):
        what = (findings.untestable + [verdict.file for verdict in findings.certain])[0]
        note = (
            f"{what} differs, but {references} reference runs are too few to tell a change from noise. "
            f"At least {LEAST_REFERENCES} are needed"
        )
    tests = len(findings.tested)
    threshold = findings.level / max(tests, 1)
    false_alarms: set[int] = set()
    verdicts = list(findings.certain)
    # Each reference would have been one run, so its tests are those of one run.
    per_run = max(1, tests // max(len(findings.runs), 1))
    for verdict, left_out in findings.tested:
        wrong = {number for number, p in enumerate(left_out) if p is not None and p <= findings.level / per_run}
        false_alarms |= wrong
        verdicts.append(
            verdict.model_copy(
                update={
                    "changed": verdict.p is not None and verdict.p <= threshold,
                    "level": threshold,
                    "false_positives": len(wrong),
                }
            )
        )
    verdicts.sort(key=lambda verdict: (not verdict.changed, -1.0 if verdict.p is None else verdict.p))
    smallest = min((v.p for v, _ in findings.tested if v.p is not None), default=None)
    changed = dict.fromkeys(verdict.file for verdict in verdicts if verdict.changed)
    return Judgement(
        references=references,
        runs=tuple(findings.runs),
        level=findings.level,
        tests=tests,
        p=None if smallest is None else min(1.0, smallest * tests),
        changed=bool(changed) and not note,
        verdicts=tuple(verdicts[:_MAX_VERDICTS]),
        changed_files=() if note else tuple(changed),
        false_positives=len(false_alarms) if findings.tested else None,
        outside_share=findings.outside / findings.points if findings.points else 0.0,
        note=note,
    )
