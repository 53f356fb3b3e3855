"""Results as one table: whatever layout the organizations chose."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vantage6 import Result, ResultUnavailable, Status, Task, frame_of
from prefect_biomed.clients.vantage6.payloads import recognise
from prefect_biomed.flows.vantage6 import Analysis

TABLE = pandas.DataFrame({"age": [30, 41], "weight": [70.5, math.nan], "ward": ["a", "b, c"]})


def result(organization: str, output: object, number: int = 1, **fields: Any) -> Result:
    """A result as it is fetched."""
    content = output if isinstance(output, bytes) else json.dumps(output).encode()
    kind, _ = recognise(4, content, complete=True, run_id=number)
    found: dict[str, Any] = {"value": json.loads(content)} if kind == "json" else {"content": content}
    return Result(
        run_id=number,
        task_id=1,
        organization_id=number,
        organization=organization,
        format=kind,
        size_bytes=len(content),
        **found | fields,
    )


def written(write: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


LAYOUTS: dict[str, object] = {
    "columns": json.loads(TABLE.to_json()),
    "columns as text": TABLE.to_json(),
    "split": json.loads(TABLE.to_json(orient="split")),
    "split as text": TABLE.to_json(orient="split"),
    "records": json.loads(TABLE.to_json(orient="records")),
    "records as text": TABLE.to_json(orient="records"),
    "table": json.loads(TABLE.to_json(orient="table", index=False)),
    "lists": {name: [None if value != value else value for value in TABLE[name].tolist()] for name in TABLE},
    "csv": TABLE.to_csv(index=False).encode(),
    "csv with row numbers": TABLE.to_csv().encode(),
    "csv with semicolons": TABLE.to_csv(index=False, sep=";").encode(),
    "tsv": TABLE.to_csv(index=False, sep="\t").encode(),
    "json lines": TABLE.to_json(orient="records", lines=True).encode(),
    "parquet": written(TABLE.to_parquet),
    "feather": written(TABLE.to_feather),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_stacked_with_the_organization(layout: str) -> None:
    frame = frame_of([result("north", LAYOUTS[layout]), result("south", LAYOUTS[layout], 2)])
    assert list(frame.columns) == ["organization", "age", "weight", "ward"]
    assert frame["organization"].tolist() == ["north", "north", "south", "south"]
    for start in (0, 2):
        pandas.testing.assert_frame_equal(
            frame.iloc[start : start + 2, 1:].reset_index(drop=True), TABLE, check_dtype=False
        )


def test_an_ambiguous_layout_is_read_as_told() -> None:
    by_row = {"mean": {"age": 30.0, "bmi": 22.0}, "sd": {"age": 3.0, "bmi": 2.0}}
    assert frame_of([result("north", by_row)]).columns.tolist() == ["organization", "index", "mean", "sd"]
    told = frame_of([result("north", by_row)], orient="index")
    assert told.columns.tolist() == ["organization", "index", "age", "bmi"]
    assert told["index"].tolist() == ["mean", "sd"]


def test_an_answer_that_is_no_table_is_one_row_for_each_organization() -> None:
    frame = frame_of(
        [result("north", {"sum": 10, "fit": {"age": 0.5}}), result("south", {"sum": 20, "fit": {"age": 1}})]
    )
    assert frame.to_dict("list") == {"organization": ["north", "south"], "sum": [10, 20], "fit.age": [0.5, 1.0]}
    assert frame_of([result("north", 3.5)]).to_dict("list") == {"organization": ["north"], "value": [3.5]}


def test_what_is_no_number_stays_what_it_is() -> None:
    frame = frame_of(
        [result("north", {"mean": math.nan, "most": math.inf}), result("south", {"mean": 1.0, "most": 2.0})]
    )
    assert math.isnan(frame["mean"][0]) and frame["most"][0] == math.inf


def test_a_large_table_is_read_from_its_file(tmp_path: Path) -> None:
    for name, content in (("csv", LAYOUTS["csv"]), ("parquet", LAYOUTS["parquet"])):
        assert isinstance(content, bytes)
        path = tmp_path / f"task-1-run-1.{name}"
        path.write_bytes(content)
        frame = frame_of([result("north", content, path=path, content=None)])
        pandas.testing.assert_frame_equal(frame.drop(columns="organization"), TABLE)


def test_an_organization_without_result_is_named_and_never_a_row(caplog: pytest.LogCaptureFixture) -> None:
    missing = Result(run_id=2, task_id=1, organization_id=2, organization="south", unavailable="its run crashed")
    frame = frame_of([result("north", {"sum": 1}), missing])
    assert frame["organization"].tolist() == ["north"]
    assert frame.attrs["unavailable"] == {"south": "its run crashed"}
    assert "south: its run crashed" in caplog.text
    with pytest.raises(ResultUnavailable, match="south: its run crashed"):
        frame_of([missing])


def test_a_picture_is_no_table() -> None:
    with pytest.raises(ResultUnavailable, match="north is of the format 'png'"):
        frame_of([result("north", b"\x89PNG\r\n\x1a\n" + bytes(10))])


def test_without_pandas_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'prefect-biomed\[tables\]'"):
        frame_of([result("north", {"sum": 1})])


def test_an_analysis_gives_one_organization_one_value_or_all() -> None:
    task = Task(id=1, status=Status.COMPLETED)
    north, south = result("north", {"sum": 1}), result("south", b"age,sex\n1,f\n2,m\n", 2)
    both = Analysis(task=task, results=(north, south))
    assert both["north"] == both[1] == north and both["south"].content == b"age,sex\n1,f\n2,m\n"
    with pytest.raises(KeyError, match="'north' \\(id 1\\), 'south' \\(id 2\\)"):
        both["east"]
    with pytest.raises(ConfigurationError, match="2 results"):
        _ = both.value
    assert Analysis(task=task, results=(north,)).value == {"sum": 1}
    assert Analysis(task=task, results=(south,)).value == b"age,sex\n1,f\n2,m\n"
    assert both.to_frame().columns.tolist() == ["organization", "sum", "age", "sex"]
    assert Analysis.model_validate_json(both.model_dump_json()) == both


def test_an_analysis_that_is_stored_and_loaded_keeps_every_value() -> None:
    values = {"none": math.nan, "most": [math.inf, -math.inf], "nothing": None}
    picture = b"\x89PNG\r\n\x1a\n\xff\xfe"
    kept = Analysis(
        task=Task(id=1, status=Status.COMPLETED), results=(result("north", values), result("south", picture, 2))
    )
    for loaded in (
        Analysis.model_validate_json(kept.model_dump_json()),
        Analysis.model_validate(json.loads(json.dumps(kept.model_dump(mode="json")))),
    ):
        assert repr(loaded["north"].value) == repr(values)
        assert loaded["south"].content == picture
