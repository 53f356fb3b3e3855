"""vantage6: the tutorials of generations 4 and 5 with the official clients and with ours, as their authors write them.

The programs are in `benchmarks/tutorials`, formatted alike. What all users have to say about themselves is in a module
`config`, as the tutorials have it, and is not counted.
"""

from __future__ import annotations

import ast
import csv
import io
import sys
import time
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.measure import laboratory, measure
from benchmarks.official import MissingInterpreter, official_environment
from benchmarks.vantage6 import OFFICIAL, PERSON, USER, requirements
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL, Job, Vantage6Sandbox

PROGRAMS = Path(__file__).parent / "tutorials"
IMAGE = "tutorial/average:1.0"
TASK_SECONDS = 30.0

_RUN = (
    PERSON
    + """
import runpy
os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "300"
sys.path.insert(0, arguments["folder"])

def work():
    averages = runpy.run_path(arguments["tutorial"])["averages"]
    ended = time.time()
    if hasattr(averages, "results"):
        return ended, [result.value for result in averages.results]
    records = averages["data"] if isinstance(averages, dict) else averages
    return ended, [json.loads(record["result"]) for record in records]

measured(work)
"""
)


@dataclass(frozen=True)
class Figures:
    """What one program of a tutorial takes.

    Attributes:
        lines: Of code.
        requests: To the server, and to the service for log-ins.
        delay_seconds: From the end of the last task to that of the program, which has its results then.
    """

    lines: int
    requests: int
    delay_seconds: float


def main() -> None:
    """Run the tutorials and print a table."""
    table = Table(
        "tutorial",
        "client",
        "lines of code",
        "requests",
        "from the end of the task to its results",
        box=MARKDOWN,
        title=f"Tutorials; the task takes {TASK_SECONDS:.0f} s",
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    with laboratory() as folder:
        for generation, (version, python) in OFFICIAL.items():
            clients: dict[str, Path | str] = {"prefect-biomed": sys.executable}
            name = f"vantage6-client {version}"
            try:
                clients[name] = official_environment(f"vantage6-client-{generation}", requirements(generation), python)
            except MissingInterpreter as missing:
                console.print(f"{name}: {missing}")
            for client, interpreter in clients.items():
                figures = follow(generation, interpreter, folder / f"{generation}-{client}", TASK_SECONDS)
                table.add_row(
                    f"generation {generation}",
                    client,
                    str(figures.lines),
                    str(figures.requests),
                    f"{figures.delay_seconds:.1f} s",
                )
    console.print(table)


def follow(generation: int, interpreter: Path | str, folder: Path, seconds: float) -> Figures:
    """Run the program of a tutorial on a sandbox of its own.

    Args:
        generation: 4 or 5.
        interpreter: Of the official client; this one runs the program of ours.
        folder: Made here, for what the program needs.
        seconds: How long the algorithm waits at each organization.

    Returns:
        The figures.

    Raises:
        RuntimeError: The program failed, or what came out is not the average that the cohorts have.
    """
    program = PROGRAMS / f"vantage6_{generation}_{'ours' if interpreter == sys.executable else 'official'}.py"
    folder.mkdir()
    with Sandbox("vantage6", vantage6={"generation": generation, "key_bits": 2048, "device_interval": 1}) as sandbox:
        server = cast(Vantage6Sandbox, sandbox.vantage6)
        server.add_image(IMAGE, {**server.images[CLINICAL].algorithms, "partial_average": _slowly(seconds)})
        facts = server.ready()
        (folder / "config.py").write_text(_configuration(facts))
        server.journal.clear()
        arguments = {"tutorial": str(program), "folder": str(folder), "username": USER}
        arguments["password"] = facts["users"][USER]["password"]
        ended, averages = measure(interpreter, _RUN, folder, **arguments)["result"]
        requests = len(server.journal.entries())
        last = max(run.finished_at.timestamp() for run in server.registry.runs if run.finished_at)
        expected = [_average(facts["tables"][name]["default"]) for name in ("north", "south")]
    if sorted(one["sum"] for one in averages) != sorted(one["sum"] for one in expected):
        raise RuntimeError(f"{program.name}: {averages}, not {expected}")
    return Figures(lines_of_code(program.read_text()), requests, ended - last)


def lines_of_code(text: str) -> int:
    """Count the lines of a program that hold more than comments and documentation.

    Args:
        text: Of the program.
    """
    tree = ast.parse(text)
    documentation = set()
    if ast.get_docstring(tree) is not None:
        first = tree.body[0]
        documentation = set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    left_out = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(text).readline) if one.type not in left_out]
    return len({line for one in tokens for line in range(one.start[0], one.end[0] + 1)} - documentation)


def _configuration(facts: dict[str, Any]) -> str:
    parts = urlsplit(facts["url"])
    settings: dict[str, Any] = {
        "name": "tutorial",
        "organization_key": facts["organizations"]["north"]["private_key"],
        "username": USER,
        "password": facts["users"][USER]["password"],
    }
    if facts["generation"] == 5:
        account = facts["service_account"]
        settings |= {"hq_url": facts["url"], "auth_url": facts["auth_url"]}
        settings |= {"username": account["username"], "client_secret": account["client_secret"]}
    else:
        settings |= {"server_url": f"{parts.scheme}://{parts.hostname}", "server_port": parts.port}
        settings |= {"server_api": parts.path}
    return "".join(f"{name} = {value!r}\n" for name, value in settings.items())


def _average(table: str) -> dict[str, float]:
    with Path(table).open(newline="") as file:
        ages = [float(row["age"]) for row in csv.DictReader(file)]
    return {"sum": sum(ages), "count": len(ages)}


def _slowly(seconds: float) -> Any:
    def partial_average(job: Job, column: str) -> dict[str, float]:
        time.sleep(seconds)
        values = job.column(column)
        return {"sum": float(values.sum()), "count": len(values)}

    return partial_average


if __name__ == "__main__":
    main()
