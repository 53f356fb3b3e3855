"""Which reader reads what: formats are known by their first bytes where these have a sign, by their name otherwise.

A new format is one function that makes a `Content` of a `Source`, and one row here. A reader may fail in any way: what
it cannot read is compared by digest, with the reason as a note.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prefect_biomed.analysis.comparators import BLOCK, Content, content_digest, without_packing
from prefect_biomed.analysis.models import Rules
from prefect_biomed.analysis.readers import (
    arrays,
    dicom,
    documents,
    pictures,
    streamlines,
    surfaces,
    tables,
    texts,
    volumes,
)
from prefect_biomed.analysis.readers.source import Source
from prefect_biomed.analysis.volatile import volatile_of

__all__ = ["FORMATS", "Format", "open_content"]

_HEAD_BYTES = 2048
_READING = threading.RLock()


@dataclass(frozen=True)
class Format:
    """One row of the registry.

    Attributes:
        name: What the format is called.
        fits: Tells whether a file is of it.
        read: Reads one; None when it is not of it after all.
    """

    name: str
    fits: Callable[[Source], bool]
    read: Callable[[Source], Content | None]


def _begins(*magic: bytes) -> Callable[[Source], bool]:
    return lambda source: source.head.startswith(magic)


def _named(*suffixes: str) -> Callable[[Source], bool]:
    return lambda source: source.named(*suffixes)


def _is_minc(source: Source) -> bool:
    return source.named(".mnc") and (source.head.startswith(b"CDF") or arrays.fits_hdf5(source))


_EXACT = 1 << 53
_LOW_BITS = 2047

FORMATS: tuple[Format, ...] = (
    Format("Zarr", lambda source: source.path.is_dir(), arrays.zarr),
    Format("NIfTI", volumes.fits_nifti, volumes.nifti),
    Format("MINC", _is_minc, volumes.minc),
    Format("AFNI", _named(".head", ".brik"), volumes.afni),
    Format("image with header", volumes.fits_headed, volumes.headed),
    Format("MGH", _named(".mgh", ".mgz"), volumes.mgh),
    Format("DICOM", dicom.fits_dicom, dicom.dicom),
    Format("GIFTI", surfaces.fits_gifti, surfaces.gifti),
    Format("FreeSurfer surface", _begins(b"\xff\xff\xfe"), surfaces.geometry),
    Format("FreeSurfer curvature", surfaces.fits_curvature, surfaces.curvature),
    Format("FreeSurfer annotation", _named(".annot"), surfaces.annotation),
    Format("TrackVis", _begins(b"TRACK\x00"), streamlines.trk),
    Format("MRtrix tracks", _begins(b"mrtrix tracks"), streamlines.tck),
    Format("NumPy", _begins(b"\x93NUMPY"), arrays.numpy),
    Format("HDF5", arrays.fits_hdf5, arrays.hdf5),
    Format("MATLAB", lambda s: s.head.startswith(b"MATLAB 5.0") or arrays.fits_matlab4(s), arrays.matlab),
    Format("NetCDF", _begins(b"CDF\x01", b"CDF\x02"), arrays.netcdf),
    Format("Parquet", _begins(b"PAR1", b"ARROW1"), tables.parquet),
    Format("image", lambda s: s.head.startswith(pictures.MAGIC) or s.head[8:12] == b"WEBP", pictures.picture),
    Format("image", lambda s: s.named(".bmp") and s.head.startswith(b"BM"), pictures.picture),
    Format("PDF", _begins(b"%PDF-"), documents.pdf),
    Format("notebook", _named(".ipynb"), documents.notebook),
    Format("JSON", _named(".json", ".geojson"), texts.json_tree),
    Format("JSON", _named(".jsonl", ".ndjson"), texts.json_lines),
    Format("YAML", _named(".yaml", ".yml"), texts.yaml_tree),
    Format("HTML", documents.fits_html, documents.html),
    Format("XML", documents.fits_xml, documents.xml),
    Format("FreeSurfer statistics", tables.fits_statistics, tables.statistics),
    Format("table", tables.fits_table, tables.table),
    Format("text", lambda source: True, texts.text),
)


def open_content(path: Path, name: str, workspace: Path, *, origin: Path | None = None, rules: Rules) -> Content:
    """Read what a file says. Large arrays stay on disk as memory maps.

    Args:
        path: The decompressed file, or the folder of a Zarr store; it must stay while the content is used.
        name: Its logical name, whose suffix may decide.
        workspace: Folder for what has to be unpacked; it must stay too.
        origin: The file as it came, whose neighbours may belong to it; `path` when None.
        rules: What is left out.

    Returns:
        The content. What no format fits has only a digest.
    """
    head = b""
    if not path.is_dir():
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    bare = without_packing(name.lower())
    source = Source(path, bare, head, origin or path, workspace, volatile_of(rules.volatile))
    note = ""
    for form in FORMATS:
        try:
            # Filters of warnings belong to all threads, and not every library that reads may run in two.
            with _READING, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = form.read(source) if form.fits(source) else None
        except Exception as error:  # each library has its own way to say that a file is not what it seems to be
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            note = f"{form.name} could not be read, so only digests were compared: {reason}"
            break
        if content is not None:
            return _in_doubles(content).without_ignored(rules)
    return Content("binary", digests={"content": content_digest(path)}, note=note)


def _in_doubles(content: Content) -> Content:
    """Add what doubles cannot hold: the last bits of whole numbers beyond 2^53, and of longer floats."""
    added = {}
    for name, measure in content.measures.items():
        values = measure.values
        if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
            pieces = (values[start : start + BLOCK] for start in range(0, values.size, BLOCK))
            if any(bool(((piece > _EXACT) | (piece < -_EXACT)).any()) for piece in pieces):
                added[name] = np.bitwise_and(values, values.dtype.type(_LOW_BITS)).astype(np.int16)
        elif values.dtype.kind == "f" and values.dtype.itemsize > 8:
            rest = np.asarray(values - values.astype(np.float64), dtype=np.float64)
            if rest.any():
                added[name] = rest
    if not added:
        return content
    last = {
        f"{name}, last digits": replace(
            content.measures[name], name=f"{name}, last digits", values=values, slope=1.0, intercept=0.0
        )
        for name, values in added.items()
    }
    return replace(content, measures=content.measures | last)
