"""The laboratory of `prefect-biomed up`, for scripts that work in this checkout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect_biomed.cli import laboratory
from prefect_biomed.cli.laboratory import WORK_POOL

__all__ = ["HOME", "WORK_POOL", "Laboratory"]

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".demo"


class Laboratory(laboratory.Laboratory):
    """A laboratory whose commands run in this checkout.

    Args:
        home: Folder for databases, logs and results.
        platforms: Platforms to emulate.
        **settings: Further environment variables of the server, the worker and all commands.
    """

    def __init__(self, home: Path = HOME, platforms: Sequence[str] = ("vip",), **settings: str) -> None:
        super().__init__(home, platforms, ROOT, **settings)
