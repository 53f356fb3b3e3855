"""The workflow engine of VIP: plans jobs, runs them in threads, and is asked for statuses."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import shutil
import string
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect_biomed.sandbox.vip._girder import Girder
from prefect_biomed.sandbox.vip._model import ApiError, Status, User, VipSwitches, job_is_stopped, refused
from prefect_biomed.sandbox.vip._pipelines import Call, Pipeline, Results, Stamps, ToolFailed
from prefect_biomed.sandbox.vip._publication import provenance
from prefect_biomed.sandbox.vip._storage import Storage

RESULTS_DIRECTORY = "results-directory"
_JOB_THREADS = 16
_ACTIVE = (Status.RUNNING, Status.UNKNOWN, Status.READY)

# Exit codes of the script that wraps every job on the grid.
_INPUT_MISSING, _TOOL_FAILED, _RESULT_EXISTS = 40, 50, 32


@dataclass
class Job:
    """One invocation of the tool.

    Attributes:
        number: from 0.
        values: parameter to value.
        status: in the words of the engine.
        exit_code: of the script that wraps the tool.
        exit_message: of the same.
        stdout: of the tool.
        stderr: of the tool.
        provenance: what boutiques wrote of it; None until it succeeded.
    """

    number: int
    values: dict[str, str]
    status: str = "SUCCESSFULLY_SUBMITTED"
    exit_code: int | None = None
    exit_message: str | None = None
    stdout: str = ""
    stderr: str = ""
    provenance: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether its status is final."""
        return self.status in ("COMPLETED", "ERROR", "KILL")


@dataclass
class Execution:
    """One execution, as stored by the portal and as run by the engine.

    Attributes:
        identifier: `workflow-` and six characters.
        name: given by the user, not unique.
        owner: who launched it.
        pipeline: what runs.
        values: parameter to values, after splitting of lists.
        number: counted over the executions of the application.
        started: seconds since the epoch.
        status: as stored; brought up to date only when somebody looks.
        script: statuses to report before the true one.
        held_jobs: numbers of the jobs that never end.
        inputs: what the API shows as inputs, once jobs are planned.
        jobs: by number.
        planned: whether the jobs are known.
        failed: planning failed.
        returned: output id to paths.
        stopped: set by a kill.
        killed_at: when, seconds since the epoch.
        cleaned: deleted through the API.
        example: shown to everybody.
    """

    identifier: str
    name: str
    owner: User
    pipeline: Pipeline
    values: dict[str, list[str]]
    number: int
    started: float
    status: Status
    script: deque[Status]
    held_jobs: frozenset[int]
    launched: float = field(default_factory=time.time)
    inputs: dict[str, str] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    planned: bool = False
    failed: bool = False
    returned: dict[str, list[str]] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)
    killed_at: float = 0.0
    cleaned: bool = False
    example: bool = False
    ended: float | None = None


class Engine:
    """Runs executions.

    Args:
        seed: identifiers and noise are derived from it.
        folder: for the working folders of jobs.
        switches: of the sandbox.
        storage: where inputs come from and results go to.
        girder: the storage behind `girder:` URIs.

    Attributes:
        launching: held by the portal during a launch; a portal that was restarted has a new one.
    """

    def __init__(self, seed: int, folder: Path, switches: VipSwitches, storage: Storage, girder: Girder) -> None:
        self.launching = asyncio.Lock()
        self._seed = seed
        self._folder = folder
        self._switches = switches
        self._storage = storage
        self._girder = girder
        self._random = random.Random(f"{seed}/identifiers")
        self._stamps = Stamps()
        self._lock = threading.RLock()
        self._executions: dict[str, Execution] = {}
        self._counts: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(_JOB_THREADS, thread_name_prefix="sandbox-vip-job")

    def stop(self) -> None:
        """Kill everything and wait for it."""
        with self._lock:
            for execution in self._executions.values():
                execution.stopped.set()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Any]]:
        """Give what a new process needs to go on, and change nothing meanwhile."""
        with self._lock:
            yield {"random": self._random, "executions": self._executions, "counts": self._counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `frozen` gave: jobs that had not ended are computed from their beginning."""
        self._random, self._executions, self._counts = state["random"], state["executions"], state["counts"]
        # What those jobs had copied and written so far.
        shutil.rmtree(self._folder, ignore_errors=True)

    def resume(self) -> None:
        """Take up what a process before this one was computing."""
        with self._lock:
            for execution in self._executions.values():
                if execution.stopped.is_set() or execution.failed:
                    continue
                if not execution.planned:
                    self._begin(execution)
                for job in execution.jobs:
                    if not job.ended and job.status != "ERROR_HELD":
                        job.status = "QUEUED"
                        self._pool.submit(self._run, execution, job)

    # What the portal asks for

    def check_capacity(self, owner: User) -> None:
        """Refuse a launch when too many executions are stored as running.

        Raises:
            ApiError: 2000 for the platform, 2001 for the user.
        """
        with self._lock:
            running = [one for one in self._executions.values() if one.status is Status.RUNNING and not one.cleaned]
            own = sum(one.owner is owner for one in running)
        if len(running) >= self._switches.max_running_platform:
            raise ApiError(2000, "The platform runs as many executions as it can. Try again later.")
        if own >= self._switches.max_running_user:
            raise ApiError(2001, f"You have {own} running executions, which is the most you may have.")

    def launch(self, owner: User, pipeline: Pipeline, values: dict[str, list[str]], name: str) -> Execution:
        """Start an execution.

        Raises:
            ApiError: 8000 when the engine is unreachable.
        """
        with self._lock:
            if self._switches.engine_unreachable:
                raise refused("the engine is unreachable")
            execution = self._new(owner, pipeline, values, name)
            self._begin(execution)
            return execution

    def _begin(self, execution: Execution) -> None:
        thread = threading.Thread(target=self._drive, args=(execution,), name=f"sandbox-{execution.identifier}")
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _new(self, owner: User, pipeline: Pipeline, values: dict[str, list[str]], name: str) -> Execution:
        self._counts[pipeline.name] = self._counts.get(pipeline.name, 0) + 1
        clock = self._switches.clock_seconds
        execution = Execution(
            identifier=self._identifier(),
            name=name,
            owner=owner,
            pipeline=pipeline,
            values=values,
            number=self._counts[pipeline.name],
            started=time.time() if clock is None else clock,
            status=Status.RUNNING,
            script=deque(self._switches.status_script),
            held_jobs=frozenset(self._switches.held_jobs),
        )
        self._executions[execution.identifier] = execution
        return execution

    def add_example(self, owner: User, pipeline: Pipeline, values: dict[str, list[str]], name: str) -> None:
        """Run something that cannot fail, for everybody to look at."""
        with self._lock:
            execution = self._new(owner, pipeline, values, name)
            execution.example, execution.status, execution.held_jobs = True, Status.FINISHED, frozenset()
            self._schedule(execution)

    def _identifier(self) -> str:
        while True:
            letters = self._random.choices(string.ascii_lowercase + string.digits, k=6)
            identifier = "workflow-" + "".join(letters)
            if identifier not in self._executions:
                return identifier

    def find(self, identifier: str) -> Execution | None:
        """Return an execution, a cleaned one too."""
        with self._lock:
            return self._executions.get(identifier)

    def finished(self, execution: Execution) -> bool:
        """Tell whether all jobs of an execution have succeeded."""
        with self._lock:
            return bool(execution.jobs) and all(job.status == "COMPLETED" for job in execution.jobs)

    def of(self, owner: User) -> list[Execution]:
        """Return the executions of a user that were not cleaned, newest first."""
        with self._lock:
            return [one for one in reversed(self._executions.values()) if one.owner is owner and not one.cleaned]

    def examples(self) -> list[Execution]:
        """Return the finished executions that are shown to everybody, newest first."""
        with self._lock:
            return [one for one in reversed(self._executions.values()) if one.example and one.status is Status.FINISHED]

    def refresh(self, execution: Execution) -> None:
        """Bring the stored status of a running execution up to date.

        Raises:
            ApiError: 8000 when the engine is unreachable.
        """
        with self._lock:
            if execution.status in _ACTIVE:
                if self._switches.engine_unreachable:
                    raise refused("the engine is unreachable")
                execution.status = execution.script.popleft() if execution.script else self._true_status(execution)

    def _true_status(self, execution: Execution) -> Status:
        age = time.time() - execution.launched
        unknown = self._switches.unknown_seconds
        if execution.stopped.is_set():
            over = time.time() - execution.killed_at >= self._switches.kill_seconds
            return Status.KILLED if over else Status.UNKNOWN
        if age < unknown:
            return Status.UNKNOWN
        if age < unknown + self._switches.ready_seconds:
            return Status.READY
        if execution.failed:
            return Status.EXECUTION_FAILED
        if not execution.planned or not all(job.ended for job in execution.jobs):
            return Status.RUNNING
        succeeded = any(job.status == "COMPLETED" for job in execution.jobs)
        return Status.FINISHED if succeeded else Status.EXECUTION_FAILED

    def kill(self, execution: Execution) -> None:
        """Kill an execution, without looking whether it runs: a finished one becomes Killed, too.

        Raises:
            ApiError: 8000 when the engine is unreachable; the stored status is Killed all the same.
        """
        with self._lock:
            runs = execution.status in _ACTIVE and not (
                execution.failed or (execution.planned and all(job.ended for job in execution.jobs))
            )
            execution.status = Status.KILLED
            if self._switches.engine_unreachable:
                raise refused("the engine is unreachable")
            execution.stopped.set()
            if runs:
                execution.killed_at = time.time()
                execution.script.clear()
                if self._switches.kill_seconds:
                    execution.status = Status.UNKNOWN
            for job in execution.jobs:
                if not job.ended:
                    job.status = "KILL"

    def clean(self, execution: Execution) -> None:
        """Forget an execution; its files stay."""
        with self._lock:
            execution.cleaned = True

    def describe(self, execution: Execution, *, summary: bool) -> dict[str, Any]:
        """Return the execution object of the API.

        Args:
            execution: the execution.
            summary: without inputs, outputs and jobs, as lists show it.
        """
        with self._lock:
            jobs = {
                str(job.number): {"status": job.status, "exitCode": job.exit_code, "exitMessage": job.exit_message}
                for job in execution.jobs
            }
            inputs = dict(execution.inputs)
            returned: dict[str, list[str]] | None = {name: list(paths) for name, paths in execution.returned.items()}
        if not returned and execution.status not in (Status.FINISHED, Status.KILLED):
            returned = None
        unnamed = time.time() - execution.launched < self._switches.unnamed_seconds
        found: dict[str, Any] = {
            "identifier": execution.identifier,
            "name": execution.identifier if unnamed else execution.name,
            "pipelineIdentifier": execution.pipeline.identifier,
            "timeout": 0,
            "status": execution.status,
            "inputValues": {} if summary else inputs,
            "returnedFiles": {} if summary else returned,
            "studyIdentifier": None,
            "errorCode": None,
            "startDate": int(execution.started * (1000 if self._switches.date_unit == "ms" else 1)),
            "endDate": None,
            "resultsLocation": None,
        }
        if self._switches.jobs_map:
            found["jobs"] = {} if summary else jobs
        return found

    def results(self, execution: Execution) -> list[str]:
        """Return the paths of all results."""
        with self._lock:
            return [path for paths in execution.returned.values() for path in paths]

    # What the engine does

    def _drive(self, execution: Execution) -> None:
        lag = execution.launched + self._switches.unknown_seconds + self._switches.ready_seconds - time.time()
        if execution.stopped.wait(max(0.0, lag)):
            return
        self._schedule(execution)

    def _schedule(self, execution: Execution) -> None:
        try:
            jobs = self._plan(execution)
        except ValueError:
            with self._lock:
                execution.failed = True
                execution.ended = time.time()
            return
        with self._lock:
            if execution.stopped.is_set():
                return
            execution.inputs = {name: values[0] for name, values in execution.values.items()}
            execution.inputs[RESULTS_DIRECTORY] = self._results_directory(execution)
            execution.jobs = jobs
            execution.planned = True
            for job in jobs:
                job.status = "QUEUED"
                self._pool.submit(self._run, execution, job)

    def _results_directory(self, execution: Execution) -> str:
        location = execution.values[RESULTS_DIRECTORY][0]
        if location.startswith("girder:"):
            return location
        suffix = execution.pipeline.results_suffix
        if suffix is None:
            moment = datetime.fromtimestamp(execution.started, UTC)
            suffix = moment.strftime(self._switches.result_directory_format)
        return "/".join([location.rstrip("/"), suffix]) if suffix else location.rstrip("/")

    def _plan(self, execution: Execution) -> list[Job]:
        """Combine the values to jobs.

        Raises:
            ValueError: lists of a dot that differ in length, a counter that is no number, too many jobs.
        """
        pipeline = execution.pipeline
        values = {name: texts for name, texts in execution.values.items() if name != RESULTS_DIRECTORY}
        for name in pipeline.counters:
            if name in values:
                values[name] = [str(number) for text in values[name] for number in range(int(text))]
        for name, pattern in pipeline.directories.items():
            if name in values:
                values[name] = list(self._expanded(execution.owner, values[name], pattern))
        dotted = [name for name in pipeline.dot if name in values]
        rows: list[dict[str, str]] = [{}]
        if dotted:
            rows = [dict(zip(dotted, row, strict=True)) for row in zip(*(values[name] for name in dotted), strict=True)]
        crossed = [name for name in values if name not in dotted]
        count = len(rows)
        for name in crossed:
            count *= len(values[name])
        if not 0 < count <= self._switches.max_jobs:
            raise ValueError(f"{count} jobs")
        combinations = itertools.product(*(values[name] for name in crossed))
        return [
            Job(number, {**row, **dict(zip(crossed, combination, strict=True))})
            for number, (combination, row) in enumerate(itertools.product(combinations, rows))
        ]

    def _expanded(self, owner: User, paths: Iterable[str], pattern: str) -> Iterable[str]:
        for path in paths:
            place = self._storage.input_file(owner, path)
            if place is None or not place.is_dir():
                yield path
                continue
            for entry in sorted(place.iterdir()):
                if entry.is_file() and re.fullmatch(pattern, entry.name):
                    yield f"{path.rstrip('/')}/{entry.name}"

    def _run(self, execution: Execution, job: Job) -> None:
        folder = self._folder / execution.identifier / str(job.number)
        try:
            with self._lock:
                if execution.stopped.is_set():
                    return
                if job.number in execution.held_jobs:
                    self._hold(job, "the job is held in error")
                    return
                job.status = "RUNNING"
            files = self._inputs(execution, job, folder)
            missing = next((name for name, place in files.items() if place is None), None)
            if missing is not None:
                if self._switches.missing_input == "hold":
                    self._hold(job, f"input {missing} cannot be fetched")
                else:
                    self._end(execution, job, _INPUT_MISSING, f"input {missing} could not be downloaded")
                return
            self._compute(execution, job, folder, {name: place for name, place in files.items() if place})
        except Exception as error:  # a mistake in the sandbox must not leave a job running for ever
            self._end(execution, job, 1, f"the sandbox failed: {error!r}")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _inputs(self, execution: Execution, job: Job, folder: Path) -> dict[str, Path | None]:
        files: dict[str, Path | None] = {}
        for name, value in job.values.items():
            parameter = execution.pipeline.parameter(name)
            if parameter is None or parameter.kind != "File":
                continue
            target = folder / "inputs" / name
            target.mkdir(parents=True)
            if value.startswith("girder:"):
                files[name] = self._girder.open_input(value, target)
                continue
            place = self._storage.input_file(execution.owner, value)
            files[name] = None
            if place is not None and place.is_file():
                copy = target / place.name
                # A copy, so that the file may be deleted meanwhile.
                shutil.copyfile(place, copy)
                files[name] = copy
        return files

    def _compute(self, execution: Execution, job: Job, folder: Path, files: Mapping[str, Path]) -> None:
        out = folder / "outputs"
        out.mkdir(parents=True)
        call = Call(
            values=job.values,
            files=files,
            folder=out,
            switches=self._switches,
            random=random.Random(f"{self._seed}/{execution.identifier}/{job.number}"),
            execution_number=execution.number,
            stopped=execution.stopped,
            stamp=self._stamps.next(),
            stdout=[execution.pipeline.identifier, _command(execution.pipeline, job, files)],
        )
        try:
            if job_is_stopped(execution.stopped, self._switches):
                return
            results = execution.pipeline.tool(call)
        except ToolFailed as error:
            call.stderr.append(str(error))
            with self._lock:
                job.stdout, job.stderr = "\n".join(call.stdout), "\n".join(call.stderr)
            self._end(execution, job, _TOOL_FAILED, f"the tool exited with status {error.exit_status}")
            return
        with self._lock:
            job.stdout, job.stderr = "\n".join(call.stdout), "\n".join(call.stderr)
            if execution.stopped.is_set():
                return
        written = provenance(execution.pipeline, job.values, files, results, call.stdout)
        returned = self._deliver(execution, results)
        if returned is None:
            self._end(execution, job, _RESULT_EXISTS, "a result could not be uploaded")
            return
        with self._lock:
            for output, path in returned:
                execution.returned.setdefault(output, []).append(path)
            job.provenance = written
            self._end(execution, job, 0, "ok")

    def _deliver(self, execution: Execution, results: Results) -> list[tuple[str, str]] | None:
        directory = execution.inputs[RESULTS_DIRECTORY]
        returned = []
        for output, files in results.items():
            for name, source in files:
                if directory.startswith("girder:"):
                    uri = self._girder.add_result(directory, name, source)
                    if uri is None:
                        return None
                    returned.append((output, uri))
                    continue
                path = name if name.startswith("/vip/") else f"{directory}/{name}"
                if not self._storage.add_result(execution.owner, path, source):
                    return None
                returned.append((output, path))
        return returned

    def _hold(self, job: Job, message: str) -> None:
        with self._lock:
            job.status, job.exit_message = "ERROR_HELD", message

    def _end(self, execution: Execution, job: Job, code: int, message: str) -> None:
        with self._lock:
            if job.ended:
                return
            job.status = "COMPLETED" if code == 0 else "ERROR"
            job.exit_code, job.exit_message = code, message
            if all(one.ended for one in execution.jobs):
                execution.ended = time.time()


def _command(pipeline: Pipeline, job: Job, files: Mapping[str, Path]) -> str:
    """Return the command line of a job, as its log shows it."""
    given = [one.name for one in pipeline.parameters if one.name in job.values]
    return " ".join(["run", *(files[name].name if name in files else job.values[name] for name in given)])
