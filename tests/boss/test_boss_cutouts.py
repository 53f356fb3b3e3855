"""Arrays and small volumes written into a channel by the cutout service: every voxel, also when answers are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.ingest_lab import Lab, lab, make_lab, volume
from prefect_biomed.clients.boss import (
    BossClient,
    IngestConfig,
    PublishIncomplete,
    VerifySettings,
    create_resources,
    downsample,
    write_array,
)
from prefect_biomed.clients.boss import write_cutouts as write
from prefect_biomed.clients.errors import (
    ConfigurationError,
    JobFailed,
    PlatformError,
    PreflightFailed,
    ServerUnavailable,
)
from prefect_biomed.clients.polling import PollSettings

__all__ = ["lab", "make_lab"]

ALL = VerifySettings(share=1)


def test_an_array_arrives_anywhere_in_a_channel(lab: Lab) -> None:
    for dtype in ("uint8", "uint16"):
        pixels = volume((9, 20, 600), dtype)
        path = f"sandbox/stack/{dtype}"
        assert write_array(lab.client, path, pixels, first=(500, 30, 9)) == pixels.size
        found = lab.read((20, 60, 1200), dtype)
        assert np.array_equal(found[9:18, 30:50, 500:1100], pixels)
        assert np.count_nonzero(found) == np.count_nonzero(pixels)  # nothing elsewhere
        other = volume((2, 5, 7), dtype, seed=3).astype(pixels.dtype.newbyteorder(">"))
        write_array(lab.client, path, other, sample=3)
        assert np.array_equal(lab.read((2, 5, 7), dtype, (3, 4))[0], other)


def test_what_an_array_cannot_be_is_refused_before_anything_is_sent(lab: Lab) -> None:
    pixels = volume((2, 8, 8))
    for values, first, sample, says in (
        (pixels.astype("int16"), (0, 0, 0), 0, "holds uint8, and the array int16"),
        (pixels, (-1, 0, 0), 0, "the array from -1"),
        (pixels, (10**7, 0, 0), 0, "in x"),
        (pixels, (0, 0, 0), 10**6, "has the samples"),
        (pixels[0], (0, 0, 0), 0, "an array in z, y and x"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            write_array(lab.client, "sandbox/stack/uint8", values, first=first, sample=sample)
    assert not lab.read((2, 8, 8)).any()


def test_zeros_that_replace_nothing_are_noticed(lab: Lab) -> None:
    pixels = volume((2, 8, 8))
    write_array(lab.client, "sandbox/stack/uint8", pixels)
    pixels[1, 4, 5] = 0
    with pytest.raises(JobFailed, match=r"1 voxels .* \(5, 4, 1\)\. Zeros do not replace"):
        write_array(lab.client, "sandbox/stack/uint8", pixels)


def test_a_block_whose_answer_was_lost_is_looked_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = volume((2, 8, 8))
    send, sent = BossClient.write_cutout, []

    def losing(takes_effect: bool) -> None:
        def lost(self: BossClient, *args: Any) -> None:
            sent.append(args)
            if takes_effect:
                send(self, *args)
            raise ServerUnavailable("HTTP 502", status=502)

        monkeypatch.setattr(BossClient, "write_cutout", lost)

    losing(takes_effect=False)
    with pytest.raises(PlatformError, match="502"):
        write_array(lab.client, "sandbox/stack/uint8", pixels)
    losing(takes_effect=True)
    write_array(lab.client, "sandbox/stack/uint8", pixels)
    assert len(sent) == 2  # never sent again by itself
    assert np.array_equal(lab.read((2, 8, 8)), pixels)


def test_the_sources_of_an_ingest_go_into_a_channel_without_a_job(lab: Lab, tmp_path: Path) -> None:
    pixels = volume((18, 40, 700))
    lab.write_stack(pixels)
    extent = {"x": [0, 700], "y": [0, 40], "z": [0, 18], "t": [0, 1]}
    config = IngestConfig.load(lab.config(extent=extent))
    report = write(lab.client, config, verification=ALL, ledger_folder=tmp_path)
    assert np.array_equal(lab.read(pixels.shape), pixels)
    assert report.verification
    assert (report.verification.is_right, report.verification.is_complete) == (True, True)
    assert (report.format, report.shapes, report.written) == ("channel", ((700, 40, 18),), report.blocks)
    again = write(lab.client, config, verification=ALL, ledger_folder=tmp_path)
    assert (again.written, again.written_before) == (0, report.blocks)
    assert lab.client.list_jobs() == []
    several = IngestConfig.load(lab.config(extent=extent | {"t": [0, 3]}))
    with pytest.raises(ConfigurationError, match="choose one"):
        write(lab.client, several, ledger_folder=tmp_path)
    with pytest.raises(PreflightFailed, match="no sample 2"):  # of a stack that is no series
        write(lab.client, several, sample=2, ledger_folder=tmp_path)
    # Somebody else changes the channel: named, and written again.
    write_array(lab.client, "sandbox/stack/uint8", np.full((1, 4, 4), 77, "uint8"), first=(520, 3, 5))
    healed = write(lab.client, config, verification=ALL, ledger_folder=tmp_path)
    assert [name for name in healed.mended if "z=5" in name]
    assert np.array_equal(lab.read(pixels.shape), pixels)
    (lab.folder / "stack" / "7" / "0_0_0.png").unlink()
    with pytest.raises((PublishIncomplete, PreflightFailed), match="0_0_0"):
        write(lab.client, config, verification=ALL, ledger_folder=tmp_path)


def test_lower_resolutions_are_asked_for_once_and_waited_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    path, settings = "lower/stack/uint8", PollSettings(0.05, deadline_seconds=20)
    config = lab.config()
    config["database"] = dict(zip(("collection", "experiment", "channel"), path.split("/"), strict=True))
    create_resources(lab.client, IngestConfig.load(config), datatype="uint8", levels=3)
    send, sent = BossClient.start_downsampling, []

    def counted(self: BossClient, channel_path: str) -> None:
        sent.append(channel_path)
        send(self, channel_path)
        raise ServerUnavailable("HTTP 502", status=502)  # the answer is lost

    monkeypatch.setattr(BossClient, "start_downsampling", counted)
    assert downsample(lab.client, path, settings) == 3
    assert lab.client.downsampling(path) == ("DOWNSAMPLED", 3)
    assert downsample(lab.client, path, settings) == 3
    assert sent == [path]
    write_array(lab.client, path, volume((2, 8, 8)))
    assert lab.client.downsampling(path)[0] == "NOT_DOWNSAMPLED"
    monkeypatch.undo()
    lab.client.start_downsampling(path)  # by somebody else
    assert downsample(lab.client, path, settings) == 3
    assert downsample(lab.client, "sandbox/stack/uint8", settings) >= 1
