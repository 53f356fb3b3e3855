"""Results as one table, with pandas: whatever shape the organizations gave theirs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6.errors import ResultUnavailable
from prefect_biomed.clients.vantage6.models import Result
from prefect_biomed.clients.vantage6.results import load_result

if TYPE_CHECKING:
    import pandas

__all__ = ["Orientation", "frame_of"]

logger = logger_of(__name__)

Orientation = Literal["columns", "index", "records", "split", "table", "values"]
"""How a table is laid out in JSON, in the words of pandas' `to_json`."""

_ORGANIZATION = "organization"


def frame_of(results: Iterable[Result], *, orient: Orientation | None = None) -> pandas.DataFrame:
    """Put results into one table. Needs the extra `tables`.

    Read are CSV, TSV, Parquet, Arrow and JSON lines, and JSON: a mapping of single values is one row, whose nested
    mappings become columns such as ``coefficients.age``; the layouts of pandas' `to_json` are several rows, also as the
    text that it gives. A mapping of mappings may be meant in two ways and is taken for columns, as `to_json` writes it.

    Args:
        results: The results.
        orient: How the tables in JSON are laid out, where their shape does not tell it.

    Returns:
        The rows of all organizations one below the other, with their names in a column `organization`. Row labels that
        say something are in a column `index`. Organizations without a result are left out, which is logged, and are
        listed with the reasons in ``attrs["unavailable"]``.

    Raises:
        ResultUnavailable: No organization has a result, or one is no table; the message says what it is.
        ConfigurationError: pandas is not installed.
    """
    results = list(results)
    missing = {one.organization: one.unavailable for one in results if one.unavailable is not None}
    said = "; ".join(f"{organization}: {reason}" for organization, reason in missing.items())
    if len(missing) == len(results):
        raise ResultUnavailable(f"There is no result to make a table of. {said}")
    if missing:
        logger.warning("The table is without %s", said)
    frames = []
    for result in results:
        if result.unavailable is None:
            frame = _labelled(_read(result, orient))
            # A table may tell its organization itself.
            named = f"{_ORGANIZATION}.1" if _ORGANIZATION in frame else _ORGANIZATION
            frame = frame.rename(columns={_ORGANIZATION: named})
            frame.insert(0, _ORGANIZATION, result.organization)
            frames.append(frame)
    stacked = _pandas().concat(frames, ignore_index=True)
    stacked.attrs["unavailable"] = missing
    return stacked


def _pandas() -> Any:
    try:
        import pandas
        import pyarrow  # noqa: F401  # pandas reads Parquet and Arrow with it
    except ImportError as error:
        raise ConfigurationError(
            "Tables of results need the extra 'tables': pip install 'prefect-biomed[tables]', where this runs."
        ) from error
    return pandas


def _read(result: Result, orient: Orientation | None) -> Any:
    pandas = _pandas()
    readers: dict[str, Callable[[Any], Any]] = {
        "csv": lambda file: pandas.read_csv(file, sep=_delimiter(result)),
        "tsv": lambda file: pandas.read_csv(file, sep="\t"),
        "parquet": pandas.read_parquet,
        "arrow": pandas.read_feather,
        "feather": pandas.read_feather,
        "arrows": _read_stream,
        "jsonl": lambda _: pandas.json_normalize(_lines(result)),
    }
    reader = readers.get(result.format or "")
    if reader is not None:
        return reader(result.path or io.BytesIO(result.content or b""))
    if result.format not in ("json", None):
        raise ResultUnavailable(
            f"The result of {result.organization} is of the format {result.format!r}, which is no table; it is in its "
            f"{'content' if result.path is None else f'file {result.path}'}."
        )
    return _of_json(load_result(result), orient)


def _lines(result: Result) -> list[Any]:
    """The reader of pandas would make whole numbers of some floats, and dates of some texts."""
    content = load_result(result)
    return [json.loads(line) for line in content.splitlines() if line.strip()] if isinstance(content, bytes) else []


def _delimiter(result: Result) -> str:
    if result.path is None:
        first = (result.content or b"").partition(b"\n")[0]
    else:
        with result.path.open("rb") as file:
            first = file.readline()
    return max(",;", key=lambda delimiter: first.count(delimiter.encode()))


def _read_stream(file: Any) -> Any:
    import pyarrow.ipc

    with pyarrow.ipc.open_stream(file) as reader:
        return reader.read_pandas()


def _of_json(value: Any, orient: Orientation | None) -> Any:
    pandas = _pandas()
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = json.loads(value)
    match orient or _orientation(value):
        case "records":
            return pandas.json_normalize(value)
        case "split":
            return pandas.DataFrame(value["data"], columns=value["columns"], index=value.get("index"))
        case "table":
            return pandas.read_json(io.StringIO(json.dumps(value)), orient="table")
        case "index":
            return pandas.DataFrame.from_dict(value, orient="index")
        case "columns" | "values":
            return pandas.DataFrame(value)
    return pandas.json_normalize(value) if isinstance(value, dict) else pandas.DataFrame({"value": _as_list(value)})


def _orientation(value: Any) -> Orientation | None:
    """Tell the layout of a table from its shape; None for what is a single row, or single values."""
    if isinstance(value, list) and value:
        if all(isinstance(row, dict) for row in value):
            return "records"
        return "values" if all(isinstance(row, list) for row in value) else None
    if not isinstance(value, dict) or not value:
        return None
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        return "split"
    if value.keys() == {"schema", "data"}:
        return "table"
    return "columns" if _are_columns(list(value.values())) else None


def _are_columns(values: Sequence[Any]) -> bool:
    if all(isinstance(one, list) for one in values):
        return len({len(one) for one in values}) == 1
    return all(isinstance(one, dict) for one in values) and not any(
        isinstance(cell, dict | list) for one in values for cell in one.values()
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _labelled(frame: Any) -> Any:
    """Keep row labels that say something in a column; numbers of rows do not."""
    unnamed = "Unnamed: 0"
    if len(frame.columns) and frame.columns[0] == unnamed:
        frame = frame.set_index(unnamed).rename_axis(None)
    if [str(label) for label in frame.index] == [str(number) for number in range(len(frame))]:
        return frame.reset_index(drop=True)
    return frame.reset_index()
