"""What a comparison, a judgement and a report say, as frozen models."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prefect_biomed.analysis.outcomes import NotJudged, Outcome

__all__ = [
    "Agreement",
    "Comparison",
    "Effect",
    "Evidence",
    "FactDifference",
    "FileComparison",
    "Judgement",
    "MeasureComparison",
    "PipelineReport",
    "RegionChange",
    "Report",
    "ReportFiles",
    "Rules",
    "RunSummary",
    "SeriesSummary",
    "Tolerance",
    "Variability",
    "Verdict",
]

DEFAULT_IGNORE = (
    "session_data.json",
    ".*",
    "*/.*",
    "*.log",
    "*.log.gz",
    "logs/*",
    "*/logs/*",
    "*.pid",
    "*.part",
    "stdout",
    "stderr",
    "*/stdout",
    "*/stderr",
)
DEFAULT_IGNORE_FIELDS = (
    "*timestamp*",
    "*created_at*",
    "*creation_date*",
    "*creation_time*",
    "*generated_at*",
    "*start_time*",
    "*end_time*",
    "*elapsed*",
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Tolerance(_Frozen):
    """How far two values may be apart and still count as equal: `absolute + relative * |value|`.

    Attributes:
        absolute: In the unit of the values.
        relative: As a fraction of the larger of the two values.
    """

    absolute: Annotated[float, Field(ge=0)] = 0.0
    relative: Annotated[float, Field(ge=0)] = 0.0


@lru_cache(maxsize=1 << 14)
def _matches(field: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a field is among those of patterns; asked anew for the same file of each run."""
    return any(fnmatchcase(field, pattern.lower()) for pattern in patterns)


class Rules(_Frozen):
    """What is compared and how.

    Attributes:
        ignore: Patterns of files that are left out; by default logs, hidden files and the session file.
        ignore_fields: Patterns of fields, columns and header entries that are left out, in any case; by default those
            that hold times. Dates and times in texts are always left out.
        tolerances: Tolerances by pattern of file names; the first that matches counts. None by default.
        volatile: Regular expressions by name, of what in texts is not a change, beside those of
            `analysis.volatile`; what is named `version` is reported as environment.
    """

    ignore: tuple[str, ...] = DEFAULT_IGNORE
    ignore_fields: tuple[str, ...] = DEFAULT_IGNORE_FIELDS
    tolerances: dict[str, Tolerance] = Field(default_factory=dict)
    volatile: dict[str, str] = Field(default_factory=dict)

    @field_validator("volatile")
    @classmethod
    def _compiles(cls, patterns: dict[str, str]) -> dict[str, str]:
        for name, pattern in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {name!r} is no regular expression: {error}") from None
        return patterns

    def ignores(self, name: str) -> bool:
        """Tell whether a file is left out.

        Args:
            name: Its path relative to the run, with `/`.

        Returns:
            Whether a pattern matches.
        """
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def ignores_field(self, field: str) -> bool:
        """Tell whether a field of a file is left out.

        Args:
            field: Its name.

        Returns:
            Whether a pattern matches.
        """
        return _matches(field.lower(), self.ignore_fields)

    def tolerance(self, name: str) -> Tolerance:
        """Find the tolerance of a file.

        Args:
            name: Its path relative to the run, with `/`.

        Returns:
            The first that matches; none at all when nothing does.
        """
        return next((t for pattern, t in self.tolerances.items() if fnmatchcase(name, pattern)), Tolerance())


class Baseline(_Frozen):
    """Which reference runs later ones are judged by, and in which units.

    Attributes:
        name: Its first series, or an absolute folder whose sub-folders are reference runs; when None the first series
            that fits.
        series: How many series it holds.
        unit: What is exchanged: single runs, or whole series, of which it must hold several then.
    """

    name: str | None = None
    series: Annotated[int, Field(ge=1)] = 1
    unit: Literal["run", "series"] = "run"


class Agreement(StrEnum):
    """How far a file agrees in all runs that have it."""

    IDENTICAL = "identical"
    SAME_CONTENT = "same content"
    WITHIN_TOLERANCE = "within tolerance"
    DIFFERENT = "different"
    MISSING = "missing in some runs"

    @property
    def is_agreement(self) -> bool:
        """Whether nothing that counts differs."""
        return self not in (Agreement.DIFFERENT, Agreement.MISSING)


class FactDifference(_Frozen):
    """Something other than a number that is not the same in all runs.

    Attributes:
        field: Header entry, cell, line or JSON path.
        values: Shortened value by run; runs that lack the field are absent.
    """

    field: str
    values: dict[str, str]


class MeasureComparison(_Frozen):
    """Numbers of one image, column or JSON path in all runs.

    Differences are taken over all pairs of runs. A point is one voxel, pixel, cell or element.

    Attributes:
        name: Name of the measure within its file.
        runs: Number of runs behind these numbers.
        points: Number of points of each run.
        differing: Number of points that are not equal in all runs.
        beyond_tolerance: Number of points further apart than the tolerance.
        max_difference: Largest difference of two runs at one point; None when no two can be compared.
        mean_difference: Mean of the absolute differences, points that agree included.
        rmse: Root of the mean square of the differences, points that agree included.
        digits: Decimal digits the runs have in common, the median over the points that differ:
            `-log10(spread / |mean|)`, with the bias of a small number of runs taken out. None when none differ.
        digits_assured: The same as a lower bound that holds with probability and confidence 95 %.
        digits_low: The digits that all but 5 % of the differing points reach.
        dice: For label maps, the smallest Dice coefficient of a run with the labels that most runs have, by label.
        where: The points that are furthest apart, in words.
    """

    name: str
    runs: int
    points: int
    differing: int
    beyond_tolerance: int = 0
    max_difference: float | None = None
    mean_difference: float | None = None
    rmse: float | None = None
    digits: float | None = None
    digits_assured: float | None = None
    digits_low: float | None = None
    dice: dict[str, float] | None = None
    where: tuple[str, ...] = ()


class FileComparison(_Frozen):
    """One file in all runs.

    Attributes:
        name: Path relative to the run; members of archives are named `archive/member`.
        kind: What it is: `NIfTI`, `table`, `JSON`, `image`, `NumPy`, `text`, `binary`.
        agreement: How far it agrees.
        groups: By run, the same letter for the same content.
        digests: SHA-256 of the decompressed content by run.
        missing_in: Runs that lack it.
        facts: What differs other than numbers.
        facts_differing: How many facts differ; `facts` holds the first of them.
        measures: Its numbers, where some differ.
        environment: What differs of that which made the file, such as versions; no difference of the file.
        note: What stood in the way of a closer look.
    """

    name: str
    kind: str
    agreement: Agreement
    groups: dict[str, str]
    digests: dict[str, str]
    missing_in: tuple[str, ...] = ()
    facts: tuple[FactDifference, ...] = ()
    facts_differing: int = 0
    measures: tuple[MeasureComparison, ...] = ()
    environment: tuple[FactDifference, ...] = ()
    note: str = ""


class Comparison(_Frozen):
    """Files of several runs compared with each other.

    Attributes:
        runs: Names of the runs that were compared.
        failed: Names of the runs that failed and so were not.
        files: The files, by name.
        unread: What is in some runs and was not looked at: links that lead out of a run or nowhere, pipes, sockets.
    """

    runs: tuple[str, ...]
    failed: tuple[str, ...] = ()
    files: tuple[FileComparison, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def differing(self) -> tuple[str, ...]:
        """Names of the files that differ or are missing somewhere."""
        return tuple(file.name for file in self.files if not file.agreement.is_agreement)

    @property
    def agreeing_share(self) -> float | None:
        """Fraction of the files that agree in all runs; None without files."""
        return 1.0 - len(self.differing) / len(self.files) if self.files else None

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        over = f"{len(self.runs)} runs" if len(self.runs) != 1 else "1 run"
        failed = f" {len(self.failed)} failed and are left out." if self.failed else ""
        if self.unread:
            named = ", ".join(self.unread[:5]) + (", …" if len(self.unread) > 5 else "")
            failed += f" Not looked at, since they lead out of a run or are no files: {named}."
        if not self.files:
            return f"No files to compare in {over}.{failed}"
        if len(self.runs) < 2:
            return f"Nothing to compare: {over} with {len(self.files)} files.{failed}"
        if not self.differing:
            return f"All {len(self.files)} files agree in all {over}.{failed}"
        named = ", ".join(self.differing[:5]) + (", …" if len(self.differing) > 5 else "")
        return f"{len(self.differing)} of {len(self.files)} files differ over {over}: {named}.{failed}"


class RegionChange(_Frozen):
    """The mean of one region of an atlas.

    Attributes:
        label: Label of the region.
        points: Number of its points.
        before: Mean of the references.
        now: Mean of the new runs.
        relative: Change as a fraction of the mean before; None where that is 0.
        spreads: Change in standard deviations of the references; None where they do not vary.
    """

    label: int
    points: int
    before: float
    now: float
    relative: float | None = None
    spreads: float | None = None


class Effect(_Frozen):
    """How far the means of the new runs are from those of the references, over the points of one measure.

    Attributes:
        points: Number of points with numbers.
        differing: Number of points whose means differ.
        before: Mean of the references over all points.
        now: Mean of the new runs over all points.
        absolute: Median of the differences that are not 0, in the unit of the numbers.
        absolute_largest: The largest of them.
        relative: Median as a fraction of the references' mean.
        relative_largest: The largest of them.
        spreads: Median in standard deviations of the references; None where they do not vary.
        spreads_largest: The largest of them.
        digits: Decimal digits that new runs and references have in common, in the median.
        bias: Agreement: mean over the points of the differences of the means, new less before.
        limits: Agreement: between these lie 95 % of the differences of normal points (Bland and Altman).
        bits_before: Precision: significant bits of the references, `-log2(spread / |mean|)` in the median over the
            points that vary among them; None with one reference, or when none vary.
        bits: The same of the new runs.
        dice: For label maps, the smallest Dice coefficient of a new run with what most references say, by label; those
            that agree least.
        dice_before: The same of the references.
        hausdorff: Of the labels that agree least, how many millimetres the first new run is from the first reference at
            most.
        volumes_before: Mean volume of each label in the references.
        volumes: The same in the new runs.
        regions: Means of the regions of an atlas, those that have changed most first.
    """

    points: int
    differing: int
    before: float | None = None
    now: float | None = None
    absolute: float | None = None
    absolute_largest: float | None = None
    relative: float | None = None
    relative_largest: float | None = None
    spreads: float | None = None
    spreads_largest: float | None = None
    digits: float | None = None
    bias: float | None = None
    limits: tuple[float, float] | None = None
    bits_before: float | None = None
    bits: float | None = None
    dice: dict[str, float] | None = None
    dice_before: dict[str, float] | None = None
    hausdorff: dict[str, float] | None = None
    volumes_before: dict[str, float] | None = None
    volumes: dict[str, float] | None = None
    regions: tuple[RegionChange, ...] = ()

    @property
    def sentence(self) -> str:
        """The size in one sentence."""
        if not self.differing or self.absolute is None:
            return "no difference of means"
        # Of one point the median is the largest.
        is_one = self.differing == 1
        largest = _figures(self.absolute_largest or 0.0, 3)
        said = [largest if is_one else f"{_figures(self.absolute, 3)} in the median and {largest} at most"]
        if self.relative is not None:
            largest = f"{_figures(100 * (self.relative_largest or 0.0))} %"
            said.append(largest if is_one else f"{_figures(100 * self.relative)} % and {largest}")
        if self.spreads is not None:
            largest = f"{_figures(self.spreads_largest or 0.0)} spreads of the references"
            said.append(largest if is_one else f"{_figures(self.spreads)} and {largest}")
        if self.dice and (least := min(self.dice, key=lambda label: (self.dice or {})[label])):
            said.append(f"Dice {self.dice[least]:.3f} for label {least}")
        return "differs by " + "; ".join(said)


def _figures(value: float, digits: int = 2) -> str:
    """So many significant digits, and no exponent for numbers of a usual size: 100, not 1e+02."""
    return f"{float(f'{value:.{digits}g}'):g}"


class Variability(_Frozen):
    """How runs are judged by references that were perturbed on purpose, and the checks of the field on those.

    Attributes:
        mask: Image whose non-zero voxels alone count, in images of its shape; all voxels when None.
        smoothing: Width at half maximum of a Gaussian by which images are smoothed first, in voxels; 0 for none.
        normality: Whether to count the points at which the references fail the test of Shapiro and Wilk at 5 %.
        left_out: Whether references that fail their own test veto the verdict: each is left out and judged point
            by point by a Student's t of the others, corrected for all points, and more of them fail than the binomial
            95 % band of the level allows.
    """

    mask: Path | None = None
    smoothing: Annotated[float, Field(ge=0)] = 0.0
    normality: bool = False
    left_out: bool = True


class Verdict(_Frozen):
    """What one measure of the new runs, all together, says against the reference runs.

    Attributes:
        file: File of the measure.
        measure: Its name within the file; a field, where words differ; empty for the file as a whole.
        statistic: The statistic in which the new runs stand out most.
        p: Probability that anything in the whole judgement is at least as extreme when nothing has changed.
        changed: Whether that is at most the level of the judgement.
        points: Points that vary.
        outside: Points at which the new runs stand out from the references, for their spread. To show where: the test
            makes no use of it.
        expected: Number of points that stand out when nothing has changed and noise is normal.
        where: Places of the largest differences, in words.
        reason: What words say now and said before; empty for numbers.
        fields: Number of fields of the file that differ in the same way.
        effect: How large the difference is; None for words.
    """

    file: str
    measure: str
    statistic: str = ""
    p: float | None = None
    changed: bool = False
    points: int = 0
    outside: int = 0
    expected: float = 0.0
    where: tuple[str, ...] = ()
    reason: str = ""
    fields: int = 1
    effect: Effect | None = None


# Above it single runs of different series are hardly exchangeable.
_ALIKE = 0.1


class Judgement(_Frozen):
    """New runs against reference runs, over all files and measures.

    Attributes:
        outcome: Within, changed or not judged.
        question: Whether the new runs are the `same` as the references, or `inside` the variability of references that
            were perturbed on purpose.
        references: Number of reference runs.
        runs: Names of the new runs.
        level: Probability of a false alarm of the whole judgement.
        unit: What was exchanged: `run` or `series`.
        units: Number of reference and of new units.
        labellings: In how many ways they were exchanged, the observed one counted.
        exact: Whether these are all ways, or a sample.
        smallest_p: The smallest p value that so many units can reach.
        enough: Number of new units that would reach the level with these references, and of references with these
            new units.
        files: Number of files.
        tests: Number of measures, and of files with words, that vary.
        p: Probability of a result at least as extreme when nothing has changed; None when nothing varies.
        out_of_proportion: Whether the change was found without such a p value, which so few units cannot reach: the new
            runs lie more than a thousand ranges of the references away in most of the numbers.
        size: Size of the largest statistic, on the scale of a normal variable; None when nothing varies.
        alike: Intraclass correlation of the reference runs of one series, where these are of several: 0 when they are
            as different as runs of different series, 1 when they are the same. None otherwise.
        left_out_failures: References that fail their own test when left out; None when that was not asked for.
        not_normal: Share of the points at which the references are not normal; None when that was not asked for.
        verdicts: The verdicts, the clearest first.
        changed_files: Files that have changed.
        not_judged: What is not judged, and why; without the files that have changed.
        not_judged_files: In how many files.
        environment: What made the files and is not what it was, such as versions: a value of the references and one of
            the new runs by field.
        outside_share: Fraction of points at which the new runs stand out, over all measures.
        note: Why there is no judgement, where there is none.
    """

    outcome: Outcome = Outcome.NOT_JUDGED
    question: Literal["same", "inside"] = "same"
    references: int
    runs: tuple[str, ...]
    level: float
    unit: Literal["run", "series"] = "run"
    units: tuple[int, int] = (0, 0)
    labellings: int = 0
    exact: bool = True
    smallest_p: float = 1.0
    enough: tuple[int, int] = (0, 0)
    files: int = 0
    tests: int = 0
    p: float | None = None
    out_of_proportion: bool = False
    size: float | None = None
    alike: float | None = None
    left_out_failures: int | None = None
    not_normal: float | None = None
    verdicts: tuple[Verdict, ...] = ()
    changed_files: tuple[str, ...] = ()
    not_judged: tuple[NotJudged, ...] = ()
    not_judged_files: int = 0
    environment: tuple[FactDifference, ...] = ()
    outside_share: float = 0.0
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether something has changed."""
        return self.outcome is Outcome.CHANGED

    @property
    def sentence(self) -> str:
        """`within the numerical noise …`, `changed: …` or `not judged: …`, with what is not judged and why."""
        if self.note:
            return f"not judged: {self.note}"
        if self.changed:
            return f"changed: {self._changes}{self._left('. Not judged: ')}"
        if self.outcome is Outcome.NOT_JUDGED:
            return f"not judged: {self._too_few or self._left('')}{self._rest}"
        found = "no difference at all" if self.p is None else f"p = {probability(self.p)}"
        noise = "noise" if self.question == "same" else "variability"
        return (
            f"within the numerical {noise} of the {self.references} reference runs ({found}; {self._all_files} judged)"
        )

    @property
    def exchanged(self) -> str:
        """What was exchanged in how many ways, and how alike runs of one series are."""
        base, new = self.units
        what = "single runs" if self.unit == "run" else f"whole series, {base} of references and {new} new"
        ways = f"{self.labellings} ways, {'all there are' if self.exact else 'drawn at random'}"
        if self.alike is None:
            alike = (
                "all references are of one series, or nothing varies, so how alike runs of one series are is not known"
            )
        else:
            alike = f"runs of one series are alike with an intraclass correlation of {self.alike:.2f}"
            if self.unit == "run" and self.alike > _ALIKE:
                alike += ", so series differ and the unit of exchange should be the series"
        return f"{what} were exchanged in {ways}; {alike}"

    @property
    def _all_files(self) -> str:
        return "1 file" if self.files == 1 else f"all {self.files} files"

    @property
    def _changes(self) -> str:
        by_file = {verdict.file: verdict for verdict in reversed(self.verdicts) if verdict.changed}
        parts = [_in_words(by_file[name]) for name in self.changed_files[:3] if name in by_file]
        if len(self.changed_files) > 3:
            parts.append(f"and {len(self.changed_files) - 3} more files")
        said = f"p = {probability(self.p or 0.0)}"
        if self.out_of_proportion:
            said = f"no p: {self._too_few}; taken for granted is that the noise has a single peak"
        return f"{'; '.join(parts)} ({said})"

    @property
    def _too_few(self) -> str:
        """Why no p value could be small enough, where none could."""
        if self.p is None or self.smallest_p <= self.level:
            return ""
        what = "runs" if self.unit == "run" else "series"
        base, new = self.units
        if self.question == "inside":
            return (
                f"{base} perturbed reference runs cannot give a p below {probability(self.smallest_p)} for "
                f"{len(self.runs)} new runs, and the level is {self.level:g}; {self.enough[1]} would do"
            )
        return (
            f"{base} reference {what} and {new} new {'run' if (self.unit, new) == ('run', 1) else what} cannot give "
            f"a p below {probability(self.smallest_p)}, and the level is {self.level:g}; {self.enough[0]} new {what}, "
            f"or {self.enough[1]} reference {what}, would do"
        )

    def _left(self, before: str) -> str:
        """How many files are not judged, by reason, with an example of each."""
        if not self.not_judged:
            return ""
        reasons = []
        for reason in dict.fromkeys(left.reason for left in self.not_judged):
            mine = [left for left in self.not_judged if left.reason is reason]
            files = len({left.file for left in mine})
            part = f", {mine[0].part}" if mine[0].part else ""
            more = f" and {files - 1} more" if files > 1 else ""
            reasons.append(f"{mine[0].file}{part}{more}: {reason.value}")
        listed = "; ".join(reasons[:3])
        return f"{before}{self.not_judged_files} of {self.files} files ({listed})"

    @property
    def _rest(self) -> str:
        if self._too_few or self.p is None:
            return ""
        return f". No change was found in the rest (p = {probability(self.p)})"


def probability(p: float) -> str:
    """Write a probability as people read it.

    Args:
        p: From 0 to 1.

    Returns:
        Two digits.
    """
    return f"{p:.2g}"


def _in_words(verdict: Verdict) -> str:
    what = f"{verdict.file}, {verdict.measure}" if verdict.measure else verdict.file
    if verdict.reason:
        more = f", and {verdict.fields - 1} more fields" if verdict.fields > 1 else ""
        return f"{what} ({verdict.reason}{more})"
    at = f", most at {verdict.where[0]}" if verdict.where else ""
    return f"{what} ({verdict.outside} of {verdict.points} points stand out{at})"


class RunSummary(_Frozen):
    """One run as the report shows it.

    Attributes:
        name: Name of the run.
        pipeline: Pipeline and version.
        repetition: Number of the run within its series, from 1.
        execution: Identifier the platform gave.
        status: Status at the end.
        succeeded: Whether it is part of the comparison.
        url: Where it can be looked at; empty when unknown.
        started: When it was started.
        ended: When its results were here.
        message: Why it failed.
    """

    name: str
    pipeline: str
    repetition: int
    execution: str = ""
    status: str = ""
    succeeded: bool = True
    url: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    message: str = ""


class Evidence(_Frozen):
    """Evidence of a lasting change over all series since the baseline, valid whenever it is looked at.

    Attributes:
        value: What there is now; 1 before the first series.
        threshold: Above it an alarm is raised. While nothing changes, the chance that this ever happens is the level.
        alarm: When the series began with which it was raised; None when it was not.
        since: When the series began with which the change most likely began; None without an alarm.
        earliest: The earliest series with which it may have begun, 95 %.
        latest: The latest.
    """

    value: float
    threshold: float
    alarm: datetime | None = None
    since: datetime | None = None
    earliest: datetime | None = None
    latest: datetime | None = None

    @property
    def sentence(self) -> str:
        """The evidence, and the alarm with its date."""
        if self.alarm is None or self.since is None or self.earliest is None or self.latest is None:
            return f"Evidence since the baseline: {_figures(self.value)}; {self.threshold:g} would be an alarm"
        return (
            f"Evidence since the baseline: {_figures(self.value, 3)}, above {self.threshold:g} with the series of "
            f"{self.alarm:%Y-%m-%d}. The change began with the series of {self.since:%Y-%m-%d %H:%M} (95 %: "
            f"{self.earliest:%Y-%m-%d} to {self.latest:%Y-%m-%d})"
        )


class SeriesSummary(_Frozen):
    """One earlier or present series of runs of a pipeline on the time line.

    Attributes:
        series: Name of the series.
        pipeline: Pipeline and version.
        began: When it began.
        judgement: What was found against the baseline; None for the baseline itself.
        evidence: Evidence of a lasting change after it; None for the baseline itself.
    """

    series: str
    pipeline: str
    began: datetime
    judgement: Judgement | None = None
    evidence: float | None = None


class PipelineReport(_Frozen):
    """One pipeline of a series.

    Attributes:
        pipeline: Pipeline and version.
        comparison: Its runs among each other.
        baseline: Name of the series it was judged by; empty when it is the baseline.
        against_baseline: What was found against the baseline.
        against_version: What was found against the first pipeline of the series.
        timeline: All series of this pipeline, oldest first.
        evidence: Evidence of a lasting change over all series since the baseline.
    """

    pipeline: str
    comparison: Comparison
    baseline: str = ""
    against_baseline: Judgement | None = None
    against_version: Judgement | None = None
    timeline: tuple[SeriesSummary, ...] = ()
    evidence: Evidence | None = None

    @property
    def effect(self) -> str:
        """The size of the clearest change against the baseline in one sentence; empty without one."""
        verdicts = self.against_baseline.verdicts if self.against_baseline else ()
        clearest = next((verdict for verdict in verdicts if verdict.changed and verdict.effect is not None), None)
        if clearest is None or clearest.effect is None:
            return ""
        return f"{clearest.file}, {clearest.measure} {clearest.effect.sentence}"

    @property
    def drifts(self) -> bool:
        """Whether the alarm is new with the last series, or was raised before and the last series has changed."""
        if self.evidence is None or self.evidence.alarm is None:
            return False
        changed = self.against_baseline is not None and self.against_baseline.changed
        return changed or self.evidence.alarm == self.timeline[-1].began


class Report(_Frozen):
    """Everything a report says. `report.json` is this, and its schema is `docs/report.schema.json`.

    Attributes:
        version: Version of the layout.
        title: Title of the experiment.
        series: Name of this series.
        created: When the report was made.
        level: Probability of a false alarm that was set.
        pipelines: One part for each pipeline.
        runs: The runs of this series.
    """

    version: Literal[2] = 2
    title: str
    series: str
    created: datetime
    level: float = 0.05
    pipelines: tuple[PipelineReport, ...]
    runs: tuple[RunSummary, ...] = ()

    @property
    def drifted(self) -> tuple[PipelineReport, ...]:
        """The pipelines for which the evidence of a lasting change is enough."""
        return tuple(part for part in self.pipelines if part.drifts)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What there is to say, one sentence for each finding: the verdict first, how the runs differ last."""
        found = []
        for part in self.pipelines:
            if part.against_baseline is not None:
                evidence = f" {part.evidence.sentence}." if part.evidence else ""
                found.append(f"{part.pipeline} against the baseline: {part.against_baseline.sentence}.{evidence}")
                if part.effect:
                    found.append(f"{part.pipeline}, size of the change: {part.effect}.")
            if part.against_version is not None:
                first = self.pipelines[0].pipeline
                found.append(f"{part.pipeline} against {first}: {part.against_version.sentence}.")
            found.append(f"{part.pipeline}: {part.comparison.sentence}")
        return tuple(found)


class ReportFiles(_Frozen):
    """Where a report was written.

    Attributes:
        html: The self-contained page.
        markdown: The short text.
        json_file: The report for machines.
        images: The plots.
        maps: NIfTI maps of where the images have changed that have changed most clearly.
    """

    html: Path
    markdown: Path
    json_file: Path
    images: tuple[Path, ...] = ()
    maps: tuple[Path, ...] = ()
