"""Every promise of docs/guarantees.md names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_guarantee_names_a_test_that_exists_and_is_not_skipped() -> None:
    rows = [line for line in (ROOT / "docs/guarantees.md").read_text().splitlines() if "::" in line]
    assert len(rows) >= 30
    for row in rows:
        promise, fault, held = (cell.strip() for cell in row.strip("|").split(" | "))
        assert promise and fault
        named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", held)
        assert named, held
        tree = ast.parse((ROOT / named[1]).read_text())
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert named[2] in functions, held
        marks = " ".join(map(ast.unparse, functions[named[2]].decorator_list))
        assert "skip" not in marks and "xfail" not in marks, held
        is_slow = "slow" in marks or "pytest.mark.slow" in ast.unparse(tree).partition("def ")[0]
        assert is_slow == ("(slow)" in promise), f"{held} is {'' if is_slow else 'not '}slow"
