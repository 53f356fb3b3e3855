"""Answers of VIP and other CARMIN platforms, read into models."""

import logging
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from prefect_biomed.clients.vip.models import (
    InputValue,
    JobStatus,
    Parameter,
    ParameterType,
    PathEntry,
    Pipeline,
    Platform,
    VipSession,
    Workflow,
    without_tokens,
)

EXECUTION: dict[str, Any] = {
    "identifier": "workflow-a1b2c3",
    "name": "s-r001-t0k3n",
    "pipelineIdentifier": "GreyMatter/1.0",
    "timeout": 0,
    "status": "Running",
    "inputValues": {"t1": "/vip/Home/a.nii"},
    "returnedFiles": None,
    "studyIdentifier": None,
    "errorCode": None,
    "startDate": 1767225600000,
    "endDate": None,
    "resultsLocation": None,
    "jobs": {},
}


def workflow(**changes: Any) -> Workflow:
    return Workflow.model_validate({**EXECUTION, **changes})


# -- dates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [1767225600, 1767225600.0, 1767225600000])
def test_dates_in_seconds_and_milliseconds(given: float) -> None:
    assert workflow(startDate=given).start_date == datetime(2026, 1, 1, tzinfo=UTC)


def test_milliseconds_are_kept() -> None:
    found = workflow(startDate=1767225600250).start_date
    assert found is not None
    assert found.microsecond == 250_000


def test_no_date() -> None:
    assert workflow(startDate=None).start_date is None
    assert workflow(endDate=None).end_date is None


# -- outputs and jobs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, ()),
        ({}, ()),
        ([], ()),
        ({"a": None}, ()),
        ({"a": []}, ()),
        ({"a": ["/vip/Home/x"], "b": ["/vip/Home/y", "/vip/Home/z"]}, ("/vip/Home/x", "/vip/Home/y", "/vip/Home/z")),
        ({"a": ["/vip/Home/x"], "b": ["/vip/Home/x"]}, ("/vip/Home/x",)),
        ({"a": "/vip/Home/x"}, ("/vip/Home/x",)),
        ({"a": ["girder:/collection/x?id=1"]}, ("girder:/collection/x?id=1",)),
        (["http://host:8080/path/alice/executions/1/a b#?%41"], ("/alice/executions/1/a b#?%41",)),
        ({"a": ["https://host/rest/path/vip/Home/x"]}, ("/vip/Home/x",)),
    ],
)
@pytest.mark.parametrize("status", ["Running", "Finished", "Killed"])
def test_returned_files_of_every_shape(returned: object, expected: tuple[str, ...], status: str) -> None:
    found = workflow(returnedFiles=returned, status=status)
    assert found.outputs == expected
    assert found.status == status


def test_jobs() -> None:
    found = workflow(
        jobs={
            "0": {"status": "COMPLETED", "exitCode": 0, "exitMessage": "ok"},
            "1": {"status": "ERROR_HELD", "exitCode": None, "exitMessage": None},
            "2": {"status": "RUNNING", "exitCode": None, "exitMessage": None},
        }
    )
    assert [(job.id, job.status, job.exit_code) for job in found.jobs] == [
        ("0", JobStatus.COMPLETED, 0),
        ("1", JobStatus.ERROR_HELD, None),
        ("2", JobStatus.RUNNING, None),
    ]
    assert [job.id for job in found.failed_jobs] == ["1"]


def test_portals_without_jobs_and_with_less() -> None:
    short = {key: value for key, value in EXECUTION.items() if key != "jobs"}
    assert Workflow.model_validate(short).jobs == ()
    assert workflow(jobs=None).jobs == ()
    assert Workflow.model_validate({"identifier": "x", "status": "Running"}).outputs == ()


def test_workflow_survives_its_own_json() -> None:
    found = workflow(
        returnedFiles={"a": ["/vip/Home/x"]},
        status="Finished",
        jobs={"0": {"status": "COMPLETED", "exitCode": 0, "exitMessage": None}},
    )
    assert Workflow.model_validate_json(found.model_dump_json()) == found
    assert Workflow.model_validate_json(found.model_dump_json(by_alias=True)) == found


# -- statuses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "terminal", "success"),
    [
        ("Initializing", False, False),
        ("InitializationFailed", True, False),
        ("Ready", False, False),
        ("Running", False, False),
        ("Unknown", False, False),
        ("Finished", True, True),
        ("ExecutionFailed", True, False),
        ("Killed", True, False),
        ("Removed", True, False),
    ],
)
def test_workflow_statuses(status: str, terminal: bool, success: bool) -> None:
    found = workflow(status=status).status
    assert found.is_terminal is terminal
    assert found.is_success is success
    assert found == status


def test_status_nobody_has_heard_of_is_kept_and_not_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = workflow(status="Estivating")
    assert found.status.value == "Estivating"
    assert found.status.name == "Estivating"
    assert not found.status.is_terminal
    assert not found.status.is_success
    assert "'Estivating'" in caplog.text
    assert Workflow.model_validate_json(found.model_dump_json()).status == found.status


@pytest.mark.parametrize("status", [status.value for status in JobStatus])
def test_job_statuses(status: str) -> None:
    found = JobStatus(status)
    assert found.is_success is (status == "COMPLETED")
    assert found.is_failure is (
        status in {"ERROR", "ERROR_HELD", "STALLED", "STALLED_HELD", "CANCELLED", "DELETED", "KILL"}
    )
    assert found.is_terminal is (found.is_success or found.is_failure)


def test_unknown_job_status_is_neither_success_nor_failure() -> None:
    assert not JobStatus("UNSTAGING").is_terminal


# -- platform, pipelines, paths ----------------------------------------------------------------------------------------


def test_profile_follows_from_what_the_platform_lacks() -> None:
    vip = {"platformName": "VIP", "unsupportedMethods": ["playExecution"], "supportedAPIVersion": "0.3"}
    assert Platform.model_validate(vip).profile.name == "vip"
    assert Platform.model_validate(vip).supported_api_version == "0.3"
    assert Platform.model_validate({"platformName": "x", "unsupportedMethods": []}).profile.name == "carmin"
    assert Platform.model_validate({}).profile.name == "carmin"


@pytest.mark.parametrize("placeholder", ["$input.getDefaultValue()", "No_value_provided", "", None])
def test_placeholders_are_no_defaults(placeholder: str | None) -> None:
    parameter = Parameter(name="x", default_value=placeholder)
    assert parameter.default_value is None
    assert parameter.is_required
    assert not Parameter(name="x", default_value=placeholder, is_optional=True).is_required


@pytest.mark.parametrize("default", ["a", 0, False, 0.0, []])
def test_false_values_are_defaults(default: object) -> None:
    assert not Parameter.model_validate({"name": "x", "defaultValue": default}).is_required


def test_outputs_of_carmin_are_no_inputs() -> None:
    pipeline = Pipeline.model_validate(
        {
            "identifier": "boutiques_x.json",
            "parameters": [
                {"id": "in1", "name": "In", "type": "File", "isReturnedValue": False},
                {"id": "out1", "name": "Out", "type": "File", "isReturnedValue": True},
            ],
        }
    )
    assert [parameter.key for parameter in pipeline.inputs] == ["in1"]
    assert not pipeline.parameters[1].is_required


@pytest.mark.parametrize(
    ("type_", "list_of_files", "is_file", "may_be_file"),
    [
        ("File", None, True, False),
        ("List", True, True, False),
        ("List", False, False, False),
        ("List", None, False, True),
        ("String", None, False, False),
        ("Quaternion", None, False, False),
    ],
)
def test_what_can_be_a_file(type_: str, list_of_files: bool | None, is_file: bool, may_be_file: bool) -> None:
    parameter = Parameter(name="x", type=ParameterType(type_), list_of_files=list_of_files)
    assert (parameter.is_file, parameter.may_be_file) == (is_file, may_be_file)


def test_missing_path_of_vip() -> None:
    entry = PathEntry.model_validate(
        {"path": "/vip/Home/x", "lastModificationDate": None, "isDirectory": None, "exists": False, "size": None}
    )
    assert (entry.exists, entry.is_directory, entry.size, entry.name) == (False, False, None, "x")


def test_path_of_carmin_is_a_url() -> None:
    entry = PathEntry.model_validate(
        {"platformPath": "http://host/path/alice/a#b.txt", "isDirectory": False, "size": 3, "mimeType": "text/plain"}
    )
    assert (entry.path, entry.exists, entry.size) == ("/alice/a#b.txt", True, 3)


# -- addresses on Girder -----------------------------------------------------------------------------------------------

TOKEN = "canary0Token1"


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (
            f"girder:/x.nii?apiurl=http://h/api/v1&fileId=1&token={TOKEN}",
            "girder:/x.nii?apiurl=http://h/api/v1&fileId=1",
        ),
        (f"girder:/x.nii?token={TOKEN}&fileId=1", "girder:/x.nii?fileId=1"),
        (f"girder:/x.nii?fileId=1&token={TOKEN}&token={TOKEN}", "girder:/x.nii?fileId=1"),
        (f"girder:///?apiurl=h&fileId=1&TOKEN={TOKEN}", "girder:///?apiurl=h&fileId=1"),
        (f"curl 'https://h/file/1/download?token={TOKEN}' -o x", "curl 'https://h/file/1/download' -o x"),
        (f"<uri>girder:/x?fileId=1&amp;token={TOKEN}</uri>", "<uri>girder:/x?fileId=1</uri>"),
        (f"u=girder%3A%2Fx%3FfileId%3D1%26token%3D{TOKEN} done", "u=girder%3A%2Fx%3FfileId%3D1 done"),
        (f'--header "Girder-Token: {TOKEN}"', '--header "Girder-Token: ***"'),
        (f"Girder-Token={TOKEN}", "Girder-Token=***"),
        ("a token= is a word; token=x too", "a token= is a word; token=x too"),
        ("/vip/Home/token=x.nii", "/vip/Home/token=x.nii"),
    ],
)
def test_tokens_are_taken_out(told: str, kept: str) -> None:
    assert without_tokens(told) == kept
    assert TOKEN not in kept


def test_no_way_into_a_workflow_keeps_a_token() -> None:
    address = f"girder:/x.tgz?apiurl=http://h/path/x&fileId=1&token={TOKEN}"
    job = {"status": "ERROR", "exitCode": 40, "exitMessage": f"cannot fetch {address}"}
    made = [
        Workflow.model_validate(
            {
                "identifier": "w",
                "returnedFiles": {"out": [address, address.replace(TOKEN, "another")]},
                "inputValues": {"t1": address, "results-directory": address},
                "jobs": {"0": job},
            }
        ),
        Workflow.model_validate({"identifier": "w", "returnedFiles": [address]}),
        Workflow(identifier="w", outputs=(address,)),
    ]
    for workflow in made:
        assert workflow.outputs == ("girder:/x.tgz?apiurl=http://h/path/x&fileId=1",)
        assert TOKEN not in workflow.model_dump_json() + repr(workflow)
    assert made[0].jobs[0].exit_message == "cannot fetch girder:/x.tgz?apiurl=http://h/path/x&fileId=1"
    assert TOKEN not in PathEntry(path=address).path


# -- sessions ----------------------------------------------------------------------------------------------------------


def session(**changes: Any) -> VipSession:
    return VipSession(
        **{
            "session_name": "s",
            "output_dir": Path("out"),
            "vip_input_dir": "/vip/Home/API/s/INPUTS",
            "vip_output_dir": "/vip/Home/API/s/OUTPUTS",
            "token": "abcd",
            **changes,
        }
    )


def test_each_run_has_its_own_name_and_folder() -> None:
    one = session()
    assert one.workflow_name(1) == "s-r001-abcd"
    assert one.workflow_name(1000) == "s-r1000-abcd"
    assert one.run_dir(2) == "/vip/Home/API/s/OUTPUTS/r002-abcd"
    assert one.vip_dir == "/vip/Home/API/s"


@pytest.mark.parametrize(
    "changes",
    [
        {"session_name": "a.b"},
        {"session_name": "a b"},
        {"session_name": "a/b"},
        {"session_name": ""},
        {"session_name": "é"},
        {"session_name": "a\n"},
        {"session_name": "x" * 201},
        {"token": "ABC"},
        {"token": "abc"},
        {"token": "a-b-c"},
        {"nb_runs": 0},
        {"nb_runs": 1001},
        {"backup": "cloud"},
    ],
)
def test_names_the_platform_would_refuse_are_refused_here(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        session(**changes)


def test_input_values_keep_their_types() -> None:
    values = TypeAdapter(InputValue)
    assert values.validate_python(True) is True
    assert values.validate_python(1) == 1
    assert isinstance(values.validate_python(1.0), float)
    assert values.validate_python("1") == "1"
    assert values.validate_python(["a", 1, None]) == ["a", 1, None]
    assert values.validate_python(None) is None
    for wrong in ({"a": 1}, [[1]], object()):
        with pytest.raises(ValidationError):
            values.validate_python(wrong)


def test_paths_stay_recognisable_as_paths() -> None:
    values = TypeAdapter(InputValue)
    assert values.validate_python(Path("/data/x.nii")) == "/data/x.nii"
    assert values.validate_python(Path("x.nii")) == "./x.nii"
    assert values.validate_python((PurePosixPath("a/b"), "word")) == ["./a/b", "word"]
