"""vantage6: rounds of federated averaging at three organizations: requests and seconds of each."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.measure import laboratory, measure
from benchmarks.vantage6 import account_of
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL, Vantage6Sandbox

LEARN = """
os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "300"
from pydantic import SecretStr
from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.flows.vantage6 import federated_rounds

credentials = Vantage6Credentials(url=arguments["url"], username=arguments["username"],
    password=SecretStr(arguments["password"]), private_key_path=arguments["key"])

def work():
    learnt = federated_rounds(credentials, "encrypted", arguments["image"], "partial_logistic_train",
        rounds=arguments["rounds"], state={"coefficients": [0.0] * 3}, databases="default",
        arguments={"outcome": "progression", "threshold": 140.0, "predictors": ["age", "bmi"],
            "means": [48.5, 26.4], "scales": [13.1, 4.4], "learning_rate": 1.0},
        outputs={"output_dir": os.getcwd()})
    return [one.seconds for one in learnt.rounds]

measured(work)
"""


def main(arguments: Sequence[str] = ()) -> None:
    """Learn on a sandbox of generation 4, encrypted, and print a table.

    Args:
        arguments: Those of the command.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vantage6_rounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    table = Table("rounds", "requests of a round", "seconds of a round", "of these the nodes computed", box=MARKDOWN)
    with laboratory() as folder, Sandbox("vantage6", vantage6={"generation": 4, "key_bits": 2048}) as sandbox:
        server = cast(Vantage6Sandbox, sandbox.vantage6)
        server.journal.clear()
        seconds = _learn(server.ready(), folder, options.rounds)
        asked = Counter(re.sub(r"\d+", "N", f"{one.method} {one.path}") for one in server.journal.entries())
        computed = [
            (max(run.finished_at for run in runs) - min(run.started_at for run in runs)).total_seconds()
            for runs in _by_task(server)
        ]
    table.add_row(
        str(options.rounds),
        f"{sum(asked.values()) / options.rounds:.1f}",
        f"{statistics.median(seconds):.1f}",
        f"{statistics.median(computed):.1f}",
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(", ".join(f"{count} {what}" for what, count in asked.most_common()))


def _learn(facts: dict[str, Any], folder: Path, rounds: int) -> list[float]:
    begun = time.monotonic()
    figures = measure(sys.executable, LEARN, folder, **account_of(facts), image=CLINICAL, rounds=rounds)
    found = [float(one) for one in figures["result"]]
    if len(found) != rounds or sum(found) > time.monotonic() - begun:
        raise RuntimeError(f"{len(found)} of {rounds} rounds in {time.monotonic() - begun:.0f} s")
    return found


def _by_task(server: Vantage6Sandbox) -> list[list[Any]]:
    found: dict[int, list[Any]] = {}
    for run in server.registry.runs:
        found.setdefault(run.task.id, []).append(run)
    return list(found.values())


if __name__ == "__main__":
    main(sys.argv[1:])
