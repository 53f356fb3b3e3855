"""The sources of an ingest in a volume: every voxel, every resolution, and after whatever went wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from PIL import Image

from harness.ingest_lab import volume
from prefect_biomed.clients.boss import (
    IngestConfig,
    PublishIncomplete,
    UploadSettings,
    VerifySettings,
    VolumeTarget,
    publish,
)
from prefect_biomed.clients.boss.volumes import Volume
from prefect_biomed.clients.errors import ConfigurationError, LocalStorageError

ALL = VerifySettings(share=1)
SHAPE = (17, 300, 520)  # no multiple of tiles or chunks
SEED_OF_ANOTHER_CUBOID = 5  # than the last, and of the last block of a lower resolution


def stack(folder: Path, pixels: np.ndarray, **job: Any) -> dict[str, Any]:
    """Slices as images, and the configuration that cuts them into tiles of 512 x 512."""
    folder.mkdir(exist_ok=True)
    for z, plane in enumerate(pixels):
        Image.fromarray(plane).save(folder / f"s{z}.png", compress_level=1)
    return configuration(
        {
            "path_processor": {
                "class": "ingestclient.plugins.stack.ZindexStackPathProcessor",
                "params": {"root_dir": str(folder), "base_filename": "s<>", "extension": "png"},
            },
            "tile_processor": {"class": "ingestclient.plugins.stack.ZindexStackTileProcessor", "params": {}},
        },
        {"x": [0, pixels.shape[2]], "y": [0, pixels.shape[1]], "z": [0, pixels.shape[0]], "t": [0, 1]},
        {"tile_size": {"x": 512, "y": 512, "z": 1, "t": 1}} | job,
    )


def configuration(plugins: dict[str, Any], extent: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    version = "2" if job.get("ingest_type") else "1"
    return {
        "schema": {"name": f"boss-v0.{version}-schema", "validator": f"BossValidatorV0{version}"},
        "client": {"backend": {"name": "boss", "class": "BossBackend", "host": "nowhere.invalid", "protocol": "https"}}
        | plugins,
        "database": {"collection": "c", "experiment": "e", "channel": "ch"},
        "ingest_job": {"resolution": 0, "extent": extent} | job,
    }


def image(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    """An OME-Zarr image, and the configuration of a volumetric job of it."""
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.create_array("0", data=pixels, chunks=(16, 64, 64))
    described = {"axes": [{"name": axis} for axis in "zyx"], "datasets": [{"path": "0"}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [described]}
    plugin, params = "ingestclient.plugins.zarr.Zarr", {"cloud_path": str(folder)}
    return configuration(
        {
            "path_processor": {"class": f"{plugin}PathProcessor", "params": params},
            "chunk_processor": {"class": f"{plugin}ChunkProcessor", "params": params},
        },
        {"x": [0, pixels.shape[2]], "y": [0, pixels.shape[1]], "z": [0, pixels.shape[0]], "t": [0, 1]},
        {"ingest_type": "volumetric", "chunk_size": {"x": 512, "y": 512, "z": 16}},
    )


def target(folder: Path, form: str = "precomputed", datatype: str = "uint8", **more: Any) -> VolumeTarget:
    settings = {"location": str(folder / "volume"), "format": form, "datatype": datatype} | more
    return VolumeTarget.model_validate({"voxel_size": (4, 4, 40)} | settings)


def load(config: dict[str, Any]) -> IngestConfig:
    return IngestConfig.load(config)


def stored(place: VolumeTarget, level: int = 0) -> np.ndarray:
    """A resolution in z, y and x: as the library of Zarr reads it, or out of the chunks by their names."""
    root = Path(place.location)
    if place.format == "ome-zarr":
        return np.asarray(zarr.open_array(root / str(level), mode="r")[:])
    scale = json.loads((root / "info").read_bytes())["scales"][level]
    x, y, z = scale["size"]
    made = np.zeros((z, y, x), place.datatype)
    for chunk in (root / scale["key"]).iterdir():
        spans = [tuple(map(int, span.split("-"))) for span in chunk.name.split("_")]
        (x0, x1), (y0, y1), (z0, z1) = [
            (low - at, high - at) for (low, high), at in zip(spans, scale["voxel_offset"], strict=True)
        ]
        values = np.fromfile(chunk, np.dtype(place.datatype).newbyteorder("<"))
        made[z0:z1, y0:y1, x0:x1] = values.reshape(z1 - z0, y1 - y0, x1 - x0)
    return made


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of two by two voxels of a slice, at the edges of those that are there; halves go to the even side."""
    depth, height, width = pixels.shape
    even = np.full((depth, height + height % 2, width + width % 2), np.nan)
    even[:, :height, :width] = pixels
    return np.rint(np.nanmean(even.reshape(depth, even.shape[1] // 2, 2, -1, 2), axis=(2, 4))).astype(pixels.dtype)


@pytest.mark.parametrize(
    ("form", "source", "datatype"),
    [("precomputed", "stack", "uint16"), ("precomputed", "image", "uint8"), ("ome-zarr", "image", "uint64")],
)
def test_every_voxel_of_every_resolution_arrives(form: str, source: str, datatype: str, tmp_path: Path) -> None:
    pixels = volume(SHAPE, datatype) if datatype != "uint64" else volume(SHAPE, "uint32").astype("uint64")
    made = (stack if source == "stack" else image)(tmp_path / "source", pixels)
    place = target(tmp_path, form, datatype, levels=3)
    report = publish(load(made), place, verification=ALL, ledger_folder=tmp_path)
    assert report.verification
    assert report.verification.is_complete
    assert report.verification.is_right
    assert report.written == report.blocks
    assert report.shapes == ((520, 300, 17), (260, 150, 17), (130, 75, 17))
    assert np.array_equal(stored(place), pixels)
    assert np.array_equal(stored(place, 1), halved(pixels))
    assert np.array_equal(stored(place, 2), halved(halved(pixels)))
    again = publish(load(made), place, verification=ALL, ledger_folder=tmp_path)
    assert (again.written, again.written_before) == (0, report.blocks)


def test_labels_are_never_mixed_in_lower_resolutions(tmp_path: Path) -> None:
    labels = np.zeros((2, 8, 8), "uint16")
    labels[:, :, 3:] = 900
    place = target(tmp_path, datatype="uint16", kind="annotation", levels=2)
    publish(load(stack(tmp_path / "source", labels)), place, verification=ALL, ledger_folder=tmp_path)
    assert set(np.unique(stored(place, 1))) <= {0, 900}


def test_an_extent_that_begins_elsewhere_keeps_its_place(tmp_path: Path) -> None:
    pixels = volume((32, 16, 1024))
    made = stack(tmp_path / "source", pixels, extent={"x": [512, 1024], "y": [0, 16], "z": [16, 32], "t": [0, 1]})
    place = target(tmp_path, levels=2)
    publish(load(made), place, verification=ALL, ledger_folder=tmp_path)
    scales = json.loads((tmp_path / "volume" / "info").read_bytes())["scales"]
    assert [scale["voxel_offset"] for scale in scales] == [[512, 0, 16], [256, 0, 16]]
    whole = tensorstore.open(
        {"driver": "neuroglancer_precomputed", "kvstore": f"file://{place.location}/", "scale_index": 0}
    ).result()
    assert tuple(whole.domain.origin) == (512, 0, 16, 0)
    assert np.array_equal(stored(place), pixels[16:, :, 512:])


def test_what_is_wrong_is_named_by_the_look_and_healed_in_all_resolutions(tmp_path: Path) -> None:
    pixels = volume(SHAPE)
    made, place = load(stack(tmp_path / "source", pixels)), target(tmp_path, levels=3)
    whole = publish(made, place, verification=ALL, ledger_folder=tmp_path)
    root = Path(place.location)
    (root / "0" / "0-128_0-128_0-16").unlink()  # lost
    changed = root / "0" / "512-520_256-300_0-16"
    changed.write_bytes(b"\7" * changed.stat().st_size)
    lower = next(iter((root / "2").iterdir()))
    lower.write_bytes(b"\1" * lower.stat().st_size)
    healed = publish(made, place, verification=ALL, ledger_folder=tmp_path)
    assert healed.written_before == whole.blocks
    assert healed.healed >= 3
    assert healed.verification
    assert healed.verification.is_right
    assert np.array_equal(stored(place), pixels)
    assert np.array_equal(stored(place, 2), halved(halved(pixels)))


@pytest.mark.parametrize("form", ["precomputed", "ome-zarr"])
def test_chunks_that_cannot_be_decoded_are_named_and_written_again(form: str, tmp_path: Path) -> None:
    pixels = volume(SHAPE)
    made, place = load(stack(tmp_path / "source", pixels)), target(tmp_path, form, levels=3)
    publish(made, place, ledger_folder=tmp_path)

    def spoil(level: int) -> None:
        chunks = [file for file in (Path(place.location) / str(level)).rglob("*") if file.is_file()]
        chunk = max(file for file in chunks if file.suffix != ".json")  # at the far ends
        chunk.write_bytes(chunk.read_bytes()[:7])

    for level in range(3):
        spoil(level)
    healed = publish(made, place, verification=ALL, ledger_folder=tmp_path)
    assert healed.mended["x=1 y=0 z=16 t=0"].startswith("damaged")
    assert healed.healed >= 3
    assert healed.verification
    assert healed.verification.is_right
    assert np.array_equal(stored(place), pixels)
    assert np.array_equal(stored(place, 2), halved(halved(pixels)))
    spoil(2)
    healed = publish(made, place, verification=ALL, ledger_folder=tmp_path)
    assert set(healed.mended) == {"level 2: 1 0 0"}
    spoil(0)
    one = VerifySettings(share=0, least=1, every_chunk=False, seed=SEED_OF_ANOTHER_CUBOID)
    healed = publish(made, place, verification=one, ledger_folder=tmp_path)
    assert set(healed.mended) == {"level 1: 1 0 0"}  # what is made of it
    assert np.array_equal(stored(place), pixels)


def test_a_lower_resolution_that_does_not_stay_as_it_was_written_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, place = load(stack(tmp_path / "source", volume((2, 64, 64)))), target(tmp_path, levels=2)
    write = Volume.write

    def forgetful(self: Volume, level: int, where: Any, values: Any) -> None:
        write(self, level, where, values if level == 0 else values + 1)

    monkeypatch.setattr(Volume, "write", forgetful)
    with pytest.raises(PublishIncomplete, match="level 1: 0 0 0: is not as it was written") as caught:
        publish(made, place, verification=ALL, ledger_folder=tmp_path)
    assert caught.value.report
    assert caught.value.report.unsettled == ("level 1: 0 0 0",)
    monkeypatch.undo()
    assert publish(made, place, verification=ALL, ledger_folder=tmp_path).unsettled == ()


def test_a_volume_that_was_removed_is_written_whole_again(tmp_path: Path) -> None:
    made, place = load(stack(tmp_path / "source", volume((2, 64, 64)))), target(tmp_path)
    publish(made, place, ledger_folder=tmp_path)
    Path(place.location).rename(tmp_path / "moved")
    again = publish(made, place, ledger_folder=tmp_path)
    assert (again.written, again.written_before) == (again.blocks, 0)
    assert np.array_equal(stored(place), volume((2, 64, 64)))


def test_a_source_that_changed_between_two_runs_is_written_again(tmp_path: Path) -> None:
    pixels = volume(SHAPE)
    made, place = load(stack(tmp_path / "source", pixels)), target(tmp_path, levels=2)
    publish(made, place, ledger_folder=tmp_path)
    pixels[3] = pixels[3][::-1]
    Image.fromarray(pixels[3]).save(tmp_path / "source" / "s3.png")
    none = VerifySettings(share=0, least=0, every_chunk=False)
    again = publish(made, place, verification=none, ledger_folder=tmp_path)
    assert 0 < again.written < again.blocks
    assert np.array_equal(stored(place), pixels)
    assert np.array_equal(stored(place, 1), halved(pixels))


def test_bad_sources_end_as_the_policy_says_and_are_tried_again(tmp_path: Path) -> None:
    pixels = volume((20, 600, 200))
    made, place = load(stack(tmp_path / "source", pixels)), target(tmp_path, levels=2)
    (tmp_path / "source" / "s17.png").rename(tmp_path / "kept.png")
    with pytest.raises(PublishIncomplete, match=r"s17\.png") as caught:
        publish(made, place, ledger_folder=tmp_path)
    assert caught.value.report
    assert caught.value.report.written == 2  # all but the blocks with that slice
    assert not any((tmp_path / "volume" / "1").glob("*"))
    blank = UploadSettings(on_bad_source="blank", fill=9)
    report = publish(made, place, blank, verification=ALL, ledger_folder=tmp_path)
    assert len(report.blank) == 2
    assert (stored(place)[17] == 9).all()
    skip = UploadSettings(on_bad_source="skip")
    report = publish(made, place, skip, verification=ALL, ledger_folder=tmp_path)
    assert (len(report.blank), len(report.skipped)) == (0, 2)
    assert (stored(place)[17] == 0).all()
    (tmp_path / "kept.png").rename(tmp_path / "source" / "s17.png")
    report = publish(made, place, verification=ALL, ledger_folder=tmp_path)
    assert (report.blank, report.skipped) == ((), ())
    assert np.array_equal(stored(place), pixels)
    assert np.array_equal(stored(place, 1), halved(pixels))


@pytest.mark.parametrize("form", ["precomputed", "ome-zarr"])
def test_a_place_that_holds_something_else_is_left_as_it_is(form: str, tmp_path: Path) -> None:
    made = load(stack(tmp_path / "source", volume((2, 64, 64))))
    publish(made, target(tmp_path, form), ledger_folder=tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "volume").rglob("*") if path.is_file()}
    other = load(stack(tmp_path / "other", volume((2, 64, 64), seed=1)))
    larger = load(stack(tmp_path / "source", volume((2, 64, 65))))
    for config, place in (
        (made, target(tmp_path, form, "uint16")),
        (made, target(tmp_path, {"precomputed": "ome-zarr", "ome-zarr": "precomputed"}[form])),
        (other, target(tmp_path, form)),
        (larger, target(tmp_path, form)),
    ):
        with pytest.raises(ConfigurationError, match="holds another volume"):
            publish(config, place, ledger_folder=tmp_path)
    assert before == {path: path.read_bytes() for path in (tmp_path / "volume").rglob("*") if path.is_file()}
    (tmp_path / "volume" / "prefect-biomed.json").unlink()
    with pytest.raises(ConfigurationError, match="has not written"):
        publish(made, target(tmp_path, form), ledger_folder=tmp_path)


def test_a_place_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    made = load(stack(tmp_path / "source", volume((2, 64, 64))))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LocalStorageError, match="file"):
        publish(made, target(tmp_path, location=str(tmp_path / "file" / "volume")), ledger_folder=tmp_path)
    with pytest.raises(ValueError, match="secret"):
        target(tmp_path, location="s3://key:secret@bucket/path")
    with pytest.raises(ConfigurationError, match="ftp"):
        publish(made, target(tmp_path, location="ftp://host/path"), ledger_folder=tmp_path)


def test_a_volume_is_of_one_sample(tmp_path: Path) -> None:
    extent = {"x": [0, 64], "y": [0, 64], "z": [0, 2], "t": [0, 3]}
    made = load(stack(tmp_path / "source", volume((2, 64, 64)), extent=extent))
    with pytest.raises(ConfigurationError, match="choose one"):
        publish(made, target(tmp_path), ledger_folder=tmp_path)
    with pytest.raises(ConfigurationError, match="no sample 3"):
        publish(made, target(tmp_path), sample=3, ledger_folder=tmp_path)


PROGRAM = """
import json, sys
from pathlib import Path
from prefect_biomed.clients.boss import IngestConfig, VolumeTarget, publish
config, target, ledgers = json.loads(sys.argv[1])
print("begun", flush=True)
publish(IngestConfig.load(config), VolumeTarget(**target), ledger_folder=Path(ledgers))
"""


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    pixels = volume((32, 520, 64))
    made, place = stack(tmp_path / "source", pixels), target(tmp_path, levels=3)
    arguments = json.dumps([made, place.model_dump(mode="json"), str(tmp_path)])
    root = Path(place.location)
    for level in "01":  # killed while it writes the finest resolution, and while it makes another
        with subprocess.Popen([sys.executable, "-c", PROGRAM, arguments], stdout=subprocess.PIPE) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and not any(root.glob(f"{level}/*-*")) and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
    report = publish(load(made), place, verification=ALL, ledger_folder=tmp_path)
    assert report.written_before > 0
    assert report.written + report.written_before == report.blocks
    assert np.array_equal(stored(place), pixels)
    assert np.array_equal(stored(place, 1), halved(pixels))
    assert np.array_equal(stored(place, 2), halved(halved(pixels)))
    scales = {scale["key"] for scale in json.loads((root / "info").read_bytes())["scales"]}
    assert {path.name for path in root.iterdir() if path.is_dir()} == scales


def test_two_machines_at_once_make_one_volume(tmp_path: Path) -> None:
    """Each has a ledger of its own; what the other writes at the same time is the same, and whole."""
    pixels = volume((17, 100, 300))
    config, levels = load(stack(tmp_path / "source", pixels)), 2
    for form in ("precomputed", "ome-zarr"):
        place = target(tmp_path, form, levels=levels, location=str(tmp_path / form))
        ledgers = [tmp_path / f"{form}-{machine}" for machine in "ab"]
        with ThreadPoolExecutor() as pool:
            both = [pool.submit(publish, config, place, verification=ALL, ledger_folder=ledger) for ledger in ledgers]
        assert all(one.result().verification.is_right for one in both)
        assert np.array_equal(stored(place), pixels)
        assert np.array_equal(stored(place, 1), halved(pixels))
        for ledger in ledgers:
            again = publish(config, place, verification=ALL, ledger_folder=ledger)
            assert (again.written, again.written_before) == (0, again.blocks)


def test_of_two_volumes_that_are_begun_in_one_place_at_once_one_is_refused(tmp_path: Path) -> None:
    configs = [load(stack(tmp_path / name, volume((2, 64, 64), seed=seed))) for seed, name in enumerate("ab")]
    for attempt in range(5):
        place = target(tmp_path, location=str(tmp_path / f"volume-{attempt}"))
        with ThreadPoolExecutor() as pool:
            both = [
                pool.submit(publish, config, place, verification=ALL, ledger_folder=tmp_path / f"{attempt}-{number}")
                for number, config in enumerate(configs)
            ]
        errors = [one.exception() for one in both]
        assert [type(error) for error in errors if error] == [ConfigurationError]
        assert np.array_equal(stored(place), volume((2, 64, 64), seed=errors.index(None)))
