"""Fixtures that several suites share."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Before Prefect is imported: nothing of the machine's own configuration reaches the tests.
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
# Records of launches go elsewhere, also those of processes that tests start.
os.environ["PREFECT_BIOMED_HOME"] = tempfile.mkdtemp(prefix="prefect-biomed-home-")

import hypothesis
import nibabel
import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from prefect_biomed.clients.vantage6 import forget_connections
from prefect_biomed.sandbox import Sandbox

# A few examples of each property by default; the command line chooses the other one.
hypothesis.settings.register_profile("thorough", max_examples=int(os.environ.get("EXAMPLES", "10000")), deadline=None)
hypothesis.settings.register_profile("quick", max_examples=50, deadline=None, database=None)
hypothesis.settings.load_profile("quick")


def pytest_unconfigure() -> None:
    """Remove the records of launches."""
    shutil.rmtree(os.environ["PREFECT_BIOMED_HOME"], ignore_errors=True)


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
