"""Whether a run has come to what was asked of it: the only place where success is decided.

A status word says little: VIP calls a run Finished of which one job in ten succeeded, CARMIN-server one whose tool
failed. So jobs, required outputs and the files that were to be fetched are counted too, and what is not known is no
success.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.download import not_here
from prefect_biomed.clients.vip.models import SessionOptions, VipSession, Workflow, WorkflowStatus, is_on_girder
from prefect_biomed.clients.vip.session_file import SessionFile
from prefect_biomed.clients.vip.session_record import EndedRecord, SessionRecord

__all__ = ["Asked", "Outcome", "judge", "outcome"]

logger = logger_of(__name__)


@dataclass(frozen=True)
class Asked:
    """What was asked of one run, and what is known of it besides the platform's answer.

    Attributes:
        options: What counts as success, and what is fetched.
        required_outputs: Names of the outputs that every successful run has.
        ended: How it ended, as it was written down; None when it was not.
        unfetched: Outputs that were to be fetched and are not here whole; None before the download.
        tells_jobs: Whether the platform tells the jobs of an execution, so that telling none is no success of all. No
            platform tells how many jobs it has planned: one that leaves some out is not found out, unless outputs lack.
    """

    options: SessionOptions = field(default_factory=SessionOptions)
    required_outputs: frozenset[str] = frozenset()
    ended: EndedRecord | None = None
    unfetched: tuple[str, ...] | None = None
    tells_jobs: bool = False


class Outcome(BaseModel):
    """What came of one run.

    Attributes:
        workflow: The run, as the platform tells of it.
        status: How it ended, also when it was removed since; its latest status before that.
        jobs: Number of its jobs, where the platform tells.
        failed_jobs: How many of them failed.
        open_jobs: Of how many of them nobody knows how they ended.
        missing: Outputs that every successful run has and this one lacks.
        unfetched: Wanted outputs that are not here, or with another size.
        problems: Why it does not count as success, in words.
    """

    model_config = ConfigDict(frozen=True)

    workflow: Workflow
    status: WorkflowStatus
    jobs: int = 0
    failed_jobs: int = 0
    open_jobs: int = 0
    missing: tuple[str, ...] = ()
    unfetched: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def is_success(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problems

    @property
    def succeeded_jobs(self) -> int:
        """Number of its jobs that are known to have succeeded."""
        return self.jobs - self.failed_jobs - self.open_jobs

    @property
    def is_partial(self) -> bool:
        """Whether it counts as success although jobs of it failed."""
        return self.is_success and self.failed_jobs > 0


@dataclass
class _End:
    """How a run ended, by the platform or, where that has forgotten, by the record."""

    status: WorkflowStatus
    jobs: int = 0
    failed_jobs: int = 0
    open_jobs: int = 0
    outputs: int = 0
    output_names: frozenset[str] = field(default_factory=frozenset)


def outcome(workflow: Workflow, asked: Asked) -> Outcome:
    """Judge one run by what was asked of it.

    Args:
        workflow: The run, as the platform tells of it, with its jobs.
        asked: What was asked.

    Returns:
        What came of it. What is not known is a problem.
    """
    end = _end(workflow, asked.ended)
    wanted = end.status.value in asked.options.get_status
    missing = _missing(end, asked.required_outputs) if end.status.is_success else ()
    unfetched = (asked.unfetched or ()) if wanted else ()
    problems: list[str] = []
    if not end.status.is_terminal:
        problems.append(f"has not ended, it is {end.status.value}")
    elif end.status == WorkflowStatus.REMOVED:
        problems.append("was removed, and nothing tells how it ended")
    elif not wanted:
        problems.append(end.status.value)
    if asked.options.strict:
        problems += _problems_of_jobs(end, asked)
    if missing and not asked.options.accept_incomplete:
        problems.append(f"{end.outputs} of at least {len(asked.required_outputs)} outputs, without {_list(missing)}")
    if unfetched:
        problems.append(f"{len(unfetched)} outputs are not here: {_list(unfetched)}")
    return Outcome(
        workflow=workflow,
        status=end.status,
        jobs=end.jobs,
        failed_jobs=end.failed_jobs,
        open_jobs=end.open_jobs,
        missing=missing,
        unfetched=unfetched,
        problems=tuple(problems),
    )


def judge(
    client: VipClient, session: VipSession, workflows: Sequence[Workflow], *, fetched: bool = False
) -> list[Outcome]:
    """Judge runs of a session by what was asked of each.

    Runs of the session's own intent are judged by its options, those of other intents by what their record says.

    Args:
        client: The account; asked for the pipeline when the record does not tell its outputs.
        session: The session.
        workflows: The runs, with their jobs.
        fetched: Whether what was to be fetched has to be here.

    Returns:
        The outcome of each, in the same order.
    """
    record = SessionFile(session, client).read()
    required: dict[str, frozenset[str]] = {}
    outcomes = []
    for workflow in workflows:
        token = record.intent_of(workflow.identifier)
        if token not in required:
            required[token] = _required_outputs(client, record, token)
        asked = Asked(
            options=options_of(session, record, workflow.identifier),
            required_outputs=required[token],
            ended=record.ledger.ended.get(workflow.identifier),
            unfetched=unfetched(session, record, workflow.identifier) if fetched else None,
            tells_jobs=client.profile.tells_jobs,
        )
        outcomes.append(outcome(workflow, asked))
    return outcomes


def options_of(session: VipSession, record: SessionRecord, workflow_id: str) -> SessionOptions:
    """Tell by which options a run is judged.

    Args:
        session: The session; its options count for the runs of its own intent.
        record: Its record, which has those of other intents.
        workflow_id: The run.

    Returns:
        The options.
    """
    token = record.intent_of(workflow_id)
    return session.options if token == session.token else record.ledger.intents[token].options


def unfetched(session: VipSession, record: SessionRecord, workflow_id: str) -> tuple[str, ...]:
    """Name the outputs of a run that are to be here and are not.

    Args:
        session: The session.
        record: Its record.
        workflow_id: The run.

    Returns:
        Their paths on the platform; the identifier of the run when nobody has looked what its outputs are. Outputs that
        stay on Girder are not to be here.
    """
    known = record.workflows.get(workflow_id)
    outputs = [output for output in known.outputs if not output.get("isDirectory")] if known else []
    intent = record.ledger.intents[record.intent_of(workflow_id)]
    if not (session.girder_download or intent.girder_download):
        if intent.girder_output_dir is not None:
            return ()
        if outputs and all(is_on_girder(str(output["path"])) for output in outputs):
            return ()
    if workflow_id not in record.ledger.downloaded and not any("size" in output for output in outputs):
        return (workflow_id,)
    return not_here(session, workflow_id, outputs)


def _required_outputs(client: VipClient, record: SessionRecord, token: str) -> frozenset[str]:
    intent = record.ledger.intents[token]
    if intent.required_outputs is not None:
        return frozenset(intent.required_outputs)
    if intent.pipeline_id is None:
        return frozenset()
    pipeline = client.pipeline(intent.pipeline_id)
    if pipeline.told_outputs is None:
        logger.warning(
            "It is not known which outputs a run of %s has to have, so none is missed: %s",
            pipeline.identifier,
            pipeline.undescribed,
        )
    return pipeline.required_outputs


def _end(workflow: Workflow, ended: EndedRecord | None) -> _End:
    if ended is None or not workflow.status.is_terminal or workflow.jobs or workflow.outputs:
        return _End(
            workflow.status,
            len(workflow.jobs),
            len(workflow.failed_jobs),
            len(workflow.open_jobs),
            len(workflow.outputs),
            workflow.output_names,
        )
    status = WorkflowStatus(ended.status) if workflow.status == WorkflowStatus.REMOVED else workflow.status
    return _End(status, ended.jobs, ended.failed_jobs, ended.open_jobs, ended.outputs, frozenset(ended.output_names))


def _problems_of_jobs(end: _End, asked: Asked) -> Iterator[str]:
    if end.failed_jobs:
        yield f"{end.failed_jobs} of {end.jobs} jobs failed"
    if end.open_jobs:
        yield f"of {end.open_jobs} of {end.jobs} jobs the platform does not tell that they have ended (strict)"
    if asked.tells_jobs and end.status.is_success and not end.jobs:
        yield "the platform tells nothing of its jobs, so it is not known whether all succeeded (strict)"


def _missing(end: _End, required: frozenset[str]) -> tuple[str, ...]:
    """Names of required outputs without a file; by their number where the platform tells no names."""
    if end.output_names:
        return tuple(sorted(required - end.output_names))
    return tuple(sorted(required))[end.outputs :]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
