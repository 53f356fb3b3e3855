"""What goes wrong in one rehearsal, made from its seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from prefect_biomed.sandbox import Fault

READ_SECONDS = 2.0
LONGEST_HOLD = 3.0
# A request that is held for the longest time is carried out within this after it was sent.
SETTLE_SECONDS = 6.0
_DISTURBED_ATTEMPTS = 3

_PAGE = "<html><body><h1>Bad Gateway</h1></body></html>"
_OTHER_SHAPES = ("null", "[]", "{}", '"text"', "17", '{"id": null}', '{"error": {"code": "E"}}', "[[[[" * 2500, "{")
_STATUSES = (400, 401, 403, 404, 408, 409, 429, 500, 502, 503, 504)
_JSON = {"content_type": "application/json"}

KINDS: dict[str, Callable[[Random], dict[str, Any]]] = {
    "status burst, HTML": lambda chance: {
        "status": chance.choice(_STATUSES),
        "body": _PAGE,
        "times": chance.randint(1, 4),
        "after_effect": chance.random() < 0.5,
    },
    "status burst, empty": lambda chance: {
        "status": chance.choice(_STATUSES),
        "times": chance.randint(1, 4),
        "after_effect": chance.random() < 0.5,
    },
    "status burst, JSON of another shape": lambda chance: {
        "status": chance.choice(_STATUSES),
        "body": chance.choice(_OTHER_SHAPES),
        "times": chance.randint(1, 3),
        "after_effect": chance.random() < 0.5,
        **_JSON,
    },
    "success, HTML": lambda chance: {"status": 200, "body": _PAGE, "after_effect": chance.random() < 0.7},
    "success, empty": lambda chance: {
        "status": chance.choice([200, 201, 204]),
        "after_effect": chance.random() < 0.7,
        **_JSON,
    },
    "success, JSON of another shape": lambda chance: {
        "status": 200,
        "body": chance.choice(_OTHER_SHAPES),
        "after_effect": chance.random() < 0.7,
        **_JSON,
    },
    "dropped before the effect": lambda chance: {"drop": "before", "times": chance.randint(1, 4)},
    "dropped after the effect": lambda chance: {"drop": "after", "times": chance.randint(1, 3)},
    "held, client dropped": lambda chance: {"hold_seconds": _hold(chance), "drop": "before"},
    "held, client answered 504": lambda chance: {"hold_seconds": _hold(chance), "status": 504, "body": _PAGE},
    "held beyond the time-out": lambda chance: {"hold_seconds": READ_SECONDS + chance.uniform(0.2, 0.9)},
    "delayed beyond the time-out": lambda chance: {"delay_seconds": READ_SECONDS + chance.uniform(0.2, 0.9)},
    "answered beyond the time-out": lambda chance: {"delay_seconds": READ_SECONDS + 0.5, "after_effect": True},
    "slow": lambda chance: {"delay_seconds": chance.uniform(0.05, 0.4), "times": chance.randint(1, 6)},
    "truncated": lambda chance: {"truncate_bytes": chance.choice([0, 1, 20, 200]), "times": chance.randint(1, 2)},
}


def _hold(chance: Random) -> float:
    return round(chance.uniform(0.3, LONGEST_HOLD), 2)


@dataclass(frozen=True)
class Attempt:
    """One call of the work, and what happens to it.

    Attributes:
        faults: Faults of the platform meanwhile.
        kill_at_request: SIGKILL once the platform has had so many requests of this attempt; None never.
        kill_after_seconds: SIGKILL after this time; None never.
        twin: Whether another process does the same work at the same time.
        disk: What is wrong with the local disk.
        keys_expire_after_seconds: When keys or tokens stop working; None never.
        restart_after_seconds: When the platform goes down for a moment; None never.
    """

    faults: tuple[Fault, ...] = ()
    kill_at_request: int | None = None
    kill_after_seconds: float | None = None
    twin: bool = False
    disk: Literal["", "full", "read-only"] = ""
    keys_expire_after_seconds: float | None = None
    restart_after_seconds: float | None = None

    @property
    def happenings(self) -> list[str]:
        """The disturbances that are no faults of the platform's answers, for the count."""
        told = {
            "killed at a request": self.kill_at_request is not None,
            "killed at a moment": self.kill_after_seconds is not None,
            "twin process": self.twin,
            f"{self.disk} disk": bool(self.disk),
            "keys expire": self.keys_expire_after_seconds is not None,
            "platform restarts": self.restart_after_seconds is not None,
        }
        return [name for name, happens in told.items() if happens]


def plan(seed: int, creates: str) -> list[Attempt]:
    """Make the disturbed attempts of a rehearsal.

    Args:
        seed: The same seed gives the same plan.
        creates: Regular expression of the paths whose POST launches something; they are hit more often than others.
    """
    chance = Random(seed)
    return [_attempt(chance, creates) for _ in range(chance.randint(1, _DISTURBED_ATTEMPTS))]


def _attempt(chance: Random, creates: str) -> Attempt:
    def sometimes(probability: float, value: Any) -> Any:
        return value if chance.random() < probability else None

    return Attempt(
        faults=tuple(_fault(chance, creates) for _ in range(chance.randint(1, 5))),
        kill_at_request=sometimes(0.35, chance.randint(1, 40)),
        kill_after_seconds=sometimes(0.2, round(chance.uniform(0.05, 3.0), 2)),
        twin=chance.random() < 0.2,
        disk=chance.choice(["full", "read-only"]) if chance.random() < 0.2 else "",
        keys_expire_after_seconds=sometimes(0.1, round(chance.uniform(0.1, 2.0), 2)),
        restart_after_seconds=sometimes(0.15, round(chance.uniform(0.1, 2.0), 2)),
    )


def _fault(chance: Random, creates: str) -> Fault:
    name = chance.choice(list(KINDS))
    which: dict[str, Any] = {"skip": chance.choice([0, 0, 0, 1, 2, 3, 5, 8, 13, 20])}
    if chance.random() < 0.4:
        which = {"method": "POST", "path": creates}
    elif chance.random() < 0.5:
        which["method"] = chance.choice(["GET", "POST", "PUT", "DELETE"])
    return Fault(**{"name": name, "times": 1, **KINDS[name](chance), **which})
