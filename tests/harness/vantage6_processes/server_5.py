"""Starts the real vantage6-hq 5.x in this process, on loopback, over SQLite.

Run by the interpreter of an environment that holds vantage6-hq; its one argument is a JSON object:
``port``, ``directory``, ``settings`` (merged into the server's configuration file). Where Keycloak
is comes from the environment, as in an installation.
"""

import json
import sys
from pathlib import Path

# First, because importing it patches the standard library for gevent.
import vantage6.hq  # isort: skip
import yaml


def main() -> None:
    """Write the configuration, start the server and serve until the process is ended."""
    options = json.loads(sys.argv[1])
    directory = Path(options["directory"])
    configuration = {
        "description": "conformance",
        "ip": "127.0.0.1",
        "port": options["port"],
        "api_path": "/hq",
        "base_url": f"http://127.0.0.1:{options['port']}",
        "uri": f"sqlite:///{directory / 'hq.sqlite'}",
        "allow_drop_all": False,
        "jwt_secret_key": "conformance-of-the-client-with-the-server",
        "directories": {"log": str(directory / "log"), "data": str(directory / "data")},
        "server_name": "conformance",
        "logging": {
            "level": "INFO",
            "file": "hq.log",
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
    file = directory / "hq.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    app = vantage6.hq.run_hq(str(file), system_folders=False)
    app.ensure_db_initialized()
    app.socketio.run(app.app, host="127.0.0.1", port=options["port"])


if __name__ == "__main__":
    main()
