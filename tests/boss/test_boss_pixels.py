"""Every source format, compared pixel by pixel with what comes back out of the Boss."""

from __future__ import annotations

import io
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from PIL import Image

from harness.ingest_lab import QUICK, Lab, volume
from prefect_biomed.clients.boss import IngestConfig, UploadSettings, account, images
from prefect_biomed.clients.boss._keys import Position
from prefect_biomed.clients.boss.images import DecodeCache, ImageWindow, TileFormat
from prefect_biomed.clients.boss.inspection import Inspection, inspect_sources
from prefect_biomed.clients.boss.plugins import base
from prefect_biomed.clients.boss.plugins.allowed import ENTRY_POINTS, VARIABLE
from prefect_biomed.clients.boss.sources import ChunkSource, TileSource, compress
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable
from prefect_biomed.tasks.boss import report_text

BUILT_IN = "prefect_biomed.clients.boss.plugins"
WIDE = {"x": [0, 700], "y": [0, 600], "z": [0, 18], "t": [0, 1]}
SHAPE = (18, 600, 700)
# Cut off at the edge in each axis; the large one has several messages besides several cuboids.
VOLUMES = [(20, 512, 600), pytest.param((40, 600, 1100), marks=pytest.mark.slow)]
SAME_UNDER_ANOTHER_NAME = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiff", "jpeg")]

PADDING = frozenset({"pad"})


def plugins(module: str, name: str, params: dict[str, Any], path: str | None = None) -> dict[str, Any]:
    return {
        "path_processor": {"class": f"{module}.{path or name}PathProcessor", "params": params},
        "tile_processor": {"class": f"{module}.{name}TileProcessor", "params": params},
    }


def whole(shape: tuple[int, int, int]) -> dict[str, list[int]]:
    z, y, x = shape
    return {"x": [0, x], "y": [0, y], "z": [0, z], "t": [0, 1]}


def write(pixels: np.ndarray, name: Any, tile: int = 512) -> None:
    for z, plane in enumerate(pixels):
        for y in range(0, plane.shape[0], tile):
            for x in range(0, plane.shape[1], tile):
                path: Path = name(z, y // tile, x // tile)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(plane[y : y + tile, x : x + tile]).save(path)


@pytest.mark.parametrize("datatype", ["uint8", pytest.param("uint16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("classes", "layout"),
    [
        ("CatmaidFileImageStack", "{z}/{y}_{x}_0.png"),
        ("CatmaidFileImageStackZoomLevel", "0/{z}/{y}_{x}.png"),
        ("CatmaidDirectoryImageStack", "0/{z}/{y}/{x}.png"),
    ],
)
def test_catmaid_stacks_with_tiles_cut_off_at_the_edge(lab: Lab, classes: str, layout: str, datatype: str) -> None:
    pixels = volume(SHAPE, datatype)
    root = lab.folder / "stack"
    write(pixels, lambda z, y, x: root / layout.format(z=z, y=y, x=x))
    params = {"root_dir": str(root), "filetype": "png"}
    config = lab.config(extent=WIDE, channel=datatype, **plugins("ingestclient.plugins.catmaid", classes, params))
    report, _ = lab.ingest(config)
    assert report.balanced
    assert np.array_equal(lab.read(SHAPE, datatype), pixels)
    assert not lab.read((18, 1024, 1024), datatype)[:, 600:, 700:].any()


def test_catmaid_type_4_as_catmaid_has_it(lab: Lab) -> None:
    pixels = volume((16, 512, 512))
    write(pixels, lambda z, y, x: lab.folder / "s" / f"{z}/0/{y}_{x}.png")
    params = {"root_dir": str(lab.folder / "s"), "filetype": "png"}
    config = lab.config(**plugins(f"{BUILT_IN}.catmaid", "CatmaidFileImageStack", params))
    config["client"]["path_processor"]["class"] = f"{BUILT_IN}.catmaid.CatmaidZoomInSliceImageStackPathProcessor"
    lab.ingest(config)
    assert np.array_equal(lab.read((16, 512, 512)), pixels)


def test_catmaid_behind_a_web_server_with_a_tile_missing(lab: Lab) -> None:
    pixels = volume((16, 512, 512))
    write(pixels, lambda z, y, x: lab.folder / "web" / f"{z}/{y}/{x}.png")
    (lab.folder / "web" / "3" / "0" / "0.png").unlink()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(lab.folder / "web"))

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        params = {"url": f"http://127.0.0.1:{server.server_port}/", "filetype": "png"}
        config = lab.config(**plugins("ingestclient.plugins.catmaid", "CatmaidURL", params))
        report, _ = lab.ingest(config, QUICK.model_copy(update={"on_bad_source": "blank"}))
        server.shutdown()
        thread.join()
    assert report.blank == ("x=0 y=0 z=3 t=0",)
    read = lab.read((16, 512, 512))
    assert not read[3].any()
    assert np.array_equal(np.delete(read, 3, 0), np.delete(pixels, 3, 0))


@pytest.mark.parametrize(
    ("extension", "datatype"),
    [("png", "uint8"), pytest.param("tif", "uint16", marks=pytest.mark.slow), ("tif", "uint32")],
)
def test_a_stack_of_whole_slices_is_cut_and_padded(lab: Lab, extension: str, datatype: str) -> None:
    pixels = volume(SHAPE, datatype) // (2 if datatype == "uint32" else 1)
    for z, plane in enumerate(pixels):
        array = plane.astype("int32") if datatype == "uint32" else plane
        Image.fromarray(array).save(lab.folder / f"slice_{z + 200:04d}.{extension}")
    params = {
        "root_dir": str(lab.folder),
        "base_filename": "slice_<o:200p:4>",
        "extension": extension,
        "filesystem": "local",
    }
    config = lab.config(extent=WIDE, channel=datatype, **plugins("ingestclient.plugins.stack", "ZindexStack", params))
    report, _ = lab.ingest(config)
    assert report.balanced
    assert np.array_equal(lab.read(SHAPE, datatype), pixels)


def test_a_time_series_in_multipage_tiff(lab: Lab) -> None:
    pixels = volume((5, 2, 600, 700), "uint16")
    params: dict[str, Any] = {"datatype": "uint16"}
    for z in range(2):
        pages = [Image.fromarray(page) for page in pixels[:, z]]
        pages[0].save(lab.folder / f"{z}.tif", save_all=True, append_images=pages[1:])
        params[f"z_{z}"] = str(lab.folder / f"{z}.tif")
    extent = WIDE | {"z": [0, 2], "t": [0, 5]}
    chosen = plugins("ingestclient.plugins.multipage_tiff", "SingleTimeTiff", params)
    report, _ = lab.ingest(lab.config(extent=extent, channel="uint16", **chosen))
    assert report.tile_count == report.deleted == 40
    assert np.array_equal(lab.read((2, 600, 700), "uint16", t=(0, 5)), pixels)


def test_a_hyperstack_in_several_files(lab: Lab) -> None:
    pixels = volume((4, 2, 512, 512), "uint16")  # t, z; two colours interleaved
    other = pixels // 3
    pages = [Image.fromarray(source[t, z]) for t in range(4) for z in range(2) for source in (other, pixels)]
    pages[0].save(lab.folder / "h_0000.tif", save_all=True, append_images=pages[1:])
    params = {
        "root_dir": str(lab.folder),
        "base_filename": "h_<p:4>",
        "extension": "tif",
        "time_chunk_size": 16,
        "num_z_slices": 2,
        "num_channels": 2,
        "channel_index": 1,
        "filesystem": "local",
    }
    extent = {"x": [0, 512], "y": [0, 512], "z": [0, 2], "t": [0, 4]}
    chosen = plugins("ingestclient.plugins.multipage_tiff", "TiffMultiFileHyperStack", params)
    lab.ingest(lab.config(extent=extent, channel="uint16", **chosen))
    assert np.array_equal(lab.read((2, 512, 512), "uint16", t=(0, 4)), pixels)


def test_one_large_image_is_cut_into_tiles_and_decoded_once(lab: Lab) -> None:
    pixels = volume((1, 1500, 2048))
    Image.fromarray(pixels[0]).save(lab.folder / "one.png")
    chosen = plugins(f"{BUILT_IN}.stack", "SingleImage", {"filename": str(lab.folder / "one.png")})
    extent = {"x": [0, 2048], "y": [0, 1500], "z": [0, 1], "t": [0, 1]}
    config, job = lab.create(lab.config(extent=extent, **chosen))
    uploader = lab.uploader(config, job.id)
    uploader.run()
    assert uploader._line.pieces.putting.source.cache.decoded == 1
    uploader.close()
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read((1, 1500, 2048)), pixels)


@pytest.mark.parametrize("datatype", [pytest.param("uint8", marks=pytest.mark.slow), "uint16"])
def test_hdf5_in_one_file(lab: Lab, datatype: str) -> None:
    pixels = volume(SHAPE, datatype)
    with h5py.File(lab.folder / "v.h5", "w") as file:
        file["img"] = pixels
    params = {"filename": str(lab.folder / "v.h5"), "data_name": "img", "datatype": datatype, "upload_format": "tiff"}
    chosen = plugins("ingestclient.plugins.hdf5", "Hdf5SingleFile", params)
    lab.ingest(lab.config(extent=WIDE, channel=datatype, **chosen))
    assert np.array_equal(lab.read(SHAPE, datatype), pixels)


def test_hdf5_slices_at_an_offset(lab: Lab) -> None:
    pixels = volume((16, 300, 400))
    for z, plane in enumerate(pixels):
        with h5py.File(lab.folder / f"s{z}.h5", "w") as file:
            file["img"], file["offset"], file["extent"] = plane, [450, 100], plane.shape
    params = {
        "root_dir": str(lab.folder),
        "base_filename": "s<>",
        "extension": "h5",
        "data_name": "img",
        "offset_name": "offset",
        "extent_name": "extent",
        "offset_origin_x": 10,
        "offset_origin_y": 20,
        "datatype": "uint8",
        "upload_format": "png",
        "filesystem": "local",
    }
    chosen = plugins("ingestclient.plugins.hdf5", "Hdf5Slice", params)
    extent = {"x": [0, 1024], "y": [0, 1024], "z": [0, 16], "t": [0, 1]}
    config = lab.config(extent=extent, **chosen)
    settings = UploadSettings(threads=8, convert=PADDING, on_bad_source="blank")
    report, job = lab.ingest(config, settings)
    told = account(lab.client, IngestConfig.load(config), job.id, settings, ledger_folder=lab.folder / "ledgers")
    for found in (report, told):  # that of this run, and that of all runs
        assert (len(found.padded), len(found.blank), found.delivered) == (32, 32, 32)
    assert told.padded[0] == "x=0 y=0 z=0 t=0"
    assert "Of 32 tiles the source lacks a part that lies within the extent; 'pad' made it 0." in told.warnings
    assert "32 blank, 32 padded" in told.summary()
    assert "## Padded (32)" in report_text(told)
    read = lab.read((16, 1024, 1024))
    assert np.array_equal(read[:, 470:770, 110:510], pixels)
    assert int(read.astype("int64").sum()) == int(pixels.astype("int64").sum())


def test_hdf5_blocks_and_a_missing_one(lab: Lab) -> None:
    pixels = volume((16, 512, 1024))
    for x in (0, 512):
        with h5py.File(lab.folder / f"b_{x}-{x + 512}_0-512_0-16.h5", "w") as file:
            file["img"] = pixels[:, :, x : x + 512]
    (lab.folder / "b_512-1024_0-512_0-16.h5").unlink()
    sizes = {f"{axis}_chunk_size": size for axis, size in (("x", 512), ("y", 512), ("z", 16))}
    params = {"root_dir": str(lab.folder), "prefix": "b", "extension": "h5", "data_name": "img", **sizes}
    chosen = plugins("ingestclient.plugins.hdf5", "Hdf5Chunk", params | {"use_python_convention": True})
    extent = {"x": [0, 1024], "y": [0, 512], "z": [0, 16], "t": [0, 1]}
    report, _ = lab.ingest(lab.config(extent=extent, **chosen), QUICK.model_copy(update={"on_bad_source": "blank"}))
    assert len(report.blank) == 16
    assert np.array_equal(lab.read((16, 512, 512)), pixels[:, :, :512])


@pytest.mark.parametrize("shape", VOLUMES)
def test_hdf5_volumetric(lab: Lab, shape: tuple[int, int, int]) -> None:
    pixels = volume(shape, "uint16")
    with h5py.File(lab.folder / "v.h5", "w") as file:
        file["img"] = pixels
    params = {"filename": str(lab.folder / "v.h5"), "data_name": "img"}
    config = lab.volumetric(f"{BUILT_IN}.hdf5.Hdf5Volume", params, whole(shape), channel="uint16")
    config["client"]["path_processor"]["class"] = f"{BUILT_IN}.hdf5.Hdf5SingleFilePathProcessor"
    lab.ingest(config)
    assert np.array_equal(lab.read(pixels.shape, "uint16"), pixels)


@pytest.mark.parametrize("shape", VOLUMES)
def test_zarr_volumetric(lab: Lab, shape: tuple[int, int, int]) -> None:
    pixels = volume(shape, "uint64")
    zarr.open_group(str(lab.folder / "z.zarr"), mode="w").create_array("raw", data=pixels, chunks=(16, 256, 256))
    params = {"cloud_path": str(lab.folder / "z.zarr"), "volume_name": "raw"}
    config = lab.volumetric("ingestclient.plugins.zarr.Zarr", params, whole(shape), channel="labels")
    report, _ = lab.ingest(config)
    assert report.balanced
    assert np.array_equal(lab.read(pixels.shape, "labels"), pixels)


def test_a_chunked_job_has_the_right_messages_and_zero_padded_cuboids(lab: Lab) -> None:
    pixels = volume((40, 512, 1100), "uint8")
    np.save(lab.folder / "v.npy", pixels)
    extent = {"x": [0, 1100], "y": [0, 512], "z": [0, 40], "t": [0, 1]}
    config = lab.volumetric(f"{BUILT_IN}.arrays.Array", {"filename": str(lab.folder / "v.npy")}, extent)
    report, job = lab.ingest(config)
    assert (report.received, report.deleted, report.put, len(job.objects)) == (4, 4, 16, 16)
    padded = lab.read((64, 512, 2048))
    assert np.array_equal(padded[:40, :, :1100], pixels)
    assert not padded[40:].any()
    assert not padded[:, :, 1100:].any()


def test_cuboids_that_are_refused_for_good_keep_the_message(lab: Lab) -> None:
    from prefect_biomed.sandbox.boss import AwsFault

    np.save(lab.folder / "v.npy", volume((32, 512, 1024)))
    extent = {"x": [0, 1024], "y": [0, 512], "z": [0, 32], "t": [0, 1]}
    config, job = lab.create(
        lab.volumetric(f"{BUILT_IN}.arrays.Array", {"filename": str(lab.folder / "v.npy")}, extent)
    )
    keys = [f"&0&0&{morton}" for morton in (1, 4)]
    lab.boss.switches.aws_faults = [
        AwsFault(operation="PutObject", code="InvalidRequest", status=400, times=None, key=key) for key in keys
    ]
    report = lab.upload(config, job.id)
    assert report.deleted == 0
    [reason] = report.failed.values()
    assert "2 of 4 cuboids" in reason
    assert "(512, 0, 0)" in reason
    assert "(0, 0, 16)" in reason
    lab.boss.job(job.id).upload_queue.expire_leases()
    assert lab.complete(job.id).outcome == "RESUME"
    lab.boss.switches.aws_faults = []
    assert lab.upload(config, job.id).deleted == 1
    assert lab.complete(job.id).outcome == "COMPLETE"
    assert np.array_equal(lab.read((32, 512, 1024)), volume((32, 512, 1024)))


@pytest.mark.parametrize(
    "order", ["xyzt", *(pytest.param(order, marks=pytest.mark.slow) for order in ("zyx", "xyz", "tzyx"))]
)
def test_every_order_of_the_axes_gives_equal_cuboids(lab: Lab, order: str) -> None:
    pixels = volume((32, 512, 1024))
    extent = {"x": [0, 1024], "y": [0, 512], "z": [0, 32], "t": [0, 1]}
    axes = {"z": 0, "y": 1, "x": 2}
    array = pixels.transpose([axes[axis] for axis in order if axis != "t"])
    if "t" in order:
        array = np.expand_dims(array, order.index("t"))
    np.save(lab.folder / "v.npy", array)
    params = {"filename": str(lab.folder / "v.npy"), "order": order}
    lab.ingest(lab.volumetric(f"{BUILT_IN}.arrays.Array", params, extent))
    assert np.array_equal(lab.read(pixels.shape), pixels)


@pytest.mark.slow
def test_without_blosc_a_plain_frame_is_sent_and_accepted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blosc", None)
    assert compress(b"abcd", 2)[16:] == b"abcd"
    np.save(lab.folder / "v.npy", volume((32, 512, 1024)))
    extent = {"x": [0, 1024], "y": [0, 512], "z": [0, 32], "t": [0, 1]}
    lab.ingest(lab.volumetric(f"{BUILT_IN}.arrays.Array", {"filename": str(lab.folder / "v.npy")}, extent))
    assert np.array_equal(lab.read((32, 512, 1024)), volume((32, 512, 1024)))


def test_our_plain_frame_is_one_for_the_blosc_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import blosc

    monkeypatch.setitem(sys.modules, "blosc", None)
    frame = compress(bytes(range(256)) * 64, 4)
    assert blosc.decompress(frame) == bytes(range(256)) * 64


def test_arrays_as_tiles(lab: Lab) -> None:
    pixels = volume(SHAPE, "uint16")
    np.save(lab.folder / "v.npy", pixels)
    chosen = plugins(f"{BUILT_IN}.arrays", "Array", {"filename": str(lab.folder / "v.npy")})
    lab.ingest(lab.config(extent=WIDE, channel="uint16", **chosen))
    assert np.array_equal(lab.read(SHAPE, "uint16"), pixels)


def test_classes_written_for_boss_ingest_load_unchanged(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab.folder / "their_plugin.py").write_text(
        "import io\n"
        "from PIL import Image\n"
        "from ingestclient.plugins.path import PathProcessor\n"
        "from ingestclient.plugins.tile import TileProcessor\n\n\n"
        "class GreyPathProcessor(PathProcessor):\n"
        "    def setup(self, parameters):\n"
        "        self.parameters = parameters\n\n"
        "    def process(self, x_index, y_index, z_index, t_index=None):\n"
        "        return str(z_index)\n\n\n"
        "class GreyTileProcessor(TileProcessor):\n"
        "    def __init__(self):\n"
        "        TileProcessor.__init__(self)\n\n"
        "    def setup(self, parameters):\n"
        "        self.size = parameters.pop('ingest_job')['tile_size']\n\n"
        "    def process(self, file_path, x_index, y_index, z_index, t_index=0):\n"
        "        if z_index == 9:\n"
        "            raise RuntimeError('no grey today')\n"
        "        output = io.BytesIO()\n"
        "        Image.new('L', (self.size['x'], self.size['y']), 10 * z_index).save(output, format='PNG')\n"
        "        return output\n"
    )
    monkeypatch.syspath_prepend(str(lab.folder))
    monkeypatch.setenv(VARIABLE, "another_plugin, their_plugin")
    config, job = lab.create(lab.config(**plugins("their_plugin", "Grey", {})))
    report = lab.upload(config, job.id)
    assert "ingestclient" not in sys.modules
    assert report.deleted == 15
    assert "no grey today" in report.failed["x=0 y=0 z=9 t=0"]


@pytest.mark.parametrize("listed", ["", "unwanted", "unwanted_plugin.Other", "os"])
def test_a_class_that_nobody_has_allowed_is_refused_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "unwanted_plugin.py").write_text(f"open({str(mark)!r}, 'w')\n\n\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(VARIABLE, listed)
    line = rf"{VARIABLE}={listed}{',' * bool(listed)}unwanted_plugin$"
    with pytest.raises(ConfigurationError, match=line):
        base.load("unwanted_plugin.Thing", {})
    with pytest.raises(ConfigurationError, match="not allowed"):
        base.load(f"{BUILT_IN}_evil.Thing", {})
    assert not mark.exists()
    assert "unwanted_plugin" not in sys.modules


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "os.path", f"{BUILT_IN}.base.re"])
def test_what_is_no_plugin_is_never_called(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv(VARIABLE, "os,subprocess")
    with pytest.raises(ConfigurationError, match=r"is no plugin|could not be loaded"):
        base.load(path, {})


def test_a_class_that_an_installed_package_offers_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "their_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\ntheirs = offered_plugin:Offered\n")
    (tmp_path / "offered_plugin.py").write_text(
        "class Offered:\n"
        "    def setup(self, parameters):\n        pass\n\n"
        "    def process(self, *where):\n        pass\n\n\n"
        "class Hidden(Offered):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(base.load("offered_plugin.Offered", {})).__name__ == "Offered"
    with pytest.raises(ConfigurationError, match="not allowed"):
        base.load("offered_plugin.Hidden", {})


def test_classes_that_build_on_those_of_boss_ingest_load_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "built_on_theirs.py").write_text(
        "import io\n"
        "from PIL import Image, ImageChops\n"
        "from ingestclient.plugins.stack import ZindexStackPathProcessor, ZindexStackTileProcessor\n"
        "from ingestclient.utils.filesystem import DynamicFilesystem\n\n\n"
        "class PathProcessor(ZindexStackPathProcessor):\n"
        "    def process(self, x_index, y_index, z_index, t_index=None):\n"
        "        return super().process(x_index, y_index, z_index + 1, t_index)\n\n\n"
        "class TileProcessor(ZindexStackTileProcessor):\n"
        "    def setup(self, parameters):\n"
        "        super().setup(parameters)\n"
        "        self.own = DynamicFilesystem(parameters['filesystem'], parameters)\n\n"
        "    def process(self, file_path, x_index, y_index, z_index, t_index=0):\n"
        "        with self.own.get_file(file_path) as own, self.fs.get_file(file_path) as theirs:\n"
        "            assert own.read() == theirs.read()\n"
        "        output = io.BytesIO()\n"
        "        handle = super().process(file_path, x_index, y_index, z_index, t_index)\n"
        "        ImageChops.invert(Image.open(handle)).save(output, 'PNG')\n"
        "        return output\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(VARIABLE, "built_on_theirs")
    pixels = volume((48, 64))
    Image.fromarray(pixels).save(tmp_path / "s_1.png")
    config = stack_config(tmp_path, "s_<>", {"x": [0, 64], "y": [0, 48]})
    for key in ("path_processor", "tile_processor"):
        config["client"][key]["class"] = f"built_on_theirs.{key.title().replace('_', '')}"
    source = TileSource(IngestConfig.load(config), TILE, 1 << 20)
    assert np.array_equal(pixels_of(source.read(Position(0, 0, 0, 0))), 255 - pixels)
    assert not source.names_files  # it makes paths of its own, and says nothing of them
    assert "ingestclient" not in sys.modules


def stack_config(folder: Path, name: str, extent: dict[str, list[int]], **params: Any) -> dict[str, Any]:
    module = "ingestclient.plugins.stack"
    chosen = plugins(module, "ZindexStack", {"root_dir": str(folder), "base_filename": name, "extension": "png"})
    chosen["tile_processor"]["params"] = {"extension": "png", "filesystem": "local"} | params
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {"backend": {"name": "boss", "class": "BossBackend", "host": "h", "protocol": "https"}} | chosen,
        "database": {"collection": "c", "experiment": "e", "channel": "ch"},
        "ingest_job": {
            "resolution": 0,
            "extent": extent | {"z": [0, 1], "t": [0, 1]},
            "tile_size": {"x": 512 if extent["x"][1] > 64 else 64, "y": 512 if extent["y"][1] > 48 else 48},
        },
    }


def test_a_template_with_columns_and_rows_names_one_file_for_each_tile(tmp_path: Path) -> None:
    pixels = volume((1, 1024, 1024))
    write(pixels, lambda z, y, x: tmp_path / f"t_{z:03d}_{y}_{x}.png")
    config = stack_config(tmp_path, "t_<p:3>_<y>_<x>", {"x": [0, 1024], "y": [0, 1024]})
    source = TileSource(IngestConfig.load(config), TileFormat(512, 512, "uint8"), 1 << 20)
    for y, x in np.ndindex(2, 2):
        read = pixels_of(source.read(Position(x, y, 0, 0)))
        assert np.array_equal(read, pixels[0, y * 512 : (y + 1) * 512, x * 512 : (x + 1) * 512])


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 2048)])
def test_a_stack_may_begin_where_the_extent_does(shape: tuple[int, int], tmp_path: Path) -> None:
    pixels = volume(shape)
    Image.fromarray(pixels).save(tmp_path / "s_0.png")
    config = stack_config(tmp_path, "s_<>", {"x": [1024, 2048], "y": [512, 1024]})
    source = TileSource(IngestConfig.load(config), TileFormat(512, 512, "uint8"), 1 << 22)
    top, left = (0, 0) if shape == (512, 1024) else (512, 1024)
    for x in (2, 3):
        start = left + (x - 2) * 512
        read = pixels_of(source.read(Position(x, 1, 0, 0)))
        assert np.array_equal(read, pixels[top : top + 512, start : start + 512])


def test_a_slice_that_ends_before_the_extent_is_refused_unless_padding_is_allowed(tmp_path: Path) -> None:
    pixels = volume((600, 700))
    Image.fromarray(pixels).save(tmp_path / "s_0.png")
    config = IngestConfig.load(stack_config(tmp_path, "s_<>", {"x": [0, 700], "y": [0, 650]}))
    source = TileSource(config, TileFormat(512, 512, "uint8", fill=9), 1 << 22)
    assert np.array_equal(pixels_of(source.read(Position(0, 0, 0, 0))), pixels[:512, :512])
    with pytest.raises(SourceUnreadable, match=r"gives 188 x 88 pixels of a tile of which 188 x 138 lie .* 'pad'"):
        source.read(Position(1, 1, 0, 0))
    source = TileSource(config, TileFormat(512, 512, "uint8", fill=9, convert=PADDING), 1 << 22)
    read = pixels_of(source.read(Position(1, 1, 0, 0)))
    assert np.array_equal(read[:88, :188], pixels[512:, 512:])
    assert (read[88:] == 9).all()


@pytest.mark.parametrize("kind", ["file", "array"])
def test_a_tile_that_is_too_small_is_refused_where_it_is_not_the_last(tmp_path: Path, kind: str) -> None:
    small = volume((512, 400))
    config = stack_config(tmp_path, "t_<x>_<y>", {"x": [0, 912], "y": [0, 512]})
    for x in (0, 1):
        Image.fromarray(small).save(tmp_path / f"t_{x}_0.png")
    source = TileSource(IngestConfig.load(config), TileFormat(512, 512, "uint8"), 1 << 22)
    if kind == "array":
        source._reader.process = lambda *_: small  # as a plugin of one's own gives it
    assert np.array_equal(pixels_of(source.read(Position(1, 0, 0, 0)))[:, :400], small)
    with pytest.raises(SourceUnreadable, match="ends early"):
        source.read(Position(0, 0, 0, 0))


def test_a_volume_that_ends_before_the_extent_is_refused_unless_padding_is_allowed(lab: Lab) -> None:
    pixels = volume((16, 512, 600))
    np.save(lab.folder / "v.npy", pixels)
    parameters = {"filename": str(lab.folder / "v.npy")}
    config = IngestConfig.load(lab.volumetric(f"{BUILT_IN}.arrays.Array", parameters, whole((16, 512, 700))))
    with pytest.raises(SourceUnreadable, match=r"gives \(16, 512, 600\) .* which \(16, 512, 700\) lie .* 'pad'"):
        ChunkSource(config, "uint8").read(Position(0, 0, 0, 0))
    assert np.array_equal(ChunkSource(config, "uint8", convert=PADDING).read(Position(0, 0, 0, 0)), pixels)


@pytest.mark.parametrize(
    ("values", "order", "said"),
    [
        (np.uint8(7), 99, r"shape \(\) with axis order 99 is no chunk"),
        (np.zeros((2, 2), "uint8"), base.ZYX_ORDER, r"shape \(2, 2\) with axis order \d+ is no chunk"),
        (np.zeros((2, 4, 4, 4), "uint8"), base.TZYX_ORDER, r"has not exactly one sample"),
    ],
)
def test_what_a_plugin_gives_is_a_chunk_or_refused_by_name(
    values: Any, order: int, said: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(lab.folder / "v.npy", volume((16, 512, 512)))
    extent = {"x": [0, 512], "y": [0, 512], "z": [0, 16], "t": [0, 1]}
    config = lab.volumetric(f"{BUILT_IN}.arrays.Array", {"filename": str(lab.folder / "v.npy"), "order": "zyx"}, extent)
    source = ChunkSource(IngestConfig.load(config), "uint8")
    monkeypatch.setattr(source._reader, "process", lambda *_: (values, order))
    with pytest.raises(SourceUnreadable, match=said):
        source.piece(Position(0, 0, 0, 0))


def test_fail_gracefully_makes_a_black_tile_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = stack_config(tmp_path, "s_<>", {"x": [0, 64], "y": [0, 48]}, fail_gracefully=True)
    source = TileSource(IngestConfig.load(config), TILE, 1 << 20)
    content, made = source.piece(Position(0, 0, 0, 0))
    assert (made, pixels_of(content).any()) == ("blank", False)
    (tmp_path / "s_0.png").write_bytes(b"")
    with pytest.raises(SourceUnreadable, match="not an image"):
        source.read(Position(0, 0, 0, 0))
    (tmp_path / "s_0.png").unlink()
    assert inspect_sources(IngestConfig.load(config), "uint8") == Inspection()
    config["client"]["path_processor"]["params"]["root_dir"] = str(tmp_path / "not mounted")
    assert len(inspect_sources(IngestConfig.load(config), "uint8").problems) == 1
    with pytest.raises(SourceUnreadable, match="no such file"):
        TileSource(IngestConfig.load(config), TILE, 1 << 20).read(Position(0, 0, 0, 0))


def test_a_class_that_is_not_there_is_said(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "no_such_module")
    with pytest.raises(ConfigurationError, match="no_such_module"):
        base.load("no_such_module.Thing", {})
    with pytest.raises(ConfigurationError, match="needs the parameter 'root_dir'"):
        base.load("ingest.plugins.catmaid.CatmaidFileImageStackPathProcessor", {"ingest_job": {"resolution": 0}})


# -- 34, 35, 36: images that are not what they should be ---------------------------------------------------------------

TILE = TileFormat(64, 48, "uint8")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "LA"])
def test_colour_is_an_error_or_converted_never_a_3d_tile(mode: str) -> None:
    grey = Image.fromarray(volume((48, 64)))
    content = encoded(grey.convert("RGB").quantize(256) if mode == "P" else grey.convert(mode))
    with pytest.raises(SourceUnreadable, match="the channel is uint8"):
        images.from_bytes(content, TILE, "file")
    convert = TileFormat(64, 48, "uint8", colour="convert")
    made = pixels_of(images.from_bytes(content, convert, "file"))
    assert made.shape == (48, 64)
    assert made.dtype == np.uint8
    expected = np.asarray(grey) if mode != "1" else np.asarray(grey.convert("1").convert("L"))
    tolerance = 12 if mode == "P" else 0
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= tolerance


def test_sixteen_bits_never_wrap_into_eight() -> None:
    deep = volume((48, 64), "uint16")
    with pytest.raises(SourceUnreadable, match="16 bits deep"):
        images.from_bytes(encoded(Image.fromarray(deep)), TILE, "file")
    made = images.from_bytes(encoded(Image.fromarray(deep)), TileFormat(64, 48, "uint8", colour="convert"), "file")
    assert np.array_equal(pixels_of(made), deep >> 8)
    with pytest.raises(SourceUnreadable, match="would wrap"):
        images.from_array(deep, TILE, "array")
    assert np.array_equal(pixels_of(images.from_array(deep % 256, TILE, "array")), deep % 256)


def test_eight_bits_go_into_sixteen_unchanged() -> None:
    shallow = volume((48, 64))
    wide = TileFormat(64, 48, "uint16")
    content = encoded(Image.fromarray(shallow))
    assert images.from_bytes(content, wide, "file") is content
    assert np.array_equal(np.frombuffer(images.pixels(content, wide, "file"), "<u2").reshape(48, 64), shallow)


@pytest.mark.parametrize(("datatype", "fill"), [("uint8", 7), ("uint16", 300)])
def test_a_small_edge_tile_is_padded_with_the_fill_value(datatype: str, fill: int) -> None:
    part = volume((30, 20), "uint8")
    made = pixels_of(images.from_bytes(encoded(Image.fromarray(part)), TileFormat(64, 48, datatype, fill=fill), "f"))
    assert made.shape == (48, 64)
    assert np.array_equal(made[:30, :20], part)
    assert (made[30:] == fill).all()
    assert (made[:, 20:] == fill).all()
    with pytest.raises(SourceUnreadable, match="place it wrongly"):
        images.from_bytes(encoded(Image.fromarray(volume((60, 64)))), TILE, "f")


@pytest.mark.parametrize("filetype", ["tif", *SAME_UNDER_ANOTHER_NAME, "jpg", "png"])
def test_all_file_types_of_the_documentation_are_taken(lab: Lab, filetype: str) -> None:
    smooth = np.add.outer(np.arange(512), np.arange(512)).astype("uint16") // 8
    root = lab.folder / "s"
    for z in range(2):
        (root / str(z)).mkdir(parents=True)
        Image.fromarray(smooth.astype("uint8")).save(root / str(z) / f"0_0_0.{filetype}")
    params = {"root_dir": str(root), "filetype": filetype}
    chosen = plugins("ingestclient.plugins.catmaid", "CatmaidFileImageStack", params)
    _, job = lab.ingest(lab.config(extent={"x": [0, 512], "y": [0, 512], "z": [0, 2], "t": [0, 1]}, **chosen))
    sent = lab.boss.service._blobs.get(next(iter(job.objects.values())).blob)
    assert sent == (root / "0" / f"0_0_0.{filetype}").read_bytes()  # as it was
    assert np.abs(lab.read((2, 512, 512)).astype(int) - smooth).max() <= (2 if filetype.startswith("j") else 0)


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "html"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_a_damaged_file_is_never_passed_on(kind: str, damage: str) -> None:
    whole = encoded(Image.fromarray(volume((48, 64))), kind)
    middle = len(whole) // 2
    if damage == "bit" and kind != "PNG":
        return  # TIFF and JPEG carry no checksums: nobody can see it
    content = {
        "truncated": whole[:middle],
        "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "html": b"<html>not an image</html>",
    }[damage]
    with pytest.raises(SourceUnreadable, match=r"damaged|not an image|cannot be read"):
        images.from_bytes(content, TILE, "file")


def test_the_cache_is_bounded_and_decodes_once_for_many_threads() -> None:
    cache = DecodeCache(1000)
    calls: list[int] = []
    gate = threading.Barrier(8)

    def load(key: int) -> tuple[int, int]:
        calls.append(key)
        return key, 400

    def ask() -> None:
        gate.wait()
        assert cache.get(1, lambda: load(1)) == 1

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    for key in (2, 3, 1):
        cache.get(key, lambda key=key: load(key))
    assert calls == [1, 2, 3, 1]
    assert cache._bytes <= 1000
    with pytest.raises(ValueError, match="broken"):
        cache.get(9, lambda: (_ for _ in ()).throw(ValueError("broken")))
    assert cache.get(9, lambda: (9, 1)) == 9


def test_a_window_beyond_the_image_is_an_error_not_a_black_tile(tmp_path: Path) -> None:
    Image.fromarray(volume((48, 64))).save(tmp_path / "a.png")
    with pytest.raises(SourceUnreadable, match="Correct the extent"):
        images.from_window(ImageWindow(str(tmp_path / "a.png"), left=64), TILE, DecodeCache(1 << 20))
    with pytest.raises(SourceUnreadable, match="fewer pages"):
        images.from_window(ImageWindow(str(tmp_path / "a.png"), page=3), TILE, DecodeCache(1 << 20))


@pytest.mark.parametrize("encoding", ["tiff", "jpeg"])
def test_ink_is_not_light_when_colours_become_grey(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / f"ink.{encoding}"
    Image.new("CMYK", (64, 64), (255, 0, 0, 200)).save(path)
    tile = TileFormat(64, 64, "uint8", convert=frozenset({"grey"}))
    with pytest.raises(SourceUnreadable, match="not red, green and blue"):
        images.from_window(ImageWindow(str(path), whole=True), tile, DecodeCache(0))


@pytest.mark.parametrize(("channels", "extra"), [(2, "unspecified"), (4, "unspecified"), (5, "unassalpha")])
def test_channels_that_are_no_colours_do_not_become_grey(tmp_path: Path, channels: int, extra: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "channels.tif"
    values = np.zeros((64, 64, channels), np.uint8)
    tifffile.imwrite(
        path, values, photometric="minisblack", planarconfig="contig", extrasamples=[extra] * (channels - 1)
    )
    tile = TileFormat(64, 64, "uint8", convert=frozenset({"grey"}))
    with pytest.raises(SourceUnreadable, match="channels"):
        images.from_window(ImageWindow(str(path), whole=True), tile, DecodeCache(0))
