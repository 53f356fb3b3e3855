"""Environments of their own for the official clients and servers, and the real vantage6 servers in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.official import official_environment as make_official_environment
from harness.vantage6_servers import ENVIRONMENTS, RealServer, server_3, server_4, server_5

OfficialEnvironment = Callable[..., Path]


@pytest.fixture(scope="session")
def official_environment() -> OfficialEnvironment:
    """Return the function that makes an environment, or finds it made, and returns its interpreter."""
    return make_official_environment


@pytest.fixture(scope="session")
def real_vantage6_3(
    official_environment: OfficialEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """The real vantage6-server 3.11.1 with nodes that compute; shared, so leave its nodes online."""
    with server_3(official_environment(*ENVIRONMENTS[3]), tmp_path_factory.mktemp("vantage6-3")) as server:
        yield server


@pytest.fixture(scope="session")
def real_vantage6_4(
    official_environment: OfficialEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """The real vantage6-server 4.15.2 with nodes that compute; shared, so leave its nodes online."""
    with server_4(official_environment(*ENVIRONMENTS[4]), tmp_path_factory.mktemp("vantage6-4")) as server:
        yield server


@pytest.fixture(scope="session")
def real_vantage6_5(
    official_environment: OfficialEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """The real vantage6-hq 5.0.3 with nodes that compute; shared, so leave its nodes online."""
    with server_5(official_environment(*ENVIRONMENTS[5]), tmp_path_factory.mktemp("vantage6-5")) as server:
        yield server


@pytest.fixture(params=[3, 4, 5])
def real_vantage6(request: pytest.FixtureRequest) -> RealServer:
    """Each of the real servers in turn."""
    server: RealServer = request.getfixturevalue(f"real_vantage6_{request.param}")
    return server
