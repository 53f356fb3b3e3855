"""The patients at each hospital: public data sets, split over the organizations.

Both come inside the distribution of scikit-learn and are read from its files, without importing
it: `diabetes` (442 patients, Efron, Hastie, Johnstone and Tibshirani 2004) and `breast_cancer`
(569 patients, Wolberg, Street and Mangasarian 1995).
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

# `default` is the label that algorithms and tutorials ask for when nothing else is said.
LABELS = ("default", "breast_cancer")
# A table that somebody else fills: what a pipeline has measured at the hospital.
MEASURES = "measures"

_DIABETES = ("age", "sex", "bmi", "bp", "tc", "ldl", "hdl", "tch", "ltg", "glu", "progression")
_MEASURES = (
    "radius",
    "texture",
    "perimeter",
    "area",
    "smoothness",
    "compactness",
    "concavity",
    "concave_points",
    "symmetry",
    "fractal_dimension",
)

Row = list[str]


def diabetes() -> tuple[Row, list[Row]]:
    """Return columns and rows: ten baseline values and the disease's progression in a year."""
    rows = [line.split() for line in _text("diabetes_data_raw.csv.gz")]
    targets = [f"{float(line):g}" for line in _text("diabetes_target.csv.gz")]
    return list(_DIABETES), [[*row, end] for row, end in zip(rows, targets, strict=True)]


def breast_cancer() -> tuple[Row, list[Row]]:
    """Return columns and rows: thirty measures of cell nuclei and 1 for a malignant tumour."""
    columns = [f"{kind}_{measure}" for kind in ("mean", "error", "worst") for measure in _MEASURES]
    rows = list(csv.reader(_text("breast_cancer.csv")[1:]))
    # The file says 0 for malignant; a regression reads better the other way round.
    return [*columns, "malignant"], [[*row[:-1], str(1 - int(row[-1]))] for row in rows]


def _text(name: str) -> list[str]:
    path = Path(str(distribution("scikit-learn").locate_file(f"sklearn/datasets/data/{name}")))
    content = path.read_bytes()
    if name.endswith(".gz"):
        content = gzip.decompress(content)
    return content.decode().splitlines()


def split(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Write the data sets as CSV files, dealt out to organizations.

    Row by row in turn would make the hospitals alike; whole stretches of patients ordered by age
    or tumour radius make them differ, as hospitals do.

    Args:
        folder: where the files go, one folder per organization.
        names: of the organizations.

    Returns:
        For each organization, the file of each database label.
    """
    files: dict[str, dict[str, Path]] = {name: {} for name in names}
    for label, (columns, rows) in zip(LABELS, (diabetes(), breast_cancer()), strict=True):
        ordered = sorted(rows, key=lambda row: float(row[0]))
        for place, name in enumerate(names):
            begin, end = (len(rows) * place // len(names), len(rows) * (place + 1) // len(names))
            path = folder / name / f"{label}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(ordered[begin:end])
            files[name][label] = path
    for name in names:
        files[name][MEASURES] = folder / name / f"{MEASURES}.csv"
        if not files[name][MEASURES].exists():
            # It may have been filled before a restart.
            files[name][MEASURES].write_text("image\n", encoding="utf-8")
    return files
