"""Draws the floors of docs/architecture.md out of the imports in the code: `python tests/harness/drawing.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("analysis", "blocks", "cli", "clients", "flows", "sandbox", "tasks")
PLATFORMS = ("boss", "vantage6", "vip")
_BEGIN, _END = "<!-- drawing:", "<!-- /drawing -->"


def modules() -> dict[str, Path]:
    """All modules of the package by their import names."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(("prefect_biomed", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere, late and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                whole if (whole := f"{node.module}.{alias.name}") in known else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & known.keys()


def room(module: str) -> str:
    """The box in which a module is drawn: its folder, its platform, or on the shared floor itself."""
    parts = module.split(".")[1:]
    if parts[0] != "clients" or len(parts) == 1:
        return parts[0]
    return f"clients.{parts[1]}"


def arrows() -> dict[str, set[str]]:
    """What each box imports, without what it imports through others anyway."""
    known = modules()
    below: dict[str, set[str]] = {}
    for module, path in known.items():
        if module == "prefect_biomed.clients":
            continue
        reached = {room(other) for other in imports(path, known)} - {"clients"}
        below.setdefault(room(module), set()).update(reached - {room(module)})
    return {box: {one for one in direct if not _reached(one, direct - {one}, below)} for box, direct in below.items()}


def _reached(box: str, starts: set[str], below: dict[str, set[str]]) -> bool:
    waiting, seen = list(starts), set(starts)
    while waiting:
        for one in below.get(waiting.pop(), set()) - seen:
            seen.add(one)
            waiting.append(one)
    return box in seen


def drawing() -> str:
    """The imports between the boxes as a Mermaid graph."""
    drawn = arrows()
    floor = [box for box in sorted(drawn) if box.startswith("clients.") and box.split(".")[1] not in PLATFORMS]
    lines = ["```mermaid", "graph TD"]
    lines += [f"    {_identifier(box)}[{box}]" for box in sorted(drawn) if box not in floor]
    lines += ["    subgraph floor [the shared floor of clients]"]
    lines += [f"        {_identifier(box)}[{box.removeprefix('clients.')}]" for box in floor]
    lines += ["    end"]
    lines += [
        f"    {_identifier(above)} --> {_identifier(below)}"
        for above in sorted(drawn)
        for below in sorted(drawn[above])
    ]
    return "\n".join([*lines, "```"])


def page_with(drawn: str) -> str:
    """The page with this drawing in its place."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(_BEGIN)
    note, _, rest = rest.partition("\n")
    return f"{head}{_BEGIN}{note}\n{drawn}\n{_END}{rest.partition(_END)[2]}"


def _identifier(box: str) -> str:
    return "".join(character for character in box if character.isalnum())


if __name__ == "__main__":
    PAGE.write_text(page_with(drawing()), encoding="utf-8")
