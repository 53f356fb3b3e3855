"""Starts the real vantage6-server 4.x in this process, on loopback, over SQLite.

Run by the interpreter of an environment that holds vantage6-server; its one argument is a JSON
object: ``port``, ``directory``, ``access_seconds`` and ``refresh_seconds`` (null: the server's
own), ``settings`` (merged into the server's configuration file).
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

# First, because importing it patches the standard library for gevent.
import vantage6.server  # isort: skip
import bcrypt
import yaml

CHEAP = 4


def main() -> None:
    """Write the configuration, start the server and serve until the process is ended."""
    options = json.loads(sys.argv[1])
    directory = Path(options["directory"])
    # The server compares a node's key with the hash of every node, which at bcrypt's usual cost
    # takes a quarter of a second each.
    salt = bcrypt.gensalt
    bcrypt.gensalt = lambda rounds=CHEAP, prefix=b"2b": salt(CHEAP, prefix)
    configuration = {
        "description": "conformance",
        "ip": "127.0.0.1",
        "port": options["port"],
        "api_path": "/api",
        "server_url": f"http://127.0.0.1:{options['port']}",
        "uri": f"sqlite:///{directory / 'server.sqlite'}",
        "allow_drop_all": True,
        "jwt_secret_key": "conformance-of-the-client-with-the-server",
        "directories": {"log": str(directory / "log"), "data": str(directory / "data")},
        "server_name": "conformance",
        "password_policy": {"max_failed_attempts": 5, "inactivation_minutes": 15},
        "logging": {
            "level": "INFO",
            "file": "server.log",
            "use_console": True,
            "backup_count": 1,
            "max_size": 10240,
            "format": "%(asctime)s %(levelname)s %(name)s %(message)s",
            "datefmt": "%H:%M:%S",
            "loggers": [],
        },
        **options.get("settings", {}),
    }
    for folder in ("log", "data"):
        (directory / folder).mkdir(exist_ok=True)
    file = directory / "server.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    app = vantage6.server.run_server(str(file), system_folders=False)
    if options.get("access_seconds"):
        app.app.config["JWT_ACCESS_TOKEN_EXPIRES"] = timedelta(seconds=options["access_seconds"])
    if options.get("refresh_seconds"):
        app.app.config["JWT_REFRESH_TOKEN_EXPIRES"] = timedelta(seconds=options["refresh_seconds"])
    vantage6.server.run_dev_server(app, host="127.0.0.1", port=options["port"])


if __name__ == "__main__":
    main()
