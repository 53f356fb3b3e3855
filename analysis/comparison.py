"""Comparing the files of several runs, whoever made them."""

from __future__ import annotations

import heapq
import math
import os
import string
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import significantdigits
from numpy.typing import NDArray
from scipy import stats

from prefect_biomed.analysis.comparators import BLOCK, Content, Measure, content_digest, decompressed, is_store
from prefect_biomed.analysis.effects import Labels
from prefect_biomed.analysis.models import (
    Agreement,
    Comparison,
    FactDifference,
    FileComparison,
    MeasureComparison,
    Rules,
    Tolerance,
)
from prefect_biomed.analysis.readers.registry import open_content
from prefect_biomed.clients.archives import is_archive, unpack
from prefect_biomed.clients.errors import ConfigurationError, UnsafeContent

__all__ = [
    "FileGroup",
    "Runs",
    "assured_digits",
    "compare_runs",
    "file_groups",
    "inventory",
    "measures_in_all",
    "named_runs",
    "opened",
    "runs_below",
    "same_bytes",
    "series_below",
]

Runs = Mapping[str, Path]

_MAX_DEPTH = 3
_MAX_FACTS = 20
_MAX_WHERE = 5
# Bins of the histogram that gives medians of digits without holding all points.
_DIGITS = np.arange(-20.0, 20.0, 0.005)


@dataclass(frozen=True)
class FileGroup:
    """One file of several runs.

    Attributes:
        name: Logical name; `archive/member` inside archives.
        paths: Path by run; runs that lack the file are absent.
        note: Why an archive among them was not looked into.
    """

    name: str
    paths: dict[str, Path]
    note: str = ""


def named_runs(runs: Runs | Sequence[Path | str]) -> dict[str, Path]:
    """Give names to folders of runs.

    Args:
        runs: Folders by name, or folders alone, which are named after themselves.

    Returns:
        Folders by name.

    Raises:
        ConfigurationError: A folder does not exist.
    """
    if isinstance(runs, Mapping):
        named = {name: Path(folder) for name, folder in runs.items()}
    else:
        folders = [Path(folder).expanduser().absolute() for folder in runs]
        above = Path(os.path.commonpath([folder.parent for folder in folders])) if folders else Path()
        named = {folder.relative_to(above).as_posix(): folder for folder in folders}
        if len(named) != len(folders):
            raise ConfigurationError("A folder is given twice. A run cannot be compared with itself.")
    for name, folder in named.items():
        if not folder.is_dir():
            raise ConfigurationError(f"Run {name!r}: {folder} is not a folder.")
    return named


def runs_below(folder: Path) -> dict[str, Path]:
    """Take the sub-folders of a folder for runs.

    Args:
        folder: The folder.

    Returns:
        Folders by name, without hidden ones.

    Raises:
        ConfigurationError: It has none.
    """
    folder = folder.expanduser().absolute()
    found = {path.name: path for path in sorted(folder.glob("*")) if path.is_dir() and not path.name.startswith(".")}
    if not found:
        raise ConfigurationError(f"{folder} has no sub-folders. Each is to be one run.")
    return found


def series_below(folder: Path) -> dict[str, Path]:
    """Take the sub-folders of a folder for series, and theirs for runs.

    Args:
        folder: The folder.

    Returns:
        Folders of the runs, by `<series>/<run>`.

    Raises:
        ConfigurationError: It has none, or one of them has none.
    """
    return {
        f"{name}/{run}": path for name, series in runs_below(folder).items() for run, path in runs_below(series).items()
    }


def compare_runs(
    runs: Runs | Sequence[Path | str], *, rules: Rules | None = None, failed: Sequence[str] = ()
) -> Comparison:
    """Compare the files of several runs with each other, file by file.

    Needs memory for some hundred thousand points of each run at a time, and disk for one decompressed file of each.

    Args:
        runs: Folders of the runs, by name or alone.
        rules: What is compared and how; sensible ones when None.
        failed: Names of runs that failed, to be said in the result.

    Returns:
        The comparison.

    Raises:
        ConfigurationError: A folder does not exist.
    """
    rules = rules or Rules()
    folders = named_runs(runs)
    with file_groups(folders, rules) as groups:
        files = [_compare_file(group, list(folders), rules) for group in groups]
    return Comparison(runs=tuple(folders), failed=tuple(failed), files=tuple(sorted(files, key=lambda f: f.name)))


def inventory(folder: Path, rules: Rules | None = None) -> dict[str, str]:
    """List the files of one run with digests of their decompressed content, members of archives too.

    Args:
        folder: The run.
        rules: What is left out.

    Returns:
        SHA-256 by logical name.
    """
    with file_groups({"": folder}, rules or Rules()) as groups:
        return {group.name: content_digest(group.paths[""]) for group in groups}


@contextmanager
def file_groups(runs: Runs, rules: Rules) -> Iterator[Iterator[FileGroup]]:
    """Go through the files of several runs, those inside archives too.

    Args:
        runs: Folders by name.
        rules: What is left out.

    Yields:
        The files. Each is there until the next one is taken.
    """
    with tempfile.TemporaryDirectory(prefix="biomed-compare-") as workspace:
        listed = {run: _files_of(folder) for run, folder in runs.items()}
        yield _groups(listed, rules, Path(workspace), "", 0)


def _files_of(folder: Path) -> dict[str, Path]:
    """Regular files and Zarr stores below a folder; links that lead out of it are left out."""
    base = folder.resolve()
    files: dict[str, Path] = {}
    for above, folders, names in os.walk(folder):
        here = Path(above)
        stores = (
            [here] if here == folder and is_store(here) else [here / name for name in folders if is_store(here / name)]
        )
        folders[:] = [] if here in stores else [name for name in folders if here / name not in stores]
        names = [] if here in stores else names
        for path in [*stores, *(here / name for name in names)]:
            if (path in stores or path.is_file()) and path.resolve().is_relative_to(base):
                files["store" if path == folder else path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def _groups(
    listed: Mapping[str, Mapping[str, Path]], rules: Rules, workspace: Path, prefix: str, depth: int
) -> Iterator[FileGroup]:
    for name in sorted({name for files in listed.values() for name in files}):
        if rules.ignores(name) or rules.ignores(prefix + name):
            continue
        paths = {run: files[name] for run, files in listed.items() if name in files}
        note = ""
        if depth < _MAX_DEPTH and all(is_archive(path) for path in paths.values()):
            with tempfile.TemporaryDirectory(dir=workspace) as here:
                try:
                    inner = {
                        run: _files_of(_unpacked(path, Path(here, str(number))))
                        for number, (run, path) in enumerate(paths.items())
                    }
                except UnsafeContent as error:
                    note = f"Compared as a whole: {error}"
                else:
                    # A run without the archive lacks all its members.
                    absent: dict[str, dict[str, Path]] = {run: {} for run in listed if run not in paths}
                    yield from _groups(inner | absent, rules, workspace, f"{prefix}{name}/", depth + 1)
                    continue
        yield FileGroup(prefix + name, paths, note)


def _unpacked(archive: Path, folder: Path) -> Path:
    unpack(archive, folder)
    return folder


@contextmanager
def opened(group: FileGroup, rules: Rules) -> Iterator[dict[str, Content]]:
    """Open one file of all runs; what had to be decompressed is removed afterwards.

    Args:
        group: The file.
        rules: What is left out.

    Yields:
        What it says, by run.
    """
    with tempfile.TemporaryDirectory(prefix="biomed-content-") as workspace:
        contents = {}
        for number, (run, path) in enumerate(group.paths.items()):
            try:
                # Of its own, or one run's unpacked values would take the place of another's.
                own = Path(workspace, str(number))
                own.mkdir()
                plain = decompressed(path, own / "content")
                contents[run] = open_content(plain, group.name, own, origin=path, rules=rules)
            except UnsafeContent as error:
                contents[run] = Content("binary", digests={"content": content_digest(path)}, note=str(error))
        yield _side_by_side(contents)


def _side_by_side(contents: dict[str, Content]) -> dict[str, Content]:
    """Reduce numbers with names to the names that all runs have, where these differ."""
    names = dict.fromkeys(name for content in contents.values() for name in content.measures)
    for name in names:
        found = [content.measures[name] for content in contents.values() if name in content.measures]
        keys = [measure.keys for measure in found]
        if len(set(keys)) < 2 or any(key is None for key in keys):
            continue
        common = set.intersection(*(set(key or ()) for key in keys))
        for run, content in contents.items():
            if name in content.measures:
                measures = content.measures | {name: content.measures[name].only(common)}
                contents[run] = replace(content, measures=measures)
    return contents


def measures_in_all(contents: Sequence[Content]) -> list[str]:
    """List the measures that all contents have in the same shape.

    Args:
        contents: What the files say.

    Returns:
        Names of measures.
    """
    first = contents[0]
    return [
        name
        for name, measure in first.measures.items()
        if all(name in other.measures and other.measures[name].shape == measure.shape for other in contents[1:])
    ]


def _compare_file(group: FileGroup, runs: Sequence[str], rules: Rules) -> FileComparison:
    digests = {run: content_digest(path) for run, path in group.paths.items()}
    missing = tuple(run for run in runs if run not in group.paths)
    letters = _letters(digests)
    if len(set(digests.values())) == 1:
        first = next(iter(group.paths.values()))
        alike = all(same_bytes(first, path) for path in group.paths.values())
        agreement = Agreement.MISSING if missing else Agreement.IDENTICAL if alike else Agreement.SAME_CONTENT
        # Opened only to say what it is.
        with opened(FileGroup(group.name, dict(list(group.paths.items())[:1])), rules) as contents:
            kind = next(iter(contents.values())).kind
        return FileComparison(
            name=group.name,
            kind=kind,
            agreement=agreement,
            groups=letters,
            digests=digests,
            missing_in=missing,
            note=group.note,
        )
    with opened(group, rules) as contents:
        facts = list(_differing({run: content.words for run, content in contents.items()}))
        environment = tuple(_differing({run: content.environment for run, content in contents.items()}))
        tolerance = rules.tolerance(group.name)
        common = measures_in_all(list(contents.values()))
        measures = [
            _compare_measure(name, [content.measures[name] for content in contents.values()], tolerance)
            for name in common
        ]
        facts += _odd_measures(contents, common)
        differing = [measure for measure in measures if measure.differing]
        kind = next(iter(contents.values())).kind
        note = next((content.note for content in contents.values() if content.note), group.note)
    if missing:
        agreement = Agreement.MISSING
    elif facts or any(measure.beyond_tolerance for measure in differing):
        agreement = Agreement.DIFFERENT
    elif differing:
        agreement = Agreement.WITHIN_TOLERANCE
    else:
        agreement = Agreement.SAME_CONTENT
        letters = dict.fromkeys(letters, "A")
    return FileComparison(
        name=group.name,
        kind=kind,
        agreement=agreement,
        groups=letters,
        digests=digests,
        missing_in=missing,
        facts=tuple(facts[:_MAX_FACTS]),
        facts_differing=len(facts),
        measures=tuple(differing),
        environment=environment[:_MAX_FACTS],
        note=note,
    )


def _letters(digests: Mapping[str, str]) -> dict[str, str]:
    order = {digest: number for number, digest in enumerate(dict.fromkeys(digests.values()))}
    alphabet = string.ascii_uppercase
    return {
        run: alphabet[order[digest]] if order[digest] < len(alphabet) else f"#{order[digest] + 1}"
        for run, digest in digests.items()
    }


def same_bytes(one: Path, other: Path) -> bool:
    """Tell whether two files hold the same bytes; reads no further than the first difference.

    Args:
        one: A file, or a Zarr store.
        other: Another.

    Returns:
        Whether they do.
    """
    if one.is_dir() or other.is_dir():
        return content_digest(one) == content_digest(other)
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            piece = first.read(1 << 20)
            if piece != second.read(1 << 20):
                return False
            if not piece:
                return True


def _differing(words: Mapping[str, Mapping[str, str]]) -> Iterator[FactDifference]:
    for field in dict.fromkeys(field for said in words.values() for field in said):
        values = {run: said[field] for run, said in words.items() if field in said}
        if len(values) < len(words) or len(set(values.values())) > 1:
            yield FactDifference(field=field, values={run: value[:200] for run, value in values.items()})


def _odd_measures(contents: Mapping[str, Content], common: Sequence[str]) -> list[FactDifference]:
    """Numbers that not all runs have, or not in the same shape."""
    names = dict.fromkeys(name for content in contents.values() for name in content.measures if name not in common)
    return [
        FactDifference(
            field=f"shape of {name}",
            values={run: str(c.measures[name].shape) for run, c in contents.items() if name in c.measures},
        )
        for name in names
    ]


def _compare_measure(name: str, measures: Sequence[Measure], tolerance: Tolerance) -> MeasureComparison:
    count = len(measures)
    differing = beyond = comparable = 0
    largest = total = squares = 0.0
    digits = np.zeros(_DIGITS.size + 1, dtype=np.int64)
    assured = np.zeros_like(digits)
    furthest: list[tuple[float, int]] = []
    labels = Labels(count) if all(measure.may_be_labels for measure in measures) else None
    for start in range(0, measures[0].size, BLOCK):
        block = np.stack([measure.read(start, start + BLOCK) for measure in measures])
        if labels is not None:
            labels.add(block)
        unequal = ~((block == block[0]) | (np.isnan(block) & np.isnan(block[0]))).all(axis=0)
        finite = np.isfinite(block).all(axis=0)
        comparable += int(np.count_nonzero(finite))
        if not unequal.any():
            continue
        differing += int(np.count_nonzero(unequal))
        apart = unequal & finite
        # A value beside a missing or infinite one is beyond any tolerance.
        beyond += int(np.count_nonzero(unequal & ~finite))
        values = block[:, apart]
        spans = np.ptp(values, axis=0)
        allowed = tolerance.absolute + tolerance.relative * np.abs(values).max(axis=0, initial=0.0)
        beyond += int(np.count_nonzero(spans > allowed))
        largest = max(largest, float(spans.max(initial=0.0)))
        total += float(_mean_pair_difference(values).sum())
        squares += float(2.0 * values.var(axis=0, ddof=1).sum())
        positions = np.flatnonzero(apart) + start
        for index in np.argsort(spans)[-_MAX_WHERE:]:
            heapq.heappush(furthest, (float(spans[index]), int(positions[index])))
        furthest = heapq.nlargest(_MAX_WHERE, furthest)
        odd = np.flatnonzero(unequal & ~finite)[:_MAX_WHERE]
        furthest += [(math.inf, int(index) + start) for index in odd]
        raw, sure = _digits(values)
        digits += _histogram(raw)
        assured += _histogram(sure)
    # The median of a sample spread is below the true one by this factor when the noise is normal.
    bias = -0.5 * math.log10(float(stats.chi2.median(count - 1)) / (count - 1)) if count > 1 else 0.0
    median, low = _quantile(digits, 0.5), _quantile(digits, 0.05)
    return MeasureComparison(
        name=name,
        runs=count,
        points=measures[0].size,
        differing=differing,
        beyond_tolerance=beyond,
        max_difference=largest if comparable else None,
        mean_difference=total / comparable if comparable else None,
        rmse=math.sqrt(squares / comparable) if comparable else None,
        digits=None if median is None else round(median - bias, 3),
        digits_assured=_quantile(assured, 0.5),
        digits_low=low,
        dice=(labels.dice() or None) if labels is not None and differing else None,
        where=tuple(measures[0].where(index) for _, index in heapq.nlargest(_MAX_WHERE, furthest)),
    )


def _mean_pair_difference(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the absolute differences over all pairs of runs, without forming the pairs."""
    count = values.shape[0]
    weights = 2.0 * np.arange(1, count + 1) - count - 1
    ordered = np.sort(values - values.mean(axis=0), axis=0)
    result: NDArray[np.float64] = weights @ ordered / (count * (count - 1) / 2)
    return result


def _digits(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Significant decimal digits of points that differ: the estimate, and the bound of `significantdigits`."""
    mean = values.mean(axis=0)
    spread = values.std(axis=0, ddof=1)
    usable = (mean != 0.0) & (spread > 0.0)
    if not usable.any():
        return np.empty(0), np.empty(0)
    sample, reference = values[:, usable], mean[usable]
    estimate = -np.log10(spread[usable] / np.abs(reference))
    return estimate, assured_digits(sample, reference)


def assured_digits(sample: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute a lower bound of the significant decimal digits, probability and confidence 95 %.

    Args:
        sample: Values, shape (runs, points).
        reference: Their means, none of them 0.

    Returns:
        Digits of each point.
    """
    bound: NDArray[np.float64] = np.asarray(
        significantdigits.significant_digits(sample, reference=reference, axis=0, basis=10), dtype=np.float64
    )
    return bound


def _histogram(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(_DIGITS, values), minlength=_DIGITS.size + 1)


def _quantile(histogram: NDArray[np.int64], fraction: float) -> float | None:
    total = int(histogram.sum())
    if not total:
        return None
    bin_number = int(np.searchsorted(np.cumsum(histogram), fraction * total))
    middle = _DIGITS[min(bin_number, _DIGITS.size - 1)] - 0.0025
    return round(float(middle), 3)
