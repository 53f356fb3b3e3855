"""How often the stability test is wrong, and what it finds: `python -m benchmarks.repeatability alarms power`.

Each cell of a table is a file below `--folder`, written after each batch of experiments, so that a run that is stopped
loses nothing and a later one goes on; `tables` writes what is there into the documentation. One seed for each cell and
batch: two runs give the same numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from prefect_biomed.analysis.exchange import Evidence, Labellings, Scan
from prefect_biomed.analysis.models import Tolerance
from prefect_biomed.analysis.monitor import Monitor, Shown
from prefect_biomed.analysis.stability import Measured

Floats = NDArray[np.float64]
Generator = np.random.Generator
Shape = tuple[int, int]

LEVEL = 0.05
BATCH = 25
DESIGNS = ((3, 5), (5, 5), (10, 1), (10, 5), (19, 1))
DOCUMENT = Path(__file__).parents[1] / "docs" / "repeatability.md"


def _float32(generator: Generator, shape: Shape) -> Floats:
    base = generator.uniform(50, 200, shape[1])
    return (base * (1 + 6e-8 * generator.standard_normal(shape))).astype("f4").astype("f8")


def _int16(generator: Generator, shape: Shape) -> Floats:
    base = generator.uniform(50, 200, shape[1])
    return np.rint((base + 0.01 * generator.standard_normal(shape)) / 0.013) * 0.013


def _smooth(generator: Generator, shape: Shape) -> Floats:
    smoothed: Floats = ndimage.gaussian_filter1d(generator.standard_normal(shape), 30.0, axis=1)
    return smoothed


def _flips_by_voxel(generator: Generator, shape: Shape) -> Floats:
    return generator.uniform(50, 200, shape[1]) + (generator.random(shape) < 0.1)


def _flips_by_run(generator: Generator, shape: Shape) -> Floats:
    branch = generator.random((shape[0], 1)) < 0.3
    return branch * generator.standard_normal(shape[1]) + 1e-3 * generator.standard_normal(shape)


def _clustered_labels(generator: Generator, shape: Shape) -> Floats:
    labels = np.tile(np.repeat(np.arange(-(-shape[1] // 50)) % 7, 50)[: shape[1]].astype("f8"), (shape[0], 1))
    for row in labels:
        for start in generator.integers(0, shape[1], 5):
            row[start : start + int(generator.integers(1, 30))] = generator.integers(0, 7)
    return labels


def _mask_edges(generator: Generator, shape: Shape) -> Floats:
    place = np.arange(shape[1])
    first, last = (generator.normal(centre, 3.0, (shape[0], 1)) for centre in (0.2 * shape[1], 0.8 * shape[1]))
    return np.where((place > first) & (place < last), 100.0 + 0.0 * place, 0.0)


NOISES: dict[str, Callable[[Generator, Shape], Floats]] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "t, 3 degrees of freedom": lambda generator, shape: generator.standard_t(3, shape),
    "log-normal": lambda generator, shape: np.exp(0.5 * generator.standard_normal(shape)),
    "float32, last bit": _float32,
    "scaled int16": _int16,
    "smooth": _smooth,
    "branches, by voxel": _flips_by_voxel,
    "branches, by run": _flips_by_run,
    "clustered labels": _clustered_labels,
    "mask edges": _mask_edges,
    "spread by run": lambda g, shape: g.standard_normal(shape) * np.exp(0.5 * g.standard_normal((shape[0], 1))),
}


def _move(new: Floats, generator: Generator, spreads: float, share: float) -> Floats:
    chosen = generator.choice(new.shape[1], max(1, round(share * new.shape[1])), replace=False)
    new[:, chosen] += spreads
    return new


def _new_nan(new: Floats, generator: Generator) -> Floats:
    new[:, generator.integers(new.shape[1])] = np.nan
    return new


CHANGES: dict[str, Callable[[Floats, Generator], Floats]] = {
    "1 % of the points by 3 spreads": lambda new, generator: _move(new, generator, 3.0, 0.01),
    "all points by half a spread": lambda new, generator: new + 0.5,
    "one point by 100 spreads": lambda new, generator: _move(new, generator, 100.0, 0.0),
    "the spread by 1.5": lambda new, generator: 1.5 * new,
    "one new NaN": _new_nan,
}


def _flipped_labels(generator: Generator, references: int, runs: int, points: int) -> Floats:
    labels = np.tile((np.arange(points) // 50 % 7).astype("f8"), (references + runs, 1))
    labels[generator.random(labels.shape) < 0.002] += 1.0
    labels[references:, generator.choice(points, points // 100, replace=False)] += 2.0
    return labels


def _moved_affine(generator: Generator, references: int, runs: int, points: int) -> Floats:
    """A header entry as the test sees it: one point for each of its two values."""
    is_new = np.arange(references + runs) >= references
    return np.stack([is_new, ~is_new], axis=1).astype("f8")


OTHER_CHANGES = {"a moved affine": _moved_affine, "1 % of the labels flipped": _flipped_labels}


def _alarms(labellings: Labellings, noise: str, measures: int, points: int, generator: Generator) -> dict[str, int]:
    evidence = Evidence(labellings)
    for _ in range(measures):
        scan = Scan(labellings)
        scan.add(NOISES[noise](generator, (labellings.references + labellings.runs, points)))
        evidence.add(scan)
    return {"alarms": int(evidence.p is not None and evidence.p <= LEVEL)}


def _found(labellings: Labellings, points: int, generator: Generator) -> dict[str, int]:
    """Which changes are found alone, among 30 and among 200 measures; the others are the same for all changes."""
    references, runs = labellings.references, labellings.runs
    made: dict[str, Floats] = {}
    for name, change in CHANGES.items():
        values = generator.standard_normal((references + runs, points))
        values[references:] = change(values[references:], generator)
        made[name] = values
    made |= {name: make(generator, references, runs, points) for name, make in OTHER_CHANGES.items()}
    others, known = Evidence(labellings), 0
    found = {}
    for number in (1, 30, 200):
        for _ in range(known, number - 1):
            scan = Scan(labellings)
            scan.add(generator.standard_normal((references + runs, points // 10)))
            others.add(scan)
        known = number - 1
        for name, values in made.items():
            evidence = copy.deepcopy(others)
            measured = Measured(labellings, Tolerance())
            measured.add(values)
            for scan in measured.scans:
                evidence.add(scan)
            found[f"{name}|{number}"] = int(evidence.p is not None and evidence.p <= LEVEL)
    return found


class Cell:
    """One cell of a table: counts over experiments, kept in a file.

    Args:
        folder: Where.
        name: Its name.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._path = folder / f"{zlib.crc32(name.encode()):08x}.json"
        known = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self.experiments: int = known.get("experiments", 0)
        self.counts: dict[str, int] = known.get("counts", {})

    def run(self, wanted: int, experiment: Callable[[Generator], dict[str, int]]) -> None:
        """Add a batch of experiments, unless there are as many as wanted."""
        if self.experiments >= wanted:
            return
        for number in range(self.experiments, min(wanted, self.experiments + BATCH)):
            for key, value in experiment(np.random.default_rng([zlib.crc32(self.name.encode()), number])).items():
                self.counts[key] = self.counts.get(key, 0) + value
            self.experiments = number + 1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {"name": self.name, "experiments": self.experiments, "counts": self.counts}
        self._path.write_text(json.dumps(content))
        print(self.name, self.experiments, self.counts, flush=True)


def _alarm_cells() -> Iterator[tuple[str, int, int, int]]:
    for measures in (1, 30):
        for references, runs in DESIGNS:
            for noise in NOISES:
                yield noise, references, runs, measures


def alarms(folder: Path, wanted: int) -> None:
    """Count false alarms."""
    for goal in range(BATCH, wanted + BATCH, BATCH):
        for noise, references, runs, measures in _alarm_cells():
            labellings = Labellings(references, runs)
            points = 20_000 if measures == 1 else 1_000
            Cell(folder, f"alarms|{noise}|{references}+{runs}|{measures}").run(
                min(goal, wanted),
                partial(_alarms, labellings, noise, measures, points),
            )


def power(folder: Path, wanted: int) -> None:
    """Count changes that are found in a measure of 20 000 points, alone and among others of 2 000."""
    for goal in range(BATCH, wanted + BATCH, BATCH):
        for references, runs in ((5, 5), (10, 5)):
            labellings = Labellings(references, runs)
            Cell(folder, f"power|{references}+{runs}").run(min(goal, wanted), partial(_found, labellings, 20_000))


YEARS = ("normal", "t, 3 degrees of freedom", "smooth")
WEEKS = 52


def _year(labellings: Labellings, noise: str, points: int, change: int | None, generator: Generator) -> Monitor:
    """One baseline and a year of series; after `change` quiet weeks 5 % of the points move by half a spread."""
    references, runs = labellings.references, labellings.runs
    baseline = NOISES[noise](generator, (references, points))
    spread = NOISES[noise](generator, (50, points)).std()
    moved = generator.choice(points, points // 20, replace=False)
    monitor = Monitor(LEVEL)
    for week in range(WEEKS):
        new = NOISES[noise](generator, (runs, points))
        if change is not None and week >= change:
            new[:, moved] += 0.5 * spread
        scan, evidence = Scan(labellings), Evidence(labellings)
        scan.add(np.concatenate([baseline, new]))
        evidence.add(scan)
        monitor.add(Shown(str(generator.random()), evidence.p, labellings.smallest_p, evidence.size))
        if monitor.alarm is not None:
            break
    return monitor


def _quiet_year(labellings: Labellings, noise: str, generator: Generator) -> dict[str, int]:
    return {"alarms": int(_year(labellings, noise, 500, None, generator).alarm is not None)}


def _changed_year(labellings: Labellings, noise: str, change: int, generator: Generator) -> dict[str, int]:
    alarm = _year(labellings, noise, 20_000, change, generator).alarm
    weeks = "never" if alarm is None else "too early" if alarm < change else str(alarm - change + 1)
    return {weeks: 1}


def years(folder: Path, wanted: int) -> None:
    """Count years with an alarm while nothing changes, and weeks until a change is told."""
    cells = [(design, noise) for noise in YEARS for design in ((5, 5), (10, 5))]
    for goal in range(BATCH, wanted + BATCH, BATCH):
        for design, noise in cells:
            name = f"years|{noise}|{design[0]}+{design[1]}"
            Cell(folder, name).run(min(goal, wanted), partial(_quiet_year, Labellings(*design), noise))
        for design, noise in cells:
            for change in (0, 12, 26):
                name = f"change|{noise}|{design[0]}+{design[1]}|{change}"
                # Forty times as many points as in a quiet year.
                few = min(goal, wanted) // 10
                Cell(folder, name).run(few, partial(_changed_year, Labellings(*design), noise, change))


def tables(folder: Path) -> None:
    """Write the tables of which there are cells into the documentation, between their markers."""
    text = DOCUMENT.read_text()
    known = {json.loads(path.read_text())["name"].partition("|")[0] for path in folder.glob("*.json")}
    for name, lines in (
        ("alarms", _alarm_table(folder)),
        ("power", _power_table(folder)),
        ("years", _year_table(folder)),
    ):
        if name not in known:
            continue
        before, rest = text.split(f"<!-- table: {name} -->\n")
        after = rest.split("<!-- /table -->", 1)[1]
        text = f"{before}<!-- table: {name} -->\n" + "\n".join(lines) + f"\n<!-- /table -->{after}"
    DOCUMENT.write_text(text)


def _alarm_table(folder: Path) -> list[str]:
    heads = [f"{n} + {m}{', 30 measures' if k > 1 else ''}" for k in (1, 30) for n, m in DESIGNS]
    lines = [f"| noise | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    experiments = []
    for noise in NOISES:
        shares = []
        for measures in (1, 30):
            for references, runs in DESIGNS:
                cell = Cell(folder, f"alarms|{noise}|{references}+{runs}|{measures}")
                experiments.append(cell.experiments)
                shares.append(_share(cell, "alarms"))
        lines.append(f"| {noise} | {' | '.join(shares)} |")
    known = [number for number in experiments if number]
    if known:
        high = float(stats.binom.ppf(0.975, min(known), LEVEL)) / min(known)
        counted = f"{max(known)}" if min(known) == max(known) else f"{min(known)} to {max(known)}"
        lines += ["", f"{counted} experiments for each cell; {min(known)} stay below {high:.0%} by chance."]
    return lines


def _share(cell: Cell, key: str) -> str:
    return f"{100 * cell.counts.get(key, 0) / cell.experiments:.0f} %" if cell.experiments else "-"


def _power_table(folder: Path) -> list[str]:
    designs = ((5, 5), (10, 5))
    heads = [f"{n} + {m}, {'alone' if k == 1 else f'among {k}'}" for n, m in designs for k in (1, 30, 200)]
    lines = [f"| change | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    cells = {design: Cell(folder, f"power|{design[0]}+{design[1]}") for design in designs}
    for name in (*CHANGES, *OTHER_CHANGES):
        shares = [_share(cells[design], f"{name}|{number}") for design in designs for number in (1, 30, 200)]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    done = ", ".join(f"{cell.experiments} for {n} + {m}" for (n, m), cell in cells.items())
    return [*lines, "", f"Experiments: {done}."]


def _year_table(folder: Path) -> list[str]:
    lines = [
        "| noise | references + runs a week | years | with any alarm, nothing changed | weeks until 5 % of the points "
        "moved by half a spread is told, median, change in week 1 | in week 13 | in week 27 |",
        "|---|---|---|---|---|---|---|",
    ]
    for noise in YEARS:
        for design in ("5+5", "10+5"):
            cell = Cell(folder, f"years|{noise}|{design}")
            share = _share(cell, "alarms")
            weeks = [_median_weeks(Cell(folder, f"change|{noise}|{design}|{change}")) for change in (0, 12, 26)]
            lines.append(
                f"| {noise} | {design.replace('+', ' + ')} | {cell.experiments} | {share} | {' | '.join(weeks)} |"
            )
    return lines


def _median_weeks(cell: Cell) -> str:
    """The median, and of how many years; those with an alarm before the change do not count."""
    weeks = sorted(
        float("inf") if key == "never" else float(key)
        for key, count in cell.counts.items()
        if key != "too early"
        for _ in range(count)
    )
    if not weeks:
        return "-"
    middle = weeks[len(weeks) // 2]
    shown = "not within the year" if middle == float("inf") else f"{middle:.0f}"
    return f"{shown} (of {len(weeks)})"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeatability", description=__doc__)
    parser.add_argument("what", nargs="+", choices=["alarms", "power", "years", "tables"])
    parser.add_argument("--experiments", type=int, default=400, help="for each cell")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks") / "results" / "repeatability")
    given = parser.parse_args()
    for what in given.what:
        if what == "tables":
            tables(given.folder)
        else:
            {"alarms": alarms, "power": power, "years": years}[what](given.folder, given.experiments)


if __name__ == "__main__":
    main()
