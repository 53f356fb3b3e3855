"""How repeatable results are: comparison of files, the stability test, the experiment folder and its report.

Works on folders from anywhere. It knows neither Prefect nor a platform and needs the extra `analysis`.
"""

from importlib.util import find_spec

from prefect_biomed.clients.errors import ConfigurationError

_MISSING = [
    name
    for name in ("jinja2", "matplotlib", "nibabel", "numpy", "scipy", "significantdigits")
    if find_spec(name) is None
]
if _MISSING:
    raise ConfigurationError(
        f"Comparing results needs {', '.join(_MISSING)}. Install the extra: pip install 'prefect-biomed[analysis]'"
    )

from prefect_biomed.analysis.comparison import compare_runs, inventory  # noqa: E402  # only once the extra is there
from prefect_biomed.analysis.experiment import Experiment, RunRecord  # noqa: E402  # only once the extra is there
from prefect_biomed.analysis.models import (  # noqa: E402  # only once the extra is there
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
from prefect_biomed.analysis.outcomes import NotJudged, Outcome, Reason  # noqa: E402  # only once the extra is there
from prefect_biomed.analysis.report import write_report  # noqa: E402  # only once the extra is there
from prefect_biomed.analysis.stability import (  # noqa: E402  # only once the extra is there
    StabilityTest,
    judge_runs,
    judge_variability,
)

__all__ = [
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
    "inventory",
    "judge_runs",
    "judge_variability",
    "write_report",
]
