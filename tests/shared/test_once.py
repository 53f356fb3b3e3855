"""Launching exactly once, on a platform of a few lines, with a clock that only moves when somebody sleeps."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    CapacityError,
    ConfigurationError,
    ConnectionFailed,
    HeldElsewhere,
    LaunchInDoubt,
    LedgerError,
    LocalStorageError,
    NetworkError,
    NotFoundError,
    PlatformError,
    PreflightFailed,
    RequestTimedOut,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.files import exclusive
from prefect_biomed.clients.once import Circumstances, Intent, IntentFolder, Launch, leaves_doubt, once
from prefect_biomed.clients.polling import now

SETTLE = 100.0


class Clock:
    """Takes the place of the module `time` in polling; things happen on the platform while it moves."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0
        self.set_by = 0.0
        self.due: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.seconds + self.set_by

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        for moment, happen in sorted(self.due, key=lambda one: one[0]):
            if moment <= self.seconds:
                self.due.remove((moment, happen))
                happen()

    def later(self, seconds: float, happen: Callable[[], object]) -> None:
        self.due.append((self.seconds + seconds, happen))


class Platform:
    """Objects by token; an answer may be lost, and an effect may come late."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.objects: list[str] = []
        self.sent = 0
        self.looked = 0
        self.ended: list[str] = []
        self.answers: list[BiomedError | None] = []
        self.effects: list[float | None] = []
        self.look_fails: list[BiomedError] = []

    def make(self) -> str:
        self.objects.append(f"job-{len(self.objects) + 1}")
        return self.objects[-1]

    def send(self) -> str:
        self.sent += 1
        effect = self.effects.pop(0) if self.effects else 0.0
        answer = self.answers.pop(0) if self.answers else None
        if effect:
            self.clock.later(effect, self.make)
        elif effect is not None:
            self.make()
        if answer is not None:
            raise answer
        return self.objects[-1]

    def find(self, intent: Intent) -> Sequence[str]:
        self.looked += 1
        if self.look_fails:
            raise self.look_fails.pop(0)
        return list(self.objects)

    def get(self, identifier: str) -> str:
        if identifier not in self.objects:
            raise NotFoundError(f"no {identifier}")
        return identifier

    def launch(self, **changes: Any) -> Launch[str]:
        settings: dict[str, Any] = {
            "what": "job x",
            "token": "abc",
            "settle_seconds": SETTLE,
            "find": self.find,
            "prepare": lambda _: {},
            "send": self.send,
            "get": self.get,
            "identify": str,
            "end": self.ended.append,
        }
        return Launch(**(settings | changes))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("prefect_biomed.clients.polling.time", clock)
    return clock


@pytest.fixture
def platform(clock: Clock) -> Platform:
    return Platform(clock)


@pytest.fixture
def store(tmp_path: Path) -> IntentFolder:
    return IntentFolder(tmp_path / "intents")


def spoken(status: int, kind: type[PlatformError] = PlatformError) -> PlatformError:
    return kind("the platform says", status=status, spoken=True)


LOST: dict[str, BiomedError] = {
    "connection lost": NetworkError("lost"),
    "no answer in time": RequestTimedOut("late"),
    "502 page": ServerUnavailable("page", status=502),
    "500 page": UnexpectedResponse("page", status=500),
    "500 in the platform's words": spoken(500),
    "400 page": UnexpectedResponse("page", status=400),
    "200 page": UnexpectedResponse("page", status=200),
    "201 empty": UnexpectedResponse("nothing", status=201),
    "401 page of a proxy": AuthenticationError("page", status=401),
}


def killed(store: IntentFolder, platform: Platform, effect: float | None) -> None:
    """A process that dies while its request is on the way; the effect comes so many seconds later, or never."""

    class Killed(BaseException):
        pass

    def send() -> str:
        if effect is not None:
            platform.clock.later(effect, platform.make)
        raise Killed

    with pytest.raises(Killed):
        once(platform.launch(send=send), store)


# -- the plain way -----------------------------------------------------------------------------------------------------


def test_first_call_writes_the_intent_before_it_sends(store: IntentFolder, platform: Platform) -> None:
    seen: list[Intent | None] = []

    def send() -> str:
        seen.append(store.read("abc"))
        return platform.send()

    assert once(platform.launch(send=send, prepare=lambda _: {"what": "this"}), store) == "job-1"
    assert seen[0] is not None
    assert seen[0].is_in_doubt
    assert seen[0].asked == {"what": "this"}
    record = store.read("abc")
    assert record is not None
    assert record.id == "job-1"
    assert not record.is_in_doubt


def test_repeated_call_asks_for_the_known_object_and_sends_nothing(store: IntentFolder, platform: Platform) -> None:
    once(platform.launch(), store)
    assert once(platform.launch(), store) == "job-1"
    assert (platform.sent, platform.looked) == (1, 1)


def test_known_object_that_is_gone_is_an_error_and_not_made_again(store: IntentFolder, platform: Platform) -> None:
    once(platform.launch(), store)
    platform.objects.clear()
    with pytest.raises(NotFoundError):
        once(platform.launch(), store)
    assert platform.sent == 1


def test_object_that_carries_the_token_is_adopted_without_a_record(store: IntentFolder, platform: Platform) -> None:
    platform.make()
    assert once(platform.launch(), store) == "job-1"
    assert platform.sent == 0
    record = store.read("abc")
    assert record is not None
    assert record.id == "job-1"


def test_checks_that_fail_leave_no_doubt(store: IntentFolder, platform: Platform) -> None:
    def prepare(_: Intent) -> Mapping[str, Any]:
        raise PreflightFailed("wrong", ["this"])

    with pytest.raises(PreflightFailed):
        once(platform.launch(prepare=prepare), store)
    record = store.read("abc")
    assert record is not None
    assert not record.is_in_doubt


# -- lost answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_lost_answer_of_a_launch_that_took_effect_is_found(
    store: IntentFolder, platform: Platform, lost: BiomedError
) -> None:
    platform.answers = [lost]
    assert once(platform.launch(), store) == "job-1"
    assert (platform.sent, platform.objects) == (1, ["job-1"])


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_effect_that_comes_late_is_waited_for(
    store: IntentFolder, platform: Platform, clock: Clock, lost: BiomedError
) -> None:
    platform.answers, platform.effects = [lost], [20.0]
    assert once(platform.launch(), store) == "job-1"
    assert platform.sent == 1


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_effect_at_the_very_end_of_the_window_is_found_by_the_next_call(
    store: IntentFolder, platform: Platform, clock: Clock, lost: BiomedError
) -> None:
    platform.answers, platform.effects = [lost], [SETTLE - 1]
    for _ in range(3):
        try:
            assert once(platform.launch(), store) == "job-1"
        except BiomedError as error:
            assert isinstance(error, LaunchInDoubt) or (isinstance(error, PlatformError) and error.spoken)
    assert (platform.sent, platform.objects) == (1, ["job-1"])


def test_launch_that_never_took_effect_is_in_doubt_and_sent_again_by_the_next_call(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    platform.answers, platform.effects = [NetworkError("lost")], [None]
    begun = clock.seconds
    with pytest.raises(LaunchInDoubt, match=r"job x was made \(lost\).*looks before it sends") as caught:
        once(platform.launch(), store)
    assert clock.seconds - begun >= SETTLE
    assert caught.value.transient
    assert once(platform.launch(), store) == "job-1"
    assert clock.seconds - begun < SETTLE + 10, "the window had passed already"
    assert platform.sent == 2


def test_platform_that_cannot_be_asked_leaves_the_doubt(store: IntentFolder, platform: Platform) -> None:
    platform.answers, platform.effects = [NetworkError("lost")], [None]
    platform.look_fails = []
    looked = iter(range(10_000))

    def find(_: Intent) -> Sequence[str]:
        if next(looked) == 0:
            return []
        raise ServerUnavailable("down", status=503)

    with pytest.raises(LaunchInDoubt, match=r"cannot be looked for now \(down\)"):
        once(platform.launch(find=find), store)
    record = store.read("abc")
    assert record is not None
    assert record.is_in_doubt


def test_nothing_is_sent_while_the_look_fails(store: IntentFolder, platform: Platform, clock: Clock) -> None:
    killed(store, platform, None)
    clock.sleep(SETTLE + 1)
    platform.look_fails = [ServerUnavailable("down", status=503)]
    with pytest.raises(ServerUnavailable):
        once(platform.launch(), store)
    assert platform.sent == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [spoken(400), spoken(401, AuthenticationError), spoken(400, CapacityError), ConnectionFailed("no connection")],
    ids=["400", "401", "capacity", "never connected"],
)
def test_definite_refusal_clears_the_intent(store: IntentFolder, platform: Platform, refusal: BiomedError) -> None:
    platform.answers, platform.effects = [refusal], [None]
    with pytest.raises(type(refusal)):
        once(platform.launch(), store)
    record = store.read("abc")
    assert record is not None
    assert not record.is_in_doubt
    assert once(platform.launch(), store) == "job-1"
    assert (platform.sent, platform.looked) == (2, 2), "no wait for what was refused"


def test_refusal_that_the_platform_does_not_mean_is_looked_for(store: IntentFolder, platform: Platform) -> None:
    platform.answers, platform.effects = [spoken(400)], [5.0]
    assert once(platform.launch(says_no=lambda _: False), store) == "job-1"


def test_answer_of_the_platform_is_told_when_nothing_appears(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    platform.answers, platform.effects = [spoken(500)], [None]
    begun = clock.seconds
    with pytest.raises(PlatformError, match="the platform says"):
        once(platform.launch(), store)
    assert clock.seconds - begun < 40
    record = store.read("abc")
    assert record is not None
    assert record.is_in_doubt, "the next call looks until the window has passed"


class Lease:
    """Remembers whether the last attempt has closed it."""

    def __init__(self) -> None:
        self.open_since: datetime | None = None

    @contextmanager
    def __call__(self, _: str) -> Iterator[datetime | None]:
        earlier, self.open_since = self.open_since, self.open_since or now()
        yield earlier
        self.open_since = None


@pytest.mark.parametrize("refusal", [spoken(400), ConnectionFailed("no connection")], ids=["400", "never connected"])
def test_refusal_makes_no_other_machine_wait(
    store: IntentFolder, platform: Platform, clock: Clock, refusal: BiomedError
) -> None:
    lease = Lease()
    platform.answers, platform.effects = [refusal], [None]
    with pytest.raises(type(refusal)):
        once(platform.launch(), store, Circumstances(lease=lease))
    begun = clock.seconds
    once(platform.launch(), store, Circumstances(lease=lease))
    assert clock.seconds == begun
    assert lease.open_since is None


def test_checks_that_fail_make_no_other_machine_wait(store: IntentFolder, platform: Platform) -> None:
    lease = Lease()
    platform.look_fails = [ServerUnavailable("down", status=503)]
    with pytest.raises(ServerUnavailable):
        once(platform.launch(), store, Circumstances(lease=lease))
    assert lease.open_since is None


def test_known_object_that_is_gone_makes_no_other_machine_wait(store: IntentFolder, platform: Platform) -> None:
    lease = Lease()
    store.write(Intent(token="abc", id="job-9"))
    with pytest.raises(NotFoundError):
        once(platform.launch(), store, Circumstances(lease=lease))
    assert lease.open_since is None


def test_doubt_leaves_the_lease_open(store: IntentFolder, platform: Platform) -> None:
    lease = Lease()
    platform.answers, platform.effects = [NetworkError("lost")], [None]
    with pytest.raises(LaunchInDoubt):
        once(platform.launch(), store, Circumstances(lease=lease))
    assert lease.open_since is not None
    platform.look_fails = [AuthenticationError("key")]
    with pytest.raises(AuthenticationError):
        once(platform.launch(), store, Circumstances(lease=lease))
    assert lease.open_since is not None, "the first request may still take effect"


@pytest.mark.parametrize(
    ("error", "doubt"),
    [
        (ConnectionFailed("x"), False),
        (ConfigurationError("x"), False),
        (PreflightFailed("x"), False),
        (spoken(400), False),
        (spoken(404, NotFoundError), False),
        (spoken(429, ServerUnavailable), False),
        (spoken(500), True),
        (spoken(503, ServerUnavailable), True),
        (PlatformError("x", status=400), True),
        (UnexpectedResponse("x", status=400, spoken=True), True),
        (UnexpectedResponse("x", status=200), True),
        (NetworkError("x"), True),
        (LedgerError("x"), True),
    ],
)
def test_one_list_says_what_leaves_a_doubt(error: BiomedError, doubt: bool) -> None:
    assert leaves_doubt(error) is doubt


# -- processes that die, twins, other machines -------------------------------------------------------------------------


def test_killed_in_flight_and_started_again_at_once_makes_one(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    killed(store, platform, 30.0)
    begun = clock.seconds
    assert once(platform.launch(), store) == "job-1"
    assert platform.sent == 0
    assert clock.seconds - begun >= 29


def test_killed_before_the_request_left_is_sent_when_the_window_has_passed(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    killed(store, platform, None)
    begun = clock.seconds
    assert once(platform.launch(), store) == "job-1"
    assert clock.seconds - begun >= SETTLE
    assert platform.sent == 1


@pytest.mark.parametrize("seconds", [-1_000_000.0, 1_000_000.0])
def test_clock_that_is_set_while_a_request_is_on_its_way_does_not_end_the_wait(
    store: IntentFolder, platform: Platform, clock: Clock, seconds: float
) -> None:
    killed(store, platform, SETTLE - 10.0)
    clock.set_by = seconds
    assert once(platform.launch(), store) == "job-1"
    assert platform.sent == 0


def test_clock_that_is_fast_after_a_boot_does_not_end_the_wait(
    store: IntentFolder, platform: Platform, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(store, platform, SETTLE - 10.0)
    monkeypatch.setattr("prefect_biomed.clients.polling._boot", lambda: "another")
    clock.set_by = 1_800.0
    assert once(platform.launch(), store) == "job-1"
    assert platform.sent == 0


def test_request_of_hours_before_a_boot_is_not_waited_for(
    store: IntentFolder, platform: Platform, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(store, platform, None)
    monkeypatch.setattr("prefect_biomed.clients.polling._boot", lambda: "another")
    clock.sleep(2 * 3600.0)
    begun = clock.seconds
    once(platform.launch(), store)
    assert clock.seconds == begun


def test_clock_that_was_set_back_does_not_make_the_wait_longer(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    killed(store, platform, None)
    clock.seconds -= 1_000_000
    begun = clock.seconds
    once(platform.launch(), store)
    assert clock.seconds - begun <= SETTLE + 10


def test_attempt_that_prefect_knows_of_counts_when_this_machine_has_no_record(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    clock.later(40.0, platform.make)
    assert once(platform.launch(), store, Circumstances(attempted_since=now())) == "job-1"
    assert platform.sent == 0


def test_record_tells_since_when_other_machines_may_have_sent(store: IntentFolder, platform: Platform) -> None:
    since = now() - timedelta(hours=1)
    told: list[Intent] = []

    def find(intent: Intent) -> Sequence[str]:
        told.append(intent)
        return platform.find(intent)

    once(platform.launch(find=find), store, Circumstances(attempted_since=since))
    assert {intent.since for intent in told} == {since}
    stored = store.read(platform.launch().token)
    assert stored is not None
    assert stored.since == since


@contextmanager
def left_open(_: str) -> Iterator[datetime | None]:
    yield now()


def test_look_after_a_refusal_knows_since_when_others_may_have_gone_on(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    platform.answers, platform.effects = [spoken(400)], [None]
    with pytest.raises(PlatformError):
        once(platform.launch(), store)
    since, begun, seen = now(), clock.seconds, []

    def find(intent: Intent) -> Sequence[str]:
        seen.append(intent.since)
        return platform.find(intent)

    platform.make()
    assert once(platform.launch(find=find), store, Circumstances(attempted_since=since)) == "job-1"
    assert (platform.sent, seen, clock.seconds) == (1, [since], begun)


def test_first_attempt_that_died_before_the_request_is_no_doubt_on_this_machine(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    platform.look_fails = [ServerUnavailable("down", status=503)]
    with pytest.raises(ServerUnavailable):
        once(platform.launch(), store)
    begun = clock.seconds
    assert once(platform.launch(), store, Circumstances(attempted_since=now())) == "job-1"
    assert clock.seconds == begun


def test_attempt_that_left_no_lease_open_makes_nobody_wait(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    """A run that is retried because it failed before it came to its launch, as most are."""
    begun = clock.seconds
    assert once(platform.launch(), store, Circumstances(attempted_since=now(), lease=Lease())) == "job-1"
    assert clock.seconds == begun


def test_wait_for_another_machine_that_is_killed_begins_anew(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    class Killed(BaseException):
        pass

    def find(_: Intent) -> Sequence[str]:
        raise Killed

    with pytest.raises(Killed):
        once(platform.launch(find=find), store, Circumstances(attempted_since=now()))
    clock.later(40.0, platform.make)
    assert once(platform.launch(), store, Circumstances(attempted_since=now())) == "job-1"
    assert platform.sent == 0


def test_attempt_of_another_machine_counts_whatever_this_one_remembers(
    store: IntentFolder, platform: Platform, clock: Clock
) -> None:
    killed(store, platform, None)
    clock.sleep(SETTLE + 1)
    # Meanwhile the other machine was killed in flight.
    clock.later(40.0, platform.make)
    assert once(platform.launch(), store, Circumstances(lease=left_open)) == "job-1"
    assert platform.sent == 0


def test_lock_keeps_a_second_process_out(
    store: IntentFolder, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_biomed.clients.once._LOCK_SECONDS", 0.1)
    with (
        exclusive(store.folder / ".abc.lock", seconds=1, what="it"),
        pytest.raises(HeldElsewhere, match="another process"),
    ):
        once(platform.launch(settle_seconds=0.1), store)
    assert platform.sent == 0


def test_duplicates_are_named_and_ended_and_the_oldest_is_taken(
    store: IntentFolder, platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.make()
    platform.make()
    platform.make()
    told: list[Sequence[str]] = []
    assert once(platform.launch(), store, Circumstances(on_duplicates=told.append)) == "job-1"
    assert told == [["job-1", "job-2", "job-3"]]
    assert platform.ended == ["job-2", "job-3"]
    assert [record.levelno for record in caplog.records if "3 times" in record.message] == [logging.ERROR]


def test_duplicate_that_cannot_be_ended_is_named_and_the_oldest_is_taken_all_the_same(
    store: IntentFolder, platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.make()
    platform.make()

    def end(_: str) -> None:
        raise PlatformError("not yours")

    assert once(platform.launch(end=end), store) == "job-1"
    assert "job-2 could not be ended, end it by hand: not yours" in caplog.text


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_intents_are_readable_for_their_owner_only(store: IntentFolder, platform: Platform) -> None:
    once(platform.launch(), store)
    assert (store.folder / "abc.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 1}', '{"version": "one"}', "[" * 10_000])
def test_damaged_intent_is_not_taken_for_none(store: IntentFolder, platform: Platform, content: str) -> None:
    store.folder.mkdir()
    (store.folder / "abc.json").write_text(content)
    with pytest.raises(LedgerError, match=r"abc\.json is damaged.*left as it is"):
        once(platform.launch(), store)
    assert platform.sent == 0
    assert (store.folder / "abc.json").read_text() == content


@pytest.mark.parametrize(
    "field",
    [
        '"intended_at": "2026-11-28T00:00:00"',
        '"intended_at": "2026-11-28T00:00:00Z", "uptime": {"boot": "x", "seconds": NaN}',
        '"version": 1.0',
        '"version": "1"',
        '"id": ""',
    ],
)
def test_intent_with_a_value_that_says_nothing_is_damaged(store: IntentFolder, platform: Platform, field: str) -> None:
    store.folder.mkdir()
    (store.folder / "abc.json").write_text(f'{{"version": 1, "token": "abc", {field}}}')
    with pytest.raises(LedgerError, match=r"abc\.json is damaged"):
        once(platform.launch(), store)
    assert platform.sent == 0


@pytest.mark.parametrize("target", ["nowhere.json", "abc.json"])
def test_link_in_place_of_an_intent_is_not_taken_for_none(store: IntentFolder, platform: Platform, target: str) -> None:
    store.folder.mkdir()
    (store.folder / "abc.json").symlink_to(store.folder / target)
    with pytest.raises(LocalStorageError, match=str(store.folder)):
        once(platform.launch(), store)
    assert platform.sent == 0


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_in_place_of_an_intent_is_refused_at_once(
    store: IntentFolder, platform: Platform, kind: str
) -> None:
    store.folder.mkdir()
    path = store.folder / "abc.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises((LedgerError, LocalStorageError), match=str(store.folder)):
        once(platform.launch(), store)
    assert platform.sent == 0
    assert [intent.token for intent in store.others("other")] == []


def test_intent_of_a_later_release_asks_for_it(store: IntentFolder, platform: Platform) -> None:
    store.folder.mkdir()
    (store.folder / "abc.json").write_text(json.dumps({"version": 2, "token": "abc", "new": []}))
    with pytest.raises(LedgerError, match=r"later version of prefect-biomed\. Update the package"):
        once(platform.launch(), store)


def test_intent_under_the_name_of_another_is_refused(store: IntentFolder, platform: Platform) -> None:
    store.write(Intent(token="other"))
    (store.folder / "other.json").rename(store.folder / "abc.json")
    with pytest.raises(LedgerError, match="about the intent other"):
        once(platform.launch(), store)


def test_damaged_intent_of_another_token_concerns_it_alone(
    store: IntentFolder, platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    store.write(Intent(token="other", id="7"))
    (store.folder / "damaged.json").write_text("{")
    assert once(platform.launch(), store) == "job-1"
    assert [intent.token for intent in store.others("abc")] == ["other"]
    assert "damaged.json is damaged" in caplog.text


def test_file_without_a_version_is_migrated(tmp_path: Path) -> None:
    store = IntentFolder(
        tmp_path, migrate=lambda content: Intent(token=str(content["token"]), id=str(content["job_id"]))
    )
    (tmp_path / "abc.json").write_text(json.dumps({"token": "abc", "job_id": 3}))
    assert store.read("abc") == Intent(token="abc", id="3")
    (tmp_path / "abc.json").write_text(json.dumps({"token": "abc"}))
    with pytest.raises(LedgerError, match="damaged"):
        store.read("abc")


def test_one_lock_for_the_whole_folder(tmp_path: Path) -> None:
    store = IntentFolder(tmp_path, one_at_a_time=True)
    with store.exclusive("abc", 1), pytest.raises(HeldElsewhere), store.exclusive("other", 0.05):
        pass
    begun = time.monotonic()
    with IntentFolder(tmp_path).exclusive("abc", 1), IntentFolder(tmp_path).exclusive("other", 1):
        assert time.monotonic() - begun < 0.9
