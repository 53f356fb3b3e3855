"""A look at what arrived: what the service lost, blackened or changed is found, and what is right is not accused."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import beta

from harness.ingest_lab import QUICK, Lab, volume
from prefect_biomed.clients.boss import (
    IngestConfig,
    Region,
    UploadReport,
    UploadSettings,
    VerificationFailed,
    VerifySettings,
    WrongTile,
    account,
    extents_to_heal,
    verification,
    verify,
)
from prefect_biomed.clients.boss.proofs import Verification, upper_bound
from prefect_biomed.clients.errors import ConfigurationError, ConnectionFailed
from prefect_biomed.sandbox.boss import IngestFault
from prefect_biomed.tasks.boss import verification_text

SMALL = {"x": 64, "y": 64, "z": 1, "t": 1}
ALL = VerifySettings(share=1)
CHUNKS = VerifySettings(share=0, least=0)


def column(depth: int, **more: Any) -> dict[str, Any]:
    return {"extent": {"x": [0, 64], "y": [0, 64], "z": [0, depth], "t": [0, 1]}, "tile_size": SMALL} | more


def finished(lab: Lab, pixels: np.ndarray, faults: list[IngestFault] | None = None) -> tuple[IngestConfig, int]:
    lab.write_stack(pixels, tile=64)
    lab.boss.switches.ingest_faults = faults or []
    config = lab.config(**column(len(pixels)))
    lab.ingest(config)
    return IngestConfig.load(config), max(lab.boss.service.jobs)


SIX = [
    *(IngestFault(kind="black", z=z) for z in (0, 160, 304)),
    IngestFault(kind="lost", z=37),
    IngestFault(kind="lost", z=255),
    IngestFault(kind="clipped", z=200),
]
BLACK = {z for start in (0, 160, 304) for z in range(start, start + 16)}


@pytest.mark.parametrize(("share", "windows"), [(0.01, False), (0.1, False), (1.0, False), (0.01, True)])
def test_what_the_service_spoilt_is_found(lab: Lab, share: float, windows: bool) -> None:
    config, _ = finished(lab, volume((320, 64, 64)), SIX)
    look = verify(lab.client, config, VerifySettings(share=share, least=0, compare_windows=windows))
    missing = {tile.z for tile in look.wrong if tile.kind == "missing"}
    assert missing == BLACK | {37, 255}
    different = {tile.z for tile in look.wrong if tile.kind == "different"}
    if share == 1:
        assert different == {200}
        assert look.wrong_cuboids == 6
        assert (look.verified_tiles, look.compared, look.bound) == (320 - 51, 20, 6 / 20)
    else:
        assert different == {200} if windows else different <= {200}
        assert look.chunks_looked_at == 20
        assert look.bound >= look.wrong_cuboids / look.compared
    assert not look.is_right
    clipped = next((tile for tile in look.wrong if tile.z == 200), None)
    assert clipped is None or "the Boss 127" in clipped.detail


def test_what_is_right_is_not_accused(lab: Lab) -> None:
    """Black where the source is black, and black in the middle only."""
    pixels = volume((40, 64, 64))
    pixels[3] = pixels[16:32] = 0
    pixels[:, 8:56, 8:56] = 0
    config, _ = finished(lab, pixels)
    for settings in (ALL, CHUNKS, VerifySettings()):
        look = verify(lab.client, config, settings)
        assert look.is_right, look.summary()
    assert verify(lab.client, config, ALL).verified_tiles == 40


def test_nothing_is_right_when_no_source_can_be_read(lab: Lab) -> None:
    config, _ = finished(lab, volume((16, 64, 64)))
    for tile in lab.folder.rglob("*.png"):
        tile.write_bytes(b"no picture")
    for settings in (ALL, VerifySettings()):
        look = verify(lab.client, config, settings)
        assert (look.wrong, look.compared, look.is_right) == ((), 0, False)
        assert look.summary().startswith("None of the 1 cuboids of sandbox/stack/uint8 was compared.")
        assert "Run this where the sources can be read." in str(VerificationFailed.of(look))


def test_nothing_is_right_when_nothing_is_looked_at(lab: Lab) -> None:
    config, _ = finished(lab, volume((16, 64, 64)))
    look = verify(lab.client, config, VerifySettings(share=0, least=0, every_chunk=False))
    assert (look.compared, look.chunks_looked_at, look.is_right) == (0, 0, False)
    assert "None of the 1 cuboids" in str(VerificationFailed.of(look))
    assert verify(lab.client, config, CHUNKS).is_right


@pytest.mark.parametrize("settings", [ALL, VerifySettings(share=0, least=0, compare_windows=True)])
def test_tiles_that_were_filled_up_are_counted(lab: Lab, settings: VerifySettings) -> None:
    root = lab.write_stack(volume((16, 64, 64)), tile=64)
    for z in (3, 9):
        Image.fromarray(volume((64, 40), seed=z)).save(root / str(z) / "0_0_0.png")
    config, upload = lab.config(**column(16)), UploadSettings(convert=frozenset({"pad"}), fill=7)
    lab.ingest(config, upload)
    look = verify(lab.client, IngestConfig.load(config), settings, upload=upload)
    assert (look.is_right, look.padded_tiles, look.unreadable_tiles) == (True, 2, 0)
    assert "2 tiles are padded: where their sources end, the fill value was compared." in look.summary()


def test_all_sources_that_cannot_be_read_are_counted_though_not_all_are_named(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_NAMED_LIMIT", 3)
    config, _ = finished(lab, volume((32, 64, 64)))
    for z in range(16, 32):
        (lab.folder / "stack" / str(z) / "0_0_0.png").unlink()
    look = verify(lab.client, config, ALL)
    assert (len(look.unreadable), look.unreadable_tiles, look.compared) == (3, 16, 1)
    assert "(of 2 of sandbox/stack/uint8, of those that can be compared)" in look.summary()
    assert "16 tiles could not be compared" in look.summary()
    assert "## Not compared (16)" in verification_text(look)


def test_a_look_that_fails_midway_is_one_typed_error_and_leaves_no_manifest(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, _ = finished(lab, volume((64, 64, 64)))
    read, asked = lab.client.cutout, itertools.count()

    def cutout(*arguments: Any, **more: Any) -> Any:
        if next(asked) == 2:
            raise ConnectionFailed("The Boss does not answer.")
        return read(*arguments, **more)

    monkeypatch.setattr(lab.client, "cutout", cutout)
    settings = VerifySettings(share=1, threads=1, manifest=tmp_path / "proof.jsonl")
    with pytest.raises(ConnectionFailed):
        verify(lab.client, config, settings)
    assert list(tmp_path.glob("proof*")) == []
    assert verify(lab.client, config, settings).is_complete
    assert len((tmp_path / "proof.jsonl").read_text().splitlines()) == 1 + 4


def test_tiles_that_are_black_in_the_middle_are_found_when_they_are_not_there(lab: Lab) -> None:
    pixels = volume((32, 64, 64))
    pixels[:, 8:56, 8:56] = 0
    config, _ = finished(lab, pixels, [IngestFault(kind="lost", z=5), IngestFault(kind="black", z=16)])
    look = verify(lab.client, config, CHUNKS)
    assert {tile.z for tile in look.wrong} == {5, *range(16, 32)}


def test_tiles_and_extents_that_are_no_multiples_are_compared(lab: Lab) -> None:
    pixels = volume((20, 300, 700), "uint16")
    lab.write_stack(pixels)
    extent = {"x": [0, 700], "y": [0, 300], "z": [0, 20], "t": [0, 1]}
    lab.boss.switches.ingest_faults = [IngestFault(kind="clipped", x=1, z=18)]
    config = lab.config(extent=extent, channel="uint16")
    lab.ingest(config)
    loaded = IngestConfig.load(config)
    look = verify(lab.client, loaded, ALL)
    assert (look.cuboids, look.compared) == (4, 4)
    assert [(tile.x, tile.y, tile.z, tile.kind) for tile in look.wrong] == [(1, 0, 18, "different")]
    few = verify(lab.client, loaded, VerifySettings(share=0.5, least=0, every_chunk=False, seed=1))
    assert few.compared == 2
    right = verify(lab.client, loaded, ALL, region=Region(x=(100, 600), z=(3, 18)))
    assert (right.is_right, right.cuboids) == (True, 4)
    with pytest.raises(ConfigurationError, match="nothing of what"):
        verify(lab.client, loaded, ALL, region=Region(x=(2000, 2100)))


def test_a_cuboid_that_is_lost_is_found(lab: Lab) -> None:
    array = lab.folder / "array.npy"
    np.save(array, np.arange(20 * 512 * 1100, dtype="uint16").reshape(20, 512, 1100) | 1)
    config = lab.volumetric(
        "prefect_biomed.clients.boss.plugins.arrays.Array",
        {"filename": str(array), "order": "zyx"},
        {"x": [0, 1100], "y": [0, 512], "z": [0, 20], "t": [0, 1]},
        channel="uint16",
    )
    lab.ingest(config)
    loaded = IngestConfig.load(config)
    assert (
        verify(lab.client, loaded, ALL).summary().startswith("All 6 cuboids of sandbox/stack/uint16 were compared: 0")
    )
    assert verify(lab.client, loaded, CHUNKS).is_right
    [kept] = lab.boss.service._volumes._channels.values()
    kept.pieces = [piece for piece in kept.pieces if (piece.x_index, piece.z_index) != (1, 1)]
    for settings in (ALL, CHUNKS):
        look = verify(lab.client, loaded, settings)
        assert [(tile.position, tile.kind) for tile in look.wrong] == [((0, 0, 0, 0), "missing")]


@pytest.mark.parametrize("policy", ["skip", "blank", "quarantine"])
def test_what_an_ingest_left_out_is_told_apart_from_what_was_lost(lab: Lab, policy: str) -> None:
    root = lab.write_stack(volume((48, 64, 64)), tile=64)
    for z in range(16, 32):
        (root / str(z) / "0_0_0.png").unlink()
    lab.boss.switches.ingest_faults = [IngestFault(kind="lost", z=40)]
    config, job = lab.create(lab.config(**column(48)))
    lab.upload(config, job.id, QUICK.model_copy(update={"on_bad_source": policy}))
    assert lab.complete(job.id).outcome == "COMPLETE"
    report = account(lab.client, config, job.id, verification=ALL, ledger_folder=lab.folder / "ledgers")
    assert report.holes == ("x=0 y=0 z=40 t=0",)
    assert len(getattr(report, {"skip": "skipped", "blank": "blank"}.get(policy, "quarantined"))) == 16
    assert (report.delivered, report.by_others) == (32, 0)
    assert report.verified == (47 if policy == "blank" else 31)
    assert report.unverified == 0
    assert report.verification is not None
    assert report.verification.left_out == (0 if policy == "blank" else 16)
    assert report.verification.unreadable == {}
    # Years later the ledger is gone: what has no source cannot be compared, and is said.
    later = verify(lab.client, config, ALL)
    assert len(later.unreadable) == 16
    assert "no such file" in later.unreadable["x=0 y=0 z=16 t=0"]


def test_work_of_others_is_looked_at_and_counted_as_theirs(lab: Lab) -> None:
    config, job_id = finished(lab, volume((48, 64, 64)), [IngestFault(kind="black", z=16)])
    report = account(lab.client, config, job_id, ledger_folder=lab.folder / "none")
    assert (report.deleted, report.by_others, len(report.holes)) == (0, 32, 16)
    assert "32 by other clients" in report.summary()


def test_what_is_wrong_is_healed_by_ingesting_it_again(lab: Lab) -> None:
    faults = [IngestFault(kind="black", z=0), IngestFault(kind="clipped", z=40)]
    config, _ = finished(lab, volume((48, 64, 64)), faults)
    lab.boss.switches.ingest_faults = []
    look = verify(lab.client, config, ALL)
    extents = extents_to_heal(config, look.wrong)
    assert [extent["z"] for extent in extents] == [(0, 16), (32, 48)]
    for extent in extents:
        lab.ingest(lab.config(**column(48, extent={axis: list(span) for axis, span in extent.items()})))
    assert verify(lab.client, config, ALL).is_right


def test_neighbours_are_healed_together() -> None:
    config = IngestConfig.load(
        {
            "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
            "client": {
                "backend": {"name": "boss", "class": "BossBackend", "host": "h", "protocol": "https"},
                "path_processor": {"class": "a.B", "params": {}},
                "tile_processor": {"class": "a.B", "params": {}},
            },
            "database": {"collection": "c", "experiment": "e", "channel": "ch"},
            "ingest_job": {
                "resolution": 0,
                "extent": {"x": [0, 2000], "y": [0, 1024], "z": [0, 20], "t": [0, 1]},
                "tile_size": {"x": 512, "y": 512, "z": 1, "t": 1},
            },
        }
    )
    wrong = [WrongTile(x=x, y=1, z=z, t=0, kind="missing", detail="") for x, z in ((2, 17), (3, 16), (0, 19), (3, 4))]
    assert extents_to_heal(config, wrong) == [
        {"x": (1536, 2000), "y": (512, 1024), "z": (0, 16), "t": (0, 1)},
        {"x": (0, 512), "y": (512, 1024), "z": (16, 20), "t": (0, 1)},
        {"x": (1024, 2000), "y": (512, 1024), "z": (16, 20), "t": (0, 1)},
    ]


def test_a_full_proof_writes_digests_that_others_can_check(lab: Lab) -> None:
    pixels = volume((20, 64, 64))
    config, _ = finished(lab, pixels, [IngestFault(kind="lost", z=18)])
    manifest = lab.folder / "proof.jsonl"
    verify(lab.client, config, VerifySettings(share=1, manifest=manifest))
    head, first, second = map(json.loads, manifest.read_text().splitlines())
    assert (head["channel"], head["datatype"], head["version"]) == ("sandbox/stack/uint8", "uint8", 1)
    assert first["sha256"] == hashlib.sha256(pixels[:16].tobytes()).hexdigest()
    assert (first["equal"], second["equal"], second["z"]) == (True, False, [16, 20])


def test_the_same_seed_chooses_the_same_cuboids(lab: Lab) -> None:
    config, _ = finished(lab, volume((320, 64, 64)))

    def chosen(seed: int) -> list[Any]:
        manifest = lab.folder / "proof.jsonl"
        settings = VerifySettings(share=0.3, least=0, seed=seed, every_chunk=False, manifest=manifest)
        assert verify(lab.client, config, settings).requests == 6
        return [json.loads(line).get("z") for line in manifest.read_text().splitlines()]

    assert chosen(1) == chosen(1) != chosen(2)


@pytest.mark.parametrize(("wrong", "of"), [(0, 1), (0, 3000), (2, 3000), (5, 40), (700, 2000)])
def test_the_bound_is_that_of_clopper_and_pearson(wrong: int, of: int) -> None:
    assert upper_bound(wrong, of) == pytest.approx(beta.ppf(0.95, wrong + 1, of - wrong), rel=1e-6)


def test_a_sample_states_its_bound() -> None:
    look = Verification(channel="c/e/ch", region={}, cuboids=90_000, compared=3000)
    assert look.summary().startswith("0 of 3,000 random cuboids wrong: fewer than 0.1 % are, with 95 %")
    assert upper_bound(0, 0) == 1.0


def test_a_report_without_a_look_says_nothing_of_it() -> None:
    assert UploadReport(job_id=1, tile_count=3, deleted=3).summary() == "Ingest job 1: 3 of 3 tiles finished."
