"""A node: takes runs from a server, decrypts, computes on CSV files, returns results.

It speaks the REST API of vantage6 3, 4 and 5 as the real node does, so the same node works for
the sandbox and for the real servers.
"""

from __future__ import annotations

import base64
import csv
import json
import queue
import re
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import httpx

from prefect_biomed.sandbox.vantage6._encryption import KeyPair, seal, seal_blob
from prefect_biomed.sandbox.vantage6.algorithms import (
    Algorithm,
    Image,
    Job,
    Killed,
    SubtaskFailed,
    Table,
    read_table,
)

__all__ = ["Channel", "ComputeNode", "NodeSettings", "Refused"]

_SUBTASK_POLL_SECONDS = 0.05
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Json = dict[str, Any]
OnEvent = Callable[[str, Json], None]


class Channel(Protocol):
    """The event channel between a node and its server; it also makes the node appear online."""

    def open(self, token: str, info: Json, on_event: OnEvent) -> None:
        """Connect as the owner of a token and report the node's configuration."""

    def emit(self, event: str, payload: Json) -> None:
        """Send an event to the server."""

    def close(self) -> None:
        """Disconnect; the node then appears offline."""


class Refused(Exception):
    """The server refused what a node asked for."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"{response.request.method} {response.url.path}: {response.status_code}")
        self.status = response.status_code
        self.text = response.text


@dataclass
class NodeSettings:
    """What the configuration file of a real node holds.

    Attributes:
        api_key: its own.
        databases: CSV file of each label.
        images: the algorithms it has; by name, without registry digests.
        keys: of its organization; needed in an encrypted collaboration.
        allowed_images: names it may run; None is any.
        shares_configuration: whether it tells the server labels and columns.
        shares_logs: whether the lines of algorithms leave it.
        client_id: of its Keycloak account (v5).
        token_url: of Keycloak (v5).
        startup_seconds: how long a container takes from the report that a run has begun to the
            request for its token, as when its image has to be pulled.
    """

    api_key: str = field(repr=False)
    databases: Mapping[str, Path]
    images: dict[str, Image]
    keys: KeyPair | None = field(default=None, repr=False)
    allowed_images: set[str] | None = None
    shares_configuration: bool = True
    shares_logs: bool = True
    client_id: str | None = None
    token_url: str | None = None
    startup_seconds: float = 0.0


class _Run:
    """One run in progress."""

    def __init__(self, record: Json) -> None:
        self.id: int = record["id"]
        self.record = record
        self.killed = threading.Event()
        self.lines: list[str] = []

    @property
    def log(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


class ComputeNode:
    """One node, working in threads of its own between `start` and `stop`.

    Args:
        generation: of the server: 3, 4 or 5.
        http: reaches the API of the server (`base_url` ends with the API path).
        channel: events.
        settings: its configuration.
        folder: where it keeps the dataframes of sessions.
        poll_seconds: how often it asks for work without being told.
    """

    def __init__(
        self,
        generation: int,
        http: httpx.Client,
        channel: Channel,
        settings: NodeSettings,
        folder: Path,
        poll_seconds: float = 1.0,
    ) -> None:
        self.generation = generation
        self.settings = settings
        self._http = http
        self._channel = channel
        self._folder = folder
        self._poll_seconds = poll_seconds
        self._events: queue.Queue[tuple[str, Json]] = queue.Queue()
        self._runs: dict[int, _Run] = {}
        self._seen: set[int] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._workers: list[threading.Thread] = []
        self._token = ""
        self.id = 0
        self.organization_id = 0
        self.collaboration_id = 0
        self.encrypted = False

    # -- life --------------------------------------------------------------------------------------

    @property
    def online(self) -> bool:
        """Whether it is connected."""
        return self._thread is not None

    def start(self) -> None:
        """Log in, appear online and take up what is open. Does nothing when it already runs.

        Raises:
            Refused: the server does not know the key.
            ValueError: the collaboration is encrypted and there are no keys.
        """
        if self._thread is not None:
            return
        self._log_in()
        collaboration = self._get(f"/collaboration/{self.collaboration_id}")
        self.encrypted = bool(collaboration["encrypted"])
        if self.encrypted and self.settings.keys is None:
            raise ValueError("an encrypted collaboration needs the keys of the organization")
        self._stopping.clear()
        self._events = queue.Queue()
        self._channel.open(self._token, self._information(), self._hear)
        self._thread = threading.Thread(target=self._work, name=f"vantage6-node-{self.id}", daemon=True)
        self._thread.start()

    def reconnect(self) -> None:
        """Connect again after the server was away; open runs that are not in work here are taken up again.

        Does nothing when the node is offline.
        """
        if self._thread is None:
            return
        self._log_in()
        self._channel.open(self._token, self._information(), self._hear)
        with self._lock:
            self._seen &= set(self._runs)
        self._events.put(("", {}))

    def stop(self) -> None:
        """Disappear: what runs is abandoned, and stays open on the server."""
        if self._thread is None:
            return
        self._stopping.set()
        self._events.put(("", {}))
        self._thread.join()
        self._thread = None
        self._channel.close()
        with self._lock:
            for run in self._runs.values():
                run.killed.set()
            self._runs.clear()
            self._seen.clear()
        for worker in self._workers:
            worker.join(timeout=5)
        self._workers.clear()

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._http.close()

    def _information(self) -> Json:
        """Return what a node that shares its configuration reports."""
        if not self.settings.shares_configuration:
            return {}
        columns = {}
        for label, path in self.settings.databases.items():
            with path.open(encoding="utf-8", newline="") as file:
                columns[f"columns_{label}"] = next(csv.reader(file))
        allowed = self.settings.allowed_images
        return {
            "encryption": self.encrypted,
            "allowed_algorithms": sorted(allowed) if allowed is not None else "all",
            "database_labels": list(self.settings.databases),
            "database_types": {f"db_type_{label}": "csv" for label in self.settings.databases},
            "database_columns": columns,
        }

    def _hear(self, event: str, payload: Json) -> None:
        if payload.get("collaboration_id", self.collaboration_id) == self.collaboration_id:
            self._events.put((event, payload))

    def _work(self) -> None:
        self._take_up()
        while not self._stopping.is_set():
            try:
                event, payload = self._events.get(timeout=self._poll_seconds)
            except queue.Empty:
                event, payload = "", {}
            if self._stopping.is_set():
                return
            if event == "kill_containers":
                self._kill(payload)
            elif event == "delete_dataframe":
                self._forget(payload)
            else:
                self._take_up()

    def _kill(self, payload: Json) -> None:
        with self._lock:
            chosen = list(self._runs)
            if "kill_list" in payload:
                key = "result_id" if self.generation == 3 else "run_id"
                chosen = [entry[key] for entry in payload["kill_list"]]
            elif payload.get("node_id") not in (None, self.id):
                chosen = []
            for identifier in chosen:
                if identifier in self._runs:
                    self._runs[identifier].killed.set()

    def _forget(self, payload: Json) -> None:
        path = self._dataframe(payload["session_id"], payload["df_name"])
        path.unlink(missing_ok=True)
        self._channel.emit("dataframe_deleted", {**payload, "node_id": self.id})

    def _take_up(self) -> None:
        try:
            records = self._pages(
                "/result" if self.generation == 3 else "/run",
                {"state": "open", "node_id": self.id, "include": "task"},
            )
        except (Refused, httpx.HTTPError):
            # The server is away or busy; the next turn asks again.
            return
        for record in sorted(records, key=lambda r: int(r["id"])):
            with self._lock:
                # A run whose report was refused stays open on the server for good.
                if record["id"] in self._seen or record.get("finished_at"):
                    continue
                self._seen.add(record["id"])
                run = self._runs[record["id"]] = _Run(record)
            worker = threading.Thread(target=self._execute, args=(run,), name=f"vantage6-run-{run.id}", daemon=True)
            self._workers = [w for w in self._workers if w.is_alive()] + [worker]
            worker.start()

    # -- REST ----------------------------------------------------------------------------------------

    def _log_in(self) -> None:
        if self.generation == 5:
            answer = self._http.post(
                str(self.settings.token_url),
                data={
                    "grant_type": "client_credentials",
                    "client_id": str(self.settings.client_id),
                    "client_secret": self.settings.api_key,
                },
            )
        else:
            answer = self._http.post("/token/node", json={"api_key": self.settings.api_key})
        if answer.status_code != 200:
            raise Refused(answer)
        body = answer.json()
        self._token = body["access_token"]
        own = "/node/me" if self.generation == 5 else f"/node/{body['node_url'].split('/')[-1]}"
        node = self._get(own)
        self.id = node["id"]
        self.organization_id = node["organization"]["id"]
        self.collaboration_id = node["collaboration"]["id"]

    def _ask(self, method: str, path: str, token: str | None = None, **more: Any) -> Any:
        for attempt in (1, 2):
            headers = {"Authorization": f"Bearer {token or self._token}"}
            answer = self._http.request(method, path, headers=headers, **more)
            if token is not None or attempt == 2 or not self._token_is_old(answer):
                break
            self._log_in()
        if answer.status_code >= 300:
            raise Refused(answer)
        if "json" not in answer.headers.get("content-type", ""):
            return answer.content
        return answer.json()

    def _token_is_old(self, answer: httpx.Response) -> bool:
        """Whether a new token would help: this one has expired, or the server signs with another key now."""
        if answer.status_code == 500:
            # What some routes of v5 answer.
            return self.generation == 5
        expired = answer.status_code == 401 and "expired" in answer.text
        return expired or (answer.status_code == 422 and "Signature verification failed" in answer.text)

    def _get(self, path: str, token: str | None = None, **query: Any) -> Any:
        return self._ask("GET", path, token, params=query)

    def _pages(self, path: str, query: Json, token: str | None = None) -> list[Json]:
        found: list[Json] = []
        if self.generation == 3:
            answer: list[Json] = self._get(path, token, **query)
            return answer
        for page in range(1, 1000):
            answer_page = self._get(path, token, **query, page=page, per_page=100)
            found += answer_page["data"]
            if "next" not in answer_page["links"]:
                break
        return found

    def _now(self) -> str:
        # v3 cannot read an offset.
        return (
            datetime.now(UTC).replace(tzinfo=None if self.generation == 3 else UTC).isoformat(timespec="microseconds")
        )

    def _patch(self, run: _Run, **values: Any) -> None:
        path = f"/result/{run.id}" if self.generation == 3 else f"/run/{run.id}"
        self._ask("PATCH", path, json=values)

    # -- one run -------------------------------------------------------------------------------------

    def _execute(self, run: _Run) -> None:
        try:
            self._run(run)
        except Killed:
            self._leave_log(run)
        except (Refused, httpx.HTTPError) as error:
            # The run was killed, failed with a sibling or deleted meanwhile, or the server went
            # away. Nothing can be reported then; an open run is taken up again later.
            if isinstance(error, Refused):
                self._leave_log(run)
        finally:
            with self._lock:
                # Abandoned runs are not there any more; a new connection may have taken them up.
                if self._runs.get(run.id) is run:
                    del self._runs[run.id]

    def _leave_log(self, run: _Run) -> None:
        """v5 takes the log of a killed run afterwards."""
        if self.generation == 5 and run.lines:
            try:
                self._patch(run, log=run.log)
            except (Refused, httpx.HTTPError):
                return

    def _run(self, run: _Run) -> None:
        task = run.record["task"]
        image = str(task["image"]).split("@")[0]
        action = run.record.get("action")
        self._patch(run, started_at=self._now())
        if run.killed.wait(self.settings.startup_seconds):
            raise Killed
        token = None
        if self.generation < 5 or action == "central_compute":
            try:
                token = self._ask("POST", "/token/container", json={"task_id": task["id"], "image": task["image"]})[
                    "container_token"
                ]
            except Refused:
                # As the real node does: without `finished_at`, so the run never looks finished.
                self._patch(run, status="failed", log="Could not obtain algorithm container token")
                return
        allowed = self.settings.allowed_images
        if allowed is not None and image not in allowed:
            self._finish(run, "not allowed", None)
            return
        if image not in self.settings.images:
            self._finish(run, "non-existing Docker image", "")
            return
        self._patch(run, status="active")
        self._tell_status(run, "active")
        status, output = self._compute(run, self.settings.images[image], token)
        if run.killed.is_set():
            raise Killed
        self._finish(run, status, output)

    def _finish(self, run: _Run, status: str, output: bytes | str | None) -> None:
        result = self._seal(run, output) if isinstance(output, bytes) else output
        log = run.log if self.settings.shares_logs else "Node does not allow sharing algorithm logs"
        values: Json = {"status": status, "finished_at": self._now()}
        if result is not None:
            values["result"] = result
        if status != "not allowed":
            values["log"] = log
        self._tell_status(run, status)
        self._patch(run, **values)

    def _tell_status(self, run: _Run, status: str) -> None:
        task = run.record["task"]
        self._channel.emit(
            "algorithm_status_change",
            {
                "node_id": self.id,
                "status": status,
                "run_id": run.id,
                "task_id": task["id"],
                "job_id": task.get("job_id", task.get("run_id")),
                "collaboration_id": self.collaboration_id,
                "organization_id": self.organization_id,
                "parent_id": task["parent"]["id"] if task.get("parent") else None,
            },
        )

    def _compute(self, run: _Run, image: Image, token: str | None) -> tuple[str, bytes | str]:
        """Run the algorithm; whatever it raises is its crash."""
        task = run.record["task"]

        def write(line: str) -> None:
            run.lines.append(line)
            if self.settings.shares_logs and not run.killed.is_set():
                self._channel.emit("algorithm_log", {"run_id": run.id, "task_id": task["id"], "log": f"{line}\n"})

        write(f"info > wrapper for {image.name}")
        try:
            method, arguments, positional = self._asked(run)
            algorithm = image.algorithms.get(method)
            if algorithm is None:
                raise AttributeError(f"image {image.name} has no method {method!r}")
            job = Job(
                self._tables(run, algorithm),
                organization_id=self.organization_id,
                task_id=task["id"],
                write=write,
                subtask=self._subtasks(run, token) if token else None,
                killed=run.killed,
            )
            write(f"info > {method}")
            value = algorithm.function(job, *positional, **arguments)
        except Killed:
            raise
        except Exception:
            for line in traceback.format_exc().rstrip().splitlines():
                write(line)
            return "crashed", ""
        if algorithm.action in ("data_extraction", "preprocessing") and self.generation == 5:
            self._keep(run, value)
            return "completed", ""
        if isinstance(value, bytes):
            return "completed", value
        prefix = b"json." if self.generation == 3 else b""
        return "completed", prefix + json.dumps(value).encode()

    def _asked(self, run: _Run) -> tuple[str, Json, list[Any]]:
        """Return method, keyword and positional arguments of a run."""
        if self.generation == 5:
            content = run.record.get("arguments")
            arguments = json.loads(self._open(content)) if content else {}
            return run.record["task"]["method"], arguments or {}, []
        plain = self._open(run.record["input"])
        if self.generation == 3:
            form, _, plain = plain.partition(b".")
            if form.lower() != b"json":
                raise ValueError("this node takes input in JSON only")
        asked = json.loads(plain)
        method = asked["method"]
        if self.generation == 3 and method.startswith("RPC_"):
            method = method.removeprefix("RPC_")
        return method, asked.get("kwargs") or {}, asked.get("args") or []

    def _open(self, content: str) -> bytes:
        """Return the plain bytes of an input, from the blob store when that is where it is."""
        sealed = content.encode()
        blob = _UUID.fullmatch(content) is not None
        if blob:
            sealed = self._get(f"/blobstream/{content}")
        if not self.encrypted:
            return base64.b64decode(sealed)
        assert self.settings.keys is not None
        return self.settings.keys.open(sealed, blob=blob)

    def _seal(self, run: _Run, output: bytes) -> str:
        """Encrypt for the initiating organization, and store as a blob where that is wanted."""
        task = run.record["task"]
        key = "initiator" if self.generation == 3 else "init_org"
        initiator = self._get(f"/task/{task['id']}")[key]
        identifier = initiator if isinstance(initiator, int) else initiator["id"]
        public = self._get(f"/organization/{identifier}")["public_key"]
        return self._payload(output, public)

    def _blobs(self) -> bool:
        if self.generation == 3:
            return False
        answer: Json = self._get("/blobstream/status")
        return bool(answer["blob_store_enabled"])

    # -- tables --------------------------------------------------------------------------------------

    def _tables(self, run: _Run, algorithm: Algorithm) -> list[Table]:
        """Read the databases or dataframes a task asks for."""
        if algorithm.action == "central_compute":
            return []
        task = run.record["task"]
        if self.generation == 3:
            labels = [task["database"]] if task.get("database") else []
            return [self._database(label) for label in labels]
        tables = []
        for entry in task["databases"]:
            if entry.get("type") == "dataframe":
                path = self._dataframe(task["session"]["id"], entry["dataframe_name"])
                if not path.exists():
                    raise FileNotFoundError(f"no dataframe {entry['dataframe_name']!r} here")
                tables.append(read_table(path))
            else:
                tables.append(self._database(entry["label"]))
        return tables

    def _database(self, label: str) -> Table:
        if label not in self.settings.databases:
            raise KeyError(f"no database {label!r}: there are {', '.join(self.settings.databases)}")
        return read_table(self.settings.databases[label])

    def _dataframe(self, session_id: int, name: str) -> Path:
        # The name comes from a user by way of the server.
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"not the name of a dataframe: {name!r}")
        return self._folder / f"session-{session_id}" / f"{name}.csv"

    def _keep(self, run: _Run, table: Table) -> None:
        frame = run.record["task"]["dataframe"]
        path = self._dataframe(run.record["task"]["session"]["id"], frame["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*(values.tolist() for values in table.values()), strict=True))
        part.replace(path)
        kinds = {"f": "double", "i": "int64", "b": "bool"}
        self._ask(
            "POST",
            f"/session/dataframe/{frame['id']}/column",
            json=[{"name": name, "dtype": kinds.get(values.dtype.kind, "string")} for name, values in table.items()],
        )

    # -- subtasks ------------------------------------------------------------------------------------

    def _subtasks(self, run: _Run, token: str) -> Callable[[str, Mapping[str, Any], list[int] | None], list[Any]]:
        """Return what runs a method elsewhere, as an algorithm's client and its proxy do."""

        def everywhere(method: str, arguments: Mapping[str, Any], organizations: list[int] | None) -> list[Any]:
            known = self._organizations(run, token)
            chosen = organizations or list(known)
            task = self._ask(
                "POST",
                "/task",
                token,
                json=self._subtask(run, method, arguments, {i: known[i] for i in chosen}),
            )
            while not self._task_finished(task["id"], token):
                if run.killed.wait(_SUBTASK_POLL_SECONDS):
                    raise Killed
            return self._outputs(task["id"], token)

        return everywhere

    def _organizations(self, run: _Run, token: str) -> dict[int, str]:
        """Return public keys by id of the organizations a task may use."""
        task = run.record["task"]
        query: Json = {"collaboration_id": self.collaboration_id}
        if task.get("study"):
            query = {"study_id": task["study"]["id"]}
        if self.generation == 3:
            collaboration = self._get(f"/collaboration/{self.collaboration_id}", token)
            records = [self._get(f"/organization/{entry['id']}", token) for entry in collaboration["organizations"]]
        else:
            records = self._pages("/organization", query, token)
        return {record["id"]: record["public_key"] for record in records}

    def _subtask(self, run: _Run, method: str, arguments: Mapping[str, Any], keys: Mapping[int, str]) -> Json:
        task = run.record["task"]
        body: Json = {
            "name": "subtask",
            "description": f"task from a central algorithm: {method}",
            "image": task["image"],
            "collaboration_id": self.collaboration_id,
        }
        asked: Json = {"method": method, "args": [], "kwargs": dict(arguments)}
        payload = json.dumps(asked).encode()
        name = "input"
        if self.generation == 3:
            asked |= {"master": False, "output_format": "json"}
            payload = b"json." + json.dumps(asked).encode()
            body["database"] = task["database"]
        elif self.generation == 4:
            body["databases"] = [
                {"label": entry["label"], **json.loads(entry["parameters"] or "{}")} for entry in task["databases"]
            ]
            for key, field_name in (("study", "study_id"), ("algorithm_store", "store_id")):
                if task.get(key):
                    body[field_name] = task[key]["id"]
        else:
            payload, name = json.dumps(dict(arguments)).encode(), "arguments"
            groups: dict[int, list[Json]] = {}
            for entry in task["databases"]:
                written = {"type": entry["type"], "dataframe_id": entry["dataframe_id"]}
                groups.setdefault(entry["position"], []).append(written)
            body |= {
                "session_id": task["session"]["id"],
                "method": method,
                "action": "federated_compute",
                "databases": [groups[position] for position in sorted(groups)],
            }
            if task.get("study"):
                body["study_id"] = task["study"]["id"]
        body["organizations"] = [
            {"id": identifier, name: self._payload(payload, public)} for identifier, public in keys.items()
        ]
        return body

    def _payload(self, payload: bytes, public: str) -> str:
        if self._blobs():
            content = seal_blob(payload, public) if self.encrypted else base64.b64encode(payload)
            stored: Json = self._ask("POST", "/blobstream", content=content)
            return str(stored["uuid"])
        return seal(payload, public) if self.encrypted else base64.b64encode(payload).decode()

    def _task_finished(self, identifier: int, token: str) -> bool:
        if self.generation == 3:
            return bool(self._get(f"/task/{identifier}", token)["complete"])
        status = self._get(f"/task/{identifier}/status", token)["status"]
        return status not in ("pending", "initializing", "active", "awaiting")

    def _outputs(self, identifier: int, token: str) -> list[Any]:
        path = "/result"
        runs = self._pages(path if self.generation == 3 else "/run", {"task_id": identifier}, token)
        failed = [run for run in runs if run["status"] != "completed"]
        if failed:
            raise SubtaskFailed(
                f"subtask {identifier}: "
                + ", ".join(f"{r['status']} at organization {r['organization']['id']}" for r in failed)
            )
        results = runs
        if self.generation > 3:
            results = self._pages(path, {"task_id": identifier}, token)
        outputs = []
        for result in sorted(results, key=lambda r: int(r["id"])):
            plain = self._open(result["result"])
            if self.generation == 3:
                plain = plain.removeprefix(b"json.")
            outputs.append(json.loads(plain))
        return outputs
