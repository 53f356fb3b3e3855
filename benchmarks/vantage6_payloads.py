"""vantage6: results of each kind and size, and arguments of 50 MB; memory, requests, and what the engine keeps.

`python -m benchmarks.vantage6_payloads results --sizes 1000 200000000 --kinds json parquet` measures a part of it. What
is raised is a pickle, or ends the benchmark.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.measure import laboratory, measure, sandbox
from benchmarks.vantage6 import account_of, client_of, data_of, run_of

SIZES = (1_000, 1_000_000, 200_000_000)
ARGUMENTS_BYTES = 50_000_000
STARTS = {
    "json": None,
    "csv": b"30,a\n31,b\n",
    "parquet": b"PAR1",
    "arrow": b"ARROW1\0\0",
    "png": b"\x89PNG\r\n\x1a\n",
    "safetensors": (64).to_bytes(8, "little") + b"{" + b" " * 63,
    "bin": b"\xff\xfe\xff\xfe",
    "pickle": b"\x80\x04",
}

FETCH = """
from pathlib import Path
from pydantic import SecretStr
from prefect_biomed.clients.errors import BiomedError
from prefect_biomed.clients.vantage6 import PrivateKey, connect, fetch_results
client = connect(arguments["url"], username=arguments["username"], password=SecretStr(arguments["password"]),
    auth_url=arguments["auth_url"], private_key=PrivateKey.from_file(Path(arguments["key"])),
    encryption="as the collaboration says")
client.me

def work():
    try:
        (result,) = fetch_results(client, arguments["task"], output_dir=Path("results"))
    except BiomedError as error:
        return [type(error).__name__, 0]
    held = "file" if result.path else "value" if result.content is None else "content"
    if result.path:
        result.path.unlink()
    return [f"{held} ({result.format})", result.size_bytes]

measured(work)
"""
SEND = """
import tempfile, urllib.request
os.environ["PREFECT_HOME"] = tempfile.mkdtemp()
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "300"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
from pathlib import Path
from prefect import flow
from pydantic import SecretStr
from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.clients.vantage6 import TaskRequest
from prefect_biomed.flows.vantage6 import federated_analysis
from prefect_biomed.tasks.vantage6 import create_task, wait_for_results

credentials = Vantage6Credentials(url=arguments["url"], username=arguments["username"],
    password=SecretStr(arguments["password"]), private_key_path=arguments["key"])
common = dict(collaboration="encrypted", image=arguments["image"], method="sleep_with", databases="default")

def journal(verb):
    request = urllib.request.Request(arguments["root"] + "/_sandbox/journal", method=verb)
    return urllib.request.urlopen(request).read()

def kept():
    return sum(path.stat().st_size for path in Path(os.environ["PREFECT_HOME"]).glob("prefect.db*"))

@flow
def empty():
    pass

def of_files():
    federated_analysis(credentials, arguments_file={"weights": arguments["file"]}, arguments={"seconds": 12}, **common)

def in_memory():
    with open(arguments["file"], "rb") as file:
        weights = base64.b64encode(file.read()).decode()
    # The request is not a parameter of the flow, which the engine would keep.
    request = TaskRequest(arguments={"weights": weights, "seconds": 12}, **common)
    @flow
    def mine():
        wait_for_results(credentials, create_task(credentials, request))
    mine()

import base64
empty()
journal("DELETE")
before = kept()

def work():
    {"file": of_files, "memory": in_memory}[arguments["way"]]()
    requests = json.loads(journal("GET"))
    listed = [one["bytes_out"] for one in requests if one["path"].endswith("/run")]
    return [len(requests), sum(one["bytes_in"] for one in requests), sum(listed), len(listed), kept() - before]

measured(work)
"""


def main(arguments: Sequence[str] = ()) -> None:
    """Measure and print a table of arguments, and one of results for each generation.

    Args:
        arguments: Those of the command; all is measured without any.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vantage6_payloads", description=__doc__)
    parser.add_argument("what", nargs="*", choices=["arguments", "results", []], metavar="arguments|results")
    parser.add_argument("--bytes", type=int, default=ARGUMENTS_BYTES, help="size of the arguments")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of results, in bytes")
    parser.add_argument("--kinds", nargs="+", choices=STARTS, default=list(STARTS), help="of results")
    parser.add_argument("--generations", type=int, nargs="+", choices=(3, 4, 5), default=(3, 4, 5))
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    with laboratory() as folder:
        if not options.what or "arguments" in options.what:
            console.print(_arguments(folder, options.bytes))
        if not options.what or "results" in options.what:
            for generation in options.generations:
                console.print(_results(generation, folder, options.sizes, options.kinds))


def _switches(**switches: Any) -> list[str]:
    named = {"key_bits": 2048} | switches
    return [part for name, value in named.items() for part in ("--set", f"vantage6.{name}={json.dumps(value)}")]


def _results(generation: int, folder: Path, sizes: Sequence[int], kinds: Sequence[str]) -> Table:
    columns = [f"{size / 1000:,.0f} kB" for size in sizes]
    title = f"What comes back from generation {generation}; peak memory above idle"
    table = Table("collaboration", "kind", *columns, title=title, box=MARKDOWN)
    with sandbox("vantage6", *_switches(generation=generation)) as ready:
        for collaboration in ("plain", "encrypted"):
            for kind in kinds:
                cells = [_fetched(ready["vantage6"], collaboration, kind, size, folder) for size in sizes]
                table.add_row(collaboration, kind, *cells)
    return table


def _fetched(facts: dict[str, Any], collaboration: str, kind: str, size: int, folder: Path) -> str:
    """Run an algorithm that answers with so many bytes, and fetch its result in a process of its own."""
    start = STARTS[kind]
    arguments: dict[str, Any] = {"size": size}
    if start is not None:
        arguments |= {"start": base64.b64encode(start).decode(), "repeat": start.isascii() and b"\n" in start}
    with client_of(facts) as client:
        data = data_of(client, facts["generation"], collaboration)
        method = "payload" if start is None else "noise"
        task = run_of(client, facts["generation"], data, method, ["north"], collaboration=collaboration, **arguments)
    figures = measure(sys.executable, FETCH, folder, **account_of(facts), task=task)
    said, received = figures["result"]
    what = f"a result of {size} bytes of {kind} on generation {facts['generation']}, {collaboration}"
    if (kind == "pickle") != (said == "UnsafeFormat"):
        raise RuntimeError(f"{what}: {said}")
    if received and abs(received - size) > 100:
        raise RuntimeError(f"{what}: {received} bytes came back")
    return f"{said}, {figures['peak_mib']:.0f} MiB"


def _arguments(folder: Path, size: int) -> Table:
    path = folder / "weights.bin"
    path.write_bytes(b"\x3f\x80\x00\x01" * (size // 4))
    table = Table(
        f"arguments of {size / 1e6:g} MB, 3 organizations, encrypted",
        "peak memory",
        "seconds",
        "requests",
        "MB sent",
        "lists of runs",
        "MB of these",
        "kB more in the engine's database",
        box=MARKDOWN,
    )
    for way, blobs in (("file", False), ("file", True), ("memory", False)):
        with sandbox("vantage6", *_switches(blob_store=blobs)) as ready:
            account = account_of(ready["vantage6"])
            figures = measure(
                sys.executable, SEND, folder, **account, image="prefect-biomed/clinical:1.0", file=str(path), way=way
            )
        requests, sent, listed, lists, kept = figures["result"]
        table.add_row(
            f"from {way}{', blob store' if blobs else ''}",
            f"{figures['peak_mib']:.0f} MiB",
            f"{figures['seconds']:.0f}",
            str(requests),
            f"{sent / 1e6:.0f}",
            str(lists),
            f"{listed / 1e6:.0f}",
            f"{kept / 1e3:.0f}",
        )
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
