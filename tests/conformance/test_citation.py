"""`CITATION.cff`, looked at by the tool of its makers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conformance.conftest import OfficialEnvironment

pytestmark = pytest.mark.conformance

CITATION = Path(__file__).parents[2] / "CITATION.cff"


def test_the_citation_follows_the_schema(official_environment: OfficialEnvironment, tmp_path: Path) -> None:
    program = official_environment("cffconvert", ["cffconvert==2.0.0"]).parent / "cffconvert"

    def validated(path: Path) -> subprocess.CompletedProcess[str]:
        words = [str(program), "--validate", "-i", str(path)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    done = validated(CITATION)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "valid according to schema version 1.2.0" in done.stdout
    broken = tmp_path / "CITATION.cff"
    broken.write_text(CITATION.read_text().replace("authors:", "writers:"))
    assert validated(broken).returncode != 0
