"""Replays of published runs: digests first, numbers after, one verdict at the end."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from prefect_biomed.analysis.models import Comparison, FactDifference, FileComparison, Judgement, Rules
from prefect_biomed.analysis.outcomes import Outcome
from prefect_biomed.clients.archives import is_archive, unpack
from prefect_biomed.clients.files import digest, safe_join

__all__ = ["Published", "Replay", "ReplayOutcome", "ReplayedExecution", "judge_replay"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class ReplayOutcome(StrEnum):
    """What a replay has shown."""

    REPRODUCED = "reproduced"
    DIFFERS = "differs"
    TAMPERED = "tampered"
    NOT_JUDGED = "not judged"


_DIGEST = re.compile("[0-9a-f]{64}")
_WORST_FIRST = (ReplayOutcome.TAMPERED, ReplayOutcome.DIFFERS, ReplayOutcome.NOT_JUDGED, ReplayOutcome.REPRODUCED)


class Published(_Frozen):
    """What was published of one execution, and what its replay gave.

    Attributes:
        name: Identifier of the published execution.
        pipeline: What ran.
        group: The same for executions of one pipeline with the same inputs.
        digests: What was written down of each output file; None where nothing was.
        places: The output files that were published.
        contradictions: Published files that are not those of which the digests were written, with what is wrong.
        execution: Identifier of the replay.
        replayed: Output files and folders of the replay, by name.
        environment: What made the files and is not what it was: then and now by field.
        unchecked: Inputs of which nobody has written down a digest.
    """

    name: str
    pipeline: str
    group: str
    digests: dict[str, str | None]
    places: dict[str, Path]
    contradictions: dict[str, str] = {}
    execution: str = ""
    replayed: dict[str, Path] = {}
    environment: dict[str, tuple[str, str]] = {}
    unchecked: tuple[str, ...] = ()


class ReplayedExecution(_Frozen):
    """One published execution and its replay.

    Attributes:
        name: Identifier of the published execution.
        pipeline: What ran.
        execution: Identifier of the replay.
        outcome: What the replay has shown.
        identical: Output files with the digest that was published.
        equal: Output files with another digest and the same content, by format: other time stamps, for instance.
        differing: Output files with another content, and how they differ.
        missing: Published output files that the replay lacks.
        not_judged: Output files that could not be compared, with the reason.
        tampered: Published output files that contradict their provenance, with what is wrong and what the replay says.
        new: Output files of the replay of which nothing was published.
        environment: What made the files and is not what it was.
        unchecked: Inputs of which nothing tells whether they are the published ones.
        within: Whether differences are within the numerical noise of the published runs; None when too few were
            published to tell.
    """

    name: str
    pipeline: str
    execution: str
    outcome: ReplayOutcome
    identical: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    differing: dict[str, str] = {}
    missing: tuple[str, ...] = ()
    not_judged: dict[str, str] = {}
    tampered: dict[str, str] = {}
    new: tuple[str, ...] = ()
    environment: tuple[FactDifference, ...] = ()
    unchecked: tuple[str, ...] = ()
    within: bool | None = None

    @property
    def sentence(self) -> str:
        """The outcome, with what it rests on."""
        count = len(self.identical) + len(self.equal) + len(self.differing) + len(self.missing) + len(self.not_judged)
        said = [f"{len(self.identical)} of {count} files with the published digest"]
        if self.equal:
            said.append(f"{len(self.equal)} with other bytes and the same content")
        if self.differing:
            noise = " within the noise of the published runs" if self.within else ""
            said.append(f"{len(self.differing)} with another content{noise} ({_listed(self.differing)})")
        if self.missing:
            said.append(f"missing: {', '.join(self.missing[:3])}")
        if self.not_judged:
            said.append(f"{len(self.not_judged)} not judged ({_listed(self.not_judged)})")
        if self.new:
            said.append(f"{len(self.new)} of which nothing was published")
        if self.environment:
            said.append(f"the platform's descriptor has changed in {', '.join(one.field for one in self.environment)}")
        if self.unchecked:
            said.append(f"inputs that nothing tells the digest of: {', '.join(self.unchecked[:3])}")
        begins = f"{self.outcome.value} ({_listed(self.tampered)}); " if self.tampered else f"{self.outcome.value}: "
        alone = self.outcome is ReplayOutcome.DIFFERS and self.differing and self.within is None
        ends = ". Too few runs were published to tell whether that is numerical noise" if alone else ""
        return f"{self.name} ({self.pipeline}) {begins}{'; '.join(said)}{ends}"


class Replay(_Frozen):
    """A bundle of public executions that was replayed.

    Attributes:
        title: Title of the bundle.
        executions: Its executions.
        judgements: Replays judged by published runs of the same pipeline and inputs, where enough were published.
    """

    title: str = ""
    executions: tuple[ReplayedExecution, ...]
    judgements: dict[str, Judgement] = {}

    @property
    def outcome(self) -> ReplayOutcome:
        """The worst of its executions; not judged when there is none."""
        known = {one.outcome for one in self.executions}
        return next((outcome for outcome in _WORST_FIRST if outcome in known), ReplayOutcome.NOT_JUDGED)

    @property
    def sentence(self) -> str:
        """One sentence for each execution, the worst first."""
        return ". ".join(
            one.sentence for one in sorted(self.executions, key=lambda one: _WORST_FIRST.index(one.outcome))
        )


def judge_replay(
    published: Sequence[Published], *, title: str = "", rules: Rules | None = None, level: float = 0.05
) -> Replay:
    """Compare what replays gave with what was published.

    Digests are compared first. Files with another digest are compared by their content, as far as they were published.
    Where several runs of one pipeline with the same inputs were published, the replays are judged by them.

    Args:
        published: The executions and their replays.
        title: Title of the bundle.
        rules: What is compared and how; sensible ones when None.
        level: Probability of calling something changed when nothing is.

    Returns:
        What the replays have shown. Without a digest or a published file to compare with, nothing is reproduced.
    """
    rules = rules or Rules()
    with tempfile.TemporaryDirectory(prefix="biomed-replay-") as workspace:
        folders = {one.name: _side_by_side(one, Path(workspace, str(n))) for n, one in enumerate(published)}
        judgements = _judged(published, folders, rules, level)
        executions = [_compared(one, *folders[one.name], rules, judgements.get(one.group)) for one in published]
    return Replay(title=title, executions=tuple(executions), judgements=judgements)


def _side_by_side(one: Published, folder: Path) -> tuple[Path, Path]:
    """Lay published and replayed files out alike; an archive is unpacked where a folder was published."""
    then, now = folder / "published", folder / "replayed"
    for name, place in one.places.items():
        _put(place, safe_join(then, name))
    for name, place in one.replayed.items():
        target = safe_join(now, name)
        if place.is_file() and is_archive(place) and any(known.startswith(f"{name}/") for known in one.digests):
            target.parent.mkdir(parents=True, exist_ok=True)
            unpack(place, target)
        else:
            _put(place, target)
    for side in (then, now):
        side.mkdir(parents=True, exist_ok=True)
    return then, now


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _judged(
    published: Sequence[Published], folders: Mapping[str, tuple[Path, Path]], rules: Rules, level: float
) -> dict[str, Judgement]:
    from prefect_biomed.analysis import LEAST_REFERENCES, judge_runs

    judgements = {}
    for group in dict.fromkeys(one.group for one in published):
        mine = [one for one in published if one.group == group and one.replayed]
        whole = all(set(one.digests) <= set(one.places) and not one.contradictions for one in mine)
        if len(mine) >= LEAST_REFERENCES and whole:
            references, runs = ({one.name: folders[one.name][side] for one in mine} for side in (0, 1))
            judgements[group] = judge_runs(references, runs, rules=rules, level=level)
    return judgements


def _compared(one: Published, then: Path, now: Path, rules: Rules, judgement: Judgement | None) -> ReplayedExecution:
    from prefect_biomed.analysis import compare_runs

    identical = [name for name, told in one.digests.items() if told is not None and told == _md5(now, name)]
    missing = [name for name in one.digests if not (now / name).is_file()]
    contents = _contents(compare_runs({"published": then, "replayed": now}, rules=rules), one.digests)
    equal: list[str] = []
    differing: dict[str, str] = {}
    left: dict[str, str] = {}
    for name in one.digests:
        if name in identical or name in missing or rules.ignores(name):
            continue
        if name not in one.places:
            left[name] = "another digest, and the file itself was not published"
            continue
        if name in one.contradictions:
            continue
        found = [file for file in contents[name] if not file.agreement.is_agreement]
        opaque = [file.name for file in found if _is_opaque(file)]
        if not contents[name]:
            left[name] = "another digest, and nothing in it can be compared"
        elif not found:
            equal.append(name)
        elif len(opaque) == len(found):
            left[name] = f"another digest, and nothing is known of the format of {opaque[0]}"
        else:
            differing[name] = _in_words(found)
    within = None if judgement is None else {Outcome.WITHIN: True, Outcome.CHANGED: False}.get(judgement.outcome)
    tampered = {
        name: f"{name}: {why}; the replay {'gives that one' if name in identical else 'gives neither'}"
        for name, why in one.contradictions.items()
    }
    return ReplayedExecution(
        name=one.name,
        pipeline=one.pipeline,
        execution=one.execution,
        outcome=_outcome(bool(identical or equal or differing), tampered, differing, missing, left, within),
        identical=tuple(identical),
        equal=tuple(equal),
        differing=differing,
        missing=tuple(missing),
        not_judged=left,
        tampered=tampered,
        new=tuple(sorted(_all_files(now) - set(one.digests))),
        environment=tuple(
            FactDifference(field=field, values={"published": before, "replayed": after})
            for field, (before, after) in one.environment.items()
        ),
        unchecked=one.unchecked,
        within=within,
    )


def _outcome(
    some: bool,
    tampered: Mapping[str, str],
    differing: Mapping[str, str],
    missing: Sequence[str],
    left: Mapping[str, str],
    within: bool | None,
) -> ReplayOutcome:
    if tampered:
        return ReplayOutcome.TAMPERED
    if missing or (differing and not within):
        return ReplayOutcome.DIFFERS
    return ReplayOutcome.NOT_JUDGED if left or not some else ReplayOutcome.REPRODUCED


def _contents(comparison: Comparison, names: Iterable[str]) -> dict[str, list[FileComparison]]:
    """What was compared of each output: the file itself, or the members of an archive."""
    found: dict[str, list[FileComparison]] = {name: [] for name in names}
    for file in comparison.files:
        parts = file.name.split("/")
        for length in range(1, len(parts) + 1):
            if (name := "/".join(parts[:length])) in found:
                found[name].append(file)
    return found


def _is_opaque(file: FileComparison) -> bool:
    """Whether nothing but digests can be compared of it."""
    said = [value for fact in file.facts for value in fact.values.values()]
    return not file.measures and not file.missing_in and all(_DIGEST.fullmatch(value) for value in said)


def _in_words(files: Sequence[FileComparison]) -> str:
    """The clearest difference: numbers with what they have in common, then words."""
    measured = [(file, measure) for file in files for measure in file.measures]
    if measured:
        file, measure = min(measured, key=lambda known: 99.0 if known[1].digits is None else known[1].digits)
        digits = "" if measure.digits is None else f", {max(measure.digits, 0.0):.1f} digits in common"
        size = "" if measure.max_difference is None else f", at most by {measure.max_difference:.3g}"
        return f"{file.name}, {measure.name}: {measure.differing} of {measure.points} points differ{size}{digits}"
    file = files[0]
    if file.missing_in:
        return f"{file.name} is missing in what was {' and '.join(file.missing_in)}"
    said = {field.field: field.values for field in file.facts[:1]}
    return f"{file.name}: " + "; ".join(f"{field} is {' and '.join(values.values())}" for field, values in said.items())


def _listed(found: Mapping[str, str]) -> str:
    shown = [why if why.startswith(name) else f"{name}: {why}" for name, why in list(found.items())[:3]]
    return "; ".join(shown) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _md5(folder: Path, name: str) -> str | None:
    path = folder / name
    return digest(path, "md5") if path.is_file() else None
