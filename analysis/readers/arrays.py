"""Containers of arrays: NumPy, MATLAB, HDF5, NetCDF, Zarr."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat, netcdf_file, whosmat

from prefect_biomed.analysis.comparators import Content, content_digest
from prefect_biomed.analysis.readers.source import (
    Parts,
    Source,
    Unreadable,
    check_expansion,
    inflated_size,
    library,
    measures_of,
    walk,
)

__all__ = ["fits_hdf5", "fits_matlab4", "hdf5", "matlab", "netcdf", "numpy", "zarr"]

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_INFLATED = 2 * 1024**3
_MATLAB_TEXT = 116
_MATLAB_HEADER = 128
_MATLAB_COMPRESSED = 15
_MAX_STRINGS = 100_000
_STEP_BYTES = 1 << 24
# Zarr's codecs that only rearrange and pack bytes; others may run code.
_CODECS = frozenset({
    "blosc", "bytes", "crc32c", "gzip", "zlib", "zstd", "lz4", "bz2", "lzma", "shuffle", "delta", "transpose", "astype",
    "fixedscaleoffset", "packbits", "quantize", "bitround", "sharding_indexed", "vlen-utf8", "vlen-bytes",
    "numcodecs.blosc", "numcodecs.zlib", "numcodecs.zstd", "numcodecs.lz4", "numcodecs.bz2", "numcodecs.lzma",
    "numcodecs.shuffle", "numcodecs.delta", "numcodecs.gzip", "crc32", "adler32", "fletcher32",
})  # fmt: skip


def numpy(source: Source) -> Content:
    """Read an array of NumPy; objects are never unpickled."""
    array = np.load(source.path, mmap_mode="r", allow_pickle=False)
    parts = Parts(source.volatile)
    parts.facts |= {"shape": str(array.shape), "type": str(array.dtype)}
    if array.dtype.kind in "US":
        _strings(parts, "values", array)
        return parts.content("NumPy")
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    flat = array.reshape(-1, order="F" if order == "F" else "C")
    parts.measures |= measures_of("values", flat, array.shape, order)
    if not parts.measures:
        parts.digests["values"] = content_digest(source.path)
    elif isinstance(array, np.memmap):
        # Another array, when several were saved one after the other.
        parts.digests |= source.behind(array.offset + array.nbytes)
    return parts.content("NumPy")


def _strings(parts: Parts, name: str, array: Any) -> None:
    values = np.asarray(array).ravel().tolist()
    if len(values) > _MAX_STRINGS:
        raise Unreadable(f"{name} has more than {_MAX_STRINGS} texts")
    for index, value in enumerate(values):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        parts.text(f"{name}[{index}]" if len(values) > 1 else name, text, f"numbers in {name}", name)


def fits_matlab4(source: Source) -> bool:
    """Tell whether a file is MATLAB's version 4, which ANTs writes transforms in; it has no magic.

    Args:
        source: The file.

    Returns:
        Whether its first header is a possible one.
    """
    if not source.named(".mat") or len(source.head) < 20:
        return False
    for order in "<>":
        kind, rows, columns, imaginary, length = struct.unpack(f"{order}5i", source.head[:20])
        if (
            0 <= kind < 5000
            and kind % 10 < 3
            and rows >= 0
            and columns >= 0
            and imaginary in (0, 1)
            and 0 < length < 256
        ):
            return bool(source.path.stat().st_size >= 20 + length)
    return False


def matlab(source: Source) -> Content:
    """Read MATLAB's versions 4 to 7, ANTs' transforms among them: arrays, texts, structures and cells by path."""
    parts = Parts(source.volatile)
    if source.head.startswith(b"MATLAB"):
        parts.word("header", source.head[:_MATLAB_TEXT].decode("latin-1").strip(" \x00"))
        _check_matlab(source)
    names = [name for name, _, _ in whosmat(str(source.path))]
    for name in names:
        variables = loadmat(str(source.path), variable_names=[name], simplify_cells=True)
        _matlab_value(parts, source, name, variables[name])
    return parts.content("MATLAB")


def _check_matlab(source: Source) -> None:
    """Elements of version 5 are deflated one by one; together they must fit into the memory."""
    order = ">" if source.head[126:128] == b"MI" else "<"
    left = _MAX_INFLATED
    with source.path.open("rb") as file:
        file.seek(_MATLAB_HEADER)
        while len(tag := file.read(8)) == 8:
            kind, length = struct.unpack(f"{order}II", tag)
            start = file.tell()
            if kind == _MATLAB_COMPRESSED:
                left -= inflated_size(_pieces(file, length), left)
            else:
                left -= length
            if left < 0:
                raise Unreadable(f"it has more than {_MAX_INFLATED} bytes of values")
            file.seek(start + length)


def _pieces(file: Any, length: int) -> Iterator[bytes]:
    while length > 0 and (piece := file.read(min(length, 1 << 20))):
        length -= len(piece)
        yield piece


def _matlab_value(parts: Parts, source: Source, path: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _matlab_value(parts, source, f"{path}.{key}", inner)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "iufcb" and value.size:
        parts.facts[f"{path} (shape)"] = f"{value.dtype.name} {value.shape}"
        flat = source.spilled(value)
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        parts.measures |= measures_of(path, flat, value.shape, order)
    elif hasattr(value, "tocoo"):
        entries = value.tocoo()
        parts.facts[f"{path} (places)"] = hashlib.sha256(entries.row.tobytes() + entries.col.tobytes()).hexdigest()
        parts.measures |= measures_of(f"{path} (sparse)", entries.data, entries.data.shape)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "US":
        _strings(parts, path, value)
    elif isinstance(value, np.ndarray | list):
        parts.facts[f"{path} (length)"] = str(len(value))
        for index, inner in enumerate(np.asarray(value, dtype=object).ravel()):
            _matlab_value(parts, source, f"{path}[{index}]", inner)
    elif isinstance(value, np.generic | bool | int | float):
        walk(parts, value.item() if isinstance(value, np.generic) else value, path, "numbers")
    elif isinstance(value, str):
        parts.text(path, value, "numbers in texts", path)
    else:
        parts.digests[path] = hashlib.sha256(repr(value).encode()).hexdigest()


def netcdf(source: Source) -> Content:
    """Read NetCDF 3: attributes and variables by name."""
    parts = Parts(source.volatile)
    with netcdf_file(str(source.path), "r", mmap=False) as file:
        for key, value in file._attributes.items():
            _attribute(parts, f"@{key}", value)
        for name, variable in file.variables.items():
            for key, value in variable._attributes.items():
                _attribute(parts, f"{name} @{key}", value)
            values = np.array(variable[...])
            if values.dtype.kind == "S":
                _strings(parts, name, values)
            parts.measures |= measures_of(name, values.reshape(-1), values.shape)
    return parts.content("NetCDF")


def _attribute(parts: Parts, label: str, value: Any) -> None:
    """An attribute of a container: a text, some numbers, or what is neither."""
    field = label.rpartition("@")[2]
    if isinstance(value, bytes | str):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        for number, line in enumerate(text.splitlines()):
            parts.text(f"{label}, line {number + 1}" if number else label, line, "attributes", field)
        return
    array = np.asarray(value)
    if array.dtype.kind in "iufb":
        for index, number in enumerate(array.ravel().tolist()):
            parts.number(f"{label}[{index}]" if array.size > 1 else label, number, "attributes", field)
    elif array.dtype.kind in "USO":
        for index, text in enumerate(array.ravel().tolist()):
            said = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
            parts.text(f"{label}[{index}]" if array.size > 1 else label, said, "attributes", field)
    else:
        parts.word(label, str(value), field)


def fits_hdf5(source: Source) -> bool:
    """Tell whether a file is HDF5, perhaps behind the text that MATLAB puts first.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    return any(source.head[start : start + 8] == _HDF5_MAGIC for start in (0, 512, 1024))


def hdf5(source: Source) -> Content:
    """Read HDF5, MATLAB 7.3 and ITK transforms among it: attributes and data sets by path. Links are not followed."""
    h5py = library("h5py", "h5py")
    parts = Parts(source.volatile)
    is_matlab = source.head.startswith(b"MATLAB")
    if is_matlab:
        parts.word("header", source.head[:_MATLAB_TEXT].decode("latin-1").strip(" \x00"))
    with h5py.File(source.path, "r") as file:
        _hdf5_attributes(parts, "/", file)

        def visit(name: str, item: Any) -> None:
            _hdf5_attributes(parts, name, item)
            if isinstance(item, h5py.Dataset):
                _hdf5_values(h5py, parts, source, name, item)
            else:
                parts.facts[f"{name} (group)"] = f"{len(item)} members"

        file.visititems(visit)
        file.visititems_links(lambda name, link: _hdf5_link(h5py, parts, name, link))
    return parts.content("MATLAB" if is_matlab else "HDF5")


def _hdf5_link(h5py: Any, parts: Parts, name: str, link: Any) -> None:
    """Tell where a link leads that is not followed."""
    if not isinstance(link, h5py.HardLink):
        parts.facts[f"{name} (link)"] = f"{getattr(link, 'filename', '')}:{link.path}"


def _hdf5_attributes(parts: Parts, name: str, item: Any) -> None:
    for key in sorted(item.attrs):
        try:
            value = item.attrs[key]
        except (OSError, TypeError) as error:
            parts.word(f"{name} @{key}", f"unreadable: {error}")
        else:
            _attribute(parts, f"{name} @{key}", value)


def _hdf5_values(h5py: Any, parts: Parts, source: Source, name: str, item: Any) -> None:
    dtype = item.dtype
    parts.facts[f"{name} (shape)"] = f"{dtype} {item.shape}"
    if item.is_virtual or item.external:
        places = item.virtual_sources() if item.is_virtual else item.external
        parts.digests[name] = hashlib.sha256(repr(places).encode()).hexdigest()
        parts.note = f"{name} is in other files, which are not read"
        return
    if not item.size:
        return
    if h5py.check_string_dtype(dtype) is not None or dtype.kind == "S":
        _strings(parts, name, item[()])
    elif h5py.check_ref_dtype(dtype) is not None:
        file = item.file
        for index, reference in enumerate(np.asarray(item[()]).ravel()):
            parts.facts[f"{name}[{index}]"] = str(file[reference].name) if reference else "nothing"
    elif item.attrs.get("MATLAB_class") == b"char":
        text = "".join(map(chr, np.asarray(item[()]).ravel().tolist()))
        parts.text(name, text, "numbers in texts", name)
    elif dtype.hasobject or dtype.kind not in "iufcbV":
        values = np.asarray(item[()]).ravel()
        parts.digests[name] = hashlib.sha256(b"\0".join(np.asarray(v).tobytes() for v in values)).hexdigest()
    else:
        flat = _pulled(source, item, item.shape, dtype)
        parts.measures |= measures_of(name, flat, item.shape)


def _pulled(source: Source, item: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Bring an array from its container to disk, some rows at a time."""
    size = math.prod(shape)
    check_expansion(size * dtype.itemsize, source)
    if size * dtype.itemsize <= _STEP_BYTES or not shape:
        return source.spilled(np.ascontiguousarray(item[()]))
    target = source.allocated(size, dtype)
    row = size // shape[0]
    step = max(1, _STEP_BYTES // (row * dtype.itemsize))
    for start in range(0, shape[0], step):
        piece = np.ascontiguousarray(item[start : start + step])
        target[start * row : start * row + piece.size] = piece.reshape(-1)
    return target


def zarr(source: Source) -> Content:
    """Read a Zarr store of version 2 or 3: attributes and arrays by path, through codecs that only pack bytes."""
    library_ = library("zarr", "zarr")
    for path in sorted(source.path.rglob("*")):
        if path.name in (".zarray", "zarr.json"):
            _check_codecs(json.loads(path.read_text()))
    parts = Parts(source.volatile)
    root = library_.open(str(source.path), mode="r")
    if isinstance(root, library_.Array):
        _zarr_array(parts, source, "values", root)
    else:
        walk(parts, dict(root.attrs), "@", "attributes")
        for name, item in sorted(root.members(max_depth=None)):
            if isinstance(item, library_.Array):
                _zarr_array(parts, source, name, item)
            else:
                walk(parts, dict(item.attrs), f"{name} @", "attributes")
    return parts.content("Zarr")


def _zarr_array(parts: Parts, source: Source, name: str, array: Any) -> None:
    parts.facts[f"{name} (shape)"] = f"{array.dtype} {array.shape}"
    walk(parts, dict(array.attrs), f"{name} @", "attributes")
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "iufcb" or not array.size:
        _strings(parts, name, array[...])
        return
    flat = _pulled(source, _Sliced(array), array.shape, dtype)
    parts.measures |= measures_of(name, flat, array.shape)


class _Sliced:
    """A Zarr array that is asked as one of h5py is."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getitem__(self, key: Any) -> Any:
        return self._array[... if key == () else key]


def _check_codecs(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise Unreadable("its metadata is none")
    if "O" in str(metadata.get("dtype", "")):
        raise Unreadable("it holds objects")
    named = [metadata.get("compressor"), *(metadata.get("filters") or []), *(metadata.get("codecs") or [])]
    if metadata.get("storage_transformers"):
        raise Unreadable("its chunks are transformed")
    while named:
        codec = named.pop()
        if codec is None:
            continue
        name = str(codec.get("id") or codec.get("name"))
        if name not in _CODECS:
            raise Unreadable(f"its codec {name[:40]!r} is not one that only packs bytes")
        configuration = codec.get("configuration") or {}
        named += [*(configuration.get("codecs") or []), *(configuration.get("index_codecs") or [])]
