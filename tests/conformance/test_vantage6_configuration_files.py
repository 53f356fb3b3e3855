"""Configurations that are written for nodes and servers, read by the command line of each generation."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.vantage6_servers import ENVIRONMENTS
from prefect_biomed.clients.vantage6 import NodeDatabase
from prefect_biomed.clients.vantage6.configuration_files import node_configuration, server_configuration

pytestmark = [pytest.mark.conformance]

# The command line leaves what is not valid empty (3) or raises (4); of 5 its own templates are what it checks by.
READ = {
    3: """
import json, sys
from vantage6.cli.configuration_manager import NodeConfigurationManager, ServerConfigurationManager
node, server = sys.argv[1:]
found = [dict(NodeConfigurationManager.from_file(node).application),
         dict(ServerConfigurationManager.from_file(server).prod)]
print(json.dumps(found))
""",
    4: """
import json, sys
from vantage6.cli.configuration_manager import NodeConfigurationManager, ServerConfigurationManager
node, server = sys.argv[1:]
found = [dict(NodeConfigurationManager.from_file(node).config),
         dict(ServerConfigurationManager.from_file(server).config)]
print(json.dumps(found))
""",
    5: """
import json, sys, jinja2, yaml
from vantage6.cli.configuration_manager import HQConfigurationManager, NodeConfigurationManager
found = []
for manager, file in zip((NodeConfigurationManager, HQConfigurationManager), sys.argv[1:]):
    given = dict(manager.from_file(file).config)
    template = manager(name="any").get_config_template()
    template.environment.undefined = jinja2.ChainableUndefined
    found.append(yaml.safe_load(template.render(**given)))
print(json.dumps(found))
""",
}


def written(major: int, encrypted: bool, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    url = "https://vantage6.example.org/hq" if major == 5 else "https://vantage6.example.org:5000/api"
    keycloak = {"auth_url": "https://auth.example.org", "realm": "vantage6"}
    node = node_configuration(
        url,
        major,
        "north-diabetes",
        "0123-key",
        private_key=folder / "privkey_north.pem" if encrypted else None,
        databases=[NodeDatabase(uri="/data/patients.csv"), NodeDatabase(label="more", uri="/data/more.parquet")],
        **keycloak,  # type: ignore[arg-type]
    )
    return node, server_configuration(url, major, lambda: "made-up", folder / "server", **keycloak)  # type: ignore[arg-type]


def is_within(ours: Any, theirs: Any) -> bool:
    """Whether all that we write was understood, beside what the command line adds."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(is_within(value, theirs.get(name)) for name, value in ours.items())
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(ours) == len(theirs) and all(map(is_within, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("major", [3, 4, 5])
def test_the_command_line_reads_what_is_written(
    official_environment: Callable[..., Path], major: int, encrypted: bool, tmp_path: Path
) -> None:
    node, server = written(major, encrypted, tmp_path)
    files = [tmp_path / "node.yaml", tmp_path / "server.yaml"]
    for file, content in zip(files, (node, server), strict=True):
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    done = subprocess.run(
        [official_environment(*ENVIRONMENTS[major]), "-c", READ[major], *files],
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    node_read, server_read = json.loads(done.stdout.splitlines()[-1])
    if major == 3:
        node, server = node["application"], server["environments"]["prod"]
    assert is_within(node, node_read), (node, node_read)
    assert is_within(server, server_read), (server, server_read)
