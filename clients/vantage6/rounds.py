"""Rounds of federated learning: the global state between them, its aggregation, its checkpoints, and when to stop.

A round asks the organizations for an answer to the state so far, and an aggregation makes the next state of these. Each
state is a JSON file, which is what the next round sends, and what a run that was killed goes on from.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from prefect_biomed.clients.errors import ConfigurationError, LedgerError
from prefect_biomed.clients.files import atomic_write
from prefect_biomed.clients.vantage6.errors import TooFewAnswers
from prefect_biomed.clients.vantage6.models import Result
from prefect_biomed.clients.vantage6.results import load_result

__all__ = [
    "AVERAGING",
    "Aggregation",
    "Checkpoints",
    "Round",
    "RoundUpdate",
    "Stopping",
    "aggregated",
    "aggregation_of",
    "answers_of",
    "federated_averaging",
]

State = dict[str, Any]
AVERAGING = "prefect_biomed.clients.vantage6.rounds:federated_averaging"
"""Where `federated_averaging` is imported from."""


class RoundUpdate(BaseModel):
    """What an aggregation may return in place of the bare state.

    Attributes:
        state: The next state: JSON, by the names of the function's arguments.
        metrics: Figures about this round, shown as a table and a plot.
        converged: Whether no further round is needed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: State = Field(repr=False)
    metrics: dict[str, float] = Field(default_factory=dict)
    converged: bool = False


Aggregation = Callable[..., dict[str, Any] | RoundUpdate]
"""Gets the state, the answers of a round by organization, and settings of its own as keyword arguments."""


class Round(BaseModel):
    """A round that has ended.

    Attributes:
        number: From 1.
        task_id: Its task.
        organizations: Those whose answers were aggregated.
        missing: Those without an answer in time, with the reason.
        metrics: What the aggregation said.
        converged: Whether no further round is needed.
        seconds: How long it took.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    number: int
    task_id: int
    organizations: tuple[str, ...]
    missing: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    converged: bool = False
    seconds: float = 0.0


class Stopping(BaseModel):
    """When to stop before the last round: when the aggregation says so, or a metric is small or gets no smaller.

    Attributes:
        metric: Name of the metric.
        below: Stop when it is smaller than this.
        patience: Stop after so many rounds in a row without improvement.
        min_delta: What counts as improvement.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = "change"
    below: float | None = None
    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0)

    def is_due(self, rounds: Sequence[Round]) -> bool:
        """Tell whether to stop.

        Args:
            rounds: Those that have ended, the oldest first.

        Raises:
            ConfigurationError: The aggregation gives no such metric; the message lists those it gives.
        """
        if rounds and rounds[-1].converged:
            return True
        if not rounds or (self.below is None and self.patience is None):
            return False
        if self.metric not in rounds[-1].metrics:
            known = ", ".join(rounds[-1].metrics) or "none"
            raise ConfigurationError(f"Round {rounds[-1].number} has no metric {self.metric!r}. Known: {known}.")
        values = [one.metrics[self.metric] for one in rounds]
        if self.below is not None and values[-1] < self.below:
            return True
        best, without = math.inf, 0
        for value in values:
            if value < best - self.min_delta:
                best, without = value, 0
            else:
                without += 1
        return self.patience is not None and without >= self.patience


class Checkpoints:
    """States and rounds in a folder: ``state-0007.json`` is what round 7 has made, ``rounds.jsonl`` tells of each.

    Args:
        folder: Of this run alone.
        asked: What the run was asked for; a folder of another request is refused.
        initial: The state before the first round.

    Raises:
        ConfigurationError: The initial state is not JSON, or the folder belongs to another request.
        LedgerError: The folder cannot be read.
    """

    def __init__(self, folder: Path, asked: Mapping[str, JsonValue], initial: Mapping[str, Any]) -> None:
        self.folder = folder
        request = folder / "request.json"
        wanted = json.loads(json.dumps(asked, default=str))
        if request.exists() and (kept := _read(request)) != wanted:
            changed = sorted(name for name in wanted.keys() | kept.keys() if wanted.get(name) != kept.get(name))
            raise ConfigurationError(
                f"{folder} holds rounds that were asked for with other {', '.join(changed)}. Give another output_dir."
            )
        if not request.exists():
            self._write_state(0, initial)
            with atomic_write(request) as file:
                file.write(json.dumps(wanted, indent=1).encode())
        self.rounds: list[Round] = self._kept()

    def state_file(self, number: int) -> Path:
        """Name the file with the state that a round has made; 0 is the initial one."""
        return self.folder / f"state-{number:04d}.json"

    def state(self) -> State:
        """Read the newest state."""
        return _read(self.state_file(len(self.rounds)))

    def add(self, ended: Round, state: Mapping[str, Any]) -> None:
        """Keep a round and the state it has made. Safe to repeat.

        Raises:
            ConfigurationError: The state is not JSON, as when the learning has diverged.
        """
        self._write_state(ended.number, state)
        # The record comes last: a state without one is made again.
        rounds = [*self.rounds, ended]
        with atomic_write(self.folder / "rounds.jsonl") as file:
            file.writelines(f"{one.model_dump_json()}\n".encode() for one in rounds)
        self.rounds = rounds

    def _write_state(self, number: int, state: Mapping[str, Any]) -> None:
        try:
            text = json.dumps(dict(state), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"The state after round {number} is not JSON: {error}.") from None
        with atomic_write(self.state_file(number)) as file:
            file.write(text.encode())

    def _kept(self) -> list[Round]:
        path = self.folder / "rounds.jsonl"
        if not path.exists():
            return []
        try:
            return [Round.model_validate_json(line) for line in path.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise LedgerError(f"{path} cannot be read: {type(error).__name__}. Put it right or remove it.") from None


def _read(path: Path) -> State:
    try:
        found: State = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"{path} cannot be read: {type(error).__name__}. Put it right or remove it.") from None
    return found


def aggregation_of(given: str | Aggregation) -> Aggregation:
    """Find an aggregation.

    Args:
        given: The function itself, or where it is imported from: ``package.module:function``.

    Raises:
        ConfigurationError: There is none; the message says what is missing.
    """
    if not isinstance(given, str):
        return given
    module, _, name = given.partition(":")
    if not module or not name:
        raise ConfigurationError(f"aggregation is {given!r}; it has the form 'package.module:function'.")
    try:
        found: Aggregation = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"aggregation {given!r} cannot be imported where this runs: {error}.") from error
    if not callable(found):
        raise ConfigurationError(f"aggregation {given!r} is no function.")
    return found


def answers_of(results: Iterable[Result], least: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Tell the answers of a round from those that are missing.

    Args:
        results: One for each organization.
        least: So many answers are enough; all when None.

    Returns:
        Decoded JSON or bytes by organization, and the reasons of those without.

    Raises:
        TooFewAnswers: The round cannot be aggregated; the message says who has not answered and why.
    """
    results = list(results)
    missing = {one.organization: one.unavailable for one in results if one.unavailable is not None}
    answers = {one.organization: load_result(one) for one in results if one.unavailable is None}
    needed = len(results) if least is None else least
    if not answers or len(answers) < needed:
        said = "; ".join(f"{organization}: {reason}" for organization, reason in missing.items()) or "nobody was asked"
        raise TooFewAnswers(f"{len(answers)} organizations have answered, {max(1, needed)} are needed. {said}")
    return answers, missing


def aggregated(
    aggregation: Aggregation, state: State, answers: Mapping[str, Any], settings: Mapping[str, Any]
) -> RoundUpdate:
    """Make the next state of the answers.

    Args:
        aggregation: The function of the user.
        state: The state so far.
        answers: Answers by organization.
        settings: Further keyword arguments of the aggregation.

    Returns:
        The next state.

    Raises:
        ConfigurationError: The aggregation returns something else.
    """
    update = aggregation(state, answers, **settings)
    if isinstance(update, RoundUpdate):
        return update
    if not isinstance(update, dict):
        raise ConfigurationError(
            f"The aggregation returns {type(update).__name__}; it has to return the next state as a mapping, or a "
            "RoundUpdate."
        )
    return RoundUpdate(state=update)


def federated_averaging(state: State, answers: Mapping[str, Any], records: str = "count") -> RoundUpdate:
    """Average what the organizations have made of the state, weighted by their numbers of records.

    Args:
        state: The state so far: numbers, and lists and mappings of these.
        answers: Each holds the same names and shapes as the state, the number of records, and perhaps further numbers,
            whose averages become metrics.
        records: Name of the number of records.

    Returns:
        The averages; with them `change`, the largest change of a number of the state, as a metric.

    Raises:
        ConfigurationError: An answer has another shape, or no number of records; the message names the organization.
    """
    weights: dict[str, float] = {}
    for organization, answer in answers.items():
        count = answer.get(records) if isinstance(answer, dict) else None
        if count is None or not _is_number(count) or count < 0:
            raise ConfigurationError(f"{organization} does not tell its number of records as {records!r}.")
        weights[organization] = float(count)
    total = sum(weights.values())
    if total <= 0:
        raise ConfigurationError("No organization has any records.")
    shares = [weight / total for weight in weights.values()]
    changes: list[float] = [0.0]
    averages = {}
    for name, old in state.items():
        parts = [answer.get(name) for answer in answers.values()]
        wrong = [one for one, part in zip(answers, parts, strict=True) if not _same_shape(old, part)]
        if wrong:
            raise ConfigurationError(f"{name!r} of {', '.join(wrong)} has another shape than that of the state.")
        averages[name] = _average(old, parts, shares, changes)
    metrics = _metrics(list(answers.values()), shares, {*state, records})
    return RoundUpdate(state=averages, metrics={"change": max(changes), **metrics})


def _metrics(
    answers: Sequence[Mapping[str, Any]], shares: Sequence[float], without: Collection[str]
) -> dict[str, float]:
    """Average the further numbers that all answers have."""
    numbers = [{name for name, value in answer.items() if _is_number(value)} for answer in answers]
    common = set.intersection(*numbers) - set(without)
    return {
        name: math.fsum(share * answer[name] for share, answer in zip(shares, answers, strict=True))
        for name in answers[0]
        if name in common
    }


def _average(old: Any, parts: Sequence[Any], shares: Sequence[float], changes: list[float]) -> Any:
    if isinstance(old, dict):
        return {name: _average(old[name], [part[name] for part in parts], shares, changes) for name in old}
    if isinstance(old, list):
        columns = zip(old, *parts, strict=True)
        return [_average(first, rest, shares, changes) for first, *rest in columns]
    new = math.fsum(share * part for share, part in zip(shares, parts, strict=True))
    changes[0] = max(changes[0], abs(new - old))
    return new


def _same_shape(old: Any, part: Any) -> bool:
    if isinstance(old, dict):
        return isinstance(part, dict) and all(name in part and _same_shape(old[name], part[name]) for name in old)
    if isinstance(old, list):
        return isinstance(part, list) and len(old) == len(part) and all(map(_same_shape, old, part))
    return _is_number(old) and _is_number(part)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
