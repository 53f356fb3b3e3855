"""What the containers of `deployments/` may do, read from their files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "deployments" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service and not service.get("privileged")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("network_mode") != "host" and "pid" not in service
    assert "docker.sock" not in str(service.get("volumes", ""))
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ())), "open to other machines"


def test_the_files_of_the_package_cannot_be_changed_from_within() -> None:
    for name in ("server", "setup", "worker"):
        assert SERVICES[name]["read_only"] is True
        assert {"/tmp", "/var/lib/prefect"} <= {place.partition(":")[0] for place in SERVICES[name]["tmpfs"]}


def test_nothing_runs_as_root() -> None:
    *_, last = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert int(last) > 0
    for name, service in SERVICES.items():
        if "build" not in service:
            assert int(str(service["user"]).partition(":")[0]) > 0, f"{name} is of another image, and may begin as root"
        else:
            assert "user" not in service, f"{name} has the user of the image"


def test_images_of_others_have_a_version_and_a_system() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    others = [service["image"] for service in SERVICES.values() if "build" not in service]
    for image in [*bases, *others]:
        assert re.search(r":\d+\.\d+(\.\d+)?-", image) or "@sha256:" in image, image


def test_no_secret_is_in_the_files() -> None:
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH_STRING|KEY$", variable):
                assert "${" in value or value.startswith("env:"), variable
