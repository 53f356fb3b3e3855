"""The examples do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_rounds_of_averaging_end_at_the_pooled_fit() -> None:
    command = [sys.executable, "-m", "examples.federated_averaging"]
    root = Path(__file__).parents[2]
    # On a busy machine Prefect's own server takes longer to start than Prefect gives it.
    environment = os.environ | {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bmi" in done.stdout
