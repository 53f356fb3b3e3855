"""VIP: uploads and memory, beside vip-client 0.1.10."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import requests
from rich.console import Console
from rich.table import Table

from benchmarks.measure import measure, sandbox
from benchmarks.official import official_environment

FILES = 500
FILE_BYTES = 100_000
SERVER_SECONDS = 0.2
LARGE_BYTES = 2**30

OFFICIAL_UPLOAD = """
from vip_client import VipSession
VipSession.init(api_key=arguments["api_key"], vip_portal_url=arguments["url"], verbose=False)
session = VipSession(session_name="official", input_dir="inputs", output_dir="official")
measured(lambda: session.upload_inputs() and None)
"""
OURS_UPLOAD = """
from pathlib import Path
from prefect_biomed.clients.vip import VipClient, VipSession, preflight, upload
home = "/vip/Home/API/ours"
session = VipSession(session_name="ours", input_dir=Path("inputs").absolute(), output_dir=Path("ours").absolute(),
    vip_input_dir=home + "/INPUTS", vip_output_dir=home + "/OUTPUTS", token="benchmark")
client = VipClient(arguments["url"], arguments["api_key"], parallelism=8)
measured(lambda: upload(client, session, preflight(client, session)).sent)
"""
OFFICIAL_LARGE = """
from vip_client.utils import vip
vip.set_vip_url(arguments["url"])
vip.setApiKey(arguments["api_key"])
vip.create_dir("/vip/Home/large-official")
def work():
    if arguments["up"]:
        vip.upload("large.bin", "/vip/Home/large-official/large.bin")
    else:
        vip.download("/vip/Home/large-official/large.bin", "back-official.bin")
measured(work)
"""
OURS_LARGE = """
from pathlib import Path
from prefect_biomed.clients.vip import VipClient
from prefect_biomed.clients.vip.download import Output, fetch_file
from prefect_biomed.clients.vip.remote_files import put_and_verify
client = VipClient(arguments["url"], arguments["api_key"])
client.make_folder("/vip/Home/large-ours")
path = "/vip/Home/large-ours/large.bin"
def work():
    if arguments["up"]:
        put_and_verify(client, Path("large.bin"), path)
    else:
        fetch_file(client, Output(path, Path("back-ours.bin"), client.entry(path).size))
measured(work)
"""


def main() -> None:
    """Measure and print both clients side by side."""
    official = official_environment("vip-client", ["vip-client==0.1.10"])
    table = Table("", "vip-client 0.1.10", "prefect-biomed", "ratio", title="VIP")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _upload(official, folder, table)
        _large(official, folder, table)
    Console().print(table)


def _upload(official: Path, folder: Path, table: Table) -> None:
    (folder / "inputs").mkdir()
    for number in range(FILES):
        (folder / "inputs" / f"{number:03d}.bin").write_bytes(number.to_bytes(2) * (FILE_BYTES // 2))
    with sandbox("vip", "--set", f"vip.transfer_seconds={SERVER_SECONDS}") as ready:
        facts = ready["vip"]
        account = {"url": facts["url"], "api_key": facts["api_key"]}
        ours = measure(sys.executable, OURS_UPLOAD, folder, **account)
        peak = _peak_of_puts(facts["url"])
        theirs = measure(official, OFFICIAL_UPLOAD, folder, **account)
    if ours["result"] != FILES:
        raise RuntimeError(f"{ours['result']} files were sent")
    table.add_row(
        f"upload of {FILES} files of {FILE_BYTES // 1000} kB, {SERVER_SECONDS * 1000:.0f} ms of server time each",
        f"{theirs['seconds']:.1f} s",
        f"{ours['seconds']:.1f} s, {peak} at once",
        f"{theirs['seconds'] / ours['seconds']:.1f}x",
    )


def _peak_of_puts(url: str) -> int:
    journal = requests.get(f"{url}/_sandbox/journal", timeout=60).json()
    return max(entry["concurrent"] for entry in journal if entry["method"] == "PUT")


def _large(official: Path, folder: Path, table: Table) -> None:
    with (folder / "large.bin").open("wb") as file:
        file.truncate(LARGE_BYTES)
        file.write(b"not only zeros")
        file.truncate(LARGE_BYTES)
    limit = f"vip.max_direct_transfer_bytes={2 * LARGE_BYTES}"
    with sandbox("vip", "--set", limit) as ready:
        facts = ready["vip"]
        for direction, up in (("up", True), ("down", False)):
            account = {"url": facts["url"], "api_key": facts["api_key"], "up": up}
            ours = measure(sys.executable, OURS_LARGE, folder, **account)
            theirs = measure(official, OFFICIAL_LARGE, folder, **account)
            table.add_row(
                f"one file of 1 GiB {direction}: peak memory above the idle process",
                f"{theirs['peak_mib']:.0f} MiB, {theirs['seconds']:.1f} s",
                f"{ours['peak_mib']:.0f} MiB, {ours['seconds']:.1f} s",
                f"{theirs['peak_mib'] / max(ours['peak_mib'], 0.1):.0f}x",
            )
            if not up and (folder / "back-ours.bin").stat().st_size != LARGE_BYTES:
                raise RuntimeError("the file did not come back whole")
