"""Comparing the files of several runs, whoever made them."""

from __future__ import annotations

import heapq
import math
import os
import string
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import significantdigits
from numpy.typing import NDArray
from scipy import stats
from threadpoolctl import threadpool_limits

from prefect_biomed.analysis.comparators import (
    Content,
    Measure,
    blocks,
    content_digest,
    decompressed,
    decompressed_digest,
    is_store,
)
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
    "for_each_file",
    "inventory",
    "measures_in_all",
    "named_runs",
    "opened",
    "runs_below",
    "same_bytes",
    "series_below",
    "unread",
]

Runs = Mapping[str, Path]
Result = TypeVar("Result")

_MAX_DEPTH = 3
# More would need more memory, and reading holds the interpreter.
_WORKERS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)
_MAX_FACTS = 20
_MAX_WHERE = 5
# Bins of the histogram that gives medians of digits without holding all points.
_DIGIT = 0.005
_DIGITS = np.arange(-20.0, 20.0, _DIGIT)


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

    As many files are compared at a time as there are processors; each takes about a quarter of a million values of all
    runs together in memory, and one decompressed file of each run on disk.

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
    files = for_each_file(folders, rules, lambda group: _compare_file(group, list(folders), rules))
    return Comparison(
        runs=tuple(folders),
        failed=tuple(failed),
        files=tuple(sorted(files, key=lambda f: f.name)),
        unread=tuple(sorted({name for folder in folders.values() for name in unread(folder, rules)})),
    )


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


def for_each_file(runs: Runs, rules: Rules, work: Callable[[FileGroup], Result]) -> Iterator[Result]:
    """Work on the files of several runs, as many at a time as there are processors.

    In threads, since nearly all of the time goes by in NumPy, which lets others run; a process of its own would need a
    script that may be imported.

    Args:
        runs: Folders by name.
        rules: What is left out.
        work: What is done with one file.

    Yields:
        What was made of each, in the order of the files.
    """
    pending: deque[Future[Result]] = deque()
    with (
        # One thread of BLAS for each of ours, so that there are no more threads than processors.
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(_WORKERS) as pool,
        file_groups(runs, rules, before_removal=lambda: wait(pending)) as groups,
    ):
        for group in groups:
            pending.append(pool.submit(work, group))
            if len(pending) > _WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def file_groups(
    runs: Runs, rules: Rules, before_removal: Callable[[], object] | None = None
) -> Iterator[Iterator[FileGroup]]:
    """Go through the files of several runs, those inside archives too.

    Args:
        runs: Folders by name.
        rules: What is left out.
        before_removal: Called before members of an archive are removed.

    Yields:
        The files. Each is there until the next one is taken.
    """
    with tempfile.TemporaryDirectory(prefix="biomed-compare-") as workspace:
        listed = {run: _files_of(folder) for run, folder in runs.items()}
        yield _groups(listed, rules, _Place(Path(workspace), before_removal))


def unread(folder: Path, rules: Rules) -> tuple[str, ...]:
    """List what is in a run and cannot be looked at: links that lead out of it or nowhere, pipes, sockets.

    Args:
        folder: The run.
        rules: What is left out.

    Returns:
        Names.
    """
    return tuple(name for name in _listed(folder)[1] if not rules.ignores(name))


def _files_of(folder: Path) -> dict[str, Path]:
    """Regular files and Zarr stores below a folder; links that lead out of it are left out."""
    return _listed(folder)[0]


def _listed(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files below a folder, and the names of what is there and is not looked at."""
    base = folder.resolve()
    files: dict[str, Path] = {}
    left: list[str] = []
    for above, folders, names in os.walk(folder):
        here = Path(above)
        stores = (
            [here] if here == folder and is_store(here) else [here / name for name in folders if is_store(here / name)]
        )
        # Folders behind links are not walked into; within the run they are met where they are.
        linked = [here / name for name in folders if (here / name).is_symlink() and here / name not in stores]
        left += [_name(path, folder) for path in linked if not path.resolve().is_relative_to(base)]
        folders[:] = [] if here in stores else [name for name in folders if here / name not in stores]
        names = [] if here in stores else names
        for path in [*stores, *(here / name for name in names)]:
            if (path in stores or path.is_file()) and path.resolve().is_relative_to(base):
                files["store" if path == folder else _name(path, folder)] = path
            else:
                left.append(_name(path, folder))
    return dict(sorted(files.items())), sorted(left)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


@dataclass(frozen=True)
class _Place:
    """Where in nested archives one is: where they are unpacked, their names, and how many they are."""

    workspace: Path
    before_removal: Callable[[], object] | None
    prefix: str = ""
    depth: int = 0


def _groups(listed: Mapping[str, Mapping[str, Path]], rules: Rules, place: _Place) -> Iterator[FileGroup]:
    prefix = place.prefix
    for name in sorted({name for files in listed.values() for name in files}):
        if rules.ignores(name) or rules.ignores(prefix + name):
            continue
        paths = {run: files[name] for run, files in listed.items() if name in files}
        note = ""
        if place.depth < _MAX_DEPTH and all(is_archive(path) for path in paths.values()):
            with tempfile.TemporaryDirectory(dir=place.workspace) as here:
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
                    inside = replace(place, prefix=f"{prefix}{name}/", depth=place.depth + 1)
                    yield from _groups(inner | absent, rules, inside)
                    if place.before_removal is not None:
                        place.before_removal()
                    continue
        yield FileGroup(prefix + name, paths, note)


def _unpacked(archive: Path, folder: Path) -> Path:
    unpack(archive, folder)
    return folder


@contextmanager
def opened(group: FileGroup, rules: Rules, plain: Mapping[str, Path] | None = None) -> Iterator[dict[str, Content]]:
    """Open one file of all runs; what had to be decompressed is removed afterwards.

    Args:
        group: The file.
        rules: What is left out.
        plain: What is decompressed already, by run.

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
                known = (plain or {}).get(run) or decompressed(path, own / "content")
                contents[run] = open_content(known, group.name, own, origin=path, rules=rules)
            except UnsafeContent as error:
                contents[run] = Content("binary", digests={"content": content_digest(path)}, note=str(error))
        yield _side_by_side(contents, Path(workspace))


def _side_by_side(contents: dict[str, Content], workspace: Path) -> dict[str, Content]:
    """Reduce numbers with names to those that all runs have, and lay arrays out in one order, where these differ."""
    names = dict.fromkeys(name for content in contents.values() for name in content.measures)
    for place, name in enumerate(names):
        found = {run: content.measures[name] for run, content in contents.items() if name in content.measures}
        keys = {measure.keys for measure in found.values()}
        orders = {measure.order for measure in found.values()}
        if len(orders) < 2 and (len(keys) < 2 or None in keys):
            continue
        if len(orders) > 1:
            found = {
                run: measure if measure.order == "C" else measure.in_rows(workspace / f"rows {place} {number}")
                for number, (run, measure) in enumerate(found.items())
            }
        if len(keys) > 1 and None not in keys:
            common = set.intersection(*(set(key or ()) for key in keys))
            found = {run: measure.only(common) for run, measure in found.items()}
        for run, measure in found.items():
            contents[run] = replace(contents[run], measures=contents[run].measures | {name: measure})
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
    plain: dict[str, Path] = {}
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="biomed-content-") as workspace:
        for number, (run, path) in enumerate(group.paths.items()):
            try:
                plain[run], digests[run] = decompressed_digest(path, Path(workspace, str(number)))
            except (UnsafeContent, OSError):
                digests[run] = content_digest(path)
        return _compare_unpacked(group, runs, rules, plain, digests)


def _compare_unpacked(
    group: FileGroup, runs: Sequence[str], rules: Rules, plain: Mapping[str, Path], digests: dict[str, str]
) -> FileComparison:
    missing = tuple(run for run in runs if run not in group.paths)
    letters = _letters(digests)
    if len(set(digests.values())) == 1:
        first = next(iter(group.paths.values()))
        alike = all(same_bytes(first, path) for path in group.paths.values())
        agreement = Agreement.MISSING if missing else Agreement.IDENTICAL if alike else Agreement.SAME_CONTENT
        # Opened only to say what it is.
        with opened(FileGroup(group.name, dict(list(group.paths.items())[:1])), rules, plain) as contents:
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
    with opened(group, rules, plain) as contents:
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
    for name in dict.fromkeys(name for said in words.values() for name in said):
        values = {run: said[name] for run, said in words.items() if name in said}
        if len(values) < len(words) or len(set(values.values())) > 1:
            yield FactDifference(field=name, values={run: value[:200] for run, value in values.items()})


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


@dataclass
class _Spread:
    """Collects how far runs are apart, block by block.

    Attributes:
        differing: Points at which they are.
        beyond: Of these, those beyond the tolerance.
        comparable: Points that have a number in all runs.
        largest: The largest difference of two runs.
        total: Mean difference of two runs, summed over the points.
        squares: The same of squared differences.
        digits: Histogram of the digits in common.
        furthest: Where the differences are largest.
        room: Where points are sorted, got once: to get memory from the system for each block takes longer.
    """

    differing: int = 0
    beyond: int = 0
    comparable: int = 0
    largest: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    digits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_DIGITS.size + 1, dtype=np.int64))
    room: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    furthest: list[tuple[float, int]] = field(default_factory=list)

    def add(self, block: NDArray[np.float64], start: int, tolerance: Tolerance) -> None:
        """Take in some points, shape (runs, points)."""
        count = len(block)
        unequal = (block != block[0]).any(axis=0)
        finite = np.isfinite(block).all(axis=0)
        if not finite.all():
            unequal &= ~((block == block[0]) | (np.isnan(block) & np.isnan(block[0]))).all(axis=0)
        self.comparable += int(np.count_nonzero(finite))
        apart = np.flatnonzero(unequal & finite)
        odd = np.flatnonzero(unequal & ~finite)
        # A value beside a missing or infinite one is beyond any tolerance.
        self.beyond += odd.size
        self.differing += odd.size + apart.size
        self.furthest += [(math.inf, int(index) + start) for index in odd[:_MAX_WHERE]]
        if not apart.size:
            return
        # Short rows that lie together are sorted several times faster than long columns.
        if self.room.size < block.size:
            self.room = np.empty(block.size)
        ordered = self.room[: apart.size * count].reshape(apart.size, count)
        ordered[:] = block.T if apart.size == block.shape[1] else block[:, apart].T
        ordered.sort(axis=1)
        low, high = ordered[:, 0], ordered[:, -1]
        spans = high - low
        allowed = tolerance.absolute + tolerance.relative * np.maximum(np.abs(low), np.abs(high))
        self.beyond += int(np.count_nonzero(spans > allowed))
        self.largest = max(self.largest, float(spans.max()))
        for index in np.argpartition(spans, -min(_MAX_WHERE, spans.size))[-_MAX_WHERE:]:
            self.furthest.append((float(spans[index]), int(apart[index]) + start))
        self.furthest = heapq.nlargest(_MAX_WHERE, self.furthest)
        mean = ordered @ np.full(count, 1.0 / count)
        ordered -= mean[:, np.newaxis]
        # The mean over all pairs, without forming the pairs.
        weights = (2.0 * np.arange(1, count + 1) - count - 1) / (count * (count - 1) / 2)
        self.total += float((ordered @ weights).sum())
        variance = np.einsum("pr,pr->p", ordered, ordered) / (count - 1)
        self.squares += float(2.0 * variance.sum())
        usable = (mean != 0.0) & (variance > 0.0) & np.isfinite(variance)
        self.digits += _histogram(-np.log10(np.sqrt(variance[usable]) / np.abs(mean[usable])))


def _compare_measure(name: str, measures: Sequence[Measure], tolerance: Tolerance) -> MeasureComparison:
    count = len(measures)
    spread = _Spread()
    labels = Labels(count) if all(measure.may_be_labels for measure in measures) else None
    for start, block in blocks(measures):
        if labels is not None:
            labels.add(block)
        spread.add(block, start, tolerance)
    # The median of a sample spread is below the true one by this factor when the noise is normal.
    bias = -0.5 * math.log10(float(stats.chi2.median(count - 1)) / (count - 1)) if count > 1 else 0.0
    median, low = _quantile(spread.digits, 0.5), _quantile(spread.digits, 0.05)
    comparable = spread.comparable
    return MeasureComparison(
        name=name,
        runs=count,
        points=measures[0].size,
        differing=spread.differing,
        beyond_tolerance=spread.beyond,
        max_difference=spread.largest if comparable else None,
        mean_difference=spread.total / comparable if comparable else None,
        rmse=math.sqrt(spread.squares / comparable) if comparable else None,
        digits=None if median is None else round(median - bias, 3),
        digits_assured=None if median is None else round(median - _without_confidence(count), 3),
        digits_low=low,
        dice=(labels.dice() or None) if labels is not None and spread.differing else None,
        where=tuple(measures[0].where(index) for _, index in heapq.nlargest(_MAX_WHERE, spread.furthest)),
    )


def assured_digits(sample: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute a lower bound of the significant decimal digits, probability and confidence 95 %.

    Args:
        sample: Values, shape (runs, points), not the same in all runs.
        reference: Their means, none of them 0.

    Returns:
        Digits of each point.
    """
    estimate: NDArray[np.float64] = -np.log10(sample.std(axis=0, ddof=1) / np.abs(reference))
    return estimate - _without_confidence(len(sample))


@cache
def _without_confidence(count: int) -> float:
    """Digits that so many runs cannot assure, by `significantdigits`: for normal noise the same at every point."""
    sample = 1.0 + 0.01 * np.linspace(-1.0, 1.0, count)
    bound = float(significantdigits.significant_digits(sample, reference=1.0, axis=0, basis=10))
    return -math.log10(float(sample.std(ddof=1))) - bound


def _histogram(values: NDArray[np.float64]) -> NDArray[np.int64]:
    # The place that a search would find, computed, which is several times faster.
    places = np.ceil((values - _DIGITS[0]) / _DIGIT).clip(0.0, _DIGITS.size).astype(np.intp)
    return np.bincount(places, minlength=_DIGITS.size + 1)


def _quantile(histogram: NDArray[np.int64], fraction: float) -> float | None:
    total = int(histogram.sum())
    if not total:
        return None
    bin_number = int(np.searchsorted(np.cumsum(histogram), fraction * total))
    middle = _DIGITS[min(bin_number, _DIGITS.size - 1)] - 0.0025
    return round(float(middle), 3)
