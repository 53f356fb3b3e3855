"""Fixtures of the tests that go through a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from federation import Federation, federation


@pytest.fixture(scope="module")
def federations() -> Iterator[Callable[[int], Federation]]:
    """One vantage6 sandbox of each generation, for the tests that leave it as it was."""
    opened: dict[int, Federation] = {}
    with ExitStack() as stack:

        def get(generation: int) -> Federation:
            if generation not in opened:
                opened[generation] = stack.enter_context(federation(generation))
            found = opened[generation]
            found.sandbox.faults.clear()
            found.sandbox.journal.clear()
            return found

        yield get


@pytest.fixture
def here(federations: Callable[[int], Federation]) -> Federation:
    """The shared vantage6 sandbox of generation 4."""
    return federations(4)
