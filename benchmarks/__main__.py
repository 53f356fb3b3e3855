"""Side by side with the official clients: `make bench`, or `python -m benchmarks vip`."""

from __future__ import annotations

import argparse
import importlib

PLATFORMS = ("vip", "vantage6", "vantage6_payloads", "vantage6_rounds", "vantage6_tutorials", "boss", "imports")


def main() -> None:
    """Run the benchmarks asked for, all by default, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("platforms", nargs="*", choices=[*PLATFORMS, []], metavar="platform", help=", ".join(PLATFORMS))
    for platform in parser.parse_args().platforms or PLATFORMS:
        importlib.import_module(f"benchmarks.{platform}").main()


if __name__ == "__main__":
    main()
