"""Volumes of every format as one thing: an array that is read in parts, and the names of its axes."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from prefect_biomed.clients.boss import dicom_series
from prefect_biomed.clients.boss.pictures import Array
from prefect_biomed.clients.boss.storage import filesystem, key_value_store
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["KINDS", "OpenVolume", "kind_of", "open_volume"]

Read = Callable[[tuple[slice | int, ...]], Array]


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class OpenVolume:
    """A volume that is open.

    Attributes:
        name: For errors.
        shape: Voxels by axis.
        axes: Names of the axes in their order: `x`, `y`, `z`, and others of which one index is read.
        dtype: Of its values.
        read: Gives a part, by slices and indices in the order of the axes that do not leave the shape.
        origin: Where its first voxel lies, where the format tells.
        close: Gives back what it holds open.
        followed: Which of the parameters `level`, `t` and `c` chose what was opened.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: np.dtype[Any]
    read: Read
    origin: Mapping[str, int] = field(default_factory=dict)
    close: Callable[[], object] = _nothing
    followed: tuple[str, ...] = ()


def kind_of(source: str) -> str | None:
    """Tell the kind of a source from its name or, on the local disk, from what lies in it; None if that does not tell.

    Args:
        source: Path or URL.
    """
    name = source.rstrip("/").lower()
    for kind, endings in _ENDINGS.items():
        if name.endswith(endings):
            return kind
    folder = Path(source)
    if folder.is_dir():
        inside = {entry.name.lower() for entry in folder.iterdir()}
        for kind, marks in _MARKS.items():
            if inside & marks:
                return kind
        if any(one.endswith((".dcm", ".ima")) for one in inside):
            return "dicom"
    return None


def open_volume(parameters: Mapping[str, Any]) -> OpenVolume:
    """Open a volume.

    Args:
        parameters: As for `plugins.volume.VolumeChunkProcessor`.

    Returns:
        The volume; nothing but its description was read.

    Raises:
        ConfigurationError: It is not there, not told apart, damaged, of a kind whose values are not told exactly, or
            needs a package that is not installed.
    """
    source = str(parameters.get("source") or "")
    if not source:
        raise ConfigurationError("A volume needs the parameter 'source', a path or URL.")
    kind = parameters.get("kind") or kind_of(source)
    if kind not in KINDS:
        raise ConfigurationError(
            f"{source}: of which kind it is cannot be told. Say in the parameter kind: {', '.join(KINDS)}."
        )
    missing = parameters.get("missing_chunks")
    if missing not in (None, "fill", "refuse") or (missing == "refuse" and kind not in _TELL_MISSING):
        raise ConfigurationError(
            f"{source}: missing_chunks is {missing!r}. Say fill, or refuse for {' and '.join(_TELL_MISSING)}; "
            "readers of other kinds take the fill value without a word."
        )
    try:
        volume = KINDS[kind](source, parameters)
    except ConfigurationError:
        raise
    except ImportError as error:
        raise ConfigurationError(
            f"{source}: {kind} needs {error.name or error}: pip install 'prefect-biomed[volumetric]'."
        ) from error
    except Exception as error:  # whatever the libraries of so many formats raise
        said = str(error).partition(" [tensorstore_spec")[0] or type(error).__name__
        raise ConfigurationError(f"{source}: the {kind} volume cannot be opened ({said}).") from error
    for name in ("level", "t", "c"):
        if parameters.get(name) and name not in volume.followed + volume.axes:
            volume.close()
            raise ConfigurationError(f"{volume.name}: has nothing to choose by {name}, which is {parameters[name]}.")
    return volume


def _is_url(source: str) -> bool:
    return "://" in source


def _file(source: str, parameters: Mapping[str, Any]) -> IO[bytes]:
    if not _is_url(source):
        return Path(source).open("rb")
    found, path = filesystem(source, parameters)
    file: IO[bytes] = found.open(path, "rb")
    return file


def _zarr(source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    from prefect_biomed.clients.boss.plugins.zarr import ZarrChunkProcessor

    opened = ZarrChunkProcessor()
    opened.setup({**parameters, "cloud_path": source, "volume_name": parameters.get("dataset")})
    array = opened.array
    return OpenVolume(
        opened.name,
        tuple(array.shape),
        tuple(opened.axes),
        np.dtype(array.dtype),
        array.__getitem__,
        followed=("level",),
    )


def _tensorstore(spec: dict[str, Any], name: str, axes: str | Sequence[str]) -> OpenVolume:
    import tensorstore

    store = tensorstore.open(spec, open=True, read=True).result()
    low = store.domain.inclusive_min
    store = store.translate_to[(0,) * store.rank]

    def read(where: tuple[slice | int, ...]) -> Array:
        part: Array = store[where].read().result()
        return part

    found = tuple(axes)
    if len(found) != store.rank:
        raise ConfigurationError(
            f"{name}: has {store.rank} axes, not those of {''.join(found)}. Say in the parameter axes which they are."
        )
    origin = {axis: int(first) for axis, first in zip(found, low, strict=True) if axis in "xyz"}
    return OpenVolume(name, tuple(store.shape), found, np.dtype(store.dtype.numpy_dtype), read, origin)


def _n5(source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    dataset, level = str(parameters.get("dataset") or "").strip("/"), int(parameters.get("level", 0))
    sample, setup = int(parameters.get("t", 0)), int(parameters.get("c", 0))
    places = [dataset, f"{dataset}/s{level}", f"{dataset}/setup{setup}/timepoint{sample}/s{level}"]
    missing: list[str] = []
    if level:
        places = places[1:]
    for place in places:
        followed = () if place == dataset else ("level", "t", "c") if place == places[-1] else ("level",)
        root = f"{source.rstrip('/')}/{place.strip('/')}".rstrip("/")
        spec = {"driver": "n5", "kvstore": key_value_store(root, parameters)}
        spec["fill_missing_data_reads"] = parameters.get("missing_chunks", "fill") == "fill"
        try:
            return replace(_tensorstore(spec, root, parameters.get("axes") or "xyz"), followed=followed)
        except ValueError as error:
            # A group has attributes as well, but no dimensions.
            if not str(error).startswith("NOT_FOUND") and '"dimensions"' not in str(error):
                raise
            missing.append(place or ".")
    raise ConfigurationError(f"{source}: has no N5 dataset {' nor '.join(missing)}. Name it in the parameter dataset.")


def _precomputed(source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    source = source.removeprefix("precomputed://")
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": key_value_store(source, parameters),
        "scale_index": int(parameters.get("level", 0)),
        # A chunk that is not there is no black one, unless somebody says so.
        "fill_missing_data_reads": parameters.get("missing_chunks", "refuse") == "fill",
    }
    return replace(_tensorstore(spec, source, "xyzc"), followed=("level",))


def _hdf5(source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    import h5py

    file = h5py.File(source if not _is_url(source) else _file(source, parameters), "r")
    level, sample, setup = (int(parameters.get(name, 0)) for name in ("level", "t", "c"))
    name, bigdataviewer = str(parameters.get("dataset") or ""), False
    if not name and "s00" in file and "t00000" in file:
        name, bigdataviewer = f"t{sample:05}/s{setup:02}/{level}/cells", True
    found: list[str] = []
    file.visititems(lambda key, item: found.append(key) if isinstance(item, h5py.Dataset) and item.ndim > 1 else None)
    name = name or (found[0] if len(found) == 1 else "")
    if name not in file or not isinstance(file[name], h5py.Dataset):
        raise ConfigurationError(
            f"{source}: has no dataset {name!r}. Name it in the parameter dataset; there are: {', '.join(found[:20])}."
        )
    data, lock = file[name], threading.Lock()
    if lacking := _lacking(data, source):
        raise ConfigurationError(
            f"{source}:{name}: values of it lie in {lacking}, which is not there or too short; HDF5 would take the "
            "fill value for them. Bring it there, or copy the dataset into one file."
        )
    # BigDataViewer writes unsigned values as signed ones of the same bits.
    dtype = np.dtype("uint16") if bigdataviewer and data.dtype == np.int16 else data.dtype

    def read(where: tuple[slice | int, ...]) -> Array:
        with lock:
            return np.asarray(data[where]).view(dtype)

    axes = tuple(parameters.get("axes") or {2: "yx", 3: "zyx"}.get(data.ndim, ""))
    followed = ("level", "t", "c") if bigdataviewer else ()
    return OpenVolume(f"{source}:{name}", tuple(data.shape), axes, dtype, read, followed=followed)


def _lacking(data: Any, source: str) -> str | None:
    """Another file that holds values of a dataset and cannot be read; None when there is none."""
    parts = [(str(part.file_name), str(part.dset_name)) for part in data.virtual_sources()] if data.is_virtual else []
    outside = data.external or []
    if _is_url(source) and (outside or any(name != "." for name, _ in parts)):
        return "other files"
    for path, offset, size in outside:
        here = Path(path)  # from the working directory, as HDF5 has it
        if not here.is_file() or here.stat().st_size < min(offset + size, offset + data.nbytes):
            return str(path)
    return next(
        (f"{name}:{dataset}" for name, dataset in sorted(set(parts)) if not _holds(data, source, name, dataset)), None
    )


def _holds(data: Any, source: str, name: str, dataset: str) -> bool:
    """Whether a file that a virtual dataset names has what it is said to have."""
    import h5py

    if name == ".":
        return dataset in data.file
    for path in (Path(source).parent / name, Path(name)):
        try:
            with h5py.File(path, "r") as file:
                return dataset in file
        except OSError:
            continue
    return False


def _tiff(source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    import tifffile

    with ExitStack() as opened:
        raw = opened.enter_context(_file(source, parameters))
        file = opened.enter_context(tifffile.TiffFile(raw))
        volume = _tiff_series(file, source, parameters)
        return replace(volume, close=opened.pop_all().close, followed=("level",))


def _tiff_series(file: Any, source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    import zarr

    if len(file.series) > 1 and "dataset" not in parameters:
        shapes = ", ".join(f"{number}: {one.axes} {one.shape}" for number, one in enumerate(file.series[:10]))
        raise ConfigurationError(
            f"{source}: has {len(file.series)} series; say in the parameter dataset which is read ({shapes})."
        )
    series = file.series[int(parameters.get("dataset", 0))]
    level = int(parameters.get("level", 0))
    if not 0 <= level < len(series.levels):
        raise ConfigurationError(f"{source}: has the levels 0 to {len(series.levels) - 1}, not {level}.")
    series = series.levels[level]
    if series.keyframe.photometric.name in ("MINISWHITE", "PALETTE") and not parameters.get("stored"):
        raise ConfigurationError(
            f"{source}: {series.keyframe.photometric.name} pages have no single value in a pixel. Convert the file, or "
            "take values as they are stored with stored=true."
        )
    store = series.aszarr()
    array: Any = zarr.open_array(store, mode="r" if store.read_only else "r+")
    named = [axis.lower() for axis in series.axes]
    unknown = [axis for axis in named if axis in "qi"]
    if "z" not in named and len(unknown) == 1:
        named[named.index(unknown[0])] = "z"  # pages that nothing describes
    axes = tuple(parameters.get("axes") or named)
    return OpenVolume(source, tuple(array.shape), axes, np.dtype(array.dtype), array.__getitem__)


def _nifti(source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    import nibabel

    packed = source.lower().endswith(".gz")
    if _is_url(source):
        with _file(source, parameters) as file:
            content = file.read()
        image: Any = nibabel.Nifti1Image.from_bytes(gzip.decompress(content) if packed else content)
    else:
        image = nibabel.load(source)
    proxy: Any = image.dataobj
    if (proxy.slope, proxy.inter) != (1.0, 0.0) and not parameters.get("stored"):
        raise ConfigurationError(
            f"{source}: its values are to be multiplied by {proxy.slope:g} and {proxy.inter:g} to be added. Convert "
            "the file, or take values as they are stored with stored=true."
        )
    lock, kept = threading.Lock(), np.asarray(proxy.get_unscaled()) if packed else None

    def read(where: tuple[slice | int, ...]) -> Array:
        if kept is not None:  # a part of a packed file costs as much as all of it
            return kept[where]
        with lock:
            return np.asarray(proxy.get_unscaled()[where])

    axes = tuple(parameters.get("axes") or "xyztc"[: len(proxy.shape)])
    return OpenVolume(source, tuple(proxy.shape), axes, np.dtype(image.get_data_dtype()), read)


def _dicom(source: str, parameters: Mapping[str, Any]) -> OpenVolume:
    found, root = filesystem(source, parameters)
    series = dicom_series.opened(found, root, wanted=parameters.get("series"), stored=bool(parameters.get("stored")))
    return OpenVolume(source, series.shape, ("z", "y", "x"), series.dtype, series.read)


KINDS: dict[str, Callable[[str, Mapping[str, Any]], OpenVolume]] = {
    "zarr": _zarr,
    "n5": _n5,
    "hdf5": _hdf5,
    "precomputed": _precomputed,
    "tiff": _tiff,
    "dicom": _dicom,
    "nifti": _nifti,
}
"""Formats that are read, by the value of the parameter `kind`."""

_TELL_MISSING = ("n5", "precomputed")
_ENDINGS: dict[str, tuple[str, ...]] = {
    "zarr": (".zarr",),
    "n5": (".n5",),
    "hdf5": (".h5", ".hdf5", ".hdf", ".he5", ".ims"),
    "precomputed": (".precomputed",),
    "tiff": (".tif", ".tiff", ".btf", ".tf8"),
    "nifti": (".nii", ".nii.gz"),
}
_MARKS: dict[str, set[str]] = {
    "zarr": {".zarray", ".zgroup", "zarr.json"},
    "n5": {"attributes.json"},
    "precomputed": {"info"},
    "dicom": {"dicomdir"},
}
