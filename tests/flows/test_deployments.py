"""The files of `deployments/` agree with the package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
FILE: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())


@pytest.mark.parametrize("deployment", FILE["deployments"], ids=lambda deployment: deployment["name"])
def test_a_deployment_names_a_flow_and_is_looked_after(deployment: dict[str, Any]) -> None:
    module, _, name = deployment["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    assert isinstance(flow, Flow)
    assert "biomed" in deployment["tags"], "the automations look after runs with the tag biomed only"
    assert deployment["work_pool"]["work_queue_name"]
    # Otherwise, deploying again takes away what users have set.
    (step,) = deployment["build"]
    kept = step["prefect_biomed.deployments.keep.keep"]
    assert {name: kept[name] for name in ("entrypoint", "name")} == {
        name: deployment[name] for name in ("entrypoint", "name")
    }
    assert deployment["parameters"] == {"__prefect_kind": "json", "value": "{{ parameters }}"}
    assert deployment["schedules"] is None
