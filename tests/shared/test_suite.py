"""What the suite itself promises to those who run it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import drawing


def run(until: float, folder: Path) -> str:
    """Run a fast file of the suite with `--until`, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--basetemp", str(folder / "tests")]
    command += ["--until", f"{until:.0f}", "tests/shared/test_texts.py"]
    done = subprocess.run(command, cwd=drawing.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_no_test_begins_after_its_time_and_the_reason_is_printed(tmp_path: Path) -> None:
    late = run(time.time() - 1, tmp_path)
    assert "`make slow` and `make conformance` run everything" in late and " passed" not in late
    early = run(time.time() + 3600, tmp_path)
    assert " passed" in early and " skipped" not in early
