"""vantage6: requests, waiting, completeness and memory, beside vantage6-client 4.15.2 and 5.0.3."""

from __future__ import annotations

import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from benchmarks.measure import laboratory, measure, sandbox
from benchmarks.official import MissingInterpreter, official_environment
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6 import (
    PrivateKey,
    SessionScope,
    TaskRequest,
    Vantage6Client,
    connect,
    launch,
    make_dataframe,
    make_session,
    wait_for_dataframe,
    watch,
)

IMAGE = "prefect-biomed/clinical:1.0"
USER = "north-researcher"
READERS = 20
MEMBERS = 25
TASK_SECONDS = 60
RESULT_BYTES = 200_000_000
OFFICIAL = {4: ("4.15.2", "3.10"), 5: ("5.0.3", "3.13")}

JOURNAL = """
import urllib.request

def journal(verb):
    request = urllib.request.Request(arguments["root"] + "/_sandbox/journal", method=verb)
    return urllib.request.urlopen(request).read()

def counted(work):
    journal("DELETE")
    work()
    return len(json.loads(journal("GET")))
"""
OURS = (
    JOURNAL
    + """
from pathlib import Path
from pydantic import SecretStr
from prefect_biomed.clients.vantage6 import PrivateKey, TaskRequest, connect, fetch_results, launch, watch
client = connect(arguments["url"], username=arguments["username"], password=SecretStr(arguments["password"]),
    auth_url=arguments["auth_url"], private_key=PrivateKey.from_file(Path(arguments["key"])))
client.me
"""
)
OFFICIAL_4 = (
    JOURNAL
    + """
from vantage6.client import UserClient
client = UserClient(arguments["host"], arguments["port"], arguments["path"], log_level="warn")
client.authenticate(arguments["username"], arguments["password"])
client.setup_encryption(arguments["key"])
"""
)
PERSON = """
import urllib.parse, urllib.request, webbrowser

class Person(webbrowser.BaseBrowser):
    "Confirms the device code, as a person would in a browser."
    def open(self, url, new=0, autoraise=True):
        page, _, query = url.partition("?")
        form = dict(urllib.parse.parse_qsl(query), username=arguments["username"], password=arguments["password"])
        urllib.request.urlopen(page, urllib.parse.urlencode(form).encode())
        return True

webbrowser.register("person", None, Person(), preferred=True)
"""
OFFICIAL_5 = (
    JOURNAL
    + PERSON
    + """
from vantage6.client import UserClient
client = UserClient(hq_url=arguments["url"], auth_url=arguments["auth_url"], log_level="warn")
client.authenticate()
client.setup_encryption(arguments["key"])
"""
)
OURS_CREATE = """
request = TaskRequest(collaboration="encrypted", image=arguments["image"], method="echo", arguments={"a": 1},
    organizations=arguments["organizations"], databases=arguments["databases"], session=arguments["session"])
measured(lambda: [counted(lambda: launch(client, request, name)) for name in ("first", "further")])
"""
OFFICIAL_CREATE_4 = """
measured(lambda: counted(lambda: client.task.create(collaboration=arguments["collaboration"],
    organizations=arguments["organizations"], name="benchmark", image=arguments["image"], description="",
    input_={"method": "echo", "kwargs": {"a": 1}}, databases=[{"label": "default"}])))
"""
OFFICIAL_CREATE_5 = """
measured(lambda: counted(lambda: client.task.create(collaboration=arguments["collaboration"],
    organizations=arguments["organizations"], name="benchmark", image=arguments["image"], description="",
    method="echo", arguments={"a": 1}, session=arguments["session"], action="federated_compute",
    databases=[[{"type": "dataframe", "dataframe_id": arguments["dataframe"]}]])))
"""
OURS_WAIT = """
def work():
    for look in watch(client, [arguments["task"]]):
        pass
    assert len(fetch_results(client, arguments["task"], output_dir=Path("."))) == 1
    return time.time()
measured(work)
"""
OFFICIAL_WAIT = """
def work():
    client.wait_for_results(arguments["task"])
    return time.time()
measured(work)
"""
OURS_RESULTS = """
measured(lambda: len(fetch_results(client, arguments["task"], output_dir=Path("."))))
"""
OFFICIAL_RESULTS = """
def work():
    results = client.result.from_task(arguments["task"])
    return len(results["data"] if isinstance(results, dict) else results)
measured(work)
"""


def main() -> None:
    """Measure and print the clients side by side, for generations 4 and 5."""
    with laboratory() as folder:
        for generation, (version, python) in OFFICIAL.items():
            title = f"vantage6 {generation}, encrypted collaboration"
            try:
                official = official_environment(f"vantage6-client-{generation}", requirements(generation), python)
            except MissingInterpreter as missing:
                Console().print(f"{title}: {missing}")
                continue
            table = Table("", f"vantage6-client {version}", "prefect-biomed", title=title)
            _measure(generation, official, folder, table)
            Console().print(table)


def requirements(generation: int) -> list[str]:
    version = OFFICIAL[generation][0]
    names = ["vantage6-client", "vantage6-common"]
    # What the clients import and do not declare.
    undeclared = {4: ["setuptools<81"], 5: ["pandas"]}
    return [f"{name}=={version}" for name in names] + undeclared[generation]


def _measure(generation: int, official: Path, folder: Path, table: Table) -> None:
    theirs_log_in = OFFICIAL_4 if generation == 4 else OFFICIAL_5
    switches = {"generation": generation, "organizations": MEMBERS, "key_bits": 2048}
    settings = [part for name, value in switches.items() for part in ("--set", f"vantage6.{name}={value}")]
    if generation == 5:
        settings += ["--set", "vantage6.device_interval=1"]
    with sandbox("vantage6", *settings) as ready:
        facts = ready["vantage6"]
        account = account_of(facts)
        with client_of(facts) as client:
            data = data_of(client, generation)
            members = client.collaboration("encrypted").organizations
        account |= data | {
            "image": IMAGE,
            "collaboration": facts["collaborations"]["encrypted"]["id"],
            "organizations": [member.id for member in members[:READERS]],
        }

        ours = measure(sys.executable, OURS + OURS_CREATE, folder, **account)
        create = OFFICIAL_CREATE_4 if generation == 4 else OFFICIAL_CREATE_5
        theirs = measure(official, theirs_log_in + create, folder, **account)
        table.add_row(
            f"requests to create a task for {READERS} organizations",
            f"{theirs['result']}, {theirs['seconds']:.1f} s",
            "{}, then {}; {:.1f} s for both".format(*ours["result"], ours["seconds"]),
        )

        with client_of(facts) as client:
            task = run_of(client, generation, data, "echo", [member.id for member in members])
        ours = measure(sys.executable, OURS + OURS_RESULTS, folder, **account, task=task)
        theirs = measure(official, theirs_log_in + OFFICIAL_RESULTS, folder, **account, task=task)
        table.add_row(
            f"results of a task of {MEMBERS} organizations",
            f"{theirs['result']} of {MEMBERS}",
            f"{ours['result']} of {MEMBERS}",
        )

        with client_of(facts) as client:
            task = run_of(client, generation, data, "sleep", ["north"], wait=False, seconds=TASK_SECONDS)
            programs = [(sys.executable, OURS + OURS_WAIT), (official, theirs_log_in + OFFICIAL_WAIT)]
            with ThreadPoolExecutor(2) as pool:
                ours, theirs = pool.map(lambda one: measure(one[0], one[1], folder, **account, task=task), programs)
            (run,) = client.runs(task)
            ended = run.finished_at.timestamp() if run.finished_at else 0.0
        table.add_row(
            f"from the end of a task of {TASK_SECONDS} s to its result",
            f"{theirs['result'] - ended:.1f} s",
            f"{ours['result'] - ended:.1f} s",
        )

        with client_of(facts) as client:
            task = run_of(client, generation, data, "payload", ["north"], size=RESULT_BYTES)
        ours = measure(sys.executable, OURS + OURS_RESULTS, folder, **account, task=task)
        size = (folder / f"task-{task}-run-{_only_run(facts, task)}.json").stat().st_size
        if size < 0.99 * RESULT_BYTES:
            raise RuntimeError(f"the result has {size} bytes")
        theirs = measure(official, theirs_log_in + OFFICIAL_RESULTS, folder, **account, task=task)
        table.add_row(
            f"a result of {RESULT_BYTES // 10**6} MB: peak memory above the idle process",
            f"{theirs['peak_mib']:.0f} MiB, {theirs['seconds']:.1f} s",
            f"{ours['peak_mib']:.0f} MiB, {ours['seconds']:.1f} s",
        )


def account_of(facts: dict[str, Any]) -> dict[str, Any]:
    parts = urlsplit(facts["url"])
    return {
        "url": facts["url"],
        "root": f"{parts.scheme}://{parts.netloc}",
        "host": f"{parts.scheme}://{parts.hostname}",
        "port": parts.port,
        "path": parts.path,
        "username": USER,
        "password": facts["users"][USER]["password"],
        "auth_url": facts.get("auth_url"),
        "key": facts["organizations"]["north"]["private_key"],
    }


def client_of(facts: dict[str, Any]) -> Vantage6Client:
    account = account_of(facts)
    return connect(
        facts["url"],
        username=USER,
        password=SecretStr(account["password"]),
        auth_url=account["auth_url"],
        private_key=PrivateKey.from_file(Path(account["key"])),
        encryption="as the collaboration says",
    )


def _only_run(facts: dict[str, Any], task: int) -> int:
    with client_of(facts) as client:
        (run,) = client.runs(task)
        return run.id


def data_of(client: Vantage6Client, generation: int, collaboration: str = "encrypted") -> dict[str, Any]:
    """What tasks read: a database, on generation 5 a dataframe of a session."""
    if generation < 5:
        return {"databases": "default", "session": None, "dataframe": None}
    session = make_session(client, collaboration, "benchmark", scope=SessionScope.OWN)
    name = f"benchmark-{collaboration}"
    frame = make_dataframe(client, session.id, name, label="default", image=IMAGE, method="read_csv")
    wait_for_dataframe(client, frame.id)
    return {"databases": frame.name, "session": session.id, "dataframe": frame.id}


def run_of(
    client: Vantage6Client,
    generation: int,
    data: dict[str, Any],
    method: str,
    organizations: list[int | str],
    *,
    wait: bool = True,
    collaboration: str = "encrypted",
    **arguments: Any,
) -> int:
    """Run a method; its id."""
    request = TaskRequest(
        collaboration=collaboration,
        image=IMAGE,
        method=method,
        arguments=arguments,
        organizations=organizations,
        databases=data["databases"],
        session=data["session"],
    )
    task = launch(client, request, uuid.uuid4().hex[:10])
    if wait:
        for _ in watch(client, [task.id], PollSettings(interval_seconds=0.2, growth=1.1, max_interval_seconds=2.0)):
            pass
    return task.id


if __name__ == "__main__":
    main()
