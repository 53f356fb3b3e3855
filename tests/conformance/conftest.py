"""Environments of their own for the official clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.official import official_environment as make_official_environment

OfficialEnvironment = Callable[..., Path]


@pytest.fixture(scope="session")
def official_environment() -> OfficialEnvironment:
    """Return the function that makes an environment, or finds it made, and returns its interpreter."""
    return make_official_environment
