"""Credentials blocks, one for each platform, and one of buckets that sources lie in.

Each is imported when it is asked for, so that a flow of one platform imports nothing of another. `registered` imports
all of them, for Prefect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_biomed.blocks.boss import BossCredentials
    from prefect_biomed.blocks.storage import StorageCredentials
    from prefect_biomed.blocks.vantage6 import Vantage6Credentials
    from prefect_biomed.blocks.vip import VipCredentials

__all__ = ["BossCredentials", "StorageCredentials", "Vantage6Credentials", "VipCredentials"]


def __getattr__(name: str) -> Any:
    """Import a block.

    Raises:
        AttributeError: There is no block of this name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{name.removesuffix('Credentials').lower()}"), name)


def __dir__() -> list[str]:
    """List the blocks, too: `prefect block register -m prefect_biomed.blocks` registers what is listed."""
    return sorted({*globals(), *__all__})
