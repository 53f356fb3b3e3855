"""Why runs were launched, skipped or adopted, and what tells two of them apart: from records on this machine alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.boss import launches as boss
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.files import digest
from prefect_biomed.clients.once import Intent, Origin
from prefect_biomed.clients.vantage6 import launches as vantage6
from prefect_biomed.clients.vip import SessionFile, SessionRecord, VipSession, open_intents
from prefect_biomed.clients.vip.download import local_outputs

__all__ = ["Comparison", "Reason", "Results", "compare", "reasons"]

_HOW = {
    Origin.SENT: "nothing carried its name, so it was sent",
    Origin.FOUND: "it carried the name already, so it was taken and nothing was sent",
    Origin.SETTLED: "it was sent, the answer was lost, and it was found by its name",
    None: "how it was had was not written down (an earlier release)",
}


class Reason(BaseModel):
    """Why something was done or left.

    Attributes:
        what: The launch, or the inputs.
        why: The reason.
    """

    model_config = ConfigDict(frozen=True)

    what: str
    why: str


def reasons(run: str) -> list[Reason]:
    """Tell the reason of each launch, skip and adoption of a run.

    Args:
        run: Folder of a VIP session; or the token, or the number on the platform, of what was launched on vantage6 or
            the Boss.

    Returns:
        One for each launch, and for the inputs of each intent.

    Raises:
        ConfigurationError: This machine has no record of it.
        LedgerError: A record is damaged.
    """
    folder = Path(run).expanduser().absolute()
    if folder.is_dir():
        return [one for session in open_intents(folder) for one in _of_session(session, SessionFile(session).read())]
    return [Reason(what=_named(intent), why=_why(intent)) for intent in _intents(run)]


def _of_session(session: VipSession, record: SessionRecord) -> Iterator[Reason]:
    intent = record.ledger.intents[session.token]
    uploads = record.ledger.uploads
    states = {True: f"are complete: {len(uploads)} files were sent or there already", False: "were broken off"}
    borrowed = session.vip_input_dir != f"{session.vip_dir}/INPUTS"
    inputs = states.get(bool(intent.inputs.is_complete)) if intent.inputs.is_complete is not None else None
    why = f"are those of {session.vip_input_dir}" if borrowed else inputs or "are not written down"
    yield Reason(what=f"inputs of {session.token}", why=why)
    if record.is_adopted(session.token):
        for identifier in record.workflows_of(session.token):
            yield Reason(what=identifier, why="another program than this one has launched it; it is taken as it is")
        return
    for repetition in range(1, session.nb_runs + 1 if session.pipeline_id else 1):
        name = session.workflow_name(repetition)
        yield Reason(what=name, why=_why_run(record, name))


def _why_run(record: SessionRecord, name: str) -> str:
    launch = record.ledger.launches.get(name)
    if launch is None:
        begun = name in record.ledger.begun
        return "was begun and refused, or its checks failed: nothing runs" if begun else "was not launched yet"
    by = f" by flow run {launch.started_by}" if launch.started_by else ""
    since = f"{launch.intended:%Y-%m-%d %H:%M:%S} UTC{by}"
    if launch.workflow_id is None:
        return f"in doubt since {since}: the next run looks for it before it sends anything"
    identifier = launch.workflow_id
    said = [f"{identifier}, {since}: {_HOW[launch.origin]}"]
    if ended := record.ledger.ended.get(identifier):
        failed = f", {ended.failed_jobs} of {ended.jobs} jobs failed" if ended.failed_jobs else ""
        said.append(f"it ended as {ended.status}{failed}, so it is not launched again")
    else:
        said.append("it is not known to have ended, so it is watched and not launched again")
    if identifier in record.ledger.downloaded:
        said.append("its outputs were fetched")
    if record.workflows.get(identifier) and record.workflows[identifier].status == "Removed":
        said.append("its outputs were removed from the platform")
    return "; ".join(said)


def _intents(run: str) -> list[Intent]:
    """The records of launches on vantage6 and the Boss that a word is about."""
    stores = (vantage6.intents(), boss.intents())
    found = [
        intent
        for store in stores
        for intent in store.others("")
        if intent.id == run or run in intent.token.split("-") or run == intent.token
    ]
    if not found:
        folders = " and ".join(str(store.folder) for store in stores)
        raise ConfigurationError(
            f"This machine has no record of {run}: it is neither the folder of a session, nor a token or number in "
            f"{folders}."
        )
    return found


def _named(intent: Intent) -> str:
    return str(intent.asked.get("what") or intent.asked.get("channel") or intent.token)


def _why(intent: Intent) -> str:
    since = f" since {intent.intended_at:%Y-%m-%d %H:%M:%S} UTC" if intent.intended_at else ""
    if intent.id is not None:
        return f"{intent.id}{since}: {_HOW[intent.origin]}"
    if intent.is_in_doubt:
        return f"in doubt{since}: the next run looks for it before it sends anything"
    return "was begun and refused, or its checks failed: nothing runs"


class Results(StrEnum):
    """Whether the results of two runs are the same."""

    SAME = "same"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


class Comparison(BaseModel):
    """What tells two runs apart.

    Attributes:
        cause: The first kind of thing that differs, of inputs, parameters, version and platform in this order; empty
            when none is known to.
        differences: What differs, of all kinds.
        unknown: What cannot be compared, because a record does not tell it.
        results: Whether the results are the same, byte by byte.
        files: Result files that differ, or that only one of them has.
    """

    model_config = ConfigDict(frozen=True)

    cause: str = ""
    differences: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    results: Results = Results.UNKNOWN
    files: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Say it in words.

        Returns:
            One line for each thing.
        """
        first = f"first cause: {self.cause}" if self.cause else "nothing differs of what is known"
        told = [first, *(f"  {one}" for one in self.differences)]
        told += [f"  not known: {one}" for one in self.unknown]
        told.append(f"results: {self.results.value}")
        return [*told, *(f"  {one}" for one in self.files)]


class _Facts(BaseModel):
    """What a record tells of one run; None for what it does not tell."""

    inputs: dict[str, str | None] | None
    parameters: dict[str, Any] | None
    version: str | None
    platform: str | None
    results: dict[str, str] | None = None


def compare(one: str, other: str) -> Comparison:
    """Find the first thing that tells two runs apart, and whether their results differ.

    Args:
        one: A run: folder of a VIP session, with `:2` behind it for its second run; else as for `reasons`.
        other: The other one.

    Returns:
        What differs. What a record does not tell is unknown, not equal.

    Raises:
        ConfigurationError: This machine has no record of one of them.
        LedgerError: A record is damaged.
    """
    first, second = _facts(one), _facts(other)
    causes: dict[str, list[str]] = {}
    unknown: list[str] = []
    for kind, told in (("input digest", "inputs"), ("parameter", "parameters")):
        here, there = getattr(first, told), getattr(second, told)
        found = None if here is None or there is None else _unlike(here, there)
        if found is None:
            unknown.append(told)
            continue
        causes[kind], open_questions = found
        unknown += open_questions
    for kind in ("version", "platform"):
        here, there = getattr(first, kind), getattr(second, kind)
        if here is None or there is None:
            unknown.append(kind)
        elif here != there:
            causes[kind] = [f"{kind}: {here}, and {there}"]
    files = None if first.results is None or second.results is None else _unlike(first.results, second.results)[0]
    results = Results.UNKNOWN if files is None else Results.DIFFERENT if files else Results.SAME
    return Comparison(
        cause=next((kind for kind, found in causes.items() if found), ""),
        differences=tuple(line for found in causes.values() for line in found),
        unknown=tuple(unknown),
        results=results,
        files=tuple(files or ()),
    )


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two mappings, and what cannot be told."""
    differs, unknown = [], []
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            differs.append(f"{name}: only the {'first' if name in one else 'second'} has it")
        elif one[name] is None or other[name] is None:
            unknown.append(f"the digest of {name}")
        elif one[name] != other[name]:
            differs.append(f"{name}: {_short(one[name])}, and {_short(other[name])}")
    return differs, unknown


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}…"


def _facts(run: str) -> _Facts:
    path, colon, repetition = run.rpartition(":")
    if colon and repetition.isdecimal() and Path(path).expanduser().is_dir():
        return _facts_of_session(Path(path).expanduser().absolute(), int(repetition))
    if Path(run).expanduser().is_dir():
        return _facts_of_session(Path(run).expanduser().absolute(), 1)
    found = _intents(run)
    if len(found) > 1:
        raise ConfigurationError(f"{run} could be {', '.join(_named(one) for one in found)}. Give the token.")
    asked = dict(found[0].asked)
    platform, version = asked.pop("server", None) or asked.pop("host", None), asked.pop("image", None)
    for name in ("what", "known"):
        asked.pop(name, None)
    inputs = _inputs_at_nodes(asked) if "method" in asked else None
    return _Facts(
        inputs=inputs,
        parameters=asked or None,
        version=None if version is None else str(version),
        platform=None if platform is None else str(platform),
    )


def _inputs_at_nodes(asked: dict[str, Any]) -> dict[str, str | None]:
    """Take the arguments of a function on vantage6 out of what was asked; nobody tells of the data there."""
    if "collaboration" in asked:
        # Written down since the arguments are, too: before, they are not known.
        for name in ("study", "databases"):
            asked.setdefault(name, None)
            asked[name] = asked[name] if "arguments" not in asked or asked[name] is not None else "none"
    if asked.get("session", "") is None:
        asked["session"] = "none"
    arguments = asked.pop("arguments", None)
    return {"arguments": None if arguments is None else str(arguments), "the data at the organizations": None}


def _facts_of_session(folder: Path, repetition: int) -> _Facts:
    session = open_intents(folder)[-1]
    if not 1 <= repetition <= session.nb_runs:
        raise ConfigurationError(f"Session {session.session_name!r} has {session.nb_runs} runs, no run {repetition}.")
    record = SessionFile(session).read()
    intent = record.ledger.intents[session.token]
    known = {name: sent.sha256 for name, sent in record.ledger.uploads.items()}
    names = intent.inputs.expected or known
    given = intent.given or intent.input_settings
    launch = record.ledger.launches.get(session.workflow_name(repetition))
    identifier = launch.workflow_id if launch else None
    complete = intent.inputs.is_complete and (known or session.input_dir is None)
    return _Facts(
        inputs={name: known.get(name) for name in names} if complete else None,
        parameters=None if given is None else dict(given),
        version=intent.pipeline_id,
        platform=record.ledger.platform_url,
        results=_results(session, record, identifier) if identifier else None,
    )


def _results(session: VipSession, record: SessionRecord, identifier: str) -> dict[str, str] | None:
    """Digests of result files by their path below what they have in common; None when none, or not all, are there."""
    noted = record.workflows.get(identifier)
    outputs = local_outputs(session, identifier, noted.outputs) if noted else []
    if not outputs or not all(output.local.exists() for output in outputs):
        return None
    files = [
        path
        for output in outputs
        for path in (sorted(output.local.rglob("*")) if output.local.is_dir() else [output.local])
        if path.is_file()
    ]
    if not files:
        return None
    # The folders above are named after the run, and on VIP after its time.
    above = Path(os.path.commonpath([output.local.parent for output in outputs]))
    return {path.relative_to(above).as_posix(): digest(path) for path in files}
