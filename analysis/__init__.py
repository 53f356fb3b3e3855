"""How repeatable results are: comparison of files, the stability test, the experiment folder and its report.

Works on folders from anywhere. It knows neither Prefect nor a platform. Its models are there always; what computes
needs the extra `analysis` and is imported when it is asked for, so that flows that name the models need no extra.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prefect_biomed.analysis.models import (
    Agreement,
    Comparison,
    FileComparison,
    Judgement,
    MeasureComparison,
    Report,
    Rules,
    SeriesSummary,
    Tolerance,
    Variability,
    Verdict,
)
from prefect_biomed.analysis.outcomes import NotJudged, Outcome, Reason
from prefect_biomed.clients.errors import ConfigurationError

if TYPE_CHECKING:
    from prefect_biomed.analysis.comparison import compare_runs, inventory, named_runs, runs_below, series_below
    from prefect_biomed.analysis.experiment import Experiment, RunRecord, inputs_digest
    from prefect_biomed.analysis.report import write_report
    from prefect_biomed.analysis.stability import (
        LEAST_REFERENCES,
        StabilityTest,
        judge_runs,
        judge_variability,
        series_of,
    )

__all__ = [
    "LEAST_REFERENCES",
    "Agreement",
    "Comparison",
    "Experiment",
    "FileComparison",
    "Judgement",
    "MeasureComparison",
    "NotJudged",
    "Outcome",
    "Reason",
    "Report",
    "Rules",
    "RunRecord",
    "SeriesSummary",
    "StabilityTest",
    "Tolerance",
    "Variability",
    "Verdict",
    "compare_runs",
    "inputs_digest",
    "inventory",
    "judge_runs",
    "judge_variability",
    "named_runs",
    "require_extra",
    "runs_below",
    "series_below",
    "series_of",
    "write_report",
]

_NEEDED = ("jinja2", "matplotlib", "nibabel", "numpy", "scipy", "significantdigits", "threadpoolctl")
_COMPUTING = {
    name: module
    for module, names in {
        "comparison": ("compare_runs", "inventory", "named_runs", "runs_below", "series_below"),
        "experiment": ("Experiment", "RunRecord", "inputs_digest"),
        "report": ("write_report",),
        "stability": ("LEAST_REFERENCES", "StabilityTest", "judge_runs", "judge_variability", "series_of"),
    }.items()
    for name in names
}


def require_extra() -> None:
    """See to it that results can be compared here. Flows ask before they send anything.

    Raises:
        ConfigurationError: The extra `analysis` is not installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"Comparing results needs {', '.join(missing)}. Install the extra: pip install 'prefect-biomed[analysis]'"
        )


def __getattr__(name: str) -> Any:
    """Import what computes.

    Raises:
        AttributeError: There is nothing of this name.
        ConfigurationError: The extra `analysis` is not installed.
    """
    if name not in _COMPUTING:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    require_extra()
    return getattr(import_module(f"{__name__}.{_COMPUTING[name]}"), name)
