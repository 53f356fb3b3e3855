"""Launches, monitoring, kills and what an execution tells of itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from harness.vip_steps import (
    EXECUTIONS,
    QUICK,
    effects,
    files_in,
    methods,
    refused,
    run,
    send,
    start,
    until,
    wait,
)
from harness.wire import exchange
from prefect_biomed.clients.errors import (
    CapacityError,
    DeadlineExceeded,
    JobFailed,
    LaunchInDoubt,
    LedgerError,
    NotFoundError,
    PreflightFailed,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    GenericVipError,
    JobStatus,
    SessionFile,
    SessionOptions,
    VipClient,
    VipSession,
    Workflow,
    WorkflowStatus,
    download,
    failures,
    kill,
    launch,
    monitor,
    open_session,
    preflight,
)
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]

HTML = "<!doctype html><html><body><h1>Bad gateway</h1></body></html>"
NO_REASON = {"status": 400, "body": '{"errorCode": 8000, "errorMessage": "no"}', "content_type": "application/json"}


def go(client: VipClient, pipeline_id: str = "EveryType/1.0", name: str = "raw", **values: object) -> Workflow:
    """Launch without any of our checks."""
    return client.launch(
        name=name, pipeline_id=pipeline_id, input_values=values, results_location=f"/vip/Home/{name.replace(' ', '_')}"
    )


def ended(client: VipClient, identifier: str) -> Workflow:
    until(lambda: client.workflow(identifier).status.is_terminal)
    return client.workflow(identifier)


def executions(client: VipClient, session: VipSession) -> list[str]:
    return [workflow.name for workflow in client.workflows() if workflow.name.startswith(f"{session.session_name}-r")]


# -- launches ----------------------------------------------------------------------------------------------------------


def test_what_the_server_checks_at_a_launch_the_preflight_checks_before(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """Names, characters and missing inputs are refused by code; unknown ones pass; a null breaks the server."""
    with refused(8019):
        go(client, name="a.b", text="x")
    for bad in ("it's", "", "a\nb", "é"):
        with refused(8009):
            go(client, text=bad)
    with refused(8018, match="text"):
        go(client)
    assert ended(client, go(client, text="x", unknown="y").identifier).status == "Finished"
    with refused(8000, 500):
        client.launch(
            name="x", pipeline_id="EveryType/1.0", input_values={"text": None}, results_location="/vip/Home/x"
        )
    assert len(client.workflows()) == 1

    vip.vip.journal.clear()
    for settings in ({"text": "it's"}, {"text": ""}, {}, {"text": "x", "unknown": "y"}, {"text": None}):
        with pytest.raises(PreflightFailed):
            start(client, new_session("EveryType/1.0", settings))
    assert effects(vip) == []


def test_lists_make_jobs_and_strings_with_a_separator_are_refused(client: VipClient, new_session: NewSession) -> None:
    """To VIP `x@@y` is two values; lists are multiplied, or zipped, and zipped ones of unequal length fail late."""

    files = dict.fromkeys("abcde", b"x")

    def launched(pipeline_id: str, name: str, **settings: object) -> tuple[int, Workflow]:
        session = new_session(pipeline_id, settings, name=name, files=files)
        send(client, session)
        plan = preflight(client, session)
        start(client, session)
        (workflow,) = wait(client, session)
        return plan.jobs, workflow

    workflow = ended(client, go(client, text="x@@y").identifier)
    assert (len(workflow.jobs), workflow.status) == (2, "Finished")
    with pytest.raises(PreflightFailed, match="VIP makes two values of what has @@ in it"):
        launched("EveryType/1.0", "string", text="x@@y")
    jobs, workflow = launched("EveryType/1.0", "cross", text=["x", "y", "z"], count=[1, 2])
    assert (jobs, len(workflow.jobs), len(workflow.outputs)) == (6, 6, 6)

    settings = {"fixed": ["a", "b", "c"], "moving": ["d", "e"]}
    with pytest.raises(PreflightFailed, match="need equal lengths: fixed has 3, moving has 2"):
        preflight(client, new_session("PairwiseDifference/1.0", settings, files=files))
    inputs = "/vip/Home/API/cross/INPUTS"
    uneven = go(
        client,
        "PairwiseDifference/1.0",
        fixed=[f"{inputs}/{n}" for n in "abc"],
        moving=[f"{inputs}/{n}" for n in "de"],
    )
    assert ended(client, uneven.identifier).status == "ExecutionFailed"


def test_launches_wait_for_capacity_and_looking_frees_it(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """One execution at a time is allowed: five runs queue, our looks free the slot, and all of them finish."""
    vip.vip.switches.max_running_user = 1
    vip.vip.switches.job_seconds = 0.1
    first = go(client, text="x")
    with refused(2001, kind=CapacityError):
        go(client, text="x")
    ended(client, first.identifier)
    vip.vip.journal.clear()

    session = new_session("EveryType/1.0", {"text": "x"}, nb_runs=5)
    workflows = start(client, session)
    assert len({workflow.identifier for workflow in workflows}) == 5
    posts = vip.vip.journal.entries("POST", EXECUTIONS)
    assert [entry.status for entry in posts].count(200) == 5
    refusals = [entry for entry in posts if entry.status == 400]
    assert len(refusals) >= 4
    looks = vip.vip.journal.entries("GET", EXECUTIONS)
    for refusal in refusals:
        after = next(entry for entry in posts if entry.number > refusal.number)
        assert any(refusal.number < look.number < after.number for look in looks)
    assert [workflow.status for workflow in wait(client, session)] == ["Finished"] * 5


def test_capacity_that_never_comes_ends_the_wait(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """With a deadline nothing is launched, and it says so; the platform's own limit counts as well."""
    vip.vip.switches.max_running_platform = 0
    session = new_session("EveryType/1.0", {"text": "x"})
    limited = PollSettings(interval_seconds=0.05, deadline_seconds=0.2)
    with pytest.raises(DeadlineExceeded, match=r"session-r001-t0k3n was not launched.*code 2000"):
        start(client, session, capacity=limited)
    vip.vip.switches.max_running_platform = 35
    start(client, session)
    assert len(client.workflows()) == 1


def test_answer_lost_after_the_launch_was_accepted(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """The execution is found by its name and adopted: one POST, one execution, its id written down."""
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, drop="after", calls=[1]))
    session = new_session("EveryType/1.0", {"text": "x"})
    (workflow,) = start(client, session)
    assert executions(client, session) == ["session-r001-t0k3n"]
    assert client.workflows()[0].identifier == workflow.identifier
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1
    assert SessionFile(session).read().workflow_ids() == [workflow.identifier]
    assert start(client, session)[0].identifier == workflow.identifier
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 502, "body": HTML, "after_effect": True},
        {"status": 500, "body": HTML, "after_effect": True},
        {"status": 400, "body": HTML, "after_effect": True},
        {**NO_REASON, "after_effect": True},
        {"truncate_bytes": 20},
    ],
    ids=["502", "500", "html400", "8000", "cut"],
)
def test_any_doubtful_answer_is_settled_by_looking(
    vip: Sandbox, client: VipClient, new_session: NewSession, fault: dict[str, object]
) -> None:
    """Whatever hides the acceptance, the name is looked for and nothing is posted again."""
    vip.vip.faults.add(Fault.model_validate({"method": "POST", "path": EXECUTIONS, **fault}))
    session = new_session("EveryType/1.0", {"text": "x"})
    (workflow,) = start(client, session)
    assert [found.identifier for found in client.workflows()] == [workflow.identifier]
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1


def test_doubt_that_looking_cannot_settle_is_left_to_a_retry(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """While the platform cannot be asked, nobody posts; the retry asks again and adopts."""
    vip.vip.faults.add(
        Fault(method="POST", path=EXECUTIONS, drop="after", calls=[1]),
        Fault.model_validate({"method": "GET", "path": EXECUTIONS, "skip": 1, **NO_REASON}),
    )
    session = new_session("EveryType/1.0", {"text": "x"})
    with pytest.raises(
        LaunchInDoubt, match=r"not known whether session-r001-t0k3n was made .* cannot be looked for now"
    ) as caught:
        start(client, session, settle_seconds=0.2)
    assert is_transient(caught.value)
    with pytest.raises(GenericVipError):
        start(client, session, settle_seconds=0.5)  # a look that fails is no reason to post
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1
    vip.vip.faults.clear()
    (workflow,) = start(client, session)
    assert [found.identifier for found in client.workflows()] == [workflow.identifier]
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1


def test_execution_whose_name_shows_up_later_is_awaited(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """Just after a launch the portal may tell the identifier instead of the name; we look again before we judge."""
    vip.vip.switches.unnamed_seconds = 0.5
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, drop="after", calls=[1]))
    session = new_session("EveryType/1.0", {"text": "x"})
    start(client, session)
    assert len(client.workflows()) == 1
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1


def test_launch_that_was_never_accepted_is_in_doubt_and_then_done_once(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """The connection broke before the server saw it: nothing appears, the retry launches."""
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, drop="before", calls=[1]))
    session = new_session("EveryType/1.0", {"text": "x"})
    with pytest.raises(LaunchInDoubt, match="Run this again: it looks before it sends") as caught:
        start(client, session, settle_seconds=0.1)
    assert is_transient(caught.value)
    start(client, session)
    assert executions(client, session) == ["session-r001-t0k3n"]


def test_killed_between_the_launch_and_its_record(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    """The process dies after the server accepted: the next one finds the execution by its name; no duplicate."""
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, status=200, after_effect=True, delay_seconds=30))
    session = new_session("EveryType/1.0", {"text": "x"})
    script = tmp_path / "launch.py"
    script.write_text(
        "import sys\n"
        "from prefect_biomed.clients.vip import VipClient, VipSession, launch\n"
        "url, key, session = sys.argv[1:]\n"
        "launch(VipClient(url, key), VipSession.model_validate_json(session), 1)\n"
    )
    arguments = [vip.vip.url, vip.ready()["vip"]["api_key"], session.model_dump_json()]
    with subprocess.Popen([sys.executable, str(script), *arguments]) as process:
        until(lambda: executions(client, session))
        process.send_signal(signal.SIGKILL)
    vip.vip.faults.clear()
    record = SessionFile(session).read()
    assert record.ledger.launches[session.workflow_name(1)].workflow_id is None
    assert record.workflows == {}

    resumed = open_session(session.output_dir)
    (workflow,) = start(client, resumed)
    assert executions(client, session) == ["session-r001-t0k3n"]
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1
    assert SessionFile(session).read().workflow_ids() == [workflow.identifier]
    assert wait(client, resumed)[0].status == "Finished"


@pytest.mark.parametrize("pipeline_id", ["EveryType/1.0", "MonteCarlo/2.3"])
def test_runs_of_one_second_do_not_share_results(
    vip: Sandbox, client: VipClient, new_session: NewSession, pipeline_id: str
) -> None:
    """The time in a result folder has seconds only, or is absent; each run has a folder of its own all the same."""
    vip.vip.switches.clock_seconds = 1767225600.0
    vip.vip.switches.result_collision = "fail"
    settings = {"text": "x"} if pipeline_id == "EveryType/1.0" else {"run": 1}
    session = new_session(pipeline_id, settings, nb_runs=2)
    start(client, session)
    workflows = wait(client, session)
    assert [workflow.status for workflow in workflows] == ["Finished"] * 2
    assert len({workflow.start_date for workflow in workflows}) == 1
    assert len({path for workflow in workflows for path in workflow.outputs}) == 2
    summary = download(client, session)
    assert summary.fetched == 2
    assert len(files_in(session.output_dir)) == 2
    assert len({path.parts[len(session.output_dir.parts)] for paths in summary.files.values() for path in paths}) == 2


# -- monitoring --------------------------------------------------------------------------------------------------------


def test_statuses_that_come_and_go_do_not_end_the_wait(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """Unknown, Ready, Running and Unknown again: it waits until Finished."""
    vip.vip.switches.job_seconds = 0.3
    session = new_session("EveryType/1.0", {"text": "x"})
    start(client, session)
    vip.vip.switches.status_script = [
        WorkflowStatus(status)
        for status in ("Unknown", "Unknown", "Ready", "Ready", "Running", "Running", "Unknown", "Unknown", "Running")
    ]
    second = new_session("EveryType/1.0", {"text": "y"}, token="second")
    start(client, second)
    seen = [[workflow.status.value for workflow in look] for look in monitor(client, session, QUICK)]
    assert {status for _, status in seen} >= {"Unknown", "Ready", "Running", "Finished"}
    assert seen[-1] == ["Finished", "Finished"]


def test_unknown_for_longer_than_the_grace_is_an_error(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """An execution of which the platform has no trace for long is reported, not taken for a success."""
    vip.vip.switches.unknown_seconds = 30
    session = new_session("EveryType/1.0", {"text": "x"})
    (workflow,) = start(client, session)
    with pytest.raises(JobFailed, match=f"no trace of {workflow.identifier}"):
        wait(client, session, unknown_grace_seconds=0.2)
    assert SessionFile(session).read().workflows[workflow.identifier].status == "Unknown"


def test_execution_that_is_held_is_killed_at_the_deadline(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """Running for ever with a job held in error: the deadline names the job and its reason, and kills."""
    vip.vip.switches.missing_input = "hold"
    session = new_session("EveryType/1.0", {"text": "x", "file": "a.txt"}, files={"a.txt": b"1"})
    send(client, session)
    client.delete(f"{session.vip_input_dir}/a.txt")
    until(lambda: not client.exists(f"{session.vip_input_dir}/a.txt"))
    values = {"text": "x", "file": f"{session.vip_input_dir}/a.txt"}
    client.launch(
        name=session.workflow_name(1),
        pipeline_id="EveryType/1.0",
        input_values=values,
        results_location=session.run_dir(1),
    )
    (workflow,) = start(client, session)
    short = PollSettings(interval_seconds=0.05, deadline_seconds=0.3)
    held = f"Held in error: {workflow.identifier} job 0 ERROR_HELD: input file cannot be fetched"
    with pytest.raises(DeadlineExceeded, match=held):
        list(monitor(client, session, short))
    assert client.workflow(workflow.identifier).status == "Running"
    with pytest.raises(DeadlineExceeded, match=f"Killed: {workflow.identifier}.*{held}"):
        list(monitor(client, session, short, kill_at_deadline=True))
    assert client.workflow(workflow.identifier).status == "Killed"
    assert SessionFile(session).read().workflows[workflow.identifier].status == "Killed"


@pytest.mark.parametrize(
    ("slices", "failing"), [([5, 7, 11], 5), ([5, 7, 11], 11), ([0, 1, 2], 0), ([0, 1, 2], 1), ([0, 1, 2], 2)]
)
def test_partial_success_names_the_failing_inputs(
    client: VipClient, new_session: NewSession, input_dir: Path, slices: list[int], failing: int
) -> None:
    """Two of three jobs succeeded and the status is Finished: the failing input is told, strict makes it a failure."""
    settings = {"image": ["anatomical.nii"], "slice": slices, "fail_on": failing}
    session = new_session("SliceStatistics/2.0", settings, input_dir=input_dir)
    (workflow,) = run(client, session)
    assert workflow.status == "Finished"
    assert [job.status for job in workflow.failed_jobs] == [JobStatus.ERROR]
    texts, failed = failures(client, session, [workflow])
    assert failed == []
    (text,) = texts
    assert text.startswith(f"{workflow.identifier} (session-r001-t0k3n) Finished, 2 of 3 jobs")
    assert f"job {workflow.failed_jobs[0].id} ERROR, exit code 50: the tool exited with status 1" in text
    assert f", inputs slice={failing}\n" in text
    assert f"slice {failing} is corrupt" in text
    strict = session.model_copy(update={"options": SessionOptions(strict=True)})
    assert failures(client, strict, [workflow])[1] == [workflow]


# -- kills and deletions -----------------------------------------------------------------------------------------------


def test_delete_is_a_trap_and_kill_is_not_sent_to_what_has_ended(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """DELETE answers 200 and does nothing; PUT kill kills, by way of Unknown; on a Finished one it would do harm."""
    vip.vip.switches.job_seconds = 30
    running = go(client, text="x").identifier
    response, body = exchange(client._http, "DELETE", f"/executions/{running}")
    assert (response.status_code, body["identifier"]) == (200, running)
    assert client.workflow(running).status == "Running"
    vip.vip.switches.kill_seconds = 0.2
    client.kill(running)
    assert client.workflow(running).status == "Unknown"
    assert [workflow.status for workflow in kill(client, [running])] == ["Killed"]

    vip.vip.switches.job_seconds = 0
    finished = ended(client, go(client, text="x").identifier)
    vip.vip.journal.clear()
    assert [workflow.status for workflow in kill(client, [finished.identifier, running])] == ["Finished", "Killed"]
    assert effects(vip) == []
    exchange(client._http, "PUT", f"/executions/{finished.identifier}/kill")
    assert client.workflow(finished.identifier).status == "Killed"


def test_records_can_be_deleted_of_finished_and_killed_ones_only(client: VipClient) -> None:
    """A failed one is refused; a finished one is gone with its files, and its folder remains."""
    failed = ended(client, go(client, "AlwaysFails/1.0", name="failed").identifier)
    assert failed.status == "ExecutionFailed"
    with refused(8000, kind=GenericVipError):
        client.delete_workflow(failed.identifier)

    finished = ended(client, go(client, text="x", name="finished").identifier)
    (output,) = finished.outputs
    client.delete_workflow(finished.identifier, delete_files=True)
    with refused(8015, kind=NotFoundError):
        client.workflow(finished.identifier)
    until(lambda: not client.exists(output))
    assert client.exists(output.rpartition("/")[0])
    assert finished.identifier not in {workflow.identifier for workflow in client.workflows()}


# -- what an execution tells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["ms", "s"])
def test_dates_and_inputs_are_understood(vip: Sandbox, client: VipClient, new_session: NewSession, unit: str) -> None:
    """startDate in milliseconds, no endDate, lists shown as one value: the times are right and our inputs kept."""
    vip.vip.switches.date_unit = unit
    session = new_session("EveryType/1.0", {"text": ["x", "y"], "words": ["a"]})
    before = datetime.now(UTC)
    start(client, session)
    (workflow,) = wait(client, session)
    assert workflow.start_date is not None
    assert before - timedelta(seconds=1) <= workflow.start_date <= datetime.now(UTC)
    assert workflow.end_date is None
    shown = exchange(client._http, "GET", f"/executions/{workflow.identifier}")[1]["inputValues"]
    assert shown["text"] == "x"
    record = SessionFile(session).read()
    assert record.input_settings == {"text": ["x", "y"], "words": ["a"]}
    started = time.strptime(record.workflows[workflow.identifier].start, "%Y/%m/%d %H:%M:%S")
    assert abs(time.mktime(started) - workflow.start_date.timestamp()) < 1
    assert open_session(session.output_dir).input_settings["text"] == ["x", "y"]


def test_outputs_in_every_state_are_handled(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """None yet, some while it runs, none at all, and those of killed ones, which are downloaded when wanted."""
    session = new_session("EveryType/1.0", {"text": ["x", "y"]}, nb_runs=2)
    vip.vip.switches.unknown_seconds = 0.2
    vip.vip.switches.held_jobs = [1]
    first = launch(client, session, 1)
    assert client.workflow(first.identifier).outputs == ()
    until(lambda: client.workflow(first.identifier).outputs)
    assert client.workflow(first.identifier).status == "Running"
    vip.vip.switches.held_jobs = []
    vip.vip.switches.unknown_seconds = 0
    second = launch(client, session, 2)
    until(lambda: client.workflow(second.identifier).status == "Finished")
    kill(client, [first.identifier])
    assert [workflow.status for workflow in wait(client, session)] == ["Killed", "Finished"]

    summary = download(client, session)
    assert {key: len(paths) for key, paths in summary.files.items()} == {second.identifier: 2}
    summary = download(client, session, get_status=["Finished", "Killed"])
    assert {key: len(paths) for key, paths in summary.files.items()} == {first.identifier: 1, second.identifier: 2}
    assert (summary.fetched, summary.skipped) == (1, 2)

    nothing = new_session("AlwaysFails/1.0", {}, name="nothing")
    start(client, nothing)
    (failed,) = wait(client, nothing)
    assert (failed.status, failed.outputs) == ("ExecutionFailed", ())
    assert download(client, nothing, get_status=["ExecutionFailed"]).files == {failed.identifier: ()}
    assert methods(vip.vip.journal.entries(path=f"{failed.identifier}/results")) == []


def test_an_execution_of_another_pipeline_is_not_adopted(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    start(client, new_session("EveryType/1.0", {"text": "x"}))
    other = new_session("Copies/1.0", {"file": "/vip/Home/x"}).model_copy(update={"output_dir": tmp_path / "elsewhere"})
    with pytest.raises(LedgerError, match=r"session-r001-t0k3n is there as .* and runs EveryType/1\.0, not Copies"):
        start(client, other)
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1
