"""The command `prefect-biomed`, in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from prefect_biomed.cli.commands import app


def typed(program: str, *words: str) -> tuple[int, str]:
    """Run the command.

    Args:
        program: `prefect-biomed`.
        *words: What follows.

    Returns:
        Exit code and output.
    """
    assert program == "prefect-biomed"
    done = CliRunner().invoke(app, [*words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output
