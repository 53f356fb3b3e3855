"""`prefect-biomed up`, `status` and `down`, and deployments that run as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.shell import typed
from prefect_biomed.cli.laboratory import FIRST


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_is_there_to_begin_with(tmp_path: Path) -> None:
    place = ("--home", str(tmp_path / "lab"))
    # In a process of its own, which the laboratory outlives.
    program = [sys.executable, "-c", "from prefect_biomed.cli import main; main()"]
    began = subprocess.run([*program, "up", *place, "--json"], capture_output=True, text=True, timeout=300, check=False)
    assert began.returncode == 0, began.stdout + began.stderr
    try:
        assert typed("prefect-biomed", "status", *place)[0] == 0
        status, again = typed("prefect-biomed", "up", *place)
        assert status == 2
        assert "End it with `prefect-biomed down`" in again
        environment = os.environ | {"PREFECT_API_URL": json.loads(began.stdout)["api_url"]}
        for deployment in FIRST.values():
            command = [sys.executable, "-m", "prefect", "deployment", "run", deployment, "--watch"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        status, ended = typed("prefect-biomed", "down", *place)
    assert (status, ended) == (0, "Ended: sandbox, server, worker\n")
    assert typed("prefect-biomed", "down", *place) == (0, "Nothing was running.\n")


def test_a_process_that_has_the_number_of_an_older_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "processes.json").write_text(json.dumps({"worker": [os.getpid(), 1.0], "server": [2**22 + 1, 1.0]}))
    assert typed("prefect-biomed", "status", "--home", str(tmp_path)) == (1, "Nothing is running.\n")
    assert typed("prefect-biomed", "down", "--home", str(tmp_path)) == (0, "Nothing was running.\n")


def test_a_folder_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "study.csv").write_text("mine")
    status, said = typed("prefect-biomed", "up", "--home", str(tmp_path))
    assert status == 2
    assert "is no folder of a laboratory" in said
    assert (tmp_path / "study.csv").read_text() == "mine"
