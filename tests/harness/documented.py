"""The commands that the documentation tells people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("make", "pip", "prefect", "prefect-biomed", "python")


def commands() -> dict[str, list[str]]:
    """Commands in blocks and between backticks.

    Returns:
        Words of each command by the command itself; without variables that are set for it, comments and the final `&`.
    """
    found = {}
    for document in DOCUMENTS:
        text = document.read_text()
        typed = [
            line for block in re.findall(r"```(?:console|sh)\n(.*?)```", text, re.DOTALL) for line in _typed(block)
        ]
        typed += re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", text)
        for command in typed:
            words = shlex.split(command, comments=True)
            while re.match(r"[A-Z_0-9]+=", words[0]):
                words = words[1:]
            words = [word for word in words if word not in ("&", "…")]
            if words[0] in PROGRAMS:
                found[shlex.join(words)] = words
    return found


def samples() -> list[tuple[str, str]]:
    """Python of the documentation.

    Returns:
        Where each sample is, as `docs/vip.md:20`, and the sample.
    """
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            line = text.count("\n", 0, block.start()) + 1
            found.append((f"{document.relative_to(ROOT)}:{line}", block[1]))
    return found


def _typed(block: str) -> list[str]:
    """Split a block into commands; a quoted text may go on over several lines, what is printed is left out."""
    prompt = "$ " if block.startswith("$ ") else ""
    lines = block.splitlines()
    typed = []
    while lines:
        line = lines.pop(0)
        if not line.startswith(prompt):
            continue
        command = line.removeprefix(prompt)
        while command.count("'") % 2:
            command += "\n" + lines.pop(0)
        typed.append(command)
    return typed
