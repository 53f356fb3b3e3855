"""The command `prefect-biomed`: what Prefect's own command does not do.

Each command imports what it needs when it is called, so that `--help` is there at once.
"""

from __future__ import annotations

import os

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    # What the clients say belongs to the log of a flow, on the shell as on a worker. Prefect reads it when imported.
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "prefect_biomed")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    from prefect_biomed.cli.commands import app

    app()
