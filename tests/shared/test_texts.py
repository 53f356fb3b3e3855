"""Text of others in logs, on terminals, in errors and in Markdown."""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from prefect_biomed.clients.errors import BiomedError, PlatformError
from prefect_biomed.clients.http import HttpSession
from prefect_biomed.clients.rest import Refusal, RestClient
from prefect_biomed.clients.texts import code_block, inline, inline_code, lines, logger_of, one_line
from prefect_biomed.tasks import _reporting as reporting

ROOT = Path(__file__).parents[2]
NASTY = "ok\n2026-01-01 ERROR forged\r\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\u2028\x00\x7f\ud800end"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@given(st.text(st.characters(exclude_categories=())) | st.just(NASTY))
def test_no_control_character_is_shown_raw(text: str) -> None:
    assert not RAW.search(one_line(text))
    assert "\n" not in one_line(text)
    assert not RAW.search(lines(text))
    assert all(not line or line.startswith("  ") for line in lines(text).split("\n")[1:])
    assert lines(lines(text)) == lines(text)
    one_line(text).encode()


def test_what_people_write_stays_as_it_is() -> None:
    for text in ("Schädel T1w, 3 µm ± 0.1", "日本語\tx", "a_b-c (d) 100 %", "👩‍⚕️"):
        assert one_line(text) == text
        assert str(BiomedError(text)) == text


@given(st.text(st.characters(exclude_categories=())) | st.just(NASTY))
def test_markup_of_others_is_none(text: str) -> None:
    cell = inline(text)
    assert "\n" not in cell
    assert not re.search(r"(?<!\\)(\\\\)*[`*\[\]|!]", cell)
    assert not re.search(r"[<>]|&(?!lt;|gt;|amp;)", cell)
    assert inline_code(text).count("`") == 2
    block = code_block(text).split("\n")
    fence = len(block[0])
    assert set(block[0]) == set(block[-1]) == {"`"}
    assert not any(re.match(rf"\s*`{{{fence},}}\s*$", line) for line in block[1:-1])


def test_markup_that_loads_or_runs_something_is_escaped() -> None:
    for markup in ("![x](http://evil/p.png)", "[x](javascript:alert(1))", "<img src=x onerror=y>", "<javascript:x>"):
        escaped = re.sub(r"([!\[\]])", r"\\\1", markup)
        assert inline(markup) == escaped.replace("<", "&lt;").replace(">", "&gt;")


def test_errors_show_lines_of_their_own_only() -> None:
    error = PlatformError(f"said {NASTY}\n  - a list of ours", status=400)
    assert "\n  2026-01-01 ERROR forged\\r\\x1b[2J" in str(error)
    assert "\n  - a list of ours" in str(error)
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error)
    assert copied.status == 400


class _Client(RestClient):
    def _refusal(self, status: int, body: Any) -> Refusal | None:
        return Refusal(body["said"]) if isinstance(body, dict) else None


def test_words_of_a_platform_are_one_line_of_its_error() -> None:
    response = requests.Response()
    response.status_code, response.url = 418, "https://h/x"
    error = _Client(HttpSession("https://h"))._error(response, json.dumps({"said": "no\nERROR forged \x1b[1m"}), "Job")
    assert str(error) == r"Job: no\nERROR forged \x1b[1m (HTTP 418)."


def test_loggers_of_the_package_show_no_argument_raw(caplog: pytest.LogCaptureFixture) -> None:
    logger = logger_of("prefect_biomed.tests")
    assert logger_of("prefect_biomed.tests").filters == logger.filters
    with caplog.at_level(logging.INFO):
        logger.info("%s is %s after %.1f s", NASTY, {"a": NASTY}, 1.5)
        logger.info("%(name)s", {"name": NASTY})
        logger.error("%s", BiomedError("two\nlines"))
        logger.info("%s", lines("a\nb"))
    assert not any(RAW.search(record.getMessage()) for record in caplog.records)
    assert [record.getMessage().count("\n") for record in caplog.records] == [0, 0, 1, 1]
    assert caplog.records[0].getMessage().endswith("after 1.5 s")


def test_every_module_logs_that_way() -> None:
    """Also the loggers of runs, which are Prefect's."""
    folders = ("analysis", "blocks", "cli", "clients", "flows", "tasks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    rooms = {ROOT / "clients/texts.py", ROOT / "tasks/_reporting.py", ROOT / "clients/boss/_aws.py"}
    raw = re.compile(r"logging\.getLogger\(|get_run_logger\(")
    assert [file for file in files if file not in rooms and raw.search(file.read_text())] == []
    literal = re.compile(r"(logger|run_logger\(\))\.(debug|info|warning|error|critical|exception)\(\s*f\"")
    assert [file for file in files if literal.search(file.read_text())] == [], "arguments within the text are not seen"


# -- artifacts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been sent to the engine."""
    made: list[dict[str, Any]] = []
    for name in ("create_table_artifact", "create_link_artifact", "create_markdown_artifact"):

        def create(**arguments: Any) -> None:
            made.append(arguments)

        create.__name__ = name
        monkeypatch.setattr(reporting, name, create)
    return made


def test_artifacts_hold_nothing_raw(left: list[dict[str, Any]]) -> None:
    reporting.table("k", [{"name": NASTY, NASTY: 1, "n": 2}], f"Runs of {NASTY}")
    reporting.link("k", "https://h/a b)](javascript:x)\n", "task [x](javascript:y)")
    shown = json.dumps(left, ensure_ascii=False)
    assert not RAW.search(shown)
    assert left[1]["link"] == "https://h/a%20b%29%5D%28javascript:x%29%0A"
    assert left[1]["link_text"] == r"task \[x\](javascript:y)"
    assert left[0]["table"][0]["n"] == 2


def test_a_table_is_written_when_a_row_has_changed_and_not_more_often_than_it_should(
    left: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: clock[0])
    watched = reporting.Table("k", "Runs", state="status", usual={"Running", "Finished"})

    def rows(ended: int, count: int = 3) -> list[dict[str, Any]]:
        return [{"run": f"r{n}", "status": "Finished" if n < ended else "Running", "jobs": n} for n in range(count)]

    for second in range(60):
        clock[0] = 1000.0 + second
        watched.show(rows(min(second // 2, 3)))
    assert [len(one["table"]) for one in left] == [3, 3, 3]
    assert [sum(row["status"] == "Finished" for row in one["table"]) for one in left] == [0, 2, 3]
    watched.show(rows(2), last=True)
    assert len(left) == 4


def test_a_thousand_runs_become_a_summary_with_what_needs_attention(left: list[dict[str, Any]]) -> None:
    watched = reporting.Table("k", "Runs", state="status", usual={"Running", "Finished"})
    states = {**dict.fromkeys(range(20), "ExecutionFailed"), **dict.fromkeys(range(20, 600), "Finished")}
    watched.show({"run": f"r{n}", "status": states.get(n, "Running"), "jobs": 1} for n in range(1000))
    table = left[0]["table"]
    assert [(row["run"], row["status"]) for row in table[:3]] == [
        ("580 of 1000", "Finished"),
        ("400 of 1000", "Running"),
        ("20 of 1000", "ExecutionFailed"),
    ]
    assert [row["run"] for row in table[3:]] == [f"r{n}" for n in range(20)]
    watched.show(({"run": f"r{n}", "status": "Killed", "jobs": 1} for n in range(1000)), last=True)
    assert len(left[1]["table"]) == 102
    assert left[1]["table"][1]["run"] == "900 more are not shown"
