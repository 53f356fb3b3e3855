"""Surfaces and what lies on them: GIFTI, FreeSurfer geometry, curvature and annotation."""

from __future__ import annotations

import base64
import hashlib
from typing import Any
from xml.parsers import expat

import nibabel
import numpy as np
from nibabel.fileholders import FileHolder

from prefect_biomed.analysis.comparators import Content
from prefect_biomed.analysis.readers.source import (
    Parts,
    Source,
    Unreadable,
    inflated_size,
    measures_of,
    refuse_entities,
)

__all__ = ["annotation", "curvature", "fits_curvature", "fits_gifti", "geometry", "gifti"]

# These have no types.
gifti_image: Any = nibabel.GiftiImage
geometry_io: Any = nibabel.freesurfer.io

_MAX_ARRAY_BYTES = 4 * 1024**3
_CURVATURE_HEADER = 15


def fits_gifti(source: Source) -> bool:
    """Tell whether a file is GIFTI.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    return source.named(".gii") or (source.head.lstrip().startswith(b"<?xml") and b"<GIFTI" in source.head)


class _Check:
    """Looks through a GIFTI for entities, values in other files, and arrays that unpack to more than they claim."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self._bytes = 0
        self._is_deflated = self._is_data = False
        self._pieces: list[str] = []

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "DataArray":
            if attributes.get("ExternalFileName"):
                raise Unreadable("its values are in another file")
            self._is_deflated = "GZip" in attributes.get("Encoding", "")
            self._bytes = 8
            for axis in range(int(attributes.get("Dimensionality", "1"))):
                self._bytes *= int(attributes.get(f"Dim{axis}", "1"))
            if self._bytes > _MAX_ARRAY_BYTES:
                raise Unreadable(f"an array claims {self._bytes} bytes")
        self._is_data = name == "Data" and self._is_deflated

    def _text(self, text: str) -> None:
        if self._is_data:
            self._pieces.append(text)

    def _end(self, name: str) -> None:
        if self._is_data and name == "Data":
            packed = base64.b64decode("".join("".join(self._pieces).split()))
            inflated_size([packed], self._bytes)
            self._pieces = []
            self._is_data = False


def gifti(source: Source) -> Content:
    """Read GIFTI in any encoding: arrays with their intents, labels, and the words beside them."""
    with source.path.open("rb") as file:
        refuse_entities(file.read)
        file.seek(0)
        _Check().parser.ParseFile(file)
    image: Any = gifti_image.from_file_map({"image": FileHolder(filename=str(source.path))})
    parts = Parts(source.volatile)
    for key, value in dict(image.meta).items():
        parts.text(f"meta {key}", str(value), "numbers beside", key)
    for label in image.labeltable.labels:
        parts.word(f"label {label.key}", str(label.label))
    for number, array in enumerate(image.darrays, start=1):
        intent = str(nibabel.nifti1.intent_codes.niistring[array.intent]).removeprefix("NIFTI_INTENT_").lower()
        title = f"array {number} ({intent})"
        values = np.asarray(array.data)
        parts.facts[f"{title}, type"] = f"{values.dtype.name} {values.shape}"
        for key, value in dict(array.meta).items():
            parts.text(f"{title}, {key}", str(value), "numbers beside", key)
        if array.coordsys is not None and array.coordsys.xform is not None and intent == "pointset":
            for index, entry in enumerate(np.asarray(array.coordsys.xform).ravel()):
                parts.number(f"{title}, transform[{index}]", float(entry), "transforms")
        parts.measures |= measures_of(
            title, source.spilled(np.ascontiguousarray(values)), values.shape, point="element"
        )
    return parts.content("GIFTI")


def geometry(source: Source) -> Content:
    """Read a FreeSurfer surface: coordinates, triangles, the volume that it belongs to."""
    vertices, triangles, info, stamp = geometry_io.read_geometry(str(source.path), read_metadata=True, read_stamp=True)
    parts = Parts(source.volatile)
    parts.word("made", str(stamp))
    for key, value in info.items():
        entry = np.asarray(value)
        if entry.dtype.kind in "iuf":
            for index, number in enumerate(entry.ravel()):
                parts.number(f"{key}[{index}]", float(number), "volume")
        else:
            parts.word(f"volume {key}", str(value))
    parts.facts["triangles"] = hashlib.sha256(np.ascontiguousarray(triangles, dtype="<i4").tobytes()).hexdigest()
    parts.facts["number of triangles"] = str(len(triangles))
    coordinates = source.spilled(np.ascontiguousarray(vertices))
    parts.measures |= measures_of("coordinates", coordinates, vertices.shape, point="vertex, axis")
    return parts.content("FreeSurfer surface")


def fits_curvature(source: Source) -> bool:
    """Tell whether a file is FreeSurfer's new curvature format, by its magic and its size.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    if not source.head.startswith(b"\xff\xff\xff") or len(source.head) < _CURVATURE_HEADER:
        return False
    vertices, _, values = np.frombuffer(source.head, ">i4", 3, 3).tolist()
    return bool(source.path.stat().st_size == _CURVATURE_HEADER + 4 * vertices * values)


def curvature(source: Source) -> Content:
    """Read thickness, curvature, sulcal depth and the like: one number for each vertex."""
    vertices, triangles, _ = np.frombuffer(source.head, ">i4", 3, 3).tolist()
    values = np.memmap(source.path, ">f4", "r", _CURVATURE_HEADER)
    parts = Parts(source.volatile)
    parts.facts |= {"vertices": str(vertices), "triangles": str(triangles)}
    parts.measures |= measures_of("values", values, values.shape, point="vertex")
    return parts.content("FreeSurfer curvature")


def annotation(source: Source) -> Content:
    """Read a FreeSurfer annotation: one label for each vertex, their names and colours."""
    labels, colours, names = geometry_io.read_annot(str(source.path))
    parts = Parts(source.volatile)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        parts.facts[f"label {number}"] = f"{name.decode('latin-1')} {colour.tolist()}"
    parts.measures |= measures_of("labels", labels, labels.shape, point="vertex")
    return parts.content("FreeSurfer annotation")
