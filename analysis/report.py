"""The report: one self-contained HTML page, plots as PNG, a short text in Markdown, and JSON for machines."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_rgb
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from prefect_biomed.analysis.comparators import Content, Measure
from prefect_biomed.analysis.comparison import FileGroup, Runs, assured_digits, file_groups, opened
from prefect_biomed.analysis.maps import write_maps
from prefect_biomed.analysis.models import (
    FileComparison,
    Judgement,
    PipelineReport,
    Report,
    ReportFiles,
    Rules,
    probability,
)
from prefect_biomed.analysis.outcomes import Outcome
from prefect_biomed.clients.files import atomic_write
from prefect_biomed.clients.texts import inline, one_line

__all__ = ["markdown_of", "write_report"]

# Colours of Okabe and Ito, which colour-blind people can tell apart; the letter in each cell says the same.
_COLOURS = ("#cfe8f7", "#f6d7a8", "#bfe5d6", "#f3c6b3", "#e3d3ee", "#f5efb3", "#d5d5d5")
_MISSING_COLOUR = "#ffffff"
_MARKERS = {
    "within the noise": ("o", "#0072b2"),
    "changed": ("X", "#b3470b"),
    "not judged": ("d", "#777777"),
}
_MAX_SLICES = 9
_MAX_MAPS = 4
_MAX_ROWS = 40
_MAX_SHOWN = 10
_MAX_LETTERS = 20
# One slice more than this is shown only in part.
_MAX_SLICE_POINTS = 16 * 1024**2


@dataclass(frozen=True)
class Plot:
    """An image of the report.

    Attributes:
        name: File name.
        title: Its heading.
        alternative: What it shows, for those who cannot see it.
        png: The image.
    """

    name: str
    title: str
    alternative: str
    png: bytes

    @property
    def uri(self) -> str:
        """The image as a URI that needs no network."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def write_report(
    report: Report,
    folder: Path,
    *,
    runs: Mapping[str, Runs] | None = None,
    references: Mapping[str, Runs] | None = None,
    rules: Rules | None = None,
) -> ReportFiles:
    """Write a report. Safe to repeat: files appear whole and replace older ones.

    Args:
        report: What to say.
        folder: Where to write; made when missing.
        runs: Folders of the runs by pipeline and name, for maps of significant digits; without them there are none.
        references: Folders of the runs of the baselines, likewise, for maps of where images have changed.
        rules: The rules of the comparison.

    Returns:
        The files.
    """
    rules = rules or Rules()
    maps = {part.pipeline: _maps(part, folder, runs or {}, references or {}, rules) for part in report.pipelines}
    plots = {part.pipeline: _plots(part, (runs or {}).get(part.pipeline), rules) for part in report.pipelines}
    environment = Environment(
        loader=PackageLoader("prefect_biomed.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "probability": _probability}
    page = environment.get_template("report.html").render(
        report=report, plots=plots, colour=_colours, max_rows=_MAX_ROWS, max_shown=_MAX_SHOWN, view=_View, maps=maps
    )
    html, markdown, json_file = folder / "report.html", folder / "report.md", folder / "report.json"
    images = [(folder / plot.name, plot.png) for group in plots.values() for plot in group]
    for path, content in [
        (html, page.encode()),
        (markdown, markdown_of(report).encode()),
        (json_file, report.model_dump_json(indent=2).encode()),
        *images,
    ]:
        with atomic_write(path) as file:
            file.write(content)
    return ReportFiles(
        html=html,
        markdown=markdown,
        json_file=json_file,
        images=tuple(path for path, _ in images),
        maps=tuple(path for found in maps.values() for path in found),
    )


def _maps(
    part: PipelineReport, folder: Path, runs: Mapping[str, Runs], references: Mapping[str, Runs], rules: Rules
) -> tuple[Path, ...]:
    old, new = references.get(part.pipeline), runs.get(part.pipeline)
    if part.against_baseline is None or not part.against_baseline.changed or not old or not new:
        return ()
    # One folder for each pipeline, or the maps of one would take the place of another's.
    stem = "".join(letter if letter.isalnum() else "-" for letter in part.pipeline).strip("-").lower()
    (target := folder / f"{stem}-where").mkdir(parents=True, exist_ok=True)
    return write_maps(part.against_baseline, old, new, target, rules)


def markdown_of(report: Report) -> str:
    """Write the short text: verdict and effect, what has changed, what was not judged, the rest.

    Args:
        report: The report.

    Returns:
        Markdown.
    """
    lines = [f"# {_cell(report.title)}", "", *(f"- {_cell(sentence)}" for sentence in report.sentences), ""]
    for part in report.pipelines:
        view = _View(part)
        if view.changes:
            lines += [f"## {part.pipeline}: what has changed", "", "| file | effect | where | p |", "|---|---|---|---|"]
            for change in view.changes[:_MAX_SHOWN]:
                cells = [_cell(change.title), _cell(change.effect), _cell(change.where), _probability(change.p)]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
        if view.reasons:
            lines += [f"## {part.pipeline}: not judged", ""]
            lines += [f"- {_cell(reason.sentence)}" for reason in view.reasons]
            lines.append("")
        if view.rows:
            lines += [
                f"## {part.pipeline}, {len(part.comparison.runs)} runs",
                "",
                "| file | agreement | largest difference | digits in common | where |",
                "|---|---|---|---|---|",
            ]
        for file in view.rows[:_MAX_SHOWN]:
            measures = file.measures[:3] or (None,)
            for measure in measures:
                cells = [_cell(file.name if measure is None else f"{file.name}: {measure.name}"), file.agreement.value]
                cells += ["", "", _cell("; ".join(fact.field for fact in file.facts[:3]))]
                if measure is not None:
                    cells[2:] = [
                        _number(measure.max_difference),
                        _number(measure.digits),
                        _cell("; ".join(measure.where[:2])),
                    ]
                lines.append(f"| {' | '.join(cells)} |")
        if len(view.rows) > _MAX_SHOWN:
            lines += ["", f"{len(view.rows) - _MAX_SHOWN} more files are in report.html and report.json."]
        lines.append("")
    failed = [run for run in report.runs if not run.succeeded]
    if failed:
        lines += [
            "## Failed runs",
            "",
            *(f"- {_cell(run.pipeline)}, {_cell(run.name)}: {_cell(run.message)}" for run in failed),
            "",
        ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Change:
    """One file that has changed, by its clearest measure."""

    title: str
    effect: str
    where: str
    p: float | None
    more: int


@dataclass(frozen=True)
class _ReasonGroup:
    """What was not judged for one reason."""

    reason: str
    parts: tuple[str, ...]
    files: int

    @property
    def sentence(self) -> str:
        named = "; ".join(self.parts[:3]) + ("; …" if len(self.parts) > 3 else "")
        return f"{self.files} {'file' if self.files == 1 else 'files'}, {self.reason}: {named}"


@dataclass(frozen=True)
class _Folder:
    """The files of one folder."""

    name: str
    files: tuple[FileComparison, ...]
    counts: str


class _View:
    """One pipeline in the order in which it is read: what matters first, each file once."""

    def __init__(self, part: PipelineReport) -> None:
        self._part = part
        judgement = part.against_baseline
        self._changed = set(judgement.changed_files) if judgement else set()
        self._not_judged = {left.file for left in judgement.not_judged} if judgement else set()
        order = {"changed": 0, "not judged": 1, "different": 2, "missing in some runs": 2}
        self.rows = sorted(part.comparison.files, key=lambda file: (order.get(self.finding(file), 3), file.name))
        self.changes = self._changes()
        self.reasons = self._reasons()
        self.folders = self._folders()

    def finding(self, file: FileComparison) -> str:
        """What is said of a file: to differ is no fault where it does not differ more than the references do."""
        if file.name in self._changed:
            return "changed"
        if file.name in self._not_judged:
            return "not judged"
        judgement = self._part.against_baseline
        if judgement is not None and not judgement.note and not file.agreement.is_agreement:
            return "within the noise" if judgement.smallest_p <= judgement.level else "differs"
        return file.agreement.value

    def _changes(self) -> list[_Change]:
        verdicts = [
            v for v in (self._part.against_baseline.verdicts if self._part.against_baseline else ()) if v.changed
        ]
        found = []
        for name in dict.fromkeys(verdict.file for verdict in verdicts):
            first, *others = [verdict for verdict in verdicts if verdict.file == name]
            effect = first.effect.sentence if first.effect else first.reason
            title = f"{name}: {first.measure}" if first.measure else name
            found.append(_Change(title, effect, "; ".join(first.where[:2]), first.p, len(others)))
        return found

    def _reasons(self) -> list[_ReasonGroup]:
        left = self._part.against_baseline.not_judged if self._part.against_baseline else ()
        found = []
        for reason in dict.fromkeys(item.reason for item in left):
            mine = [item for item in left if item.reason is reason]
            files = tuple(dict.fromkeys(item.file for item in mine))
            first = {item.file: item for item in reversed(mine)}
            parts = [f"{name}, {first[name].part}" if first[name].part else name for name in files]
            found.append(_ReasonGroup(reason.value, tuple(parts), len(files)))
        return found

    def _folders(self) -> list[_Folder]:
        groups: dict[str, list[FileComparison]] = {}
        for file in self.rows:
            groups.setdefault(file.name.rpartition("/")[0] or "top folder", []).append(file)
        found = []
        for name, files in groups.items():
            said = Counter(self.finding(file) for file in files)
            found.append(_Folder(name, tuple(files), ", ".join(f"{count} {what}" for what, count in said.items())))
        return found


def _cell(text: str) -> str:
    return inline(one_line(text, most=500))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _probability(value: float | None) -> str:
    return "-" if value is None else probability(value)


def _colours(file: FileComparison, run: str) -> str:
    letter = file.groups.get(run)
    if letter is None:
        return _MISSING_COLOUR
    number = ord(letter) - ord("A") if len(letter) == 1 else len(_COLOURS) - 1
    return _COLOURS[min(number, len(_COLOURS) - 1)]


def _plots(part: PipelineReport, runs: Runs | None, rules: Rules) -> list[Plot]:
    stem = "".join(letter if letter.isalnum() else "-" for letter in part.pipeline).strip("-").lower()
    plots = []
    if part.comparison.files and part.comparison.runs:
        plots.append(_matrix(part, f"{stem}-files.png"))
    if part.timeline:
        plots.append(_timeline(part, f"{stem}-drift.png"))
    if runs and len(runs) > 1:
        plots += _digit_maps(part, runs, rules, stem)
    return plots


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No software version inside: the same report is the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _matrix(part: PipelineReport, name: str) -> Plot:
    files = _View(part).rows[:_MAX_ROWS]
    runs = part.comparison.runs
    # Of many runs the letters would be too small to be read, and take most of the time.
    has_letters = len(runs) <= _MAX_LETTERS
    width = 0.55 if has_letters else 0.2
    figure = Figure(figsize=(2.6 + width * len(runs), 0.9 + 0.34 * len(files)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow([[to_rgb(_colours(file, run)) for run in runs] for file in files], aspect="auto")
    for row, file in enumerate(files if has_letters else ()):
        for column, run in enumerate(runs):
            axes.text(column, row, file.groups.get(run, "-"), ha="center", va="center", fontsize=9, color="#111111")
    for edge in range(1, len(runs)):
        axes.axvline(edge - 0.5, color="white", linewidth=2 if has_letters else 1)
    for edge in range(1, len(files)):
        axes.axhline(edge - 0.5, color="white", linewidth=2)
    axes.set_xticks(range(len(runs)), [run.removeprefix("run ") for run in runs], rotation=0 if has_letters else 90)
    axes.set_yticks(range(len(files)), [_shortened(file.name) for file in files], fontsize=8)
    # Without letters nothing but this says that grey is no content of its own.
    axes.set_xlabel("run" if has_letters else f"run (grey: none of the first {len(_COLOURS) - 1} contents of the file)")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    text = f"Matrix of {len(files)} files and {len(runs)} runs of {part.pipeline}. {part.comparison.sentence}"
    return Plot(name, "Files and runs", text, _png(figure))


def _shortened(name: str) -> str:
    return name if len(name) <= 44 else f"…{name[-43:]}"


def _finding(judgement: Judgement) -> str:
    return "within the noise" if judgement.outcome is Outcome.WITHIN else judgement.outcome.value


def _timeline(part: PipelineReport, name: str) -> Plot:
    """What each series said, one above the other: p, evidence since the baseline, size of the change."""
    judged = [summary for summary in part.timeline if summary.judgement is not None]
    level = judged[0].judgement.level if judged and judged[0].judgement else 0.05
    threshold = part.evidence.threshold if part.evidence else 1.0 / level
    panels: list[tuple[str, list[float | None], float | None]] = [
        ("p", [_p_of(s.judgement) for s in part.timeline], level),
        ("evidence", [s.evidence for s in part.timeline], threshold),
        ("change (%)", [_relative(s.judgement) for s in part.timeline], None),
    ]
    panels = [panel for panel in panels if any(value is not None for value in panel[1])] or panels[:1]
    figure = Figure(figsize=(6.4, 0.9 + 1.3 * len(panels)), dpi=110, layout="constrained")
    grid: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, (label, values, line) in zip(grid.flat, panels, strict=True):
        _panel(axes, part, label, values, line)
    # matplotlib annotates only part of its functions.
    locator: Any = AutoDateLocator
    formatter: Any = ConciseDateFormatter
    last = grid.flat[-1]
    last.xaxis.set_major_locator(ticks := locator(minticks=2, maxticks=6))
    last.xaxis.set_major_formatter(formatter(ticks))
    last.set_xlim(*_margins([summary.began for summary in part.timeline]))
    # Above the panels, where it hides no point.
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", fontsize=8, ncols=4)
    since = f" {part.evidence.sentence}." if part.evidence else ""
    changed = sum(bool(summary.judgement and summary.judgement.changed) for summary in part.timeline)
    shown = ", ".join(label for label, _, _ in panels)
    text = (
        f"Time line of {len(part.timeline)} series of {part.pipeline} against the baseline: {shown}. "
        f"Changed: {changed}.{since}"
    )
    return Plot(name, "Drift against the baseline", text, _png(figure))


def _margins(dates: Sequence[datetime]) -> tuple[datetime, datetime]:
    margin = max((max(dates) - min(dates)) * 0.04, timedelta(days=1))
    return min(dates) - margin, max(dates) + margin


def _p_of(judgement: Judgement | None) -> float | None:
    """The p value; that of runs that do not differ at all is 1."""
    if judgement is None:
        return None
    return 1.0 if judgement.p is None and judgement.outcome is Outcome.WITHIN else judgement.p


def _relative(judgement: Judgement | None) -> float | None:
    """The largest median change of those that were found, in percent."""
    if judgement is None:
        return None
    found = [v.effect.relative for v in judgement.verdicts if v.changed and v.effect and v.effect.relative]
    return 100.0 * max(found) if found else None


def _panel(axes: Any, part: PipelineReport, label: str, values: Sequence[float | None], line: float | None) -> None:
    known = [(s, value) for s, value in zip(part.timeline, values, strict=True) if value is not None and value > 0.0]
    axes.plot([s.began for s, _ in known], [value for _, value in known], color="#555555", linewidth=1, zorder=1)
    for finding, (marker, colour) in _MARKERS.items():
        chosen = [(s.began, value) for s, value in known if s.judgement and _finding(s.judgement) == finding]
        if chosen:
            places, heights = zip(*chosen, strict=True)
            axes.scatter(places, heights, marker=marker, s=50, color=colour, label=finding, zorder=2)
    # The baseline has none of these values: by itself it is not judged.
    for number, date in enumerate(s.began for s in part.timeline if s.judgement is None):
        axes.axvline(date, color="#000000", linewidth=2, label="_" if number else "baseline")
    if line is not None:
        axes.axhline(line, color="#0072b2", linestyle=":", linewidth=1, label="level, and alarm")
    axes.set_yscale("log")
    if not known:
        axes.set_ylim((line or 1.0) / 10.0, (line or 1.0) * 10.0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color="#dddddd")


def _digit_maps(part: PipelineReport, runs: Runs, rules: Rules, stem: str) -> list[Plot]:
    wanted = [
        file.name
        for file in part.comparison.files
        if file.kind in ("NIfTI", "NumPy", "image") and any(measure.digits for measure in file.measures)
    ][:_MAX_MAPS]
    plots: list[Plot] = []
    if not wanted:
        return plots
    with file_groups({name: runs[name] for name in part.comparison.runs if name in runs}, rules) as groups:
        for group in groups:
            if group.name in wanted and len(group.paths) > 1:
                plots += _digit_map(group, rules, f"{stem}-digits-{len(plots) + 1}.png")
    return plots


def _digit_map(group: FileGroup, rules: Rules, name: str) -> list[Plot]:
    with ExitStack() as stack:
        contents: list[Content] = list(stack.enter_context(opened(group, rules)).values())
        title = next((title for title, measure in contents[0].measures.items() if len(measure.shape) >= 2), None)
        if title is None:
            return []
        measures = [content.measures[title] for content in contents if title in content.measures]
        if any(measure.shape != measures[0].shape for measure in measures):
            return []
        planes = _planes(measures)
    shown = np.concatenate([plane[np.isfinite(plane)] for _, plane in planes] or [np.empty(0)])
    if not shown.size:
        return []
    low, high = float(np.floor(shown.min())), float(np.ceil(shown.max()))
    columns = min(3, len(planes))
    rows = -(-len(planes) // columns)
    figure = Figure(figsize=(6.4, 0.7 + 2.0 * rows), dpi=110, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    picture = None
    for axes, (label, plane) in zip(grid.flat, planes, strict=False):
        axes.set_facecolor("#eeeeee")
        picture = axes.imshow(plane.T, origin="lower", cmap="cividis", vmin=low, vmax=max(high, low + 1))
        axes.set_title(label, fontsize=8)
    if picture is not None:
        figure.colorbar(picture, ax=grid, shrink=0.8, label="significant digits (95 %)")
    text = (
        f"Map of the significant decimal digits of {group.name} over {len(group.paths)} runs in {len(planes)} slices. "
        f"Of the points shown that differ, the worst has {shown.min():.1f} digits, the middle one "
        f"{np.median(shown):.1f}, the best {shown.max():.1f}. Points that are the same in all runs are blank."
    )
    return [Plot(name, f"Significant digits of {group.name}", text, _png(figure))]


def _planes(measures: Sequence[Measure]) -> list[tuple[str, NDArray[np.float64]]]:
    """Digits of some slices across the last axis of volumes, or of the whole of an image."""
    volumes = [measure.volume() for measure in measures]
    shape = measures[0].shape
    if len(shape) == 2 or shape[-1] in (3, 4):
        chosen: list[tuple[str, tuple[Any, ...]]] = [("", (Ellipsis, 0) if len(shape) == 3 else ())]
    else:
        rest = (0,) * (len(shape) - 3)
        first, last = _extent(volumes[0])
        numbers = np.unique(np.linspace(first, last, min(_MAX_SLICES, shape[2])).round().astype(int))
        chosen = [(f"slice {number}", (slice(None), slice(None), int(number), *rest)) for number in numbers]
    planes = []
    for label, index in chosen:
        if volumes[0][index].size > _MAX_SLICE_POINTS:
            continue
        sample = np.stack(
            [
                np.asarray(volume[index], dtype=np.float64) * measure.slope + measure.intercept
                for volume, measure in zip(volumes, measures, strict=True)
            ]
        )
        mean = sample.mean(axis=0)
        usable = np.isfinite(sample).all(axis=0) & (sample != sample[0]).any(axis=0) & (mean != 0.0)
        plane = np.full(mean.shape, np.nan)
        if usable.any():
            plane[usable] = assured_digits(sample[:, usable], mean[usable])
        planes.append((label, plane))
    return planes


def _extent(volume: NDArray[Any]) -> tuple[int, int]:
    """First and last slice across the third axis that holds anything but zeros."""
    filled = [number for number in range(volume.shape[2]) if np.any(volume[:, :, number])]
    return (filled[0], filled[-1]) if filled else (0, volume.shape[2] - 1)
