"""Launching exactly once: the only place that makes remote objects which must not exist twice.

The intent is written down before the request, so that whoever comes after a crash knows that there may be something to
find. A request of a process that is gone can still be carried out, because a proxy or the server holds it; hence a
launch in doubt is looked for until no request of ours can take effect any more, and only then sent again.

A platform brings a `Launch`, which finds and sends, and an `IntentStore`, which remembers.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from prefect_biomed.clients.errors import (
    BiomedError,
    CapacityError,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    LaunchInDoubt,
    LedgerError,
    PlatformError,
    PreflightFailed,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.files import atomic_write, exclusive, is_later_version, on_disk
from prefect_biomed.clients.polling import PollSettings, Uptime, looks, now, passed, poll, uptime
from prefect_biomed.clients.texts import logger_of

__all__ = [
    "Circumstances",
    "Deed",
    "Foreseen",
    "Intent",
    "IntentFolder",
    "IntentStore",
    "Launch",
    "Origin",
    "foresee",
    "leaves_doubt",
    "once",
]

logger = logger_of(__name__)

T = TypeVar("T")


class Origin(StrEnum):
    """How the object of an intent was had."""

    SENT = "sent"
    """It was sent, and the answer told of it."""
    FOUND = "found"
    """It carried the token before anything was sent."""
    SETTLED = "settled"
    """It was sent, the answer was lost, and it was found by its token."""


class Intent(BaseModel):
    """What is remembered of one launch that was intended.

    Attributes:
        version: Version of this layout.
        token: Identity of the intent.
        intended_at: When the last request was about to be sent; None when none was, or when it was refused.
        uptime: The same moment by a clock that nobody can set, for processes of the same boot.
        since: Since when requests may have been sent elsewhere, of which this record does not tell; None for none.
        asked: What was asked for, and what the platform needs to know its object again.
        id: The remote object, once it is known.
        origin: How it was had; None in records of earlier releases.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = Field(default=1, strict=True)
    token: str
    intended_at: AwareDatetime | None = None
    uptime: Uptime | None = None
    since: AwareDatetime | None = None
    asked: dict[str, JsonValue] = Field(default_factory=dict)
    id: str | None = Field(default=None, min_length=1)
    origin: Origin | None = None

    @property
    def is_in_doubt(self) -> bool:
        """Whether a request may have been sent of which nobody knows how it ended."""
        return self.id is None and self.intended_at is not None

    def from_now(self, asked: Mapping[str, JsonValue]) -> Intent:
        """This intent with a request that may be sent at any moment from now."""
        return self.model_copy(update={"intended_at": now(), "uptime": uptime(), "asked": dict(asked)})


class IntentStore(Protocol):
    """Where intents are remembered."""

    def exclusive(self, token: str, seconds: float) -> AbstractContextManager[None]:
        """Keep other processes from launching for the same intent.

        Args:
            token: The intent.
            seconds: How long to wait for another process.

        Raises:
            HeldElsewhere: Another process is at it for longer.
        """

    def read(self, token: str) -> Intent | None:
        """Read an intent; None when it was never written.

        Raises:
            LedgerError: What is there cannot be read.
        """

    def write(self, intent: Intent) -> None:
        """Write an intent, so that it is on disk before this returns."""


@dataclass(frozen=True)
class Circumstances:
    """What the caller of a launch knows that the platform and this machine's records do not.

    Attributes:
        attempted_since: When an earlier attempt at this intent was begun, perhaps on another machine; None when this is
            the first.
        lease: Keeps other machines from launching for the same token. Entering it tells since when somebody has begun
            with this intent and left it open, or None; leaving it without an error closes it, which is done whenever
            it is certain what has come of the attempt.
        on_duplicates: Told the identifiers, the adopted one first, should two objects carry one token.
    """

    attempted_since: datetime | None = None
    lease: Callable[[str], AbstractContextManager[datetime | None]] | None = None
    on_duplicates: Callable[[Sequence[str]], None] = field(default=lambda _: None)


@dataclass(frozen=True)
class Launch(Generic[T]):
    """How one platform makes one object.

    Attributes:
        what: What is made, for messages.
        token: Identity of the intent: the same on every retry, different for every new one.
        settle_seconds: The longest time after which a request of ours may still take effect.
        find: Looks for what carries the token, oldest first, with the help of what the intent remembers. Raises when
            it cannot tell.
        prepare: Checks everything and prepares the request, which sends nothing that must not be sent twice. Gets the
            intent of earlier attempts; returns what `Intent.asked` is to hold.
        send: Sends the request, once.
        get: Reads the object of an identifier that is known already.
        identify: The identifier of an object.
        end: Ends a second object of the same token; None leaves it alone.
        says_no: Whether an error in the platform's own shape, with a status of 4xx, means that nothing was made.
    """

    what: str
    token: str
    settle_seconds: float
    find: Callable[[Intent], Sequence[T]]
    prepare: Callable[[Intent], Mapping[str, JsonValue]]
    send: Callable[[], T]
    get: Callable[[str], T]
    identify: Callable[[T], str]
    end: Callable[[T], None] | None = None
    says_no: Callable[[PlatformError], bool] = lambda _: True


# An answer in the platform's own words means that the request was dealt with: what it has made is there soon.
_ANSWERED_SECONDS = 30.0
_LOCK_SECONDS = 30.0
_MAX_RECORD_BYTES = 64 * 1024 * 1024


def leaves_doubt(error: BiomedError, says_no: Callable[[PlatformError], bool] = lambda _: True) -> bool:
    """Tell whether a request that ended so may have taken effect. The one list for all platforms.

    Args:
        error: How the request ended.
        says_no: As for `Launch`.

    Returns:
        False when nothing was sent, and for a refusal: a status of 4xx with a body in the platform's own error shape
        that says no. True for everything else: a connection that broke, no answer in time, 5xx with any body, success
        with an empty body or one of another shape, 4xx in another language than the platform's.
    """
    if isinstance(error, ConnectionFailed | ConfigurationError | PreflightFailed):
        return False
    if isinstance(error, PlatformError) and not isinstance(error, UnexpectedResponse):
        refused = error.spoken and 400 <= (error.status or 0) < 500
        return not (refused and says_no(error))
    return True


def once(
    launch: Launch[T],
    store: IntentStore,
    circumstances: Circumstances | None = None,
    *,
    queue: PollSettings | None = None,
) -> T:
    """Make a remote object, once and never twice.

    Safe to repeat with the same token: after any error, after a kill at any moment, by two processes at once, and on
    two machines as far as the lease of the circumstances reaches.

    Args:
        launch: What to make, and how.
        store: Where the intent is remembered.
        circumstances: What the caller knows beyond that.
        queue: How to wait and try again while the platform refuses for want of capacity; such a refusal is final when
            None. No other machine comes in between two tries.

    Returns:
        The object: new, found, or known from an earlier call.

    Raises:
        LaunchInDoubt: The request may or may not have taken effect, and looking did not settle it. The record stays:
            repeating looks first, and sends again only when no earlier request can take effect any more.
        HeldElsewhere: Another process or machine is at it.
        DeadlineExceeded: No capacity became free in time; nothing was made.
        PlatformError: The platform refused; nothing was made. Or it answered with an error of its own that may leave
            something behind, and nothing has appeared since; then the record stays as for `LaunchInDoubt`.
        BiomedError: As `find`, `prepare` and `get` raise.
    """
    circumstances = circumstances or Circumstances()
    lease = circumstances.lease(launch.token) if circumstances.lease else nullcontext()
    with lease as open_since:
        outcome = _queued(launch, store, circumstances, open_since, queue)
    # Raised out here, because a lease that is left by an error stays open: nobody has to wait for what was refused.
    if isinstance(outcome, _Refused):
        raise outcome.error
    return outcome


class Deed(StrEnum):
    """What `once` would do about an intent."""

    LAUNCH = "launch"
    """Send it: nothing carries the token."""
    LOOK_FIRST = "look first"
    """Look until an earlier request can take effect no more, and send it when nothing has appeared."""
    ADOPT = "adopt"
    """Take what carries the token."""
    GO_ON = "go on"
    """Take what is known from an earlier call; it has not ended."""
    DONE = "done"
    """The same, and it has ended."""


class Foreseen(BaseModel):
    """What would become of one intent.

    Attributes:
        what: What is made.
        deed: What would be done.
        id: The remote object that is there already; empty when there is none.
        ends: Others of the same token, which would be ended.
    """

    model_config = ConfigDict(frozen=True)

    what: str
    deed: Deed
    id: str = ""
    ends: tuple[str, ...] = ()


def foresee(launch: Launch[T], store: IntentStore, *, ended: Callable[[T], bool]) -> Foreseen:
    """Tell what `once` would do now. It only reads, here and there, and waits for nothing.

    Args:
        launch: What is to be made. Neither `prepare` nor `send` nor `end` is called.
        store: Where the intent is remembered.
        ended: Whether an object has ended.

    Returns:
        What would be done.

    Raises:
        BiomedError: As `find` and `get` raise, and `once` would raise.
    """
    intent = store.read(launch.token) or Intent(token=launch.token)
    if intent.id is not None:
        deed = Deed.DONE if ended(launch.get(intent.id)) else Deed.GO_ON
        return Foreseen(what=launch.what, deed=deed, id=intent.id)
    if found := [launch.identify(one) for one in launch.find(intent)]:
        return Foreseen(what=launch.what, deed=Deed.ADOPT, id=found[0], ends=tuple(found[1:]))
    return Foreseen(what=launch.what, deed=Deed.LOOK_FIRST if intent.is_in_doubt else Deed.LAUNCH)


@dataclass(frozen=True)
class _Refused:
    """An attempt that has surely sent nothing, or nothing that has taken effect."""

    error: BiomedError


@dataclass(frozen=True)
class _Raised:
    """An error to be raised outside the queue, which would take it for a look that failed."""

    error: BiomedError


def _queued(
    launch: Launch[T],
    store: IntentStore,
    circumstances: Circumstances,
    open_since: datetime | None,
    queue: PollSettings | None,
) -> T | _Refused:
    """Attempt it until the platform has capacity, and once without a queue."""
    if queue is None:
        return _exclusive_attempt(launch, store, circumstances, open_since)
    # The lease is held in between, so only the first attempt has to ask what came before.
    first, again = (circumstances, open_since), (replace(circumstances, attempted_since=None), None)
    refusals: list[BiomedError] = []

    def look() -> T | _Refused | _Raised | None:
        try:
            outcome = _exclusive_attempt(launch, store, *(again if refusals else first))
        except BiomedError as error:
            return _Raised(error)
        if isinstance(outcome, _Refused) and isinstance(outcome.error, CapacityError):
            logger.info("%s is queued: %s", launch.what, outcome.error)
            refusals.append(outcome.error)
            return None
        return outcome

    try:
        *_, outcome = poll(
            look,
            queue,
            done=lambda seen: seen is not None,
            what=f"The queue for {launch.what}",
            take_up_again="Run this again when others have ended.",
            at_deadline=lambda: f"{launch.what} was not launched: {refusals[-1]}",
        )
    except DeadlineExceeded as error:
        return _Refused(error)
    if isinstance(outcome, _Raised):
        raise outcome.error
    if outcome is None:
        raise AssertionError("a queue ends with an outcome")
    return outcome


def _exclusive_attempt(
    launch: Launch[T], store: IntentStore, circumstances: Circumstances, open_since: datetime | None
) -> T | _Refused:
    with store.exclusive(launch.token, max(launch.settle_seconds, _LOCK_SECONDS)):
        return _attempt(launch, store, circumstances, open_since)


def _attempt(
    launch: Launch[T], store: IntentStore, circumstances: Circumstances, open_since: datetime | None
) -> T | _Refused:
    intent = store.read(launch.token)
    if intent is not None and intent.id is not None:
        try:
            return launch.get(intent.id)
        except BiomedError as error:
            # What is known to be made is sent no more, so nobody has to wait for it.
            return _Refused(error)
    # Who died with a request on its way has left the lease open. Without leases, any attempt may have.
    unknown = intent is None and circumstances.lease is None and circumstances.attempted_since is not None
    if intent is None or open_since is not None:
        since = circumstances.attempted_since or open_since
        intent = _begun(intent, launch.token, since, in_doubt=unknown or open_since is not None)
        store.write(intent)
    elif circumstances.attempted_since is not None and not intent.is_in_doubt:
        # Another machine may have gone on where this one ended, and have ended well.
        intent = intent.model_copy(update={"since": circumstances.attempted_since})
    try:
        found = _look(launch, intent, circumstances)
        asked = launch.prepare(intent) if found is None else {}
    except BiomedError as error:
        if intent.is_in_doubt:
            raise
        return _Refused(error)
    origin = Origin.FOUND
    if found is None:
        intent, origin = intent.from_now(asked), Origin.SENT
        store.write(intent)
        try:
            found = launch.send()
        except BiomedError as error:
            if not leaves_doubt(error, launch.says_no):
                store.write(intent.model_copy(update={"intended_at": None}))
                return _Refused(error)
            found, origin = _settle(launch, intent, error, circumstances), Origin.SETTLED
    store.write(intent.model_copy(update={"id": launch.identify(found), "origin": origin}))
    return found


def _begun(intent: Intent | None, token: str, since: datetime | None, *, in_doubt: bool) -> Intent:
    """The record with which this attempt begins, on disk before anything else is done."""
    intent = (intent or Intent(token=token)).model_copy(update={"since": since})
    # Another machine may have sent a request at any moment until now, whatever this one remembers.
    return intent.from_now(intent.asked) if in_doubt else intent


def _look(launch: Launch[T], intent: Intent, circumstances: Circumstances) -> T | None:
    """Look for what an earlier request has made, for as long as one may still take effect."""
    seconds = 0.0
    if intent.intended_at is not None:
        # A clock that was set back must not make the wait longer than a request can take.
        left = launch.settle_seconds - passed(intent.intended_at, intent.uptime)
        seconds = min(max(left, 0.0), launch.settle_seconds)
        logger.warning(
            "%s was begun before and it is not known how that ended; looking for it for %.0f s", launch.what, seconds
        )
    return looks(lambda: _adopted(launch, intent, circumstances), seconds=seconds, what=launch.what)


def _settle(launch: Launch[T], intent: Intent, doubt: BiomedError, circumstances: Circumstances) -> T:
    logger.warning("It is not known whether %s was made, looking for it: %s", launch.what, doubt)
    answered = isinstance(doubt, PlatformError) and doubt.spoken
    seconds = min(launch.settle_seconds, _ANSWERED_SECONDS) if answered else launch.settle_seconds
    try:
        found = looks(lambda: _adopted(launch, intent, circumstances), seconds=seconds, what=launch.what)
    except BiomedError as error:
        if not is_transient(error):
            raise
        raise LaunchInDoubt(
            f"It is not known whether {launch.what} was made ({doubt}), and it cannot be looked for now ({error}). "
            "Run this again: it looks before it sends."
        ) from error
    if found is not None:
        return found
    if answered:
        raise doubt
    raise LaunchInDoubt(
        f"It is not known whether {launch.what} was made ({doubt}). It did not appear within {seconds:.0f} s. "
        "Run this again: it looks before it sends."
    ) from doubt


def _adopted(launch: Launch[T], intent: Intent, circumstances: Circumstances) -> T | None:
    """The oldest object that carries the token; the others are named and ended."""
    found = launch.find(intent)
    if not found:
        return None
    oldest, *others = found
    identifier = launch.identify(oldest)
    logger.info("%s is there: %s", launch.what, identifier)
    if others:
        extra = [launch.identify(other) for other in others]
        logger.error("%s exists %d times: %s is taken, not %s", launch.what, len(found), identifier, ", ".join(extra))
        circumstances.on_duplicates([identifier, *extra])
        _end(launch, others)
    return oldest


def _end(launch: Launch[T], others: Sequence[T]) -> None:
    for other in others:
        if launch.end is None:
            continue
        try:
            launch.end(other)
        except BiomedError as error:
            logger.error("%s could not be ended, end it by hand: %s", launch.identify(other), error)


class IntentFolder:
    """Intents as one JSON file each. A file that cannot be read concerns its own token only.

    Args:
        folder: Made when missing.
        one_at_a_time: One lock for all tokens of the folder, for platforms that tell their objects apart only by what
            was there before.
        migrate: Turns the content of a file without a version, as an earlier release wrote it, into an intent.
    """

    VERSION = 1

    def __init__(
        self,
        folder: Path,
        *,
        one_at_a_time: bool = False,
        migrate: Callable[[Mapping[str, Any]], Intent] | None = None,
    ) -> None:
        self.folder = folder
        self._one_at_a_time = one_at_a_time
        self._migrate = migrate

    @contextmanager
    def exclusive(self, token: str, seconds: float) -> Iterator[None]:
        """Keep other processes from launching for the same intent; see `IntentStore`."""
        lock = self.folder / (".lock" if self._one_at_a_time else f".{token}.lock")
        with exclusive(lock, seconds=seconds, what=f"The intent {token}"):
            yield

    def read(self, token: str) -> Intent | None:
        """Read an intent; see `IntentStore`.

        Args:
            token: The intent.

        Returns:
            The intent; None when it was never written.

        Raises:
            LedgerError: The file is damaged, belongs to another token, or is of a later version of the package.
            LocalStorageError: It cannot be read.
        """
        path = self._path(token)
        with on_disk(self.folder):
            try:
                path.lstat()
            except FileNotFoundError:
                return None
            # A link that leads nowhere is no sign that nothing was written.
            text = _content(path)
        intent = self._parsed(text, path)
        if intent.token != token:
            raise LedgerError(f"{path} is about the intent {intent.token}. It was left as it is; put it right first.")
        return intent

    def write(self, intent: Intent) -> None:
        """Write an intent, readable for its owner only; see `IntentStore`."""
        with atomic_write(self._path(intent.token), mode=0o600) as file:
            file.write(intent.model_dump_json(indent=1).encode())

    def others(self, token: str) -> Iterator[Intent]:
        """Read all other intents of the folder. Those that cannot be read are left out, with a warning.

        Args:
            token: The intent that is left out.

        Yields:
            The intents.
        """
        for path in sorted(self.folder.glob("*.json")):
            if path.stem == token:
                continue
            try:
                intent = self.read(path.stem)
            except BiomedError as error:
                logger.warning("Left out: %s", error)
                continue
            if intent is not None:
                yield intent

    def _path(self, token: str) -> Path:
        return self.folder / f"{token}.json"

    def _parsed(self, text: bytes, path: Path) -> Intent:
        try:
            content = json.loads(text, parse_constant=_no_number)
            if not isinstance(content, dict):
                raise ValueError("no object")
            version = content.get("version")
            if version is None and self._migrate is not None:
                return self._migrate(content)
            if is_later_version(version, self.VERSION):
                raise LedgerError(
                    f"{path} was written by a later version of prefect-biomed. Update the package on this machine. "
                    "The file was left as it is."
                )
            return Intent.model_validate(content)
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
            raise LedgerError(
                f"{path} is damaged, so it is not known whether its launch was made. It was left as it is. Look on the "
                "platform for what it has made, then restore the file or move it away."
            ) from None


def _content(path: Path) -> bytes:
    """Read a record; what is no file (a pipe, a device) is not waited for.

    Raises:
        LedgerError: It is none, or far too large for one.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > _MAX_RECORD_BYTES:
            raise LedgerError(
                f"{path} is no record of an intent, so it is not known whether its launch was made. It was left as it "
                "is. Look on the platform for what it has made, then move it away."
            )
        return file.read()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
