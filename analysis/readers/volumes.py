"""Images of voxels: NIfTI with CIFTI and pairs, Analyze, MGH, MINC, AFNI, and those with a header of lines."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import math
import re
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.spm2analyze import Spm2AnalyzeHeader
from numpy.typing import NDArray

from prefect_biomed.analysis.comparators import Content, without_packing
from prefect_biomed.analysis.readers.documents import collect_xml
from prefect_biomed.analysis.readers.source import (
    Parts,
    Source,
    Unreadable,
    check_expansion,
    library,
    measures_of,
    walk,
)

__all__ = ["afni", "fits_headed", "fits_nifti", "headed", "mgh", "minc", "nifti"]

# No types.
brikhead: Any = nibabel.brikhead
_NIFTI = {b"n+1\x00": nibabel.Nifti1Header, b"ni1\x00": nibabel.Nifti1Header}
_NIFTI2 = {b"n+2\x00": nibabel.Nifti2Header, b"ni2\x00": nibabel.Nifti2Header}
_ANALYZE_BYTES = 348
_CIFTI_EXTENSION = 32
_PRINTABLE = re.compile(rb"[\x20-\x7e]{6,}")


def _header_type(head: bytes, name: str) -> Any:
    found = _NIFTI.get(head[344:348]) or _NIFTI2.get(head[4:8])
    if (
        found is None
        and name.endswith(".hdr")
        and _ANALYZE_BYTES in struct.unpack("<i", head[:4]) + struct.unpack(">i", head[:4])
    ):
        return Spm2AnalyzeHeader
    return found


def fits_nifti(source: Source) -> bool:
    """Tell whether a file is NIfTI, or one half of a pair.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    if source.named(".img"):
        return source.beside(".img", ".hdr") is not None
    return len(source.head) >= _ANALYZE_BYTES and _header_type(source.head, source.name) is not None


def nifti(source: Source) -> Content:
    """Read NIfTI: entries of the header, voxels or grayordinates, and what its extensions say."""
    is_voxels_alone = source.named(".img")
    header_file = source.beside(".img", ".hdr") if is_voxels_alone else source.path
    if header_file is None:
        raise Unreadable("its .hdr is not there")
    with header_file.open("rb") as file:
        head = file.read(1024)
        header_type = _header_type(head, ".hdr")
        if header_type is None:
            raise Unreadable("its .hdr is not one")
        header = header_type(head[: header_type.sizeof_hdr])
        parts = Parts(source.volatile)
        is_cifti = not is_voxels_alone and _extensions(file, header, parts)
    if not is_voxels_alone:
        _entries(header, parts)
    if not source.named(".hdr"):
        offset = int(header.get_data_offset())
        dtype = header.get_data_dtype()
        shape = tuple(int(n) for n in header.get_data_shape())
        scaling = getattr(header, "get_slope_inter", lambda: (None, None))()
        slope, intercept = (float(value) if value is not None else None for value in scaling)
        # A map of nothing is refused.
        stored: NDArray[Any] = (
            np.memmap(source.path, dtype, "r", offset, shape, "F") if math.prod(shape) else np.empty(0)
        )
        parts.digests |= source.behind(offset + stored.nbytes)
        flat = stored.reshape(-1, order="F")
        spacing = tuple(abs(float(size)) for size in header.get_zooms()[:3])
        parts.measures |= measures_of(
            "voxels", flat, stored.shape, "F", slope or 1.0, intercept or 0.0, "voxel", spacing
        )
    return parts.content("CIFTI" if is_cifti else "NIfTI")


def _entries(header: Any, parts: Parts) -> None:
    """Real numbers of a header may carry noise, as an estimated affine does; the rest is equal or not."""
    for key, value in header.items():
        entry = np.asarray(value)
        if entry.dtype.kind == "f":
            for index, number in enumerate(entry.ravel()):
                parts.number(f"{key}[{index}]" if entry.size > 1 else key, float(number), "header", key)
        else:
            said = entry.tolist()
            parts.word(f"header {key}", said.decode("latin-1") if isinstance(said, bytes) else str(said), key)


def _extensions(file: IO[bytes], header: Any, parts: Parts) -> bool:
    """Collect what the extensions say; true when they make it a CIFTI."""
    size = header.sizeof_hdr
    is_single = header.get_data_offset() > size if hasattr(header, "get_data_offset") else False
    end = int(header.get_data_offset()) if is_single else file.seek(0, 2)
    file.seek(size)
    if file.read(4)[:1] in (b"", b"\x00"):
        return False
    is_cifti = False
    number = 0
    while file.tell() + 8 <= end:
        length, code = struct.unpack(f"{header.endianness}ii", file.read(8))
        if length < 8 or file.tell() + length - 8 > end:
            break
        content = file.read(length - 8).rstrip(b"\x00")
        label = f"header extension {number}"
        is_cifti = is_cifti or code == _CIFTI_EXTENSION
        number += 1
        _extension(content, label, parts)
    return is_cifti


def _extension(content: bytes, label: str, parts: Parts) -> None:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        parts.digests[label] = hashlib.sha256(content).hexdigest()
        return
    if text.lstrip().startswith("<"):
        collect_xml(content.strip(), parts, label)
    elif text.lstrip().startswith(("{", "[")):
        walk(parts, json.loads(text), label, label)
    else:
        for number, line in enumerate(text.splitlines()):
            parts.text(f"{label}, line {number + 1}", line, label)


def mgh(source: Source) -> Content:
    """Read FreeSurfer's MGH: header, voxels, and the words in the tags behind them."""
    image_type: Any = nibabel.MGHImage
    image: Any = image_type.from_file_map({"image": FileHolder(filename=str(source.path))})
    parts = Parts(source.volatile)
    _entries(image.header, parts)
    stored = np.asanyarray(image.dataobj.get_unscaled())
    flat = stored.reshape(-1, order="F")
    spacing = tuple(float(size) for size in image.header["delta"])
    parts.measures |= measures_of("voxels", flat, stored.shape, "F", point="voxel", spacing=spacing)
    with source.path.open("rb") as file:
        file.seek(int(image.header.get_footer_offset()))
        footer = file.read(1 << 20)
    for number, words in enumerate(_PRINTABLE.findall(footer)):
        parts.word(f"tag {number + 1}", words.decode())
    return parts.content("MGH")


def minc(source: Source) -> Content:
    """Read MINC 1 and 2, scaled as its ranges say."""
    is_first = source.head.startswith(b"CDF")
    if not is_first:
        library("h5py", "h5py")
    image_type: Any = nibabel.Minc1Image if is_first else nibabel.Minc2Image
    image: Any = image_type.from_file_map({"image": FileHolder(filename=str(source.path))})
    check_expansion(8 * math.prod(image.shape), source)
    parts = Parts(source.volatile)
    parts.word("shape", str(tuple(int(n) for n in image.shape)))
    for index, number in enumerate(np.asarray(image.affine).ravel()):
        parts.number(f"affine[{index // 4}, {index % 4}]", float(number), "header")
    values = np.ascontiguousarray(np.asarray(image.dataobj))
    parts.measures |= measures_of(
        "voxels", source.spilled(values), values.shape, point="voxel", spacing=(1.0, 1.0, 1.0)
    )
    return parts.content("MINC")


def afni(source: Source) -> Content:
    """Read AFNI: the attributes of a HEAD, or the scaled voxels of a BRIK."""
    header = source.path if source.named(".head") else source.beside(".brik", ".head")
    if header is None:
        raise Unreadable("its HEAD is not there")
    parts = Parts(source.volatile)
    if source.named(".head"):
        with header.open() as file:
            attributes = brikhead.parse_AFNI_header(file)
        for key, value in attributes.items():
            entries = value if isinstance(value, list) else [value]
            for index, entry in enumerate(entries):
                label = f"{key}[{index}]" if len(entries) > 1 else key
                if isinstance(entry, str):
                    if not key.startswith("IDCODE"):
                        parts.text(label, entry, key)
                else:
                    parts.number(label, entry, key)
        return parts.content("AFNI")
    files = {"header": FileHolder(filename=str(header)), "image": FileHolder(filename=str(source.path))}
    image: Any = brikhead.AFNIImage.from_file_map(files)
    check_expansion(8 * math.prod(image.shape), source)
    values = np.asarray(image.dataobj)
    flat = source.spilled(np.asfortranarray(values))
    parts.measures |= measures_of("voxels", flat, values.shape, "F", point="voxel", spacing=(1.0, 1.0, 1.0))
    return parts.content("AFNI")


_HEADED = (b"NRRD000", b"mrtrix image", b"ObjectType")
_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "met_char": "i1", "uchar": "u1", "unsigned char": "u1",
    "uint8": "u1", "uint8_t": "u1", "met_uchar": "u1", "bit": "u1", "short": "i2", "short int": "i2", "int16": "i2",
    "signed short": "i2", "int16_t": "i2", "met_short": "i2", "ushort": "u2", "unsigned short": "u2", "uint16": "u2",
    "uint16_t": "u2", "met_ushort": "u2", "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4",
    "met_int": "i4", "uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4", "met_uint": "u4",
    "long long": "i8", "int64": "i8", "int64_t": "i8", "longlong": "i8", "met_long_long": "i8", "met_long": "i8",
    "unsigned long long": "u8", "uint64": "u8", "uint64_t": "u8", "met_ulong": "u8", "float": "f4", "float32": "f4",
    "met_float": "f4", "double": "f8", "float64": "f8", "met_double": "f8", "cfloat32": "c8", "cfloat64": "c16",
}  # fmt: skip
_RAW = (".raw", ".zraw")


def fits_headed(source: Source) -> bool:
    """Tell whether a file is NRRD, MetaImage or MRtrix: voxels behind a header of lines.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    if source.named(*_RAW):
        return _header_of_raw(source) is not None
    return source.head.startswith(_HEADED) or (source.named(".mha", ".mhd") and b"ElementType" in source.head)


def _header_of_raw(source: Source) -> Path | None:
    suffix = next(suffix for suffix in _RAW if source.named(suffix))
    return source.beside(suffix, ".nhdr") or source.beside(suffix, ".mhd")


def headed(source: Source) -> Content:
    """Read NRRD, MetaImage and MRtrix: the lines of a header and the voxels behind it; apart where they are in two."""
    parts = Parts(source.volatile)
    is_raw = source.named(*_RAW)
    header = _header_of_raw(source) if is_raw else source.path
    if header is None:
        raise Unreadable("its header is not there")
    fields, offset = _lines_of(header, parts)
    data, offset = (source.path, 0) if is_raw else _data_of(source, fields, offset)
    if data is None:
        return parts.content("image with header")
    if is_raw:
        # What the header says is said by the header.
        parts = Parts(source.volatile)
    shape, dtype = _layout(fields)
    check_expansion(math.prod(shape) * dtype.itemsize, source)
    flat = _raw(source, data, offset, fields, math.prod(shape), dtype)
    parts.measures |= measures_of("voxels", flat, shape, "F", point="voxel", spacing=(1.0, 1.0, 1.0))
    return parts.content("NRRD" if source.head.startswith(b"NRRD") else "image with header")


def _lines_of(header: Path, parts: Parts) -> tuple[dict[str, str], int]:
    """The fields of a header, and where it ends."""
    fields: dict[str, str] = {}
    with header.open("rb") as file:
        while line := file.readline(1 << 16).decode("latin-1"):
            line = line.rstrip("\r\n")
            if not line or line == "END":
                break
            key, sign, value = line.partition("=" if " = " in line else ":")
            if line.startswith("#") or not sign:
                parts.word(f"header line {len(parts.facts)}", line)
                continue
            fields[key.strip().lower()] = value.lstrip("= ").strip()
            parts.text(f"header {key.strip()}", value.strip(), "header", key.strip())
            if key.strip() == "ElementDataFile":
                break
        return fields, file.tell()


def _data_of(source: Source, fields: dict[str, str], offset: int) -> tuple[Path | None, int]:
    """Where the values are; no path when they are in a file of the same name, which is read by itself."""
    named = (
        fields.get("data file") or fields.get("datafile") or fields.get("elementdatafile") or fields.get("file") or ""
    )
    named, _, start = named.partition(" ")
    if named.lower() in ("", "local"):
        return source.path, offset
    if named == ".":
        return source.path, int(start or 0)
    named = Path(named).name if Path(named).parent == Path() else ""
    if Path(without_packing(named)).stem == Path(source.name).stem and without_packing(named).endswith(_RAW):
        return None, 0
    found = source.neighbour(without_packing(named)) if named else None
    if found is None:
        raise Unreadable("its values are in another file that is not beside it")
    return found, int(start) if start.isdigit() else 0


def _layout(fields: dict[str, str]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    sizes = fields.get("sizes") or fields.get("dimsize") or fields.get("dim") or ""
    kind = (fields.get("type") or fields.get("elementtype") or fields.get("datatype") or "").lower()
    is_big = (
        (kind.endswith("be") and kind not in _TYPES)
        or fields.get("endian") == "big"
        or fields.get("binarydatabyteordermsb") == "True"
    )
    code = _TYPES.get(kind) or _TYPES.get(kind[:-2])
    shape = tuple(int(size) for size in re.findall(r"\d+", sizes))
    channels = int(fields.get("elementnumberofchannels", "1"))
    if code is None or not shape:
        raise Unreadable(f"values of type {kind[:40]!r} and size {sizes[:40]!r} are not known")
    return ((channels, *shape) if channels > 1 else shape), np.dtype((">" if is_big else "<") + code)


def _raw(
    source: Source, data: Path, offset: int, fields: dict[str, str], size: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    encoding = fields.get("encoding", "raw").lower()
    is_deflated = fields.get("compresseddata", "").lower() == "true"
    if encoding in ("txt", "text", "ascii"):
        with data.open("rb") as file:
            file.seek(offset)
            return np.array(file.read(size * 40).split()[:size], dtype=np.float64)
    if encoding == "raw" and not is_deflated:
        skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
        # -1 means that the values are at the end.
        offset = data.stat().st_size - size * dtype.itemsize if skip < 0 else offset + skip
        return np.memmap(data, dtype, "r", offset, (size,))
    target = source.allocated(size, dtype)
    with data.open("rb") as file:
        file.seek(offset)
        stream: Any
        if is_deflated:
            content = zlib.decompressobj().decompress(file.read(), size * dtype.itemsize)
            target[:] = np.frombuffer(content, dtype, size)
            return target
        if encoding in ("gz", "gzip"):
            stream = gzip.GzipFile(fileobj=file)
        elif encoding in ("bz2", "bzip2"):
            stream = bz2.BZ2File(file)
        else:
            raise Unreadable(f"the encoding {encoding[:20]!r} is not known")
        step = 1 << 18
        for start in range(0, size, step):
            count = min(step, size - start)
            target[start : start + count] = np.frombuffer(stream.read(count * dtype.itemsize), dtype, count)
    return target
