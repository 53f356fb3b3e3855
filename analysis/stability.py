"""Telling a change from numerical noise: runs are judged by runs.

What the files of reference runs and new runs say goes through one exchange test (`exchange`): numbers point by point,
and by the same door words, header entries, shapes, files that are there or not, points without a number, and digests of
what cannot be read. There is no change without a p value, and the p value is that of the whole judgement.

What the test cannot see, because the references themselves lack it or disagree about it, is listed as not judged
(`outcomes`); with any of that a judgement is *changed* or *not judged*, never *within*.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prefect_biomed.analysis.comparators import Content, Measure, blocks
from prefect_biomed.analysis.comparison import FileGroup, Runs, for_each_file, opened, same_bytes, unread
from prefect_biomed.analysis.effects import Atlas, EffectSize
from prefect_biomed.analysis.exchange import (
    POINT_LEVEL,
    Evidence,
    Found,
    Labellings,
    Scan,
    intraclass_correlation,
    runs_needed,
)
from prefect_biomed.analysis.models import FactDifference, Judgement, Rules, Tolerance, Variability, Verdict
from prefect_biomed.analysis.outcomes import NotJudged, Outcome, Reason
from prefect_biomed.analysis.perturbed import SelfTest, band, points_of, read_mask
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["LEAST_REFERENCES", "Measured", "StabilityTest", "Tested", "judge_runs", "judge_variability", "series_of"]

LEAST_REFERENCES = 3
"""A series of fewer good runs is no baseline."""

FAR = 1000.0
"""Ranges of the references. With too few runs for a p value, nothing closer is called changed."""
_LEAST_FOR_FAR = 5
# Distances between references. A single run that is further away is not called within.
_ODD = 10.0
_MANY_POINTS = 30
_ROUNDING = 1e-12
# Of the points of a measure, so many may have a number in one reference only, as along the edge of a mask.
_WITHOUT_YARDSTICK = 0.01
_MAX_LISTED = 200
_MAX_WORDS = 5

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tested:
    """What the test found for the new runs together.

    Attributes:
        p: Probability of a result at least as extreme when nothing has changed; None when nothing varies.
        smallest_p: The smallest that these numbers of runs can reach.
        points: Points that vary.
        outside: Points at which the new runs stand out, to show where.
        where: Positions of the largest differences.
    """

    p: float | None
    smallest_p: float
    points: int
    outside: int
    where: tuple[int, ...] = ()


class StabilityTest:
    """Judges one measure of new runs by the same measure of reference runs, block by block.

    Args:
        references: Number of reference runs.
        runs: Number of new runs.
        tolerance: Points at which all runs agree within it do not count.
    """

    def __init__(self, references: int, runs: int, *, tolerance: Tolerance | None = None) -> None:
        if references < 1 or runs < 1:
            raise ValueError(f"{references} references and {runs} new runs: at least one of each is needed")
        self._measured = Measured(Labellings(references, runs), tolerance or Tolerance())
        self._references = references

    def add(self, references: Floats, runs: Floats, start: int = 0) -> None:
        """Take in some points.

        Args:
            references: Values of the references, shape (references, points).
            runs: Values of the new runs, shape (runs, points).
            start: Number of the first point.
        """
        self._measured.add(np.concatenate([references, runs]), start)

    def results(self) -> list[Tested]:
        """Judge the new runs.

        Returns:
            One for all of them together.
        """
        measured = self._measured
        evidence = Evidence(measured.labellings)
        for scan in measured.scans:
            evidence.add(scan)
        return [
            Tested(
                p=evidence.p,
                smallest_p=measured.labellings.smallest_p,
                points=measured.numbers.points,
                outside=measured.numbers.outside,
                where=measured.numbers.where,
            )
        ]

    def left_out(self) -> list[float]:
        """Judge each reference by the others.

        Returns:
            For each, the share of the references that are at least as far from the centre of all runs.
        """
        distances = self._measured.numbers.distances()[: self._references]
        return [float(np.mean(distances >= own)) for own in distances]


class Measured:
    """One measure while its points pass by: its numbers, and where it has none.

    Args:
        labellings: The labellings.
        tolerance: Points at which all runs agree within it do not count.
        looks_far: Whether to count the points that are far away, which is wanted where no p value can tell.

    Attributes:
        numbers: The scan of its numbers.
        references_vary: Whether the references differ anywhere.
        runs_that_differ: Which new runs differ from the first reference.
        with_numbers: Points that have a number in some run.
        without_yardstick: Of these, points that have a number in one reference only.
        varying: Points at which the references differ.
        far: Of these, points at which all new runs lie on one side, more than `FAR` ranges of the references away.
    """

    def __init__(self, labellings: Labellings, tolerance: Tolerance, *, looks_far: bool = True) -> None:
        self.labellings, self._tolerance, self._looks_far = labellings, tolerance, looks_far
        self.varying = self.far = 0
        self.numbers, self._gaps = Scan(labellings), Scan(labellings)
        self.references_vary = False
        self.runs_that_differ: NDArray[np.bool_] = np.zeros(labellings.runs, dtype=np.bool_)
        self.with_numbers = self.without_yardstick = 0

    @property
    def scans(self) -> tuple[Scan, Scan]:
        """Its numbers, and where there are none."""
        return self.numbers, self._gaps

    def add(self, values: Floats, start: int = 0) -> None:
        """Take in some points.

        Args:
            values: Shape (runs, points), references first; not all need be finite.
            start: Number of the first point.
        """
        references = self.labellings.references
        with np.errstate(invalid="ignore", over="ignore"):
            total: Floats = values.sum(axis=0)
        given = values
        # One look at a number for each point, and only where that is odd at all of them.
        if not np.isfinite(total).all() and not (finite := np.isfinite(values)).all():
            self._add_gaps(values, finite, start)
            values = _filled(values, finite)
        else:
            self.with_numbers += values.shape[1]
        values = self._within_tolerance(values)
        if not self.references_vary:
            differs = values != values[0]
            self.references_vary = bool(differs[:references].any())
            self.runs_that_differ |= differs[references:].any(axis=1)
        self.numbers.add(values, start, total if values is given else None)
        if self._looks_far:
            self._add_distances(values[:references], values[references:])

    @property
    def odd_runs(self) -> NDArray[np.bool_]:
        """Which new runs are far from all references as a whole, or lack numbers where no reference does."""
        return _odd(self.numbers, self.labellings) | _odd(self._gaps, self.labellings)

    @property
    def is_far(self) -> bool:
        """Whether the new runs are out of all proportion to the references, at most points where these differ."""
        return self.far * 2 > self.varying

    def _add_distances(self, references: Floats, runs: Floats) -> None:
        low, high = references.min(axis=0), references.max(axis=0)
        varies = high > low
        with np.errstate(over="ignore", under="ignore"):
            reach = FAR * (high - low)
            far = (runs.min(axis=0) > high + reach) | (runs.max(axis=0) < low - reach)
        self.varying += int(np.count_nonzero(varies))
        self.far += int(np.count_nonzero(varies & far))

    def _add_gaps(self, values: Floats, finite: NDArray[np.bool_], start: int) -> None:
        references = self.labellings.references
        some = ~finite.all(axis=0)
        for kind in (np.isnan, np.isposinf, np.isneginf):
            found = kind(values[:, some]).astype(np.float64)
            self.references_vary = self.references_vary or bool((found[:references] != found[0]).any())
            self.runs_that_differ |= (found[references:] != found[0]).any(axis=1)
            self._gaps.add(found, start)
        with_number = finite[:references].sum(axis=0)
        self.with_numbers += int(np.count_nonzero(finite.any(axis=0)))
        self.without_yardstick += int(np.count_nonzero((with_number == 1) & finite[references:].any(axis=0)))

    def _within_tolerance(self, values: Floats) -> Floats:
        if self._tolerance.absolute == 0.0 and self._tolerance.relative == 0.0:
            return values
        allowed = self._tolerance.absolute + self._tolerance.relative * np.abs(values).max(axis=0)
        result: Floats = np.where(np.ptp(values, axis=0) <= allowed, values[0], values)
        return result


def _odd(scan: Scan, labellings: Labellings) -> NDArray[np.bool_]:
    """Which new runs are many times further from the nearest reference than any reference is from another."""
    count = labellings.references
    own = np.diag(scan.scatter)
    squares = own[:, np.newaxis] + own - 2.0 * scan.scatter
    widest, nothing = float(squares[:count, :count].max()), _ROUNDING * float(own.sum())
    if widest > nothing and count < _LEAST_FOR_FAR and scan.points < _MANY_POINTS:
        # Few are close together by chance in few numbers.
        return np.zeros(labellings.runs, dtype=np.bool_)
    result: NDArray[np.bool_] = squares[count:, :count].min(axis=1) > max(_ODD**2 * widest, nothing)
    return result


def _filled(values: Floats, finite: NDArray[np.bool_]) -> Floats:
    """Put the mean of the other runs where a run has no number, which treats all runs alike."""
    known = np.where(finite, values, 0.0)
    count = finite.sum(axis=0)
    result: Floats = np.where(finite, values, known.sum(axis=0) / np.maximum(count, 1))
    return result


class _Findings:
    """Collects what is found while the files pass by; what has changed can be said only when all are seen."""

    def __init__(
        self,
        references: Sequence[str],
        runs: Sequence[str],
        labellings: Labellings,
        level: float,
        variability: Variability | None = None,
    ) -> None:
        self.references, self.runs, self.level = references, runs, level
        self.labellings = labellings
        self.atlas: Atlas | None = None
        self.variability = variability
        self.mask = read_mask(variability.mask) if variability and variability.mask else None
        self._clear()

    def _clear(self) -> None:
        count = len(self.references) + len(self.runs)
        self.evidence = Evidence(self.labellings, is_inside=self.variability is not None)
        self.own = SelfTest(len(self.references), self.variability or Variability())
        self.found: list[tuple[Verdict, float]] = []
        self.not_judged: list[NotJudged] = []
        self.environment: list[FactDifference] = []
        self.scatter = np.zeros((count, count))
        self.files = self.measures = self.points = self.outside = 0
        self.varying = 0
        self.far: dict[tuple[str, str], str] = {}

    def of_one_file(self) -> _Findings:
        """Make an empty one for a file by itself."""
        one = copy.copy(self)
        one._clear()
        return one

    def merge(self, other: _Findings) -> None:
        """Take in what was found in one file."""
        self.evidence.merge(other.evidence)
        self.own.merge(other.own)
        self.found += other.found
        self.not_judged += other.not_judged
        self.environment += other.environment[: _MAX_LISTED - len(self.environment)]
        self.scatter += other.scatter
        self.files += other.files
        self.measures += other.measures
        self.points += other.points
        self.outside += other.outside
        self.varying += other.varying
        self.far |= other.far

    def leave(self, file: str, part: str, reason: Reason, detail: str = "") -> None:
        """Note something that is not judged."""
        self.not_judged.append(NotJudged(file=file, part=part, reason=reason, detail=detail))

    def add(self, file: str, measured: Measured, measures: Sequence[Measure], effect: EffectSize) -> None:
        """Take in a measure, all of its points seen."""
        best: Found | None = None
        for scan in measured.scans:
            found = self.evidence.add(scan)
            best = found if best is None or (found is not None and found.size > best.size) else best
        if best is None:
            return
        numbers = measured.numbers
        self.varying += measured.varying > 0
        if measured.is_far:
            self.far[file, measures[0].name] = (
                f"the new runs lie more than {FAR:,.0f} ranges of the references away at {measured.far:,} of "
                f"{measured.varying:,} points"
            )
        self.scatter += numbers.scatter
        self.measures += 1
        self.points += numbers.points
        self.outside += numbers.outside
        verdict = Verdict(
            file=file,
            measure=measures[0].name,
            statistic=best.name,
            points=numbers.points,
            outside=numbers.outside,
            expected=numbers.points * POINT_LEVEL,
            where=tuple(measures[0].where(position) for position in numbers.where),
            effect=effect.result(measures),
        )
        self.found.append((verdict, best.size))

    def add_environment(self, file: str, contents: Sequence[Content]) -> None:
        """Note what made the file and is not what it was: no change of a result, and often its cause."""
        count = len(self.references)
        for field in dict.fromkeys(field for content in contents for field in content.environment):
            values = [content.environment.get(field) for content in contents]
            new = [value for value in values[count:] if value not in values[:count] and value is not None]
            if new and len(self.environment) < _MAX_LISTED:
                said = {"references": values[0] or "absent", "new runs": new[0]}
                self.environment.append(FactDifference(field=f"{file}, {field}", values=said))

    def add_words(self, file: str, said: Mapping[str, Sequence[str | None]]) -> None:
        """Take in what is either equal or not: fields by name, with the value of each run, references first."""
        scan = Scan(self.labellings)
        varying = {field: values for field, values in said.items() if len(set(values)) > 1}
        for values in varying.values():
            kinds = np.array([[value == kind for value in values] for kind in dict.fromkeys(values)], dtype=np.float64)
            scan.add(kinds.T)
        found = self.evidence.add(scan)
        if found is None:
            return
        self.measures += 1
        count = len(self.references)
        apart = {f: v for f, v in varying.items() if not set(v[:count]) & set(v[count:])} or varying
        for field, values in list(apart.items())[:_MAX_WORDS]:
            verdict = Verdict(
                file=file,
                measure=field,
                statistic=found.name,
                reason=_in_words(values[:count], values[count:]),
                fields=len(apart),
            )
            self.found.append((verdict, found.size))


def _in_words(references: Sequence[str | None], runs: Sequence[str | None]) -> str:
    """What the references say of a field, and what the new runs say."""

    def shown(values: Sequence[str | None]) -> str:
        known = list(dict.fromkeys("absent" if value is None else repr(value[:60]) for value in values))
        return known[0] if len(known) == 1 else f"{known[0]} and {len(known) - 1} more"

    whose = "all references" if len(set(references)) == 1 else "the references"
    return f"now {shown(runs)}, in {whose} {shown(references)}"


def judge_runs(
    references: Runs,
    runs: Runs,
    *,
    rules: Rules | None = None,
    level: float = 0.05,
    units: Mapping[str, str] | None = None,
    unit: Literal["run", "series"] | None = None,
    atlas: Path | None = None,
) -> Judgement:
    """Judge new runs together, by the numerical noise of reference runs.

    Each file is read once. As many are judged at a time as there are processors, each with about a quarter of a million
    values of all runs together in memory.

    Args:
        references: Folders of the reference runs, by name.
        runs: Folders of the new runs, by name.
        rules: What is compared and how; sensible ones when None.
        level: Probability of calling something changed when nothing is, for the whole judgement.
        units: Series by name of the run, to tell how alike runs of one series are.
        unit: What is exchanged. `series` where the platform varies from series to series; of each as many runs are used
            as the smallest has. When None, series where these are given, and single runs otherwise.
        atlas: A label image, whose regions get means of every image of its shape; none when None.

    Returns:
        The judgement.

    Raises:
        ConfigurationError: A run has no unit, or one unit holds references and new runs; the atlas is no label image.
    """
    rules = rules or Rules()
    if not references or not runs:
        note = "no run succeeded" if not runs else "there are no reference runs"
        return Judgement(references=len(references), runs=tuple(runs), level=level, note=note)
    # Prefixes keep a run that is named like a reference apart from it.
    old, new = {f"r:{name}": folder for name, folder in references.items()}, {f"n:{n}": f for n, f in runs.items()}
    unit = unit or ("run" if units is None else "series")
    numbers: list[int] | None = None
    if unit == "series":
        old, new, numbers = _of_equal_units(old, new, units or {})
    labellings = Labellings(len(old), len(new), units=numbers)
    findings = _Findings(list(old), list(new), labellings, level)
    findings.atlas = Atlas.read(atlas) if atlas is not None else None
    _judge_files(old | new, rules, findings)
    series = [units.get(run.partition(":")[2], run) for run in old] if units is not None else []
    alike = _alike(findings.scatter, series)
    # With the unit, because it names what there are too few of.
    return _conclude(findings).model_copy(update={"unit": unit, "alike": alike})


def series_of(*runs: Runs) -> dict[str, str]:
    """Tell the series of runs that are named `<series>/<run>`.

    Args:
        *runs: Runs by name.

    Returns:
        Series by name of the run.
    """
    return {name: name.rpartition("/")[0] for named in runs for name in named}


def _alike(scatter: Floats, series: Sequence[str]) -> float | None:
    """Intraclass correlation of the reference runs, of which as many of each series count as the smallest has."""
    places = {name: [place for place, other in enumerate(series) if other == name] for name in dict.fromkeys(series)}
    size = min(map(len, places.values()), default=0)
    chosen = sorted(place for known in places.values() for place in known[:size])
    numbers = [list(places).index(series[place]) for place in chosen]
    return intraclass_correlation(scatter[np.ix_(chosen, chosen)], numbers) if chosen else None


def judge_variability(
    references: Runs,
    runs: Runs,
    *,
    rules: Rules | None = None,
    level: float = 0.05,
    variability: Variability | None = None,
) -> Judgement:
    """Tell whether runs are inside the numerical variability of references that were perturbed on purpose.

    Each new run is ranked by its distance from the centre among the references; the smallest p value counts, times the
    number of new runs. It takes 19 references to call one run outside at a level of 5 %.

    Args:
        references: Folders of the perturbed runs, by name.
        runs: Folders of the new runs, by name.
        rules: What is compared and how; sensible ones when None.
        level: Probability of calling anything outside when it is not.
        variability: The checks; each reference is judged by the others when None.

    Returns:
        The judgement of the run that is furthest out, over all.

    Raises:
        ConfigurationError: The mask cannot be read.
    """
    variability = variability or Variability()
    if not references or not runs:
        return judge_runs(references, runs, rules=rules, level=level).model_copy(update={"question": "inside"})
    old = {f"r:{name}": folder for name, folder in references.items()}
    share = level / len(runs)
    found = []
    for name, folder in runs.items():
        findings = _Findings(list(old), [f"n:{name}"], Labellings(len(old), 1), share, variability)
        _judge_files(old | {f"n:{name}": folder}, rules or Rules(), findings)
        judgement = _conclude(findings)
        failures = findings.own.failures(level) if variability.left_out else None
        if failures is not None and failures > band(len(old), level):
            judgement = _vetoed(judgement, failures)
        found.append(
            judgement.model_copy(update={"left_out_failures": failures, "not_normal": findings.own.not_normal})
        )
    order = [Outcome.CHANGED, Outcome.NOT_JUDGED, Outcome.WITHIN]
    worst = min(
        found, key=lambda judgement: (order.index(judgement.outcome), 1.0 if judgement.p is None else judgement.p)
    )
    return worst.model_copy(
        update={
            "question": "inside",
            "runs": tuple(runs),
            "level": level,
            "p": None if worst.p is None else min(1.0, worst.p * len(runs)),
            "smallest_p": min(1.0, worst.smallest_p * len(runs)),
        }
    )


def _vetoed(judgement: Judgement, failures: int) -> Judgement:
    """Take back a verdict by references that fail their own test."""
    detail = f"{failures} of {judgement.references} are outside the variability of the others"
    left = NotJudged(file="references", reason=Reason.LEFT_OUT, detail=detail)
    return judgement.model_copy(
        update={
            "outcome": Outcome.NOT_JUDGED,
            "changed_files": (),
            "not_judged": (left, *judgement.not_judged),
            "not_judged_files": judgement.files,
        }
    )


def _of_equal_units(
    old: Runs, new: Runs, units: Mapping[str, str]
) -> tuple[dict[str, Path], dict[str, Path], list[int]]:
    """Leave out runs of the larger units, and number the units."""
    unit_of = {run: units.get(run.partition(":")[2]) for run in [*old, *new]}
    # The same name may be given to a reference and a new run; their units must differ all the same.
    if None in unit_of.values() or {unit_of[run] for run in old} & {unit_of[run] for run in new}:
        raise ConfigurationError("Each run needs a series, and no series may hold references and new runs.")
    members = {unit: [run for run in unit_of if unit_of[run] == unit] for unit in dict.fromkeys(unit_of.values())}
    size = min(map(len, members.values()))
    kept = [run for unit in members.values() for run in unit[:size]]
    number = {unit: position for position, unit in enumerate(members)}
    kept_old, kept_new = ({r: f for r, f in side.items() if r in kept} for side in (old, new))
    return kept_old, kept_new, [number[unit_of[run]] for run in [*kept_old, *kept_new]]


def _names(runs: Iterable[str]) -> str:
    return ", ".join(run.partition(":")[2] for run in runs)


def _judge_files(runs: Runs, rules: Rules, findings: _Findings) -> None:
    def judged(group: FileGroup) -> _Findings:
        one = findings.of_one_file()
        _judge_file(group, rules, one)
        return one

    for one in for_each_file(runs, rules, judged):
        findings.merge(one)
    # What cannot be looked at in all runs is no file of theirs yet, and must not be missed among those that are judged.
    left = [unread(folder, rules) for folder in runs.values()]
    for name in sorted(set().union(*left)):
        count = sum(name in names for names in left)
        findings.files += count == len(runs)
        findings.leave(name, "", Reason.ELSEWHERE, f"in {count} of {len(runs)} runs")


def _judge_file(group: FileGroup, rules: Rules, findings: _Findings) -> None:
    findings.files += 1
    everyone = [*findings.references, *findings.runs]
    lacking = [run for run in findings.references if run not in group.paths]
    missing = [run for run in findings.runs if run not in group.paths]
    if lacking or missing:
        presence = ["there" if run in group.paths else None for run in everyone]
        findings.add_words(group.name, {"": presence})
        if lacking and len(missing) < len(findings.runs):
            findings.leave(group.name, "", Reason.ABSENT, f"{len(lacking)} of {len(findings.references)} lack it")
        elif missing and not lacking:
            findings.leave(group.name, "", Reason.MISSING, f"missing in {_names(missing)}")
        return
    if _all_same(group):
        return
    with opened(group, rules) as by_run:
        contents = [by_run[run] for run in everyone]
        before = len(findings.not_judged)
        references_vary, odd = _judge_words(group.name, contents, findings)
        findings.add_environment(group.name, contents)
        for name in dict.fromkeys(name for content in contents for name in content.measures):
            measures = [content.measures.get(name) for content in contents]
            shapes = {measure.shape if measure else None for measure in measures}
            if len(shapes) > 1:
                _judge_shapes(group.name, name, measures, findings)
                continue
            known = [measure for measure in measures if measure]
            _leave_uncommon(group.name, known, findings)
            measured = _judge_measure(group.name, known, rules.tolerance(group.name), findings)
            references_vary = references_vary or measured.references_vary
            reason = Reason.ODD if measured.references_vary else Reason.CONSTANT
            runs = measured.odd_runs if measured.references_vary else measured.runs_that_differ
            if runs.any() and not runs.all():
                odd.append(_Odd(known[0].name, reason, runs))
        if odd and len(findings.not_judged) == before:
            runs = np.any([one.runs for one in odd if one.reason is odd[0].reason], axis=0)
            names = _names(run for run, is_odd in zip(findings.runs, runs, strict=True) if is_odd)
            findings.leave(group.name, odd[0].part if references_vary else "", odd[0].reason, f"differs in {names}")


@dataclass(frozen=True)
class _Odd:
    """Some new runs that are unlike all references in a part of a file, which the test cannot tell from one odd run."""

    part: str
    reason: Reason
    runs: NDArray[np.bool_]


def _all_same(group: FileGroup) -> bool:
    first, *others = group.paths.values()
    return all(same_bytes(first, path) for path in others)


def _judge_words(file: str, contents: Sequence[Content], findings: _Findings) -> tuple[bool, list[_Odd]]:
    """Take in facts and digests, note those that cannot be judged, and tell whether the references vary in any.

    Returns:
        That, and where the references are the same and some new runs are not.
    """
    count = len(findings.references)
    words = [content.words for content in contents]
    first = words[0]
    said = {
        field: [known.get(field) for known in words]
        for field in dict.fromkeys(field for known in words for field in known)
        if any(known.get(field) != first.get(field) for known in words)
    }
    findings.add_words(file, said)
    references_vary, odd = False, []
    for field, values in said.items():
        known, new = set(values[:count]), set(values[count:])
        if len(known) == 1:
            if known & new:
                others = np.array([value not in known for value in values[count:]])
                odd.append(_Odd(field, Reason.CONSTANT, others))
            continue
        references_vary = True
        if new <= known:
            continue
        if not any(field in content.digests for content in contents):
            reason = Reason.ABSENT if None in known else Reason.WORDS
        else:
            reason = Reason.UNREADABLE if any(content.note for content in contents) else Reason.OPAQUE
        findings.leave(file, field, reason, f"{len(known)} kinds in {count} references")
    return references_vary, odd


def _judge_shapes(file: str, name: str, measures: Sequence[Measure | None], findings: _Findings) -> None:
    """Take in numbers that cannot be laid side by side: their shapes are words, and they are not judged."""
    count = len(findings.references)
    shapes = [str(measure.shape) if measure else None for measure in measures]
    findings.add_words(file, {f"shape of {name}": shapes})
    reason = Reason.ABSENT if None in shapes[:count] else Reason.MISSING if None in shapes[count:] else Reason.SHAPE
    findings.leave(file, name, reason, f"{len(set(shapes))} shapes" if reason is Reason.SHAPE else "")


def _leave_uncommon(file: str, measures: Sequence[Measure], findings: _Findings) -> None:
    """Note the points with names that not all runs have, such as rows of a table: that they are there is judged."""
    names = list(dict.fromkeys(name for measure in measures for name in measure.left_out))
    if names:
        references = measures[: len(findings.references)]
        lacking = any(name not in measure.left_out for name in names for measure in references)
        reason = Reason.ABSENT if lacking else Reason.MISSING
        findings.leave(file, measures[0].name, reason, f"{len(names)} of its rows, such as {names[0][:60]}")


def _judge_measure(file: str, measures: Sequence[Measure], tolerance: Tolerance, findings: _Findings) -> Measured:
    measured = Measured(findings.labellings, tolerance, looks_far=findings.labellings.smallest_p > findings.level)
    if findings.variability is not None:
        values = np.stack([points_of(measure, findings.variability, findings.mask) for measure in measures])
        measured.add(values)
        findings.own.add(_filled(values, np.isfinite(values))[: len(findings.references)])
        effect = EffectSize(len(findings.references), len(measures), measures[0], None)
        effect.add(values, 0)
        findings.add(file, measured, measures, effect)
        return measured
    effect = EffectSize(len(findings.references), len(measures), measures[0], findings.atlas)
    for start, values in blocks(measures):
        measured.add(values, start)
        effect.add(values, start)
    findings.add(file, measured, measures, effect)
    if measured.without_yardstick > _WITHOUT_YARDSTICK * measured.with_numbers:
        detail = f"{measured.without_yardstick} of {measured.with_numbers} points"
        findings.leave(file, measures[0].name, Reason.NOT_FINITE, detail)
    return measured


def _conclude(findings: _Findings) -> Judgement:
    labellings, level = findings.labellings, findings.level
    if not findings.files:
        note = "the runs hold no files, or none that the rules compare"
        runs = tuple(run.partition(":")[2] for run in findings.runs)
        return Judgement(references=len(findings.references), runs=runs, level=level, note=note)
    p = findings.evidence.p
    # No labelling can say so much as to be called changed.
    powerless = p is not None and labellings.smallest_p > level
    changed = p is not None and p <= level
    # Where no number of labellings can tell, only what no noise with one peak explains, and in most measures at once.
    may_be_far = powerless and findings.variability is None and len(findings.references) >= _LEAST_FOR_FAR
    far = findings.far if may_be_far and len(findings.far) * 2 > findings.varying else {}
    verdicts = [
        verdict.model_copy(
            update={
                "p": (own := findings.evidence.p_of(size)),
                "changed": own <= level or (verdict.file, verdict.measure) in far,
                "reason": far.get((verdict.file, verdict.measure), verdict.reason),
            }
        )
        for verdict, size in sorted(findings.found, key=lambda found: -found[1])
    ]
    # Only what has no share in a change that was found is still in need of a judgement.
    changed_files = tuple(dict.fromkeys(verdict.file for verdict in verdicts if verdict.changed))
    not_judged = [left for left in findings.not_judged if left.file not in changed_files]
    outcome = Outcome.CHANGED if changed or far else Outcome.NOT_JUDGED if powerless or not_judged else Outcome.WITHIN
    old_units = labellings.units - labellings.new_units
    enough = runs_needed(old_units, labellings.new_units, level)
    return Judgement(
        outcome=outcome,
        references=len(findings.references),
        runs=tuple(run.partition(":")[2] for run in findings.runs),
        level=level,
        units=(old_units, labellings.new_units),
        labellings=len(labellings),
        exact=labellings.is_exact,
        smallest_p=labellings.smallest_p,
        enough=enough,
        environment=tuple(findings.environment),
        files=findings.files,
        tests=findings.measures,
        p=p,
        out_of_proportion=bool(far),
        size=findings.evidence.size,
        verdicts=tuple(verdicts[:_MAX_LISTED]),
        changed_files=changed_files,
        not_judged=tuple(not_judged[:_MAX_LISTED]),
        not_judged_files=len({left.file for left in not_judged}),
        outside_share=findings.outside / findings.points if findings.points else 0.0,
    )
