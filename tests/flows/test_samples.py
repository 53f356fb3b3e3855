"""The python of README and documentation is run, against the sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import SecretStr

from harness.documented import samples
from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.cli.laboratory import slice_stack
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vantage6 import Job

# A sample begins with these words; it is a piece of one, or a test of its subject runs the same.
ELSEWHERE = {
    "from prefect_biomed.flows.boss import publish_volume": "a bucket: tests/boss/test_boss_buckets.py",
    "StorageCredentials(": "a bucket: tests/boss/test_boss_buckets.py",
    "write_channel_array(": "an array of the reader: tests/boss/test_boss_cutouts.py",
    "with VipCredentials.load": "a Girder: tests/vip/test_vip_girder.py",
    'input_settings={"t1": "girder:': "a Girder: tests/vip/test_vip_girder.py",
    "vip_resume(credentials, girder=": "a Girder: tests/vip/test_vip_girder.py",
    "def repeated_analysis": "five tasks and a report: tests/flows/test_repeatability.py compares folders",
    "run_my_flow": "tests/sandbox/test_vip_sandbox.py",
    "federated_analysis(...": "calls that are not written out",
    "vip_session(...": "calls that are not written out",
    "analysis.to_frame()": "goes on with the sample before: tests/vantage6/test_vantage6_payloads.py",
    'method="partial_train"': "an algorithm of the reader: tests/flows/test_federated_rounds.py",
    "def my_function(": "a piece of an algorithm",
    'session_name="adults"': "generation 5: tests/flows/test_vantage6_flows.py",
    "OrganizationSpec": "tests/flows/test_vantage6_flows.py",
    "client.add_member": "tests/vantage6/test_vantage6_client.py",
}

# What samples call `credentials`.
ACCOUNTS = """
from prefect_biomed.blocks import BossCredentials, VipCredentials

vip, boss = VipCredentials(api_key="VIP_API_KEY"), BossCredentials(host="api.bossdb.io")
"""


def elsewhere(sample: str) -> str | None:
    """Words of the sample that say that it is not run here."""
    return next((words for words in ELSEWHERE if words in sample), None)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory, volume: Path) -> Iterator[Callable[[str], str]]:
    """A folder with what the samples read; how a sample names what is there."""
    folder = tmp_path_factory.mktemp("samples")
    with Sandbox("vip", "vantage6", "boss", boss={"prepare_seconds": 0.0, "quiet_seconds": 0.1}) as sandbox:
        facts = sandbox.ready()
        vip, boss, hospitals = facts["vip"], facts["boss"], facts["vantage6"]
        sandbox.vantage6.add_image("harbor.example.org/average:2.1", {"partial_average": average})
        sandbox.vantage6.add_image("harbor.example.org/regression:2.1", {"partial_average": average})
        (folder / "images").mkdir()
        for name in ("images/sub-01.nii", "images/sub-02.nii", "sub-01.nii"):
            shutil.copy(volume, folder / name)
        for day in ("monday", "tuesday", "wednesday"):
            (folder / "runs" / day).mkdir(parents=True)
            shutil.copy(volume, folder / "runs" / day)
        key = Path(hospitals["organizations"]["north"]["private_key"])
        shutil.copy(key, folder / "north.pem")
        for z in range(4):
            Image.effect_noise((512, 512), 60 + z).save(folder / f"slice_{z:03d}.png")
        (folder / "ingest.json").write_text(json.dumps(slice_stack(boss["host"], folder, (4, 512, 512), "uint8")))
        password = hospitals["users"]["north-researcher"]["password"]
        address = {"url": hospitals["url"], "username": "north-researcher"}
        north: Any = Vantage6Credentials(**address, password=SecretStr(password), private_key_path=key)
        north.save("north", overwrite=True, _sync=True)
        written = {
            "VipCredentials(": f"VipCredentials(url={vip['url']!r}, ",
            'host="api.bossdb.io"': f"host={boss['host']!r}, protocol='http', token={boss['tokens']['alice']!r}, "
            f"aws_endpoint_url={boss['aws_endpoint_url']!r}",
            "https://vantage6.example.org": hospitals["url"],
            'username="…", password="…"': f"username='north-researcher', password={password!r}",
            "diabetes": "encrypted",
        }

        def here(sample: str) -> str:
            for theirs, ours in written.items():
                sample = sample.replace(theirs, ours)
            return sample

        before = Path.cwd()
        os.chdir(folder)
        os.environ["VIP_API_KEY"] = vip["api_key"]
        try:
            yield here
        finally:
            del os.environ["VIP_API_KEY"]
            os.chdir(before)


def average(job: Job, column: str) -> float:
    values = job.column(column)
    return float(sum(values) / len(values))


# An asynchronous flow leaves connections to Prefect's server to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_sample_runs(
    prefect_api: None, laboratory: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    accounts: dict[str, Any] = {}
    exec(laboratory(ACCOUNTS), accounts)
    ran = []
    for place, sample in samples():
        if elsewhere(sample) is None:
            names = {"credentials": accounts["boss" if "flows.boss" in sample else "vip"]}
            exec(compile(laboratory(sample), place, "exec", dont_inherit=True), names)
            if "def segment(" in sample:
                names["segment"](accounts["vip"], Path())
            if "def describe(" in sample:
                asyncio.run(names["describe"](accounts["vip"]))
            ran.append(place)
    with capsys.disabled():
        print(f"\n{len(ran)} of {len(samples())} samples were run: {', '.join(ran)}")
    assert len(ran) >= 10


def test_only_samples_that_are_there_are_run_elsewhere() -> None:
    found = {elsewhere(sample) for _, sample in samples()} - {None}
    assert found == set(ELSEWHERE)
