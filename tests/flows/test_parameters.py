"""The parameters of flows: few, in groups that are the same everywhere, and a form that can be filled in."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from types import ModuleType
from typing import Any, TypeVar

import pytest
from prefect import Flow, Task
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError

from prefect_biomed import flows, tasks
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vip import VipSession
from prefect_biomed.flows.parameters import RefreshTime, Seconds
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.flows.vip import PipelineRun, session_on_inputs_of
from prefect_biomed.flows.vip_parameters import Girder, PipelineId, Upload, VipHome

T = TypeVar("T")
GROUPS = {"upload", "outputs", "removal", "girder", "waiting", "details", "assessment"}
CARD = {
    "vip-session": "pipeline_id input_settings input_dir output_dir session_name nb_runs refresh_time",
    "vip-resume": "session_name output_dir refresh_time",
    "federated-analysis": "collaboration organizations image method arguments databases",
    "federated-session": "collaboration organizations image method arguments databases",
    "federated-rounds": "collaboration organizations image method arguments databases rounds state aggregation",
    "boss-ingest": "config processes",
    "boss-join-ingest": "config job_id processes",
}
PER_FLOW = 14
PER_TASK = 8
STATEMENTS_PER_FLOW = 15


def public(package: ModuleType, kind: type[T]) -> dict[str, T]:
    """Members of the modules of a package that are named in their `__all__`."""
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    members = {name: getattr(module, name) for module in modules for name in getattr(module, "__all__", ())}
    return {name: member for name, member in members.items() if isinstance(member, kind)}


FLOWS = {flow.name: flow for flow in public(flows, Flow).values()}
TASKS = public(tasks, Task)
every_flow = pytest.mark.parametrize("name", FLOWS)


def form(name: str) -> dict[str, Any]:
    return parameter_schema(FLOWS[name].fn).model_dump()


def statements(flow: Flow[..., Any]) -> int:
    """Statements of the body, nested ones too; the docstring is none."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(flow.fn))).body
    return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 2


@every_flow
def test_a_form_has_few_fields_and_a_body_reads_as_the_protocol(name: str) -> None:
    fields = [field for field in form(name)["properties"] if field != "credentials"]
    assert len(fields) <= PER_FLOW
    assert statements(FLOWS[name]) <= STATEMENTS_PER_FLOW


@pytest.mark.parametrize("name", TASKS)
def test_a_task_takes_few_arguments(name: str) -> None:
    assert len(inspect.signature(TASKS[name].fn).parameters) <= PER_TASK


@pytest.mark.parametrize("name", CARD)
def test_the_words_of_the_field_stay_flat(name: str) -> None:
    assert form(name)["properties"].keys() >= {*CARD[name].split(), "credentials"}


@every_flow
def test_a_group_is_folded_and_its_fields_say_what_they_are(name: str) -> None:
    schema = form(name)
    for group in GROUPS & schema["properties"].keys():
        field = schema["properties"][group]
        assert field["default"] is None
        assert field["description"]
        reference, nothing = field["anyOf"]
        assert nothing == {"type": "null"}
        folded = schema["definitions"][reference["$ref"].removeprefix("#/definitions/")]
        assert folded["additionalProperties"] is False
        assert not folded.get("required")
        assert folded["description"]
        for inner, shown in folded["properties"].items():
            assert shown["description"], f"{group}.{inner}"
            assert shown["title"] != inner.replace("_", " ").title(), f"{group}.{inner}"
            if inner.endswith("_seconds"):
                assert shown["title"].endswith("(s)"), f"{group}.{inner}"


def test_a_field_of_a_group_means_the_same_on_every_flow() -> None:
    meanings: dict[str, set[str]] = {}
    for name in FLOWS:
        schema = form(name)
        for group in GROUPS & schema["properties"].keys():
            reference = schema["properties"][group]["anyOf"][0]["$ref"].removeprefix("#/definitions/")
            for inner, shown in schema["definitions"][reference]["properties"].items():
                meanings.setdefault(f"{group}.{inner}", set()).add(shown["title"])
    assert {field: titles for field, titles in meanings.items() if len(titles) > 1} == {}


@pytest.mark.parametrize("member", [*FLOWS.values(), *TASKS.values()], ids=lambda member: member.name)
def test_every_run_says_what_it_is_about(member: Flow[..., object] | Task[..., object]) -> None:
    assert member.flow_run_name if isinstance(member, Flow) else member.task_run_name


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (RefreshTime, float("nan")),
        (RefreshTime, float("inf")),
        (Seconds, float("nan")),
        (PipelineId, ""),
        (PipelineId, "  "),
        (VipHome, "/../x"),
        (VipHome, "/vip/./x"),
        (VipHome, "vip/Home"),
        (VipHome, "/vip/Home\n"),
        (VipHome, ""),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_the_form(kind: Any, value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize("root", ["/", "//", "///"])
def test_sessions_in_the_root_of_a_platform_are_refused_with_what_to_do(root: str) -> None:
    with pytest.raises(ConfigurationError, match=r"the root of the platform.*Give a folder below it"):
        Upload.model_validate({"vip_home": root})
    with pytest.raises(ConfigurationError, match="the root of the platform"):
        FLOWS["vip-resume"].validate_parameters({"credentials": None, "session_name": "s", "vip_home": root})


def test_values_that_fit_together_to_no_session_are_one_error_of_ours() -> None:
    """Each may be right by itself, and what is made of them is not."""
    girder = Girder(output="/user/somebody/")
    assert new_session(session_name="s", girder=girder).girder_output_dir == "/user/somebody/s"
    with pytest.raises(ConfigurationError, match=r"session_name: .*200.* Nothing was sent"):
        new_session(session_name="s" * 201)
    owner, run = new_session(session_name="s" * 200), PipelineRun(pipeline_id="CopyFile/1.0", input_settings={})
    with pytest.raises(ConfigurationError, match="session_name"):
        session_on_inputs_of(owner, 1, run, owner.output_dir / "1")
    with pytest.raises(ConfigurationError, match=r"session_name: .*; nb_runs: ") as caught:
        VipSession.planned(**{**dict(owner), "nb_runs": "s3cret", "session_name": "s3cret/x"})
    assert "s3cret" not in str(caught.value)
