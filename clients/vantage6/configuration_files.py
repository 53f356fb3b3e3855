"""What ``v6 node`` and ``v6 server`` (``v6 hq`` of generation 5) read, in the form of each generation.

The names are those of the command line's own checks and templates in 3.11.1, 4.15.2 and 5.0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

__all__ = ["NodeDatabase", "node_configuration", "server_configuration"]


class NodeDatabase(BaseModel):
    """A database in the configuration of a node.

    Attributes:
        label: What tasks call it.
        uri: Path or connection string, as the node sees it.
        type: Kind of the database.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = "default"
    uri: str
    type: Literal["csv", "parquet", "sql", "excel", "sparql", "omop", "folder", "other"] = "csv"


def node_configuration(
    url: str,
    major: int,
    name: str,
    api_key: str,
    *,
    private_key: Path | None,
    databases: Sequence[NodeDatabase],
    auth_url: str | None,
    realm: str,
) -> dict[str, Any]:
    """Write the configuration of a node.

    Args:
        url: URL of the server's API.
        major: Generation of the server.
        name: Name of the node.
        api_key: Its key. A secret.
        private_key: File with the private key of its organization, None without encryption.
        databases: What it serves.
        auth_url: Keycloak, for generation 5.
        realm: Its realm.
    """
    server, port, path = _address(url)
    encrypted = {"enabled": private_key is not None}
    if major == 5:
        files = [
            {
                "name": one.label,
                "uri": one.uri,
                "type": one.type,
                "volumePath": str(Path(one.uri).parent),
                "originalName": Path(one.uri).name,
            }
            for one in databases
        ]
        return {
            "node": {
                "name": name,
                "apiKey": api_key,
                "keycloak": {"url": auth_url, "realm": realm},
                "hq": {"url": server, "port": port, "path": path},
                "encryption": encrypted | ({"private_key": str(private_key)} if private_key else {}),
                "databases": {"fileBased": files},
            }
        }
    common = {
        "api_key": api_key,
        "server_url": server,
        "port": port,
        "api_path": path,
        "encryption": encrypted | {"private_key": str(private_key) if private_key else None},
        "task_dir": f"tasks-{name}",
        "logging": _logging("node.log"),
    }
    if major == 3:
        return _of_generation_3(common | {"databases": {one.label: one.uri for one in databases}})
    return common | {"databases": [one.model_dump() for one in databases]}


def server_configuration(
    url: str, major: int, new_secret: Callable[[], str], data: Path, *, auth_url: str | None, realm: str
) -> dict[str, Any]:
    """Write the configuration of a server that is reached at an address.

    Args:
        url: URL of the server's API.
        major: Generation of the server.
        new_secret: Makes up secrets.
        data: Folder of the database.
        auth_url: Keycloak, for generation 5. Its administrator's password is not in the configuration.
        realm: Its realm.
    """
    server, port, path = _address(url)
    if major == 5:
        return {
            "nameOverride": "vantage6-hq",
            "hq": {
                "description": f"vantage6 at {url}",
                "standalone": True,
                "baseUrl": server,
                "apiPath": path,
                "port": port,
                "keycloak": {"url": auth_url, "realm": realm},
                "logging": _logging("hq.log"),
                "jwt": {"secret": new_secret()},
            },
            "rabbitmq": {"username": "vantage6", "password": new_secret(), "vhost": "/vantage6"},
            "database": {
                "external": False,
                "username": "vantage6",
                "password": new_secret(),
                "name": "vantage6",
                "volumePath": str(data),
            },
        }
    common = {
        "description": f"vantage6 at {url}",
        "ip": "0.0.0.0",  # noqa: S104 - nodes are on other machines; so does the command line
        "port": port,
        "api_path": path,
        "uri": f"sqlite:///{data / 'vantage6.sqlite'}",
        "allow_drop_all": False,
        "jwt_secret_key": new_secret(),
        "logging": _logging("server.log"),
    }
    if major == 3:
        return _of_generation_3({}, prod=common)
    return common | {"server_url": server + path}


def _address(url: str) -> tuple[str, int, str]:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}", parts.port or (443 if parts.scheme == "https" else 80), parts.path


def _logging(file: str) -> dict[str, Any]:
    return {
        "level": "INFO",
        "file": file,
        "use_console": True,
        "backup_count": 5,
        "max_size": 1024,
        # A file without these two is not valid for the command line of generations 3 and 4.
        "format": "%(asctime)s - %(name)-14s - %(levelname)-8s - %(message)s",
        "datefmt": "%Y-%m-%d %H:%M:%S",
    }


def _of_generation_3(application: Mapping[str, Any], **environments: Mapping[str, Any]) -> dict[str, Any]:
    every = {name: dict(environments.get(name, {})) for name in ("acc", "dev", "prod", "test")}
    return {"application": dict(application), "environments": every}
