"""What the modules of the VIP sandbox share: switches, users, statuses, errors."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from pydantic import Field

from prefect_biomed.sandbox._core import Switches

GIRDER_STORAGE = "pilotGirder"


class Status(StrEnum):
    """Status of an execution, in the words of CARMIN."""

    INITIALIZING = "Initializing"
    INITIALIZATION_FAILED = "InitializationFailed"
    READY = "Ready"
    RUNNING = "Running"
    FINISHED = "Finished"
    EXECUTION_FAILED = "ExecutionFailed"
    KILLED = "Killed"
    UNKNOWN = "Unknown"


class VipSwitches(Switches):
    """What can be changed about the VIP sandbox, most of it while it runs.

    Attributes:
        profile: `vip` behaves as VIP-portal 4.6, under `/rest`; `carmin` as CARMIN-server, without a prefix.
            Cannot be changed while it runs.
        key_generation: raising it gives every user a new API key; the old ones stop working.
        max_direct_transfer_bytes: size from which on the content of a file is refused.
        transfer_seconds: how long a file takes from the server to the storage, after its last byte was received.
        download_seconds: how long the first fetch of a file from the storage takes; then it is cached.
        transfer_limit_seconds: after this long the answer is 400, though the transfer goes on and may succeed.
        transfer_slots: transfers that run at once, for all users; the others wait, and the limit counts meanwhile.
        reschedule_uploads: that many of the next uploads are answered 400 at once and appear in the storage
            `reschedule_seconds` later; counts down.
        reschedule_seconds: pause before the storage tries a transfer again.
        storage_retries: how often the storage tries a transfer again that was refused because the file exists.
        delete_seconds: how long a path still exists after its DELETE was answered; 0 deletes before the answer.
        lose_deletes: that many of the next deletions are answered 204 and never done; counts down.
        mkdir_existing_fails: making a directory that exists is an error, as on grid storage.
        rewrite_names: new files and directories get spaces replaced and everything but ASCII dropped.
        ranges: `Range` is honoured with 206; without it, the whole file is sent and the header is not announced.
        results_seconds: what `/results` takes per file.
        max_running_platform: executions stored as running from which on a launch is refused with 2000.
        max_running_user: the same for one user, with 2001.
        max_jobs: an execution that needs more of them fails after the launch.
        launch_seconds: how long a launch takes; all launches wait for each other.
        unnamed_seconds: how long after its launch an execution shows its identifier instead of its name.
        unknown_seconds: how long an execution is Unknown after its launch.
        ready_seconds: how long it is Ready after that.
        kill_seconds: how long it is Unknown between a kill and Killed.
        status_script: statuses that the first looks at an execution launched from now on report, before the true one.
        engine_unreachable: launches, kills and looks at running executions fail with 400.
        job_seconds: what every job takes besides its computation; lowered, it ends those that run, too.
        held_jobs: numbers of the jobs that are held in error in executions launched from now on: those executions
            stay Running until they are killed.
        missing_input: what a job does whose input file does not exist: it fails, or is held for ever.
        jobs_map: whether executions tell of their jobs (portals since 2025).
        placeholder_defaults: parameters without a default carry a placeholder text instead of null
            (portals before mid-2025).
        date_unit: unit of `startDate`.
        result_directory_format: strftime format of the directory made in the results location for one execution.
        clock_seconds: the engine's clock stands still at this time, seconds since the epoch; None lets it run.
        result_collision: what happens when a result exists already: it is replaced (grid storage), or the job fails
            with exit code 32 (local storage).
        duration_seconds: how long a job of `SlowSegmentation` takes unless its parameter says so.
        noise_digits: significant digits that two runs of `SkullStripNoisy` have in common.
        math_library: with `alternative`, `SkullStripNoisy` computes a little differently.
        math_library_shift: relative shift of its results then.
        odd_execution: `GreyMatter` gives one different member in its archive in the execution of that number,
            counted from 1 over its executions.
        carmin_stock: with profile `carmin`, the faults of the stock server: 500 for completed executions and for kill.
    """

    profile: Literal["vip", "carmin"] = Field("vip", frozen=True)
    key_generation: int = Field(0, ge=0)
    max_direct_transfer_bytes: int = Field(15_000_000, ge=0)
    transfer_seconds: float = Field(0.0, ge=0.0)
    download_seconds: float = Field(0.0, ge=0.0)
    transfer_limit_seconds: float = Field(45.0, gt=0.0)
    transfer_slots: int = Field(20, ge=1)
    reschedule_uploads: int = Field(0, ge=0)
    reschedule_seconds: float = Field(1.0, ge=0.0)
    storage_retries: int = Field(5, ge=0)
    delete_seconds: float = Field(0.1, ge=0.0)
    lose_deletes: int = Field(0, ge=0)
    mkdir_existing_fails: bool = False
    rewrite_names: bool = True
    ranges: bool = True
    results_seconds: float = Field(0.0, ge=0.0)
    max_running_platform: int = Field(35, ge=0)
    max_running_user: int = Field(20, ge=0)
    max_jobs: int = Field(1000, ge=1)
    launch_seconds: float = Field(0.0, ge=0.0)
    unnamed_seconds: float = Field(0.0, ge=0.0)
    unknown_seconds: float = Field(0.0, ge=0.0)
    ready_seconds: float = Field(0.0, ge=0.0)
    kill_seconds: float = Field(0.1, ge=0.0)
    status_script: list[Status] = Field(default_factory=list)
    engine_unreachable: bool = False
    job_seconds: float = Field(0.0, ge=0.0)
    held_jobs: list[int] = Field(default_factory=list)
    missing_input: Literal["fail", "hold"] = "fail"
    jobs_map: bool = True
    placeholder_defaults: bool = False
    date_unit: Literal["ms", "s"] = "ms"
    result_directory_format: str = "%Y-%m-%d_%H%M%S"
    clock_seconds: float | None = None
    result_collision: Literal["replace", "fail"] = "replace"
    duration_seconds: float = Field(5.0, ge=0.0)
    noise_digits: float = 6.0
    math_library: Literal["reference", "alternative"] = "reference"
    math_library_shift: float = 1e-3
    odd_execution: int | None = None
    carmin_stock: bool = False


def job_is_stopped(stopped: threading.Event, switches: VipSwitches) -> bool:
    """Let the time of a job pass.

    Args:
        stopped: set by a kill.
        switches: they may be changed meanwhile.

    Returns:
        Whether it was killed.
    """
    began = time.monotonic()
    while (left := began + switches.job_seconds - time.monotonic()) > 0:
        if stopped.wait(min(left, 0.5)):
            return True
    return stopped.is_set()


@dataclass
class User:
    """Someone with an account.

    Attributes:
        name: login, and name of the home directory.
        groups: names of the groups whose pipelines and folder may be used.
        beginner: may read the folders of groups but not write them.
        locked: the account is refused whatever the key.
        service: holds the SERVICE role.
        external_keys: keys for external storages, by storage identifier.
    """

    name: str
    groups: tuple[str, ...] = ()
    beginner: bool = False
    locked: bool = False
    service: bool = False
    external_keys: dict[str, str] = field(default_factory=dict)

    @property
    def email(self) -> str:
        """Address, which is also the user name for `/authenticate`."""
        return f"{self.name}@example.org"


class Users:
    """The accounts. The first one is the main user."""

    def __init__(self, seed: int, switches: VipSwitches) -> None:
        self._seed = seed
        self._switches = switches
        self._users = {
            user.name: user
            for user in (
                User("alice", ("Neuroimaging", "Open Science")),
                User("bob", ("Cardiology", "Open Science")),
                User("carol", ("Neuroimaging",), beginner=True),
                User("dave", ("Neuroimaging",), locked=True),
                User("shanoir", ("Open Science",), service=True),
                User("examples", ("Open Science",)),
            )
        }

    def __iter__(self) -> Iterator[User]:
        return iter(self._users.values())

    @property
    def main(self) -> User:
        """The user whose key the ready line gives first."""
        return self._users["alice"]

    def named(self, name: str) -> User | None:
        """Return the user of that login."""
        return self._users.get(name)

    def key(self, user: User) -> str:
        """Return the API key that works now."""
        text = f"{self._seed}/{user.name}/{self._switches.key_generation}/key"
        return hashlib.sha256(text.encode()).hexdigest()[:26]

    def password(self, user: User) -> str:
        """Return the password, for `/authenticate`."""
        return hashlib.sha256(f"{self._seed}/{user.name}/password".encode()).hexdigest()[:12]

    def with_key(self, key: str) -> User | None:
        """Return the user with that API key."""
        return next((user for user in self if self.key(user) == key), None)


class ApiError(Exception):
    """An answer that says no.

    Args:
        code: `errorCode` of the body.
        message: `errorMessage` of the body.
        status: HTTP status.
        detail: `errorDetail` of the body, left out when None.
    """

    def __init__(self, code: int, message: str, status: int = 400, detail: object = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.detail = detail


def refused(note: str, status: int = 400) -> ApiError:
    """Return the error VIP gives for nearly everything: code 8000 and one sentence without a reason.

    Args:
        note: the reason, which the answer does not tell; for the journal.
        status: HTTP status.
    """
    error = ApiError(8000, "The request could not be carried out. Check its parameters or ask the support.", status)
    error.add_note(note)
    return error
