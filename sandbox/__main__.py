"""Serve the sandbox from the command line.

``python -m prefect_biomed.sandbox [vip] [vantage6] [boss]`` prints one line of JSON when ready and
serves until it gets SIGTERM or SIGINT, then exits 0.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from prefect_biomed.sandbox._sandbox import PLATFORMS, Sandbox


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after the program's name; by default those of this process.

    Returns:
        The exit status: 0 after SIGTERM or SIGINT, 2 when an argument is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m prefect_biomed.sandbox",
        description="Serve VIP, vantage6 and Boss on loopback until SIGTERM or SIGINT.",
    )
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"{', '.join(PLATFORMS)}; default: all")
    parser.add_argument("--state", type=Path, help="file for the ready line, removed at exit")
    parser.add_argument("--state-dir", type=Path, help="folder in which all state is kept for a later start")
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="per request")
    parser.add_argument("--faults", type=Path, help='JSON file: {"vip": [{"status": 502}]}')
    parser.add_argument("--seed", type=int, default=0, help="of ids, keys and noise; default 0")
    parser.add_argument("--port", type=int, default=0, help="of the first platform; the next get the ones after it")
    parser.add_argument(
        "--v6", type=int, choices=(3, 4, 5), help="generation of vantage6; short for --set vantage6.generation="
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PLATFORM.SWITCH=VALUE",
        help="a switch, such as vip.profile=carmin; VALUE is JSON, or a word; may be repeated",
    )
    options = parser.parse_args(arguments)

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        sandbox = Sandbox(
            *options.platforms,
            seed=options.seed,
            latency_ms=options.latency,
            faults=options.faults,
            state=options.state,
            state_dir=options.state_dir,
            port=options.port,
            **_switches([*options.set, *([f"vantage6.generation={options.v6}"] if options.v6 else [])]),
        )
        sandbox.start()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))
    try:
        print(json.dumps(sandbox.ready()), flush=True)
        stopped.wait()
    finally:
        sandbox.stop()
    return 0


def _switches(settings: list[str]) -> dict[str, Any]:
    """Turn `vip.profile=carmin` into `{"vip": {"profile": "carmin"}}`."""
    switches: dict[str, Any] = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        platform, dot, name = target.partition(".")
        if not (equals and dot) or platform not in PLATFORMS:
            raise ValueError(f"--set {setting}: expected PLATFORM.SWITCH=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        switches.setdefault(platform, {})[name] = value
    return switches


if __name__ == "__main__":
    sys.exit(main())
