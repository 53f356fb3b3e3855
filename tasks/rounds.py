"""What a flow of rounds leaves for people: a table of metrics, and a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec

from prefect_biomed.clients.vantage6 import Round
from prefect_biomed.tasks._reporting import artifact_key, image, run_logger, state_event, table

__all__ = ["report_rounds"]


def report_rounds(token: str, rounds: Sequence[Round]) -> None:
    """Leave a table and, where matplotlib is installed, a plot of the metrics so far, and log the newest round.

    Args:
        token: Token of the run; the artifacts of each round are versions of the same two.
        rounds: Rounds that have ended, the oldest first.
    """
    newest = rounds[-1]
    said = ", ".join(f"{name} {value:.6g}" for name, value in newest.metrics.items()) or "no metrics"
    run_logger().info(
        "Round %d of %d organizations, %.1f s: %s%s",
        newest.number,
        len(newest.organizations),
        newest.seconds,
        said,
        f"; without {', '.join(newest.missing)}" if newest.missing else "",
    )
    rows = [
        {
            "round": one.number,
            "task": one.task_id,
            "organizations": len(one.organizations),
            "missing": ", ".join(one.missing),
            **one.metrics,
            "seconds": round(one.seconds, 1),
        }
        for one in rounds
    ]
    table(artifact_key("vantage6-rounds", token), rows, f"Rounds of {token}")
    state_event("vantage6", "round", f"{token}.{newest.number}", "aggregated", **newest.metrics)
    if newest.metrics and find_spec("matplotlib") is not None:
        image(artifact_key("vantage6-metrics", token), _plot(rounds), f"Metrics of the rounds of {token}")


def _plot(rounds: Sequence[Round]) -> bytes:
    from matplotlib.figure import Figure

    names = list(rounds[-1].metrics)
    figure = Figure(figsize=(6, 2 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], strict=True):
        shown = [(one.number, one.metrics[name]) for one in rounds if name in one.metrics]
        axes.plot(*zip(*shown, strict=True), marker="o", markersize=3)
        axes.set_ylabel(name)
        if all(value > 0 for _, value in shown):
            axes.set_yscale("log")
    axes.set_xlabel("round")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
