"""What it costs to import the flows of a platform, beside Prefect's own import."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from rich.console import Console
from rich.table import Table

TIMES = 5
_PREFECT = "import prefect.flows, prefect.tasks, prefect.blocks.abstract, prefect.artifacts"
_FLOWS = {name: f"import prefect_biomed.flows.{name}" for name in ("vip", "vantage6", "boss")}
# A flow is made when its module is imported; most of what that takes is the model of its parameters.
_MADE_AGAIN = """
import prefect
import prefect_biomed.flows.vip as module
flows = [value for value in vars(module).values() if isinstance(value, prefect.Flow)]
before = time.process_time()
for flow in flows:
    prefect.Flow(flow.fn, name=flow.name)
print(time.process_time() - before)
"""
_HELP = """
import contextlib, io
from prefect_biomed.cli import main
sys.argv = ["prefect-biomed", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""
_WHOLE = "print(time.process_time())"


def main() -> None:
    """Measure processor time in new processes, all programs in turn, and print medians."""
    programs = {
        "Prefect": f"{_PREFECT}\n{_WHOLE}",
        **{f"flows.{name}": f"{program}\n{_WHOLE}" for name, program in _FLOWS.items()},
        "of flows.vip: Prefect makes its flows": _MADE_AGAIN,
        "prefect-biomed --help": f"{_HELP}\n{_WHOLE}",
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(TIMES):
        for name, program in programs.items():
            seconds[name].append(_measured(program))
    table = Table("import", "processor time", "to Prefect's", title=f"Import, medians of {TIMES}")
    for name, found in seconds.items():
        ratio = median(found) / median(seconds["Prefect"])
        table.add_row(name, f"{median(found):.2f} s ({min(found):.2f} to {max(found):.2f})", f"{ratio:.2f}x")
    Console().print(table)


def _measured(program: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, time\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
