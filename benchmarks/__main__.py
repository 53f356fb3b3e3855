"""Side by side with the official clients: `make bench`, or `python -m benchmarks vip`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

PLATFORMS = ("vip", "vantage6", "boss")


def main() -> None:
    """Run the benchmarks of the platforms asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    available = [name for name in PLATFORMS if (Path(__file__).parent / f"{name}.py").is_file()]
    parser.add_argument("platforms", nargs="*", choices=[[], *available], default=available)
    for platform in parser.parse_args().platforms:
        importlib.import_module(f"benchmarks.{platform}").main()


if __name__ == "__main__":
    main()
