"""The wheel holds what the tree holds, and the README says what is true."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prefect import Flow

ROOT = Path(__file__).parents[2]
PACKAGES = ("analysis", "blocks", "cli", "clients", "deployments", "flows", "sandbox", "tasks")


def tracked(*below: str) -> list[str]:
    """Files of the repository, also those that are not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *below]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def packed(names: Iterable[str], folder: Path) -> set[str]:
    """Modules in the wheel that is built from these files alone."""
    source = folder / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name.removeprefix("prefect_biomed/") for name in archive.namelist() if "dist-info" not in name}


@pytest.mark.timeout(300)
def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    modules = tracked(*PACKAGES)
    assert packed([*modules, "pyproject.toml", "README.md", "LICENSE"], tmp_path) == set(modules)


@pytest.mark.timeout(300)
def test_the_image_is_built_from_a_context_that_holds_the_tree(tmp_path: Path) -> None:
    refuse_all, *lines = (ROOT / ".dockerignore").read_text().split()
    assert refuse_all == "*"
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert packed(tracked(*allowed), tmp_path) == set(tracked(*PACKAGES))


def requirements() -> list[Requirement]:
    """What the package asks for, with all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [found for found in map(Requirement, asked) if found.name != project["name"]]


def pins() -> dict[str, str]:
    """Versions of constraints.txt that this python gets, by name."""
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [line for line in lines if line.marker is None or line.marker.evaluate()]
    assert len({line.name for line in found}) == len(found), "two pins of one package"
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in found}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_pin_is_what_the_package_asks_for(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("name", ["prefect", "prefect-dask"])
def test_pins_are_what_prefect_asks_for(name: str) -> None:
    asked = [Requirement(line) for line in metadata.requires(name) or ()]
    if metadata.version(name) != pins()[name]:
        pytest.skip(f"this environment was not made with constraints.txt: {name} {metadata.version(name)}")
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), str(requirement)


def test_no_prefect_whose_schedules_do_not_fire_is_taken() -> None:
    (prefect,) = [found for found in requirements() if found.name == "prefect"]
    assert not prefect.specifier.contains("3.8.8")


def deployed() -> set[str]:
    """All deployments, as `flow/deployment`."""
    found = set()
    for deployment in yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        assert isinstance(flow, Flow), deployment["name"]
        found.add(f"{flow.name}/{deployment['name']}")
    return found


def test_the_readme_names_what_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = (ROOT / "docs" / "deployments.md").read_text()
    assert set(re.findall(r"^\| `([a-z0-9-]+/[a-z0-9-]+)` \|", listed, re.MULTILINE)) == deployed()
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", readme):
        assert (ROOT / target).exists(), target
    for page in set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "index.md"}:
        assert f"docs/{page.name}" in readme, f"no way leads to {page.name}"
    pages = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert pages["theme"]["font"] is False, "fonts would be fetched from elsewhere"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?\$? ?make ([a-z]+)", readme)) <= targets


def test_names_and_version_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    present = {
        "prefect_biomed." + ".".join(path.relative_to(ROOT).parent.parts)
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == present
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    about = project["project"]
    assert (citation["version"], citation["license"]) == (about["version"], about["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_flows_are_there_without_extras_and_say_what_to_install(tmp_path: Path) -> None:
    """A flow imports nothing of another platform, and nothing that only an extra brings before it is run."""
    code = f"""
import sys

for name in ("scipy", "nibabel", "significantdigits", "matplotlib"):
    sys.modules[name] = None  # cannot be found, as after a plain `pip install`
import prefect_biomed.flows.vip
foreign = {{"rocrate", "prefect_biomed.clients.vantage6", "prefect_biomed.clients.boss"}} & set(sys.modules)
assert not foreign, foreign
import prefect_biomed.flows.vantage6
foreign = {{"boto3", "numpy", "PIL", "prefect_biomed.clients.boss"}} & set(sys.modules)
assert not foreign, foreign
from prefect_biomed.cli.running import find_flow, flow_names, run_flow
for name in flow_names():
    find_flow(name)
outcome = run_flow("compare-folders", dict(runs_dir="{tmp_path}", output_dir="{tmp_path}"))
print(outcome.exit_code, outcome.state, outcome.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("2 Refused Comparing results needs matplotlib, nibabel, scipy"), done.stderr
    assert done.stdout.endswith("pip install 'prefect-biomed[analysis]'\n")
