"""Random states of a VIP session, planned and then run: the journal of the sandbox has to show what the plan said.

By itself: `python -m harness.plans --states 100 --seed 0`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from harness.vip_steps import QUICK, start, until
from prefect_biomed.blocks import VipCredentials
from prefect_biomed.cli.planning import plan_flow
from prefect_biomed.cli.running import run_flow
from prefect_biomed.clients.once import Deed
from prefect_biomed.clients.vip import VipClient, VipSession, download, finish, preflight, upload
from prefect_biomed.clients.vip.monitoring import monitor
from prefect_biomed.flows.plans import Plan
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.flows.vip_parameters import Removal
from prefect_biomed.sandbox import Entry, Sandbox
from prefect_biomed.tasks.policies import planned_run

DEEDS = ("nothing", "upload", "a part", "launch one", "launch all", "end", "run", "lose the record", "doubt")


class State:
    """A session to which something has happened already, whatever the seed says.

    Args:
        sandbox: The platform.
        folder: For files; not shared with other states.
        seed: Decides everything.
        whole: Whether the flow is run, or the steps of the clients that it consists of.
    """

    def __init__(self, sandbox: Sandbox, folder: Path, seed: int, *, whole: bool) -> None:
        self.whole = whole
        self.random = random.Random(seed)
        self.sandbox = sandbox
        ready = sandbox.ready()["vip"]
        self.credentials = VipCredentials(api_key=ready["api_key"], url=ready["url"])
        self.key = f"state-{seed}"
        self.inputs = folder / "inputs"
        names = [f"{'below/' if self.random.random() < 0.4 else ''}f{number}.txt" for number in range(1, 4)]
        self.names = names[: self.random.randint(1, 3)]
        for name in self.names:
            self.write(name)
        removal = {"finish": self.random.random() < 0.8}
        removal |= {name: self.random.random() < 0.3 for name in ("keep_input", "keep_output")}
        self.parameters: dict[str, Any] = {
            "pipeline_id": "CopyFile/1.0",
            "input_settings": {"file": self.names},
            "input_dir": self.inputs,
            "output_dir": folder / "outputs",
            "session_name": f"planned-{seed}",
            "nb_runs": self.random.randint(1, 3),
            "removal": Removal(**removal),
        }
        self.deed = self.random.choice(DEEDS)
        self.happen()
        if self.random.random() < 0.3 and self.deed != "run":
            self.write(self.random.choice(self.names))

    def write(self, name: str) -> None:
        """Write an input file anew."""
        (self.inputs / name).parent.mkdir(parents=True, exist_ok=True)
        (self.inputs / name).write_bytes(self.random.randbytes(self.random.randint(1, 3000)))

    @property
    def session(self) -> VipSession:
        """The session as the flow run with the key will have it."""
        with planned_run(f"vip-session/{self.key}"):
            return new_session(**self.parameters)

    def happen(self) -> None:
        """Bring session and platform to where a crash may have left them."""
        if self.deed == "run":
            self.run()
        if self.deed in {"nothing", "run"}:
            return
        session = self.session
        with self.credentials.get_client() as client:
            self._sent(client, session)
            if self.deed in {"upload", "a part"}:
                return
            some = session.model_copy(update={"nb_runs": 1}) if self.deed == "launch one" else session
            start(client, some)
            if self.deed == "end":
                list(monitor(client, session, QUICK))
        record = session.output_dir / "session_data.json"
        if self.deed == "lose the record":
            record.unlink()
        if self.deed == "doubt":
            content = json.loads(record.read_text())
            for launch in content["prefect_biomed"]["launches"].values():
                launch["workflow_id"] = None
            content["workflows"] = {}
            record.write_text(json.dumps(content))

    def _sent(self, client: VipClient, session: VipSession) -> None:
        upload(client, session, preflight(client, session), settle_seconds=5)
        if self.deed == "a part":
            lost = f"{session.vip_input_dir}/{self.names[0]}"
            client.delete(lost)
            until(lambda: not client.exists(lost))  # or the run would begin on what is about to vanish

    def plan(self) -> Plan:
        """Plan the run."""
        return plan_flow("vip-session", self.given(), key=self.key)

    def run(self) -> list[str]:
        """Run it; identifiers of its executions."""
        if not self.whole:
            return self._steps()
        outcome = run_flow("vip-session", self.given(), key=self.key)
        if outcome.exit_code:
            raise AssertionError(f"{self.key} ({self.deed}): {outcome.state}: {outcome.message}")
        return [one["identifier"] for one in outcome.result["workflows"]]

    def _steps(self) -> list[str]:
        session = self.session
        with self.credentials.get_client() as client:
            upload(client, session, preflight(client, session), settle_seconds=5)
            identifiers = [workflow.identifier for workflow in start(client, session)]
            list(monitor(client, session, QUICK, workflow_ids=identifiers))
            download(client, session, workflow_ids=identifiers)
            if session.options.finish:
                finish(client, session)
        return identifiers

    def given(self) -> dict[str, Any]:
        """Parameters of the flow."""
        return {**self.parameters, "credentials": self.credentials, "refresh_time": 0.1}

    def requests(self) -> list[Entry]:
        """What would change something, since the journal was emptied."""
        entries = self.sandbox.vip.journal.entries()
        return [one for one in entries if one.method != "GET" and not one.path.endswith("/platform")]


def differences(sandbox: Sandbox, folder: Path, seed: int, *, whole: bool = False) -> list[str]:
    """Plan a state, run it, and compare.

    Args:
        sandbox: The platform.
        folder: For files.
        seed: Which state.
        whole: As for `State`.

    Returns:
        What the run did otherwise than the plan said.
    """
    state = State(sandbox, folder, seed, whole=whole)
    sandbox.vip.journal.clear()
    plan = state.plan()
    found = [f"the plan sent {one.method} {one.path}" for one in state.requests()]
    session = state.session
    sandbox.vip.journal.clear()
    identifiers = state.run()
    with state.credentials.get_client() as client:
        jobs = {one: len(client.workflow(one).jobs) for one in identifiers}
    sent = [one for one in state.requests() if one.effect]
    files = [one for one in sent if one.method == "PUT" and f"{session.vip_input_dir}/" in path(one) and one.bytes_in]
    launched = [one for one in sent if one.method == "POST" and one.path.endswith("/executions")]
    removed = [path(one) for one in sent if one.method == "DELETE"]
    adopted = [one.id for one in plan.launches if one.deed is not Deed.LAUNCH]
    new = [one for one in identifiers if one not in adopted]
    compared = {
        "files": (plan.files_to_send, len(files)),
        "bytes": (plan.bytes_to_send, sum(one.bytes_in for one in files)),
        "launches": (sum(one.deed is Deed.LAUNCH for one in plan.launches), len(launched)),
        "adopted": (sorted(adopted), sorted(set(identifiers) - set(new))),
        "jobs": (plan.jobs, sum(jobs[one] for one in new)),
        "removed": (sorted(plan.removes), sorted(one for one in removed if not _replaced(one, session))),
        "replaced": (plan.files_replaced, sum(_replaced(one, session) for one in removed)),
    }
    found += [f"{what}: planned {one}, seen {other}" for what, (one, other) in compared.items() if one != other]
    return [f"state {seed} ({state.deed}): {one}" for one in found]


def _replaced(removed: str, session: VipSession) -> bool:
    return removed.startswith(f"{session.vip_input_dir}/")


def path(entry: Entry) -> str:
    """Path on the platform that a request is about."""
    return unquote(entry.path).partition("/rest/path")[2]


def main() -> int:
    """Compare many states, and print what differs."""
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    from prefect.testing.utilities import prefect_test_harness

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    found: list[str] = []
    with Sandbox("vip") as sandbox, prefect_test_harness(server_startup_timeout=120):
        for seed in range(chosen.seed, chosen.seed + chosen.states):
            folder = Path(tempfile.mkdtemp(prefix="plans-"))
            found += differences(sandbox, folder, seed, whole=True)
            shutil.rmtree(folder)
    print("\n".join(found) or f"{chosen.states} states were run as they were planned.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
