"""Each promise has one room: nothing waits, launches, or reads a status anywhere else, and no modules form a circle."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import mutants
import pytest

from harness import drawing

CLIENTS = drawing.ROOT / "clients"
PLATFORMS = ("boss", "vantage6", "vip")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def calls(path: Path) -> dict[str, list[ast.Call]]:
    """Return what a file calls, by how it spells it."""
    found: dict[str, list[ast.Call]] = {}
    for node in nodes(path):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def in_clients() -> list[Path]:
    return sorted(CLIENTS.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(drawing.ROOT))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_platform_has_the_same_rooms(platform: str) -> None:
    rooms = {"client.py", "models.py", "errors.py", "preflight.py", "launches.py", "monitoring.py"}
    assert rooms <= {path.name for path in (CLIENTS / platform).iterdir()}


# Threads of a pool that wait for keys or for the server's quota, beside others that go on; each says why.
WAITING_IN_A_POOL = {"clients/boss/_aws.py", "clients/boss/putting.py"}


def test_nothing_sleeps_outside_polling() -> None:
    sleeping = {name_of(path) for path in in_clients() if {"sleep", "time.sleep", "polling.sleep"} & calls(path).keys()}
    assert sleeping - {"clients/polling.py"} <= WAITING_IN_A_POOL


def test_nothing_launches_outside_the_protocol() -> None:
    """What sends a create is handed to `Launch`, and only the rooms for launches make one."""
    launching = {name_of(path) for path in in_clients() if "Launch" in calls(path)}
    assert launching == {f"clients/{platform}/launches.py" for platform in PLATFORMS}
    sending = {
        name_of(path)
        for path in in_clients()
        for called in calls(path)
        if re.fullmatch(r"(self\.)?_?client\.(launch|create_task|create_job|create)", called)
    }
    # What is set up once for all, and found again by its name.
    assert sending <= launching | {"clients/vantage6/accounts.py", "clients/vantage6/provisioning.py"}


def test_statuses_of_a_server_out_of_order_are_listed_once() -> None:
    listed = []
    for path in in_clients():
        for node in nodes(path):
            if isinstance(node, ast.Set | ast.Tuple | ast.List):
                numbers = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                if {502, 503, 504} <= numbers:
                    listed.append(name_of(path))
    assert listed == ["clients/http.py"]


def test_files_are_locked_and_renamed_in_one_place() -> None:
    users = {
        name_of(path)
        for path in in_clients()
        for node in nodes(path)
        if (isinstance(node, ast.ImportFrom) and node.module in {"filelock", "fcntl"})
        or (isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"filelock", "fcntl"})
    }
    assert users == {"clients/files.py"}


def test_no_modules_form_a_circle() -> None:
    known = drawing.modules()
    # A package that only hands names on is no room of its own.
    graph = {
        module: drawing.imports(path, known) if path.name != "__init__.py" or "sandbox" in module else set()
        for module, path in known.items()
    }
    assert len(graph) > 100
    assert [circle for circle in strongly_connected(graph) if len(circle) > 1] == []


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    reached = {module: reachable(module, graph) for module in graph}
    return [{other for other in found if module in reached[other]} | {module} for module, found in reached.items()]


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    waiting, seen = [start], set()
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_drawing_of_the_floors_is_made_from_the_code() -> None:
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.page_with(drawing.drawing())


def test_functions_can_be_read_at_a_glance() -> None:
    """At most 60 lines below the docstring; complexity is held by ruff (C901)."""
    long = []
    for path in drawing.modules().values():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                has_text = ast.get_docstring(node) is not None and len(node.body) > 1
                lines = (node.end_lineno or 0) - node.body[1 if has_text else 0].lineno + 1
                if lines > 60:
                    long.append(f"{name_of(path)}:{node.name} {lines}")
    assert long == []


def test_no_test_is_named_by_a_number() -> None:
    numbered = [
        f"{name_of(path)}: {name}"
        for path in sorted((drawing.ROOT / "tests").rglob("*.py"))
        for name in re.findall(r"def (test_(?:case_)?\d+_\w+)", path.read_text(encoding="utf-8"))
    ]
    assert numbered == []


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_each_mutant_still_has_something_to_break(mutant: mutants.Mutant) -> None:
    assert (drawing.ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
