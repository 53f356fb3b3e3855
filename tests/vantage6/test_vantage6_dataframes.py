"""A dataframe is taken only when it is just what is asked for; else it is a conflict, or made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.dataframe_chains import CHANGES, chain, summary
from harness.federation import CLINICAL, FAST, HOSPITALS, Federation, token, wait
from prefect_biomed.clients.once import Circumstances
from prefect_biomed.clients.polling import now
from prefect_biomed.clients.vantage6 import (
    Dataframe,
    DataframeSpec,
    NameConflict,
    PrivateKey,
    Session,
    Task,
    TaskFailed,
    TaskRequest,
    Vantage6Client,
    add_preprocessing,
    description_of,
    fetch_results,
    launch,
    make_dataframe,
    make_session,
    wait_for_dataframe,
)

COLLABORATIONS = pytest.mark.parametrize("collaboration", ["plain", "encrypted"])


@pytest.fixture
def five(federations: Callable[[int], Federation]) -> Federation:
    return federations(5)


def extracted(client: Vantage6Client, session: Session, spec: DataframeSpec, **options: Any) -> Dataframe:
    """The dataframe after its extraction."""
    return make_dataframe(
        client,
        session.id,
        spec.name,
        label=spec.label,
        preprocessing=spec.preprocessing,
        replace=spec.replace,
        **spec.extraction.model_dump(),
        **options,
    )


def prepared(client: Vantage6Client, session: Session, spec: DataframeSpec, **options: Any) -> Dataframe:
    """The dataframe after its last step."""
    frame = extracted(client, session, spec, **options)
    wait_for_dataframe(client, frame.id, FAST)
    for number, function in enumerate(spec.preprocessing, start=1):
        add_preprocessing(client, frame.id, number, **function.model_dump())
        wait_for_dataframe(client, frame.id, FAST)
    return frame


def computed(
    client: Vantage6Client, collaboration: str, session: Session, spec: DataframeSpec, folder: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """Number and mean of each column, of each organization."""
    request = TaskRequest(
        collaboration=collaboration, image=CLINICAL, method="partial_summary", databases=spec.name, session=session.id
    )
    task = launch(client, request, token())
    wait(client, task)
    found: dict[str, Any] = {one.organization: one.value for one in fetch_results(client, task.id, output_dir=folder)}
    return {
        organization: {name: {part: column[part] for part in ("count", "mean")} for name, column in value.items()}
        for organization, value in found.items()
    }


def expected(here: Federation, spec: DataframeSpec) -> dict[str, Any]:
    return {name: summary(files["default"], spec) for name, files in here.sandbox.cohorts.items()}


@COLLABORATIONS
@pytest.mark.parametrize("change", CHANGES)
def test_another_dataframe_of_the_same_name_is_a_conflict_or_replaced(
    five: Federation, collaboration: str, change: str, tmp_path: Path
) -> None:
    first = chain(f"f-{token()}")
    changed, says = CHANGES[change]
    second = changed(first)
    with five.client() as client:
        session = make_session(client, collaboration, f"s-{token()}")
        frame = prepared(client, session, first)
        assert computed(client, collaboration, session, first, tmp_path) == expected(five, first)
        with pytest.raises(NameConflict, match=says) as conflict:
            extracted(client, session, second)
        assert "another name" in str(conflict.value) and "replace=True" in str(conflict.value)
        assert f"delete_dataframe(credentials, {frame.id})" in str(conflict.value)
        # What is there is as it was, and is still taken by who asks for it.
        assert prepared(client, session, first).id == frame.id
        prepared(client, session, second.model_copy(update={"replace": True}))
        assert computed(client, collaboration, session, second, tmp_path) == expected(five, second)
        assert [one.name for one in client.records(Dataframe, session_id=session.id)] == [first.name]


@COLLABORATIONS
def test_another_machine_knows_the_arguments_again(
    five: Federation, collaboration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = chain(f"f-{token()}")
    with five.client() as client:
        session = make_session(client, collaboration, f"s-{token()}")
        frame = prepared(client, session, spec)
    monkeypatch.setenv("PREFECT_BIOMED_HOME", str(tmp_path))
    with five.client() as client:
        five.sandbox.journal.clear()
        assert prepared(client, session, spec).id == frame.id
        assert [call for call in five.calls("POST") if "token" not in call] == []


def test_arguments_that_others_encrypted_count_as_different(five: Federation) -> None:
    spec = chain(f"f-{token()}")
    with five.client("south-researcher", key="south") as south:
        # The session of south is for the whole collaboration.
        session = make_session(south, "encrypted", f"s-{token()}")
        prepared(south, session, spec)
    with five.client("root", key=None) as root:
        steps = description_of(root, south_frame(root, session)).steps
        assert [step.arguments for step in steps] == [None] * 3
        assert {step.arguments_hidden for step in steps} == {"encrypted for others"}
    with five.client("south-researcher", key="south") as south:
        frame = south_frame(south, session)
        south.private_key = PrivateKey.generate(2048)
        steps = description_of(south, frame).steps
        assert {step.arguments_hidden for step in steps} == {"encrypted for others"}


def south_frame(client: Vantage6Client, session: Session) -> int:
    (frame,) = client.records(Dataframe, session_id=session.id)
    return frame.id


@COLLABORATIONS
def test_it_is_told_how_a_dataframe_came_about(five: Federation, collaboration: str) -> None:
    spec = chain(f"f-{token()}")
    with five.client() as client:
        session = make_session(client, collaboration, f"s-{token()}")
        frame = prepared(client, session, spec)
        steps = description_of(client, frame.id).steps
    wanted = [spec.extraction, *spec.preprocessing]
    assert [(one.number, one.method, one.arguments) for one in steps] == [
        (number, one.method, one.arguments) for number, one in enumerate(wanted)
    ]
    assert {one.image for one in steps} == {CLINICAL} and {one.status.value for one in steps} == {"completed"}
    assert all(set(one.organizations) == set(HOSPITALS) for one in steps)


def test_a_chain_that_was_begun_is_gone_on_with(five: Federation, tmp_path: Path) -> None:
    spec = chain(f"f-{token()}")
    with five.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        frame = extracted(client, session, spec)
        wait_for_dataframe(client, frame.id, FAST)
        assert extracted(client, session, spec).id == frame.id
        # Another machine does not know whether the rest is still to come, but that Prefect tries this run again.
        with pytest.raises(NameConflict, match="was not made"):
            extracted(client, session, spec, folder=tmp_path)
        again = Circumstances(attempted_since=now())
        assert extracted(client, session, spec, folder=tmp_path, circumstances=again).id == frame.id


def test_a_dataframe_that_is_used_is_not_replaced(five: Federation) -> None:
    spec = chain(f"f-{token()}")
    with five.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        frame = prepared(client, session, spec)
        request = TaskRequest(
            collaboration="plain",
            image=CLINICAL,
            method="sleep",
            arguments={"seconds": 30},
            databases=spec.name,
            session=session.id,
        )
        task = launch(client, request, token())
        other = spec.model_copy(update={"preprocessing": [], "replace": True})
        with pytest.raises(NameConflict, match=f"in use by task {task.id}. .*Nothing was deleted"):
            extracted(client, session, other)
        assert client.get(Dataframe, frame.id)
        with five.client("root") as root:
            root.kill_task(task.id)
        wait(client, task)
        assert extracted(client, session, other).name == spec.name


@pytest.mark.parametrize("failing", ["extraction", "step"])
def test_a_dataframe_that_failed_is_made_anew(five: Federation, failing: str, tmp_path: Path) -> None:
    spec = chain(f"f-{token()}").model_copy(update={"preprocessing": [chain("f").preprocessing[0]]})
    table = five.sandbox.cohorts["south"]["default"]
    away = table.with_suffix(".away")
    with five.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        if failing == "extraction":
            table.rename(away)
            try:
                with pytest.raises(TaskFailed):
                    prepared(client, session, spec)
            finally:
                away.rename(table)
        else:
            broken = spec.model_copy(
                update={"preprocessing": [spec.preprocessing[0].model_copy(update={"arguments": {"column": "none"}})]}
            )
            with pytest.raises(TaskFailed):
                prepared(client, session, broken)
            # The same again: it is tried again, and fails again.
            with pytest.raises(TaskFailed):
                prepared(client, session, broken)
            spec = spec.model_copy(update={"replace": True})
        prepared(client, session, spec)
        assert computed(client, "plain", session, spec, tmp_path) == expected(five, spec)


def test_tasks_that_are_not_listed_prove_nothing(five: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = chain(f"f-{token()}")
    with five.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        prepared(client, session, spec)
        listed = client.records

        def hidden(kind: Any, **filters: Any) -> Any:
            return [] if kind is Task else listed(kind, **filters)

        monkeypatch.setattr(client, "records", hidden)
        with pytest.raises(NameConflict, match="not listed"):
            extracted(client, session, spec)
