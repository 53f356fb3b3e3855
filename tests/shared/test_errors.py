"""The error tree: what helps when tried again, and what comes back from another process."""

import importlib
import pickle
import pkgutil
from pathlib import Path

import pytest
from prefect.serializers import JSONSerializer

import prefect_biomed.clients
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    CapacityError,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    JobFailed,
    LaunchInDoubt,
    LedgerError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    PollingFailed,
    PreflightFailed,
    RequestTimedOut,
    ServerUnavailable,
    TransferFailed,
    UnexpectedResponse,
    UnsafeContent,
    is_transient,
)
from prefect_biomed.clients.vip import StillRunning, Workflow, WorkflowFailed

TRANSIENT = {
    CapacityError,
    ConnectionFailed,
    LaunchInDoubt,
    NetworkError,
    RequestTimedOut,
    ServerUnavailable,
}
LASTING = {
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    DeadlineExceeded,
    JobFailed,
    LedgerError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    PollingFailed,
    PreflightFailed,
    TransferFailed,
    UnexpectedResponse,
    UnsafeContent,
}


def every_error() -> list[type[BiomedError]]:
    """All errors of the package, those of the platforms too."""
    folder = Path(next(iter(prefect_biomed.clients.__path__)))
    for module in pkgutil.walk_packages([str(folder)], "prefect_biomed.clients."):
        importlib.import_module(module.name)
    found: list[type[BiomedError]] = [BiomedError]
    for error in found:
        found += [kind for kind in error.__subclasses__() if kind not in found]
    return sorted((kind for kind in found if kind.__module__.startswith("prefect_biomed.")), key=lambda k: k.__name__)


def test_what_can_be_tried_again() -> None:
    assert all(is_transient(error("x")) for error in TRANSIENT)
    assert not any(is_transient(error("x")) for error in LASTING)
    for foreign in (ValueError("x"), ConnectionError("x"), TimeoutError("x"), KeyboardInterrupt()):
        assert not is_transient(foreign)


@pytest.mark.parametrize("error", every_error(), ids=lambda error: error.__name__)
def test_every_error_comes_back_from_another_process(error: type[BiomedError]) -> None:
    """Prefect stores the class and the message of an error and makes it again of these."""
    made = error("what happened")
    assert str(made) == "what happened"
    for restored in (
        pickle.loads(pickle.dumps(made)),
        JSONSerializer().loads(JSONSerializer().dumps(made)),
    ):
        assert type(restored) is error
        assert str(restored) == "what happened"
        assert is_transient(restored) is is_transient(made)


@pytest.mark.parametrize(
    "error",
    [
        PlatformError("m", status=400, code=8000, url="https://host/x"),
        PreflightFailed("Session 's'", ["first", "second"]),
        TransferFailed("Upload", {"a": NetworkError("gone")}, 2),
        StillRunning("m", ["workflow-abcdef"]),
        WorkflowFailed("m", [Workflow(identifier="workflow-abcdef")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_details_survive_pickling(error: BiomedError) -> None:
    restored = pickle.loads(pickle.dumps(error))
    assert str(restored) == str(error)
    assert restored.__dict__.keys() == error.__dict__.keys()
    assert repr(restored.__dict__) == repr(error.__dict__)
    assert is_transient(restored) is is_transient(error)


def test_reports_list_what_they_are_about() -> None:
    assert str(PreflightFailed("Session 's'", ["first", "second"])) == (
        "Session 's': 2 problems found, nothing was sent.\n  - first\n  - second"
    )
    assert str(PreflightFailed("Session 's'", ["only"])).startswith("Session 's': 1 problem found")
