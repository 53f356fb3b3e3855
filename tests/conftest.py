"""Fixtures that several suites share."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

# Before Prefect is imported: nothing of the machine's own configuration reaches the tests.
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
# Records of launches go elsewhere, also those of processes that tests start.
os.environ["PREFECT_BIOMED_HOME"] = tempfile.mkdtemp(prefix="prefect-biomed-home-")

import hypothesis
import nibabel
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc.jwk import RSAKey
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from prefect_biomed.clients.vantage6 import encryption, forget_connections
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vantage6 import _keycloak

# A few examples of each property by default; the command line chooses the other one.
hypothesis.settings.register_profile("thorough", max_examples=int(os.environ.get("EXAMPLES", "10000")), deadline=None)
hypothesis.settings.register_profile("quick", max_examples=50, deadline=None, database=None)
hypothesis.settings.load_profile("quick")

_WITH_A_PREFECT_API = ("tests/flows/", "tests/cli/", "tests/vip/test_vip_girder.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run end in time on any machine."""
    parser.addoption("--until", type=int, help="begin no test after this time, in seconds since 1970")


def pytest_unconfigure() -> None:
    """Remove the records of launches."""
    shutil.rmtree(os.environ["PREFECT_BIOMED_HOME"], ignore_errors=True)


class OnePrefectServer(LoadScopeScheduling):
    """Let one worker run all tests that need a Prefect API, first, and any worker each of the other files.

    `xdist_group` would say the same, but is lost on pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "prefect" if nodeid.startswith(_WITH_A_PREFECT_API) else nodeid.split("::", 1)[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OnePrefectServer | None:
    """Distribute the default suite so; the slow suites are distributed by file."""
    return None if config.option.dist == "loadfile" else OnePrefectServer(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with other files each time when time may not suffice."""
    if until := config.getoption("until"):
        files = sorted({item.path for item in items})
        Random(until).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is left when the time for this run is over."""
    until = item.config.getoption("until")
    if until and time.time() > until:
        pytest.skip("the time for this run is over; `make slow` and `make conformance` run everything")


@pytest.fixture(scope="session", autouse=True)
def _private_keys_are_checked_once() -> Iterator[None]:
    """Make one key for all realms, and read each private key once: both look for primes, which takes 0.1 s or more."""
    with pytest.MonkeyPatch.context() as patch:
        once = cache(serialization.load_pem_private_key)
        patch.setattr(serialization, "load_pem_private_key", once)
        patch.setattr(encryption, "load_pem_private_key", once)
        patch.setattr(_keycloak, "rsa", SimpleNamespace(generate_private_key=cache(rsa.generate_private_key)))
        patch.setattr(_keycloak, "RSAKey", SimpleNamespace(import_key=cache(RSAKey.import_key)))
        yield


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """A Prefect API of its own, for tests that run flows or tasks.

    Without heartbeats: the end of each flow run waits for their thread, which sleeps by the second. And without the
    two seconds that Prefect waits whenever SQLite is busy, which it is for a moment after each run with tasks.
    """
    sooner = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20))
    with (
        pytest.MonkeyPatch.context() as patch,
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        patch.setattr("prefect.client.base.time", sooner)
        yield


@pytest.fixture(autouse=True)
def _no_connections_of_other_tests() -> None:
    """Know no server from before: another one may have got its address."""
    forget_connections()


@pytest.fixture
def vip() -> Iterator[Sandbox]:
    """The Virtual Imaging Platform on loopback."""
    with Sandbox("vip") as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def volume() -> Path:
    """A real MRI volume, 68 kB."""
    return Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"


@pytest.fixture
def input_dir(tmp_path: Path, volume: Path) -> Path:
    """A folder with one real volume."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    shutil.copy(volume, folder / "anatomical.nii")
    return folder


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the pauses between the repetitions of a read."""
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
