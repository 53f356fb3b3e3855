"""An ingest whose process is killed at a random instant, with every policy: the report names what the volume shows.

`make chaos-ingest-kills` prints how many reports were right, and the command that repeats each that was not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.ingest_lab import FAST, SOON, Lab, volume
from prefect_biomed.clients.boss import (
    BossClient,
    IngestConfig,
    Uploader,
    UploadReport,
    UploadSettings,
    VerifySettings,
    account,
    complete,
    upload,
)
from prefect_biomed.sandbox import Sandbox

__all__ = ["POLICIES", "Outcome", "kill_once", "main"]

POLICIES = ("fail", "blank", "skip", "quarantine")

_DEPTH = 48
_MISSING = range(16, 32)  # a whole chunk: with fewer the Boss does not complete what is left out
_FILL = 9
_EVENTS = 3 * (_DEPTH - len(_MISSING))
_PROOF = VerifySettings(share=1)


@dataclass(frozen=True)
class Outcome:
    """How one kill ended.

    Attributes:
        policy: What was done with tiles without a source.
        seed: Of the instant.
        killed_after: Puts, index messages and deletions that the service had seen by then; None when it had ended.
        wrong: What the report and the volume do not agree on; empty when they do.
    """

    policy: str
    seed: int
    killed_after: int | None
    wrong: tuple[str, ...]


def kill_once(lab: Lab, policy: str, seed: int) -> Outcome:
    """Kill one ingest at a random instant, let another process finish it, and compare its report with the volume.

    Args:
        lab: A Boss; its folder is used.
        policy: For the tiles that have no source.
        seed: Of the instant.
    """
    rng = random.Random(f"{policy}-{seed}")
    pixels = volume((_DEPTH, 64, 64), seed=seed)
    root = lab.write_stack(pixels, tile=64)
    for z in _MISSING:
        (root / str(z) / "0_0_0.png").rename(root / f"away-{z}.png")
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, _DEPTH], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, tile_size={"x": 64, "y": 64, "z": 1, "t": 1}))
    settings = UploadSettings(on_bad_source=policy, fill=_FILL, threads=4, min_lease_seconds=20)
    ledgers = lab.folder / "ledgers"
    killed_after = _killed(lab, config, job.id, settings, ledgers, rng.randrange(1, _EVENTS))
    lab.boss.job(job.id).upload_queue.expire_leases()
    wrong: list[str] = []
    while True:
        report = upload(lab.client, config, job.id, settings, ledger_folder=ledgers)
        if policy == "fail" and (root / f"away-{_MISSING[0]}.png").exists():
            wrong += _compared("failed", {_slice(name) for name in report.failed}, set(_MISSING))
            for z in _MISSING:
                (root / f"away-{z}.png").rename(root / str(z) / "0_0_0.png")
            lab.boss.job(job.id).upload_queue.expire_leases()
        elif complete(lab.client, job.id, SOON).outcome == "COMPLETE":
            break
    final = account(lab.client, config, job.id, settings, verification=_PROOF, ledger_folder=ledgers)
    wrong += _differences(policy, final, lab.read((_DEPTH, 64, 64)), pixels)
    return Outcome(policy, seed, killed_after, tuple(wrong))


def _killed(
    lab: Lab, config: IngestConfig, job_id: int, settings: UploadSettings, ledgers: Path, after: int
) -> int | None:
    """Upload in a process of its own, and kill it after so many events at the service."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prefect_biomed.clients.boss", "chaos.ingest_kills"])
    order = (lab.client.arguments(), config.body(), job_id, settings, ledgers)
    child = context.Process(target=_ingest, args=order, daemon=True)
    child.start()
    observed = lab.boss.job(job_id).observed
    while child.is_alive():
        seen = sum(observed.puts.values()) + sum(observed.indexed.values()) + observed.deleted
        if seen >= after:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            return seen
        time.sleep(0.0005)
    return None


def _ingest(arguments: dict[str, Any], config: dict[str, Any], job_id: int, settings: Any, ledgers: Path) -> None:
    client = BossClient.from_arguments(arguments)
    uploader = Uploader(client, IngestConfig.load(config), job_id, settings, ledger_folder=ledgers)
    uploader.run()


def _differences(policy: str, report: UploadReport, had: np.ndarray, pixels: np.ndarray) -> list[str]:
    """What a report says of each slice, beside what the volume of the service has there."""
    is_source = {z for z in range(_DEPTH) if np.array_equal(had[z], pixels[z])}
    is_fill = {z for z in range(_DEPTH) if (had[z] == _FILL).all()}
    is_empty = {z for z in range(_DEPTH) if not had[z].any()}
    named = {
        "blank": {_slice(name) for name in report.blank},
        "skip": {_slice(name) for name in report.skipped},
        "quarantine": {_slice(name) for name in report.quarantined},
    }
    wrong = _compared("holes", {_slice(name) for name in report.holes}, set())
    wrong += _compared("blank", named["blank"], is_fill)
    wrong += _compared("left out", named["skip"] | named["quarantine"], is_empty)
    wrong += [f"{kind} is not the policy" for kind, slices in named.items() if slices and kind != policy]
    if (report.delivered, report.by_others) != (len(is_source), 0):
        wrong.append(f"delivered {report.delivered} and by others {report.by_others}, the volume has {len(is_source)}")
    if len(is_source | is_fill | is_empty) != _DEPTH:
        wrong.append("slices of the volume are neither source, fill nor empty")
    verified = len(is_source) + len(is_fill)
    if (report.verified, report.unverified, report.unaccounted) != (verified, 0, 0):
        wrong.append(f"verified {report.verified} of {verified}, unaccounted {report.unaccounted}")
    return wrong


def _compared(what: str, said: set[int], shown: set[int]) -> list[str]:
    return [] if said == shown else [f"{what}: said {sorted(said)}, shown {sorted(shown)}"]


def _slice(name: str) -> int:
    return int(name.split("z=")[1].split()[0])


def laboratory(folder: Path) -> tuple[Sandbox, Lab]:
    """Start a Boss of its own.

    Args:
        folder: Where sources and ledgers lie.
    """
    sandbox = Sandbox("boss", boss=FAST)
    sandbox.start()
    facts = sandbox.boss.ready()
    client = BossClient(facts["host"], facts["tokens"]["alice"], protocol="http", aws_endpoint_url=facts["url"])
    return sandbox, Lab(sandbox.boss, folder, client)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill ingests and print what their reports were worth.

    Returns:
        1 when a report and a volume did not agree.
    """
    parser = argparse.ArgumentParser(prog="python -m chaos.ingest_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="for each policy")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--policy", choices=POLICIES, action="append")
    chosen = parser.parse_args(arguments)
    failed = 0
    for policy in chosen.policy or POLICIES:
        outcomes = []
        for seed in range(chosen.seed, chosen.seed + chosen.kills):
            with tempfile.TemporaryDirectory() as folder:
                sandbox, lab = laboratory(Path(folder))
                try:
                    outcomes.append(kill_once(lab, policy, seed))
                finally:
                    lab.client.close()
                    sandbox.stop()
        bad = [outcome for outcome in outcomes if outcome.wrong]
        instants = sorted(outcome.killed_after for outcome in outcomes if outcome.killed_after is not None)
        span = f"after {instants[0]} to {instants[-1]} of {_EVENTS} events" if instants else "never in time"
        print(
            f"{policy:10}  {len(outcomes) - len(bad)} of {len(outcomes)} reports right, {len(instants)} killed {span}",
            flush=True,
        )
        for outcome in bad:
            print(f"  seed {outcome.seed}: {'; '.join(outcome.wrong)}")
            print(f"    python -m chaos.ingest_kills --policy {policy} --kills 1 --seed {outcome.seed}")
        failed += len(bad)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
