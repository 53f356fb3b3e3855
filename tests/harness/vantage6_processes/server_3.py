"""Starts the real vantage6-server 3.x in this process, on loopback, over SQLite.

Run by the interpreter of an environment that holds vantage6-server; its one argument is a JSON
object as `server_4.py` takes it.
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
    salt = bcrypt.gensalt
    bcrypt.gensalt = lambda rounds=CHEAP, prefix=b"2b": salt(CHEAP, prefix)
    configuration = {
        "description": "conformance",
        "type": "test",
        "ip": "127.0.0.1",
        "port": options["port"],
        "api_path": "/api",
        "uri": f"sqlite:///{directory / 'server.sqlite'}",
        "allow_drop_all": True,
        "jwt_secret_key": "conformance-of-the-client-with-the-server",
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
    file = directory / "server.yaml"
    content = {"application": {}, "environments": {"test": configuration}}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    app = vantage6.server.run_server(str(file), environment="test", system_folders=False)
    for name, key in (("access_seconds", "ACCESS"), ("refresh_seconds", "REFRESH")):
        if options.get(name):
            app.app.config[f"JWT_{key}_TOKEN_EXPIRES"] = timedelta(seconds=options[name])
    vantage6.server.run_dev_server(app, host="127.0.0.1", port=options["port"])


if __name__ == "__main__":
    main()
