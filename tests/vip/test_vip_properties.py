"""What holds for every name and every value, whoever made it up."""

from __future__ import annotations

import enum
import json
import math
import string
import tempfile
import unicodedata
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from prefect_biomed.clients.vip import InputSettings, VipSession
from prefect_biomed.clients.vip.local_files import InputFolder, stored_name
from prefect_biomed.clients.vip.preflight import _number, _whole_number
from prefect_biomed.clients.vip.profiles import CARMIN, VIP
from prefect_biomed.clients.vip.session_record import (
    IntentRecord,
    LaunchRecord,
    Ledger,
    SessionRecord,
    UploadedFile,
    parse,
)
from prefect_biomed.sandbox.vip._storage import stored_name as stored_by_sandbox

SETTINGS: TypeAdapter[dict[str, Any]] = TypeAdapter(InputSettings)

# -- names -------------------------------------------------------------------------------------------------------------

# Spaces of all kinds, a full-width solidus, leaders of two dots and one, a combining mark, letters from the right, and
# characters that fall apart into several.
ODD = (
    "  \t\n\u00a0\u2003\u3000\u0085\u1680\uff0f\u2100\uff05\u2025\u2024\u2026\u0301\u200f\u202e"
    "\u05e9\u05dc\u0627\U0001f600\u200d\u00e9\u65e5\u00bd\u247d\u33c2\ufb01\u00b2\u01c5\ufeff"
)
names = st.one_of(
    st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40),
    st.text(ODD + "ab._-", min_size=1, max_size=12),
)


def renamed_by_java(name: str) -> str:
    """What the platform makes of a name, which trims other characters than Python does."""
    trimmed = name.strip("".join(map(chr, range(33)))).replace(" ", "_")
    return unicodedata.normalize("NFKD", trimmed).encode("ascii", "ignore").decode()


@given(names)
@example("\u2025")
@example("a\uff0fb")
@example("\u00a0")
@example(" \u00a0. ")
def test_stored_name_is_one_that_the_platform_leaves_alone(name: str) -> None:
    stored = stored_name(name)
    assert stored_name(stored) == stored
    assert stored_by_sandbox(stored) == stored
    assert renamed_by_java(stored) == stored
    assert "/" not in stored
    assert stored not in {".", ".."}
    assert stored.isascii()
    assert stored_name(name, CARMIN) == name


@given(names)
def test_stored_name_is_what_the_platform_makes_of_it_where_that_stays(name: str) -> None:
    once = stored_by_sandbox(name)
    stays = renamed_by_java(name) == once == stored_by_sandbox(once) == renamed_by_java(once)
    if stays and "/" not in once and once not in {".", ".."}:
        assert stored_name(name) == once


@given(st.lists(st.lists(names, min_size=1, max_size=3), min_size=1, max_size=5))
def test_no_two_files_are_sent_under_one_name(paths: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "in")
        folder.mkdir()
        made = {local for parts in paths if (local := _make(folder, parts)) is not None}
        found = InputFolder(folder, Path(temporary, "out"), VIP)
        sent = [file.name for file in found.files]
        assert len(set(sent)) == len(sent)
        assert not set(sent) & set(found.folders)
        for name in (*sent, *found.folders):
            assert all(part == stored_by_sandbox(part) != "" for part in name.split("/"))
        # Each is sent, or a problem says why not; two folders that become one are a problem, too.
        unsent = made - {file.local_name for file in found.files}
        assert len(found.problems) >= (1 if unsent else 0)
        for file in found.files:
            assert found.find(file.local_name) == file.name
            assert found.find(str(file.path)) == file.name
            local, stored = PurePosixPath(file.local_name).parent, PurePosixPath(file.name).parent
            assert local.name == "" or found.folders[stored.as_posix()] == local.as_posix()


def _make(folder: Path, parts: list[str]) -> str | None:
    path = folder.joinpath(*parts)
    try:
        if not path.resolve().is_relative_to(folder.resolve()) or {".", ".."} & set(parts):
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    except (OSError, UnicodeEncodeError):
        return None
    return path.relative_to(folder).as_posix()


# -- values ------------------------------------------------------------------------------------------------------------


class Side(enum.Enum):
    LEFT = "left"
    SECOND = 2


int64 = st.integers(-(2**63), 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
# What is written, and what has to arrive.
singles: st.SearchStrategy[tuple[Any, Any]] = st.one_of(
    st.one_of(words, st.booleans(), int64, finite, st.none()).map(lambda value: (value, value)),
    int64.map(lambda value: (numpy.int64(value), value)),
    st.integers(-128, 127).map(lambda value: (numpy.int8(value), value)),
    st.integers(0, 2**64 - 1).map(lambda value: (numpy.uint64(value), value)),
    st.booleans().map(lambda value: (numpy.bool_(value), value)),
    finite.map(lambda value: (numpy.float64(value), value)),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(
        lambda value: (numpy.float32(value), float(str(numpy.float32(value))))
    ),
    words.filter(lambda text: "\0" not in text).map(lambda value: (numpy.str_(value), value)),
    st.sampled_from(Side).map(lambda value: (value, value.value)),
    st.dates().map(lambda value: (value, value.isoformat())),
    st.datetimes(timezones=st.just(UTC)).map(lambda value: (value, value.isoformat())),
    int64.map(lambda value: (Decimal(value), value)),
    finite.map(lambda value: (Decimal(repr(value)), value)),
    st.sampled_from(["a/b.nii", "/data/a.nii", "c.txt"]).map(
        lambda text: (Path(text), text if text.startswith("/") else f"./{text}")
    ),
)


def same(arrived: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return type(arrived) is list and len(arrived) == len(expected) and all(map(same, arrived, expected))
    # A decimal that is a whole number may come as one.
    if type(arrived) is int and type(expected) is float:
        return Decimal(arrived) == Decimal(repr(expected))
    return type(arrived) is type(expected) and bool(arrived == expected)


@given(st.one_of(singles, st.lists(singles, max_size=5).map(lambda pairs: tuple(map(list, zip(*pairs, strict=True))))))
def test_what_arrives_is_what_was_written(pair: tuple[Any, Any]) -> None:
    written, expected = pair or ([], [])
    (arrived,) = SETTINGS.validate_python({"x": written}).values()
    assert same(arrived, expected), (written, arrived, expected)
    session = VipSession(
        session_name="s",
        input_settings={"x": written},
        output_dir=Path("out"),
        vip_input_dir="/vip/Home/API/s/INPUTS",
        vip_output_dir="/vip/Home/API/s/OUTPUTS",
        token="t0k3n",
    )
    again = VipSession.model_validate_json(session.model_dump_json())
    assert same(again.input_settings["x"], arrived)


@given(st.dictionaries(st.text(max_size=8), st.one_of(words, int64, finite, st.booleans(), st.none(), st.lists(int64))))
def test_json_text_of_a_form_is_the_values(values: dict[str, Any]) -> None:
    arrived = SETTINGS.validate_python(json.dumps(values))
    assert arrived.keys() == values.keys()
    assert all(same(arrived[name], value) for name, value in values.items())


@given(st.decimals(-1_000_000, 1_000_000))
def test_number_in_json_text_stays_the_same_or_is_refused_by_name(written: Decimal) -> None:
    try:
        arrived = SETTINGS.validate_python(f'{{"the name": {written:f}}}')["the name"]
    except ValidationError as error:
        assert "'the name': " in str(error)
        assert "more digits than a number can carry" in str(error)
    else:
        assert Decimal(repr(arrived)) == written


@given(
    st.recursive(
        st.one_of(int64, st.binary(max_size=4), st.sets(int64, max_size=2), st.complex_numbers(), st.timedeltas()),
        lambda inner: st.one_of(st.lists(inner, min_size=1, max_size=3), st.dictionaries(words, inner, max_size=2)),
        max_leaves=6,
    ).filter(lambda value: not isinstance(value, int) and not (isinstance(value, list) and _is_flat(value)))
)
def test_what_no_platform_knows_is_refused_in_one_line_with_its_name(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        SETTINGS.validate_python({"good": 1, "the name": value})
    (problem,) = caught.value.errors()
    assert problem["msg"].startswith("Value error, 'the name': ")
    assert "expected is" in problem["msg"]
    assert "\n" not in problem["msg"]


def _is_flat(values: list[Any]) -> bool:
    return all(isinstance(value, int) for value in values)


@given(st.one_of(int64.map(str), finite.map(repr), st.text(string.digits + "+-.eE_ ", min_size=1, max_size=24)))
def test_numbers_given_as_text_stay_the_same_numbers(text: str) -> None:
    try:
        number = _number(text, takes_text=True)
    except ValueError:
        return
    assert Decimal(number if isinstance(number, str) else repr(number)) == Decimal(text.strip())
    if isinstance(number, float):
        assert math.isfinite(number)
    try:
        whole = _whole_number(text)
    except ValueError:
        return
    assert type(whole) is int
    assert Decimal(whole) == Decimal(text.strip())
    assert -(2**63) <= whole < 2**63


def test_dates_of_numpy_say_what_was_written() -> None:
    arrived = SETTINGS.validate_python(
        {"x": [numpy.datetime64("2024-02-29"), numpy.datetime64("2024-02-29T12:00:01.5")]}
    )
    assert arrived == {"x": ["2024-02-29", "2024-02-29T12:00:01.500"]}
    assert SETTINGS.validate_python({"x": date(2024, 2, 29)}) == {"x": "2024-02-29"}
    assert SETTINGS.validate_python({"x": datetime(2024, 2, 29, 12)}) == {"x": "2024-02-29T12:00:00"}
    with pytest.raises(ValidationError, match="NaT"):
        SETTINGS.validate_python({"x": numpy.datetime64("NaT")})


# -- the session file --------------------------------------------------------------------------------------------------

# Made of few choices, because a file has many parts.
tokens = st.integers(36**3, 36**12 - 1).map(lambda number: numpy.base_repr(number, 36).lower())
identifiers = st.integers(0, 10**6 - 1).map("workflow-{:06}".format)
moments = st.integers(0, 20 * 365 * 86_400 * 1000).map(
    lambda number: datetime(2020, 1, 1, tzinfo=UTC) + timedelta(milliseconds=number)
)
pieces = st.one_of(
    st.sampled_from(["", "a b", "\u00e9\u0301", '"\\', "\u2028\n", "\U0001f600", "null", "1e5", "x" * 300]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
)
scalars = st.one_of(pieces, st.booleans(), int64, finite)
settings = st.dictionaries(
    pieces.filter(bool), st.one_of(scalars, st.lists(scalars, max_size=2), st.none()), max_size=2
)
more = st.dictionaries(st.sampled_from(["ofAnotherRelease", "of_another_tool"]), st.one_of(pieces, int64), max_size=2)
outputs = st.lists(
    st.one_of(
        st.fixed_dictionaries({"path": pieces.map("/vip/Home/{}".format)}),
        st.fixed_dictionaries(
            {
                "path": pieces.map("/vip/Home/{}".format),
                "isDirectory": st.booleans(),
                "size": int64,
                "exists": st.booleans(),
            }
        ),
    ),
    max_size=2,
)
# As vip-client 0.1.10 writes it.
of_vip_client = st.fixed_dictionaries(
    {
        "session_name": st.just("s"),
        "pipeline_id": st.one_of(st.none(), pieces),
        "local_input_dir": st.one_of(st.none(), pieces),
        "local_output_dir": pieces,
        "vip_input_dir": st.just("/vip/Home/API/s/INPUTS"),
        "vip_output_dir": st.just("/vip/Home/API/s/OUTPUTS"),
        "input_settings": st.one_of(st.none(), settings),
        "workflows": st.dictionaries(
            identifiers,
            st.fixed_dictionaries(
                {
                    "status": st.sampled_from(["Running", "Finished", "Killed", "Removed", "Unknown", "Paused"]),
                    "start": st.just("2026/01/02 03:04:05"),
                    "outputs": outputs,
                }
            ),
            max_size=3,
        ),
    }
)
uploads = st.dictionaries(
    pieces, st.builds(UploadedFile, size=int64, mtime_ns=int64, sha256=st.just("0" * 64)), max_size=2
)
launches = st.dictionaries(
    tokens.map("s-r001-{}".format),
    st.builds(
        LaunchRecord,
        intended=moments,
        since=st.one_of(st.none(), moments),
        results_location=pieces,
        girder_inputs=settings,
        workflow_id=st.one_of(st.none(), identifiers),
        started_by=st.one_of(st.none(), pieces),
    ),
    max_size=2,
)
intents = st.builds(
    IntentRecord,
    begun_at=st.one_of(st.none(), moments),
    pipeline_id=st.one_of(st.none(), pieces),
    given=settings,
    input_settings=st.one_of(st.none(), settings),
    nb_runs=st.integers(1, 1000),
    local_input_dir=st.one_of(st.none(), pieces),
    required_outputs=st.one_of(st.none(), st.lists(pieces, max_size=2).map(tuple)),
    girder_metadata=settings,
)
ledgers = st.builds(
    Ledger,
    revision=st.integers(0, 10**6),
    intents=st.dictionaries(tokens, intents, min_size=1, max_size=3),
    begun=st.lists(pieces, max_size=2),
    launches=launches,
    uploads=uploads,
    downloaded=st.lists(identifiers, max_size=2),
    is_removed=st.booleans(),
    resume=st.one_of(st.none(), pieces),
)


def written(record: SessionRecord) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(record.model_dump(mode="json")))
    return content


def read(content: dict[str, Any]) -> SessionRecord:
    return parse(json.dumps(content).encode(), "session_data.json")


def read_by_vip_client(content: dict[str, Any]) -> dict[str, Any]:
    """What vip-client 0.1.10 takes of a file: it refuses one that lacks a key, and drops those it does not know."""
    theirs = {name: content[name] for name in PROPERTIES_OF_VIP_CLIENT}
    for workflow in theirs["workflows"].values():
        assert isinstance(workflow["status"], str)
        assert isinstance(workflow["start"], str)
        assert all(isinstance(output["path"], str) for output in workflow["outputs"])
    return theirs


PROPERTIES_OF_VIP_CLIENT = (
    "session_name",
    "pipeline_id",
    "local_input_dir",
    "local_output_dir",
    "vip_input_dir",
    "vip_output_dir",
    "input_settings",
    "workflows",
)


@given(of_vip_client, ledgers, more)
def test_session_file_is_read_as_it_was_written(
    theirs: dict[str, Any], ledger: Ledger, unknown: dict[str, Any]
) -> None:
    record = SessionRecord.model_validate({**theirs, **unknown, "prefect_biomed": ledger})
    again = read(written(record))
    assert again == record
    assert list(again.ledger.intents) == list(record.ledger.intents)
    assert written(again) == written(record)
    assert read_by_vip_client(written(record)) == theirs
    assert all(written(record)[name] == value for name, value in unknown.items())


@given(of_vip_client, more, identifiers)
def test_session_goes_to_vip_client_and_back(theirs: dict[str, Any], unknown: dict[str, Any], fresh: str) -> None:
    """It reads the file again before it writes, and keeps what it does not know."""
    record = read({**theirs, **unknown})
    assert record.prefect_biomed is None
    ledger = record.ledger.model_copy(deep=True)
    ours = written(record)
    mine = read_by_vip_client(ours)
    mine["workflows"][fresh] = {"status": "Running", "start": "2026/01/02 03:04:05", "outputs": []}
    back = read({**ours, **mine})
    assert back.ledger == ledger
    assert list(back.workflows) == list(mine["workflows"])
    assert back.workflows_of(ledger.newest) == list(back.workflows)
    assert all(written(back)[name] == value for name, value in unknown.items())


@given(of_vip_client, tokens, st.integers(1, 1000), launches, uploads, st.lists(identifiers, max_size=2), more)
def test_session_file_of_an_earlier_release_loses_nothing(
    theirs: dict[str, Any],
    token: str,
    nb_runs: int,
    launched: dict[str, LaunchRecord],
    sent: dict[str, UploadedFile],
    downloaded: list[str],
    unknown: dict[str, Any],
) -> None:
    ledger = {
        "version": 1,
        "token": token,
        "nb_runs": nb_runs,
        "launches": {name: launch.model_dump(mode="json") for name, launch in launched.items()},
        "uploads": {name: file.model_dump(mode="json") for name, file in sent.items()},
        "downloaded": downloaded,
        "girder_download": True,
        **unknown,
    }
    record = read({**theirs, "prefect_biomed": ledger})
    assert record.ledger.newest == token
    intent = record.ledger.intents[token]
    assert (intent.nb_runs, intent.pipeline_id, intent.girder_download) == (nb_runs, theirs["pipeline_id"], True)
    assert intent.given == (theirs["input_settings"] or {})
    assert record.ledger.launches == launched
    assert record.ledger.uploads == sent
    assert record.ledger.downloaded == downloaded
    assert all(written(record)["prefect_biomed"][name] == value for name, value in unknown.items())
    assert read(written(record)) == record
    assert read_by_vip_client(written(record)) == theirs
