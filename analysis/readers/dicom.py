"""DICOM: elements by name, with what is drawn anew for each file apart, and pixels."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from prefect_biomed.analysis.comparators import Content
from prefect_biomed.analysis.readers.source import (
    Parts,
    Source,
    check_expansion,
    inflated_size,
    library,
    measures_of,
)

__all__ = ["dicom", "fits_dicom"]

_DEFLATED = "1.2.840.10008.1.2.1.99"
_MAX_INFLATED = 1024**3
_NUMERIC = frozenset({"DS", "FL", "FD", "IS", "SL", "SS", "SV", "UL", "US", "UV"})
_OPAQUE = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
_VOLATILE = frozenset({"DA", "DT", "TM"})
# Unique identifiers that say what kind of thing it is and not which one.
_KINDS = frozenset({"SOPClassUID", "MediaStorageSOPClassUID", "TransferSyntaxUID", "ReferencedSOPClassUID"})
_ENVIRONMENT = frozenset({
    "ImplementationClassUID", "ImplementationVersionName", "SoftwareVersions", "StationName", "InstitutionName",
    "SourceApplicationEntityTitle", "DeviceSerialNumber",
})  # fmt: skip


def fits_dicom(source: Source) -> bool:
    """Tell whether a file is DICOM, with its preamble.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    return source.head[128:132] == b"DICM"


def dicom(source: Source) -> Content:
    """Read DICOM. Dates, times and identifiers of single objects do not count; versions belong to the environment."""
    pydicom = library("pydicom", "pydicom")
    meta = pydicom.filereader.read_file_meta_info(source.path)
    if str(meta.get("TransferSyntaxUID", "")) == _DEFLATED:
        with source.path.open("rb") as file:
            file.seek(132 + 12 + int(meta.FileMetaInformationGroupLength))
            inflated_size(iter(lambda: file.read(1 << 20), b""), _MAX_INFLATED, -15)
    dataset = pydicom.dcmread(source.path)
    parts = Parts(source.volatile)
    _elements(parts, "", dataset.file_meta)
    _elements(parts, "", dataset)
    if "PixelData" in dataset:
        _pixels(parts, source, dataset)
    return parts.content("DICOM")


def _elements(parts: Parts, prefix: str, dataset: Any) -> None:
    for element in dataset:
        name = element.keyword or f"{element.tag.group:04X},{element.tag.element:04X}"
        label, vr = prefix + name, str(element.VR)
        if name == "PixelData" or vr in _VOLATILE or name == "FileMetaInformationGroupLength":
            continue
        if vr == "SQ":
            for number, item in enumerate(element.value, start=1):
                _elements(parts, f"{label}[{number}].", item)
        elif name in _ENVIRONMENT:
            parts.environment[label] = str(element.value)
        elif vr == "UI":
            if name in _KINDS:
                parts.facts[label] = str(element.value)
        elif vr in _OPAQUE and isinstance(element.value, bytes):
            parts.digests[label] = hashlib.sha256(element.value).hexdigest()
        elif vr in _NUMERIC:
            _numbers(parts, label, element.value)
        else:
            parts.word(label, str(element.value))


def _numbers(parts: Parts, label: str, value: Any) -> None:
    values = [value] if isinstance(value, str | int | float) or value is None else list(value)
    for index, number in enumerate(values):
        title = f"{label}[{index}]" if len(values) > 1 else label
        if number in (None, ""):
            parts.word(title, "")
        else:
            parts.number(title, float(number), "elements")


def _pixels(parts: Parts, source: Source, dataset: Any) -> None:
    size = math.prod(int(dataset.get(key, 1) or 1) for key in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"))
    check_expansion(size * (int(dataset.get("BitsAllocated", 16)) // 8 or 1), source)
    try:
        pixels = np.ascontiguousarray(dataset.pixel_array)
    except Exception as error:  # each codec that may be missing says so in its own way
        parts.digests["PixelData"] = hashlib.sha256(dataset.PixelData).hexdigest()
        parts.note = f"its pixels could not be unpacked: {str(error)[:200]}"
        return
    slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    flat = source.spilled(pixels)
    parts.measures |= measures_of("pixels", flat, pixels.shape, "C", slope, intercept, "pixel (row, column)")
