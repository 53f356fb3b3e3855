"""What `make sbom` does: a bill of materials of what is installed, its licences, and what is known to be vulnerable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.official import official_environment

TOOLS = ("cyclonedx-bom==7.5.0", "pip-audit==2.10.1")
ROOT = Path(__file__).parents[2]
# Licences that bind whoever passes the package on; a package that can be had under another one is not bound.
RECIPROCAL = ("GPL", "AGPL", "SSPL", "European Union Public")
_AUDITED_WITHIN_SECONDS = 300


def bill_of_materials(interpreter: str, target: Path) -> dict[str, Any]:
    """Write a CycloneDX document of an environment.

    Args:
        interpreter: Of the environment.
        target: The file to write.

    Returns:
        The document.

    Raises:
        subprocess.CalledProcessError: The tool failed; what it said is on standard error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [_tool("cyclonedx-py"), "environment", interpreter, "--pyproject", str(ROOT / "pyproject.toml")]
    options = ["--output-reproducible", "--validate", "--output-format", "JSON", "--output-file", str(target)]
    subprocess.run([*command, *options], check=True)
    document: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return document


def licences(component: Mapping[str, Any]) -> list[str]:
    """Return what a component says of its licences, in its own words."""
    found = []
    for one in component.get("licenses", []):
        licence = one.get("license", {})
        found.append(str(one.get("expression") or licence.get("id") or licence.get("name")))
    return found


def reciprocal(components: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the components that can be had under reciprocal licences alone."""
    return [
        f"{component['name']} {component['version']}: {', '.join(found)}"
        for component in components
        if (found := licences(component)) and all(_is_reciprocal(licence) for licence in found)
    ]


def _is_reciprocal(licence: str) -> bool:
    return "LGPL" not in licence and " OR " not in licence and any(name in licence for name in RECIPROCAL)


def audit(interpreter: str) -> str:
    """Ask for known vulnerabilities of what is installed.

    Args:
        interpreter: Of the environment.

    Returns:
        What was found, or that nobody could be asked: no answer is not the answer that there is nothing.
    """
    installed = Path(interpreter).parents[1] / "lib"
    paths = [str(path) for path in installed.glob("python*/site-packages")]
    command = [_tool("pip-audit"), "--skip-editable", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(
            [*command, *(word for path in paths for word in ("--path", path))],
            capture_output=True,
            text=True,
            timeout=_AUDITED_WITHIN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"NOT AUDITED: the list of vulnerabilities did not answer within {_AUDITED_WITHIN_SECONDS} s"
    return told(done.returncode, done.stdout, done.stderr)


def told(status: int, output: str, errors: str) -> str:
    """Return in a line for each vulnerability what an audit printed.

    Args:
        status: Its exit status.
        output: What it printed as JSON.
        errors: What it printed on standard error.
    """
    try:
        dependencies: Sequence[Mapping[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (errors.strip().splitlines() or [f"exit status {status}"])[-1]
        return f"NOT AUDITED: {last}"
    found = [f"{one['name']} {one['version']}: {known['id']}" for one in dependencies for known in one.get("vulns", [])]
    passed_over = [str(one["name"]) for one in dependencies if "skip_reason" in one]
    looked_at = len(dependencies) - len(passed_over)
    lines = [
        f"{looked_at} packages audited, known vulnerabilities: {len(found)}" if looked_at else "NOT AUDITED",
        *found,
    ]
    return "\n".join([*lines, f"nothing is known of {', '.join(passed_over)}"] if passed_over else lines)


def _tool(name: str) -> str:
    return str(official_environment("supply-chain", TOOLS).parent / name)


def main() -> None:
    """Print licences and vulnerabilities; write the bill of materials."""
    target = ROOT / "build" / "sbom.cdx.json"
    components = bill_of_materials(sys.executable, target)["components"]
    print(f"{len(components)} components in {target.relative_to(ROOT)}")
    for words, count in Counter("; ".join(licences(one)) or "not said" for one in components).most_common():
        print(f"{count:5} {words}")
    if bound := reciprocal(components):
        raise SystemExit("under reciprocal licences alone:\n" + "\n".join(bound))
    print(audit(sys.executable))


if __name__ == "__main__":
    main()
