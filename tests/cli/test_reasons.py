"""`prefect-biomed why` and `diff`: from records alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.shell import typed
from harness.vip_steps import send, start, wait
from prefect_biomed.cli.reasons import Results, compare, reasons
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.once import Intent, Origin
from prefect_biomed.clients.vantage6.launches import intents
from prefect_biomed.clients.vip import VipClient, VipSession, download, launch
from prefect_biomed.sandbox import Fault, Sandbox


def session(folder: Path, name: str, content: bytes = b"x", **changes: Any) -> VipSession:
    inputs = folder / f"in-{name}"
    inputs.mkdir()
    (inputs / "a.txt").write_bytes(content)
    return VipSession(
        **{
            "session_name": name,
            "pipeline_id": "CopyFile/1.0",
            "input_settings": {"file": "a.txt"},
            "input_dir": inputs,
            "output_dir": folder / name,
            "vip_input_dir": f"/vip/Home/API/{name}/INPUTS",
            "vip_output_dir": f"/vip/Home/API/{name}/OUTPUTS",
            "token": "t0k3n",
            **changes,
        }
    )


def test_each_launch_has_its_reason_and_two_runs_their_difference(vip: Sandbox, tmp_path: Path) -> None:
    facts = vip.ready()["vip"]
    with VipClient(facts["url"], facts["api_key"]) as client:
        one = session(tmp_path, "one", nb_runs=3)
        send(client, one)
        vip.vip.faults.add(Fault(method="POST", path="/executions$", calls=range(1, 2), drop="after"))
        launch(client, one, 1, settle_seconds=5)
        record = one.output_dir / "session_data.json"
        content = json.loads(record.read_text())
        assert content["prefect_biomed"]["launches"].popitem()[1]["origin"] == "settled"
        content["workflows"] = {}
        record.write_text(json.dumps(content))
        for repetition in (1, 2):
            launch(client, one, repetition, settle_seconds=5)
        wait(client, one)
        download(client, one)
        found = {reason.what: reason.why for reason in reasons(str(one.output_dir))}
        assert "1 files were sent" in found["inputs of t0k3n"]
        assert "carried the name already" in found["one-r001-t0k3n"]
        assert "nothing carried its name" in found["one-r002-t0k3n"] and "Finished" in found["one-r002-t0k3n"]
        assert found["one-r003-t0k3n"] == "was not launched yet"
        others = {
            "changed": {"content": b"y"},
            "again": {},
        }
        for name, changes in others.items():
            other = session(tmp_path, name, **changes)
            send(client, other)
            start(client, other)
            wait(client, other)
            download(client, other)
    look = compare(str(one.output_dir), str(tmp_path / "changed"))
    assert look.cause == "input digest" and look.differences[0].startswith("a.txt: ")
    assert look.results is Results.DIFFERENT
    look = compare(f"{one.output_dir}:2", str(tmp_path / "again"))
    assert (look.cause, look.unknown, look.results) == ("", (), Results.SAME)
    status, said = typed("prefect-biomed", "diff", str(one.output_dir), str(tmp_path / "changed"))
    assert status == 1 and "first cause: input digest" in said
    status, said = typed("prefect-biomed", "why", str(one.output_dir))
    assert status == 0 and "one-r003-t0k3n: was not launched yet" in said
    for kind, changed in (
        ("parameter", {"given": {"file": "b.txt"}}),
        ("version", {"pipeline_id": "CopyFile/2.0"}),
    ):
        record = tmp_path / "again" / "session_data.json"
        before = record.read_text()
        content = json.loads(before)
        content["prefect_biomed"]["intents"]["t0k3n"] |= changed
        record.write_text(json.dumps(content))
        assert compare(f"{one.output_dir}:2", str(tmp_path / "again")).cause == kind
        record.write_text(before)
    with pytest.raises(ConfigurationError, match="no run 4"):
        compare(f"{one.output_dir}:4", str(tmp_path / "again"))
    next(path for path in (tmp_path / "again").rglob("a.txt*") if path.is_file()).unlink()
    status, said = typed("prefect-biomed", "diff", str(one.output_dir), str(tmp_path / "again"))
    assert status == 3 and "results: unknown" in said
    for path in [path for path in one.output_dir.rglob("a.txt*") if path.is_file()]:
        path.unlink()
        path.mkdir()
    look = compare(f"{one.output_dir}:2", f"{one.output_dir}:1")
    assert look.results is Results.UNKNOWN, "two runs without a file are not the same result"


def test_what_was_launched_elsewhere_is_told_by_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_BIOMED_HOME", str(tmp_path))
    for number, image in ((7, "mean:1"), (8, "mean:2")):
        asked = {"server": "https://one", "what": f"task mean-tok{number}", "image": image, "method": "mean"}
        name = f"task-mean-tok{number}-0123"
        intents().write(Intent(token=name, id=str(number), asked=asked, origin=Origin.FOUND))
    (reason,) = reasons("tok7")
    assert reason.what == "task mean-tok7" and "carried the name already" in reason.why
    look = compare("7", "tok8")
    data = "the digest of the data at the organizations"
    assert (look.cause, look.unknown, look.results) == ("version", ("the digest of arguments", data), Results.UNKNOWN)
    intents().write(Intent(token="task-mean-tok9-0123", id="9", asked=asked | {"arguments": "b"}))
    intents().write(Intent(token="task-mean-tok10-0123", id="10", asked=asked | {"arguments": "c"}))
    assert compare("8", "9").unknown == ("the digest of arguments", data), "of an earlier release"
    assert (compare("9", "10").cause, compare("9", "10").unknown) == ("input digest", (data,))
    assert compare("9", "10").differences == ("arguments: b, and c",)
    old, new = asked | {"collaboration": 1, "session": None}, {"study": None, "databases": [{"label": "d"}]}
    for number, more in ((11, {}), (12, new | {"arguments": "b"}), (13, new | {"arguments": "b"})):
        intents().write(Intent(token=f"task-mean-tok{number}-0123", id=f"{number}", asked=old | more))
    assert compare("12", "13").unknown == (data,) and not compare("12", "13").differences
    untold = ("the digest of arguments", data, "the digest of databases", "the digest of study")
    assert compare("11", "12").unknown == untold and not compare("11", "12").differences
    status, said = typed("prefect-biomed", "why", "tok14")
    assert status == 2 and "no record of tok14" in said
