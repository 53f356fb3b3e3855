"""What becomes of a time stamp, of noise and of a change in each format of the field.

    python -m benchmarks.formats [--seeds N] [--only NAME] [--table FILE]

Each format is written by the library that the field writes it with, or line by line as its tool does, twelve times: six
references and six new runs. Four experiments: only times, hosts, process numbers and identifiers differ; numbers carry
noise of one in a million; the new runs are also 5 % larger; nothing varies and the new runs are 5 % larger.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import gzip
import io
import json
import lzma
import struct
import sys
import tarfile
import tempfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.streamlines import Tractogram
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from scipy.io import netcdf_file, savemat

from prefect_biomed.analysis import judge_runs

Floats = NDArray[np.float64]

REFERENCES = RUNS = 6
# Of 100 formats with noise one is called changed by chance.
LEVEL = 0.01
POINTS = 512
NOISE = 1e-6
CHANGE = 1.05
_SIDE = 8


@dataclass(frozen=True)
class Made:
    """When, where and by whom a file was made: what must not count."""

    when: datetime
    host: str
    user: str
    process: int
    folder: str
    token: str

    @classmethod
    def drawn(cls, generator: np.random.Generator, number: int) -> Made:
        """Draw one that differs from all others."""
        letters = "".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz0123456789"), 8))
        return cls(
            when=datetime(2026, 3, 2, 9, 15, 7, 123456)
            + timedelta(minutes=37.3 * number + 60 * 24 * 70 * (number >= REFERENCES)),
            host=f"node{number + 11:03d}.cluster.example",
            user="alice" if number % 2 else "bob",
            process=int(generator.integers(1000, 90000)),
            folder=f"/tmp/tmp{letters}/work",
            token=str(uuid.UUID(bytes=generator.bytes(16), version=4)),
        )


def _cube(values: Floats) -> NDArray[Any]:
    return values.reshape(_SIDE, _SIDE, _SIDE)


def _labels(values: Floats) -> NDArray[Any]:
    """Labels of at most 40 structures: noise moves some borders."""
    return np.floor(_cube(values) / 5.0).astype(np.int16)


def _nifti(image: nibabel.Nifti1Image, path: Path, made: Made) -> None:
    image.header["descrip"] = f"{made.when:%Y-%m-%d %H:%M:%S}".encode()
    nibabel.save(image, path)


def nii(path: Path, values: Floats, made: Made) -> None:
    _nifti(nibabel.Nifti1Image(_cube(values).astype("f4"), np.eye(4)), path, made)


def nii_double(path: Path, values: Floats, made: Made) -> None:
    _nifti(nibabel.Nifti1Image(_cube(values), np.eye(4)), path, made)


def nii_scaled(path: Path, values: Floats, made: Made) -> None:
    image = nibabel.Nifti1Image(_cube(values), np.eye(4))
    image.set_data_dtype(np.int16)
    _nifti(image, path, made)


def nii_complex(path: Path, values: Floats, made: Made) -> None:
    _nifti(nibabel.Nifti1Image((_cube(values) * (1 + 0.5j)).astype("c8"), np.eye(4)), path, made)


def nii_rgb(path: Path, values: Floats, made: Made) -> None:
    voxels = np.zeros((_SIDE, _SIDE, _SIDE), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    voxels["R"] = voxels["G"] = np.rint(_cube(values))
    _nifti(nibabel.Nifti1Image(voxels, np.eye(4)), path, made)


def nii_labels(path: Path, values: Floats, made: Made) -> None:
    _nifti(nibabel.Nifti1Image(_labels(values), np.eye(4)), path, made)


def nii_affine(path: Path, values: Floats, made: Made) -> None:
    affine = np.eye(4)
    affine[:3] = values[:12].reshape(3, 4)
    affine[:3, :3] += 500 * np.eye(3)
    _nifti(nibabel.Nifti1Image(np.ones((4, 4, 4), "u1"), affine), path, made)


def nifti2(path: Path, values: Floats, made: Made) -> None:
    nibabel.save(nibabel.Nifti2Image(_cube(values).astype("f4"), np.eye(4)), path)


def nifti_pair(path: Path, values: Floats, made: Made) -> None:
    _nifti(nibabel.Nifti1Pair(_cube(values).astype("f4"), np.eye(4)), path, made)


def analyze(path: Path, values: Floats, made: Made) -> None:
    nibabel.save(nibabel.Spm99AnalyzeImage(_cube(values).astype("f4"), np.eye(4)), path)


def mgh(path: Path, values: Floats, made: Made) -> None:
    nibabel.save(nibabel.MGHImage(_cube(values).astype("f4"), np.eye(4)), path)


def mgz_with_tags(path: Path, values: Floats, made: Made) -> None:
    mgh(path.with_suffix(".mgh"), values, made)
    content = path.with_suffix(".mgh").read_bytes()
    path.with_suffix(".mgh").unlink()
    command = (
        f"mri_convert {made.folder}/a.mgz b.mgz ProgramVersion: 7.4.1 TimeStamp: {made.when:%Y/%m/%d-%H:%M:%S}-GMT"
    )
    command += f" User: {made.user} Machine: {made.host}"
    path.write_bytes(gzip.compress(content + struct.pack(">iq", 3, len(command)) + command.encode()))


def cifti(path: Path, values: Floats, made: Made) -> None:
    brain = nibabel.cifti2.BrainModelAxis.from_mask(
        np.ones((_SIDE,) * 3, bool), affine=np.eye(4), name="CIFTI_STRUCTURE_OTHER"
    )
    image = nibabel.Cifti2Image(values[None].astype("f4"), (nibabel.cifti2.ScalarAxis(["thickness"]), brain))
    nibabel.save(image, path)


def cifti_series(path: Path, values: Floats, made: Made) -> None:
    brain = nibabel.cifti2.BrainModelAxis.from_mask(
        np.ones((_SIDE, _SIDE, 2), bool), affine=np.eye(4), name="CIFTI_STRUCTURE_CORTEX_LEFT"
    )
    times = nibabel.cifti2.SeriesAxis(start=0.0, step=0.72, size=4)
    image = nibabel.Cifti2Image(values.reshape(4, -1).astype("f4"), (times, brain))
    image.nifti_header.extensions.append(nibabel.nifti1.Nifti1Extension(6, f"written {made.when}".encode()))
    nibabel.save(image, path)


def cifti_labels(path: Path, values: Floats, made: Made) -> None:
    brain = nibabel.cifti2.BrainModelAxis.from_mask(
        np.ones((_SIDE,) * 3, bool), affine=np.eye(4), name="CIFTI_STRUCTURE_OTHER"
    )
    table = {number: (f"area {number}", (0.1, 0.2, 0.3, 1.0)) for number in range(60)}
    axis = nibabel.cifti2.LabelAxis(["parcels"], [table])
    nibabel.save(nibabel.Cifti2Image(_labels(values).reshape(1, -1).astype("f4"), (axis, brain)), path)


def gifti_labels(path: Path, values: Floats, made: Made) -> None:
    table = nibabel.gifti.GiftiLabelTable()
    for number in range(60):
        label = nibabel.gifti.GiftiLabel(key=number, red=0.1 * (number % 7), green=0.5, blue=0.5, alpha=1.0)
        label.label = f"area {number}"
        table.labels.append(label)
    array = nibabel.gifti.GiftiDataArray(
        _labels(values).ravel().astype("i4"), intent="NIFTI_INTENT_LABEL", datatype="NIFTI_TYPE_INT32"
    )
    meta = nibabel.gifti.GiftiMetaData({"Date": f"{made.when:%a %b %d %H:%M:%S %Y}", "UserName": made.user})
    nibabel.save(nibabel.GiftiImage(darrays=[array], labeltable=table, meta=meta), path)


def warp(path: Path, values: Floats, made: Made) -> None:
    """A displacement field as ANTs and FSL write it: one vector for each voxel."""
    image = nibabel.Nifti1Image(values[:510].reshape(10, 17, 1, 1, 3).astype("f4"), np.eye(4))
    image.header.set_intent("vector")
    _nifti(image, path, made)


def nrrd_gzip(path: Path, values: Floats, made: Made) -> None:
    head = (
        f"NRRD0004\n# Complete NRRD file format specification at:\n# written {made.when}\ntype: float\ndimension: 3\n"
        "sizes: 8 8 8\nspace: right-anterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\n"
        f"encoding: gzip\nDate:={made.when:%Y-%m-%d %H:%M:%S}\n\n"
    )
    path.write_bytes(head.encode() + gzip.compress(values.astype("<f4").tobytes(), mtime=int(made.when.timestamp())))


def _gifti(encoding: str) -> Callable[[Path, Floats, Made], None]:
    def write(path: Path, values: Floats, made: Made) -> None:
        meta = nibabel.gifti.GiftiMetaData({"Date": f"{made.when:%a %b %d %H:%M:%S %Y}", "UserName": made.user})
        points = nibabel.gifti.GiftiDataArray(
            values[:510].reshape(-1, 3).astype("f4"), intent="NIFTI_INTENT_POINTSET", encoding=encoding, meta=meta
        )
        faces = np.arange(30, dtype="i4").reshape(-1, 3)
        triangles = nibabel.gifti.GiftiDataArray(faces, intent="NIFTI_INTENT_TRIANGLE", encoding=encoding)
        nibabel.save(nibabel.GiftiImage(darrays=[points, triangles]), path)

    return write


def gifti_shape(path: Path, values: Floats, made: Made) -> None:
    array = nibabel.gifti.GiftiDataArray(values.astype("f4"), intent="NIFTI_INTENT_SHAPE")
    nibabel.save(nibabel.GiftiImage(darrays=[array]), path)


def minc1(path: Path, values: Floats, made: Made) -> None:
    with netcdf_file(path, "w") as file:
        file.history = f"{made.when:%a %b %d %H:%M:%S %Y}>>> mincresample {made.folder}/a.mnc"
        for name in ("zspace", "yspace", "xspace"):
            file.createDimension(name, _SIDE)
            axis = file.createVariable(name, "i4", ())
            axis.step, axis.start, axis.spacing = 1.0, 0.0, b"regular__"
        image = file.createVariable("image", "f8", ("zspace", "yspace", "xspace"))
        image[:] = _cube(values)
        image.signtype = b"signed__"
        image.valid_range = np.array([values.min(), values.max()])
        for name, bound in (("image-max", values.max()), ("image-min", values.min())):
            limit = file.createVariable(name, "f8", ())
            limit.data = np.array(bound)


def minc2(path: Path, values: Floats, made: Made) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        root = file.create_group("minc-2.0")
        root.attrs["history"] = f"{made.when:%a %b %d %H:%M:%S %Y}>>> mincresample {made.folder}/a.mnc"
        root.attrs["ident"] = f"{made.user}:{made.host}:{made.when:%Y.%m.%d.%H.%M.%S}:{made.process}:1"
        dimensions = root.create_group("dimensions")
        for name in ("zspace", "yspace", "xspace"):
            axis = dimensions.create_dataset(name, data=0)
            axis.attrs["step"], axis.attrs["start"], axis.attrs["length"] = 1.0, 0.0, _SIDE
        image = root.create_group("image/0")
        scaled = np.rint((_cube(values) - values.min()) / np.ptp(values) * 65535).astype("u2")
        data = image.create_dataset("image", data=scaled)
        data.attrs["dimorder"] = np.bytes_("zspace,yspace,xspace")
        data.attrs["valid_range"] = np.array([0.0, 65535.0])
        image.create_dataset("image-max", data=values.max())
        image.create_dataset("image-min", data=values.min())


def afni(path: Path, values: Floats, made: Made) -> None:
    voxels = _cube(values).astype("<f4")
    path.write_bytes(voxels.tobytes("F"))
    entries: list[tuple[str, str, list[Any] | str]] = [
        ("string", "TYPESTRING", "3DIM_HEAD_ANAT"),
        ("string", "IDCODE_STRING", f"AFN_{made.token[:22]}"),
        ("string", "IDCODE_DATE", f"{made.when:%a %b %d %H:%M:%S %Y}"),
        ("string", "BYTEORDER_STRING", "LSB_FIRST"),
        ("string", "HISTORY_NOTE", f"[{made.user}@{made.host}: {made.when:%a %b %d %H:%M:%S %Y}] 3dcalc -a a+orig"),
        ("string", "TEMPLATE_SPACE", "ORIG"),
        ("integer", "DATASET_RANK", [3, 1, 0, 0, 0, 0, 0, 0]),
        ("integer", "DATASET_DIMENSIONS", [_SIDE, _SIDE, _SIDE, 0, 0]),
        ("integer", "ORIENT_SPECIFIC", [0, 3, 4]),
        ("integer", "BRICK_TYPES", [3]),
        ("integer", "SCENE_DATA", [0, 2, 0, -999, -999, -999, -999, -999]),
        ("float", "BRICK_STATS", [float(values.min()), float(values.max())]),
        ("float", "BRICK_FLOAT_FACS", [0.0]),
        ("float", "ORIGIN", [0.0, 0.0, 0.0]),
        ("float", "DELTA", [1.0, 1.0, 1.0]),
        ("float", "IJK_TO_DICOM_REAL", [1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0, 0]),
    ]
    text = []
    for kind, name, value in entries:
        said = "'" + value + "~" if isinstance(value, str) else " ".join(f"{number:.9g}" for number in value)
        text.append(
            f"\ntype = {kind}-attribute\nname = {name}\ncount = {len(value) + isinstance(value, str)}\n{said}\n"
        )
    path.with_suffix(".HEAD").write_text("".join(text))


def nrrd(path: Path, values: Floats, made: Made) -> None:
    header = f"NRRD0004\n# Complete NRRD file, {made.when:%Y-%m-%d}\ntype: float\ndimension: 3\n"
    header += f"sizes: {_SIDE} {_SIDE} {_SIDE}\n"
    header += "endian: little\nencoding: gzip\nspace: left-posterior-superior\nspace origin: (0,0,0)\n\n"
    path.write_bytes(header.encode() + gzip.compress(values.astype("<f4").tobytes()))


def nhdr(path: Path, values: Floats, made: Made) -> None:
    header = f"NRRD0004\ntype: double\ndimension: 3\nsizes: {_SIDE} {_SIDE} {_SIDE}\nendian: little\nencoding: raw\n"
    path.write_text(header + f"data file: {path.stem}.raw\n")
    path.with_suffix(".raw").write_bytes(values.astype("<f8").tobytes())


def mha(path: Path, values: Floats, made: Made) -> None:
    header = f"ObjectType = Image\nNDims = 3\nComment = made {made.when:%d %b %Y}\nBinaryDataByteOrderMSB = False\n"
    header += (
        f"CompressedData = True\nDimSize = {_SIDE} {_SIDE} {_SIDE}\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n"
    )
    path.write_bytes(header.encode() + zlib.compress(values.astype("<f4").tobytes()))


def mif(path: Path, values: Floats, made: Made) -> None:
    header = f"mrtrix image\ndim: {_SIDE},{_SIDE},{_SIDE}\nvox: 1,1,1\nlayout: +0,+1,+2\ndatatype: Float32LE\n"
    header += f"command_history: mrcalc {made.folder}/a.mif 2 -mult\nmrtrix_version: 3.0.4\nfile: . 512\nEND\n"
    path.write_bytes(header.encode().ljust(512, b"\0") + values.astype("<f4").tobytes())


def dicom(path: Path, values: Floats, made: Made) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.SeriesInstanceUID, image.StudyInstanceUID = generate_uid(), generate_uid()
    image.InstanceCreationDate, image.InstanceCreationTime = f"{made.when:%Y%m%d}", f"{made.when:%H%M%S.%f}"
    image.ContentDate, image.ContentTime = image.InstanceCreationDate, image.InstanceCreationTime
    image.PatientName, image.Modality, image.StationName = "Phantom", "MR", made.host[:7]
    image.Rows, image.Columns, image.SamplesPerPixel = 16, 32, 1
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
    image.PhotometricInterpretation = "MONOCHROME2"
    image.RescaleSlope, image.RescaleIntercept = "0.01", "0"
    image.PixelData = np.rint(values * 100).astype("<u2").tobytes()
    image.save_as(path, enforce_file_format=True)


def surface(path: Path, values: Floats, made: Made) -> None:
    faces = np.arange(30).reshape(-1, 3)
    stamp = f"created by {made.user} on {made.when:%a %b %d %H:%M:%S %Y}"
    nibabel.freesurfer.write_geometry(path, values[:510].reshape(-1, 3), faces, create_stamp=stamp)


def curvature(path: Path, values: Floats, made: Made) -> None:
    nibabel.freesurfer.write_morph_data(path, values.astype("f4"))


def annotation(path: Path, values: Floats, made: Made) -> None:
    labels = _labels(values).ravel().astype(int)
    table = np.array([[n * 5 % 256, n * 7 % 256, n * 11 % 256, 0, 0] for n in range(64)])
    nibabel.freesurfer.write_annot(path, labels, table, [f"area{n}" for n in range(64)], fill_ctab=True)


def label_file(path: Path, values: Floats, made: Made) -> None:
    rows = [f"{n}  {values[n]:.6f}  {values[n + 1]:.6f}  {values[n + 2]:.6f} {values[n + 3]:.9f}" for n in range(100)]
    path.write_text(f"#!ascii label  , from subject bert vox2ras=TkReg\n{len(rows)}\n" + "\n".join(rows) + "\n")


def aseg_stats(path: Path, values: Floats, made: Made) -> None:
    lines = [
        "# Title Segmentation Statistics", "#", "# generating_program mri_segstats",
        "# cvs_version $Id: mri_segstats.c,v 1.121 2016/05/31 17:27:11 greve Exp $",
        f"# cmdline mri_segstats --seg mri/aseg.mgz --sum {made.folder}/aseg.stats", "# sysname  Linux",
        f"# hostname {made.host}", "# machine  x86_64", f"# user     {made.user}",
        f"# CreationTime {made.when:%Y/%m/%d-%H:%M:%S}-GMT", f"# SUBJECTS_DIR {made.folder}", "# subjectname bert",
        f"# Measure BrainSeg, BrainSegVol, Brain Segmentation Volume, {1e4 * values[0]:.6f}, mm^3",
        "# ColHeaders  Index SegId NVoxels Volume_mm3 StructName normMean normStdDev",
    ]  # fmt: skip
    lines += [
        f"{n:3d} {n + 3:3d} {1000 + n:8d} {100 * values[n]:12.6f}  Structure-{n:02d} {values[n + 50]:12.6f} "
        f"{values[n]:9.6f}"
        for n in range(1, 40)
    ]
    path.write_text("\n".join(lines) + "\n")


def aparc_stats(path: Path, values: Floats, made: Made) -> None:
    lines = ["# Table of FreeSurfer cortical parcellation anatomical statistics", f"# hostname {made.host}"]
    lines += [f"# CreationTime {made.when:%Y/%m/%d-%H:%M:%S}-GMT", "# ColHeaders StructName NumVert SurfArea ThickAvg"]
    lines += [f"area{n:02d}   {1200 + n}   {900 + n}   {values[n]:.7f}" for n in range(34)]
    path.write_text("\n".join(lines) + "\n")


def lta(path: Path, values: Floats, made: Made) -> None:
    matrix = "\n".join(" ".join(f"{v:.12e}" for v in values[4 * r : 4 * r + 4]) for r in range(4))
    path.write_text(f"# transform file {made.folder}/x.lta\n"
                    f"# created by {made.user} on {made.when:%a %b %d %H:%M:%S %Y}\n\n"
                    f"type      = 0\nnxforms   = 1\nmean      = 0.0000 0.0000 0.0000\n1 4 4\n{matrix}\n")  # fmt: skip


def flirt(path: Path, values: Floats, made: Made) -> None:
    path.write_text("".join("  ".join(f"{v:.10f}" for v in values[4 * r : 4 * r + 4]) + "  \n" for r in range(4)))


def itk_text(path: Path, values: Floats, made: Made) -> None:
    numbers = " ".join(f"{v!r}" for v in values[:12].tolist())
    path.write_text(
        f"#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\nParameters: {numbers}\n"
        "FixedParameters: 0 0 0\n"
    )


def ants_mat(path: Path, values: Floats, made: Made) -> None:
    savemat(path, {"AffineTransform_double_3_3": values[:12, None], "fixed": np.zeros((3, 1))}, format="4")


def itk_h5(path: Path, values: Floats, made: Made) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["HDFVersion"], file["ITKVersion"], file["OSName"] = b"1.14.3", b"5.3.0", b"Linux"
        file["TransformGroup/0/TransformType"] = np.array([b"AffineTransform_double_3_3"], dtype=object)
        file["TransformGroup/0/TransformParameters"] = values[:12]
        file["TransformGroup/0/TransformFixedParameters"] = np.zeros(3)


def xfm(path: Path, values: Floats, made: Made) -> None:
    matrix = "\n".join(" ".join(f"{v:.10f}" for v in values[4 * r : 4 * r + 4]) for r in range(3))
    path.write_text(f"MNI Transform File\n%{made.when:%a %b %d %H:%M:%S %Y}>>> minctracc {made.folder}/a.mnc\n"
                    f"Transform_Type = Linear;\nLinear_Transform =\n{matrix};\n")  # fmt: skip


def bval(path: Path, values: Floats, made: Made) -> None:
    path.write_text(" ".join(f"{10 * v:.4f}" for v in values[:64]) + "\n")


def bvec(path: Path, values: Floats, made: Made) -> None:
    path.write_text("\n".join(" ".join(f"{v / 200:.9f}" for v in values[r : r + 64]) for r in range(3)) + "\n")


def one_d(path: Path, values: Floats, made: Made) -> None:
    rows = "\n".join(" ".join(f"{v:.8f}" for v in values[6 * r : 6 * r + 6]) for r in range(80))
    path.write_text(f"# 3dvolreg run by {made.user}@{made.host} {made.when:%a %b %d %H:%M:%S %Y}\n{rows}\n")


def _streamlines(values: Floats) -> list[NDArray[Any]]:
    return [values[30 * n : 30 * n + 30].reshape(10, 3).astype("f4") for n in range(17)]


def tck(path: Path, values: Floats, made: Made) -> None:
    order = np.random.default_rng(made.process).permutation(17)
    lines = _streamlines(values)
    tracts = Tractogram([lines[n] for n in order], affine_to_rasmm=np.eye(4))
    header = {"timestamp": f"{made.when.timestamp():.9f}", "command_history": f"tckgen {made.folder}/fod.mif out.tck"}
    nibabel.streamlines.TckFile(tracts, header=header).save(str(path))


def trk(path: Path, values: Floats, made: Made) -> None:
    order = np.random.default_rng(made.process).permutation(17)
    lines = _streamlines(values)
    nibabel.streamlines.TrkFile(Tractogram([lines[n] for n in order], affine_to_rasmm=np.eye(4))).save(str(path))


def mat5(path: Path, values: Floats, made: Made) -> None:
    # scipy writes the time of writing into the header, as MATLAB does.
    inner = {"beta": values[:50], "name": "model", "date": f"{made.when:%d-%b-%Y %H:%M:%S}", "opts": [1.0, "a"]}
    savemat(path, {"SPM": inner, "map": _cube(values)}, do_compression=True)
    content = path.read_bytes()
    head = f"MATLAB 5.0 MAT-file, Platform: GLNXA64, Created on: {made.when:%a %b %d %H:%M:%S %Y}".ljust(116)
    path.write_bytes(head.encode() + content[116:])


def mat4(path: Path, values: Floats, made: Made) -> None:
    savemat(path, {"map": values[:400].reshape(20, 20), "name": "model", "when": f"{made.when}"}, format="4")


def mat73(path: Path, values: Floats, made: Made) -> None:
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        file["map"] = values
        file["map"].attrs["MATLAB_class"] = np.bytes_("double")
        said = f"{made.when:%d-%b-%Y %H:%M:%S}"
        file["when"] = np.array([[ord(letter)] for letter in said], dtype="u2")
        file["when"].attrs["MATLAB_class"] = np.bytes_("char")
    head = f"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: {made.when:%a %b %d %H:%M:%S %Y} HDF5 schema 1.00 ."
    with path.open("r+b") as out:
        out.write(head.ljust(116).encode())


def hdf5(path: Path, values: Floats, made: Made) -> None:
    import h5py

    with h5py.File(path, "w", track_order=True) as file:
        file.attrs["created"] = made.when.timestamp()
        file.attrs["hostname"] = made.host
        data = file.create_dataset("group/values", data=_cube(values), compression="gzip", track_times=True)
        data.attrs["units"] = "mm"
        file["table"] = np.array(list(zip(range(9), values[:9], strict=True)), dtype=[("id", "i4"), ("v", "f8")])


def netcdf(path: Path, values: Floats, made: Made) -> None:
    with netcdf_file(path, "w") as file:
        file.history = f"{made.when:%Y-%m-%dT%H:%M:%SZ} created by {made.user} on {made.host}"
        file.createDimension("x", POINTS)
        variable = file.createVariable("v", "f8", ("x",))
        variable[:] = values


def _zarr(version: int) -> Callable[[Path, Floats, Made], None]:
    def write(path: Path, values: Floats, made: Made) -> None:
        import zarr

        group = zarr.open_group(path, mode="w", zarr_format=version)
        group.attrs["created"] = made.when.isoformat()
        group.create_array("v", data=_cube(values), chunks=(4, 4, 4))

    return write


def npy(path: Path, values: Floats, made: Made) -> None:
    np.save(path, values)


def npy_record(path: Path, values: Floats, made: Made) -> None:
    np.save(path, np.array(list(zip(range(POINTS), values, strict=True)), dtype=[("id", "i4"), ("v", "f4")]))


def npz(path: Path, values: Floats, made: Made) -> None:
    np.savez_compressed(path, a=values, b=_cube(values).astype("f4"))


def parquet(path: Path, values: Floats, made: Made) -> None:
    import pyarrow
    import pyarrow.parquet

    order = np.random.default_rng(made.process).permutation(50)
    columns = {"region": [f"r{n}" for n in order], "volume": values[:50][order]}
    columns |= {"written": [made.when.isoformat()] * 50}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def feather(path: Path, values: Floats, made: Made) -> None:
    import pyarrow
    import pyarrow.feather

    pyarrow.feather.write_feather(pyarrow.table({"region": [f"r{n}" for n in range(50)], "v": values[:50]}), path)


def _csv(separator: str) -> Callable[[Path, Floats, Made], None]:
    def write(path: Path, values: Floats, made: Made) -> None:
        order = np.random.default_rng(made.process).permutation(50)
        rows = [
            separator.join((f"sub-{n:02d}", f"{made.when:%Y-%m-%d %H:%M}", repr(float(values[n])), "ok")) for n in order
        ]
        path.write_text("\n".join([separator.join(("participant_id", "measured", "volume", "quality")), *rows]) + "\n")

    return write


def confounds(path: Path, values: Floats, made: Made) -> None:
    rows = ["\t".join(repr(float(v)) for v in values[5 * n : 5 * n + 5]) for n in range(90)]
    path.write_text("\n".join(["\t".join(("csf", "white_matter", "dvars", "fd", "trans_x")), *rows]) + "\n")


def json_file(path: Path, values: Floats, made: Made) -> None:
    tree = {
        "created": made.when.timestamp(),
        "provenance": {"hostname": made.host, "pid": made.process, "cwd": made.folder},
        "run_uuid": made.token, "elapsed_seconds": made.process / 7.0, "software": {"version": "1.2.3"},
        "written": made.when.replace(tzinfo=UTC).isoformat(),
        "tsnr": values[:20].tolist(), "fd_mean": float(values[21]),
    }  # fmt: skip
    path.write_text(json.dumps(tree))


def json_lines(path: Path, values: Floats, made: Made) -> None:
    path.write_text("".join(json.dumps({"t": made.when.isoformat(), "v": float(v)}) + "\n" for v in values[:50]))


def yaml_file(path: Path, values: Floats, made: Made) -> None:
    rows = "".join(f"  r{n}: {float(values[n])!r}\n" for n in range(30))
    path.write_text(f"date: {made.when:%Y-%m-%d %H:%M:%S}\nhost: {made.host}\nvolumes:\n{rows}")


def xml_file(path: Path, values: Floats, made: Made) -> None:
    rows = "".join(
        f'<region name="r{n}" mean="{float(values[n])!r}">{float(values[n + 1])!r}</region>' for n in range(30)
    )
    path.write_text(
        f'<?xml version="1.0"?>\n<report created="{made.when.isoformat()}" user="{made.user}">{rows}</report>\n'
    )


def html_file(path: Path, values: Floats, made: Made) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.rint(values[:256].reshape(16, 16)).astype("u1")).save(picture, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    path.write_text(
        f"<!DOCTYPE html><html><body><h1>QC of {made.when:%B %d, %Y} at {made.when:%H:%M}</h1>"
        f'<div id="{made.token}"><p>mean {float(values[0])!r} sd {float(values[1])!r}</p></div>'
        f'<img alt="x" src="{uri}"><footer>Generated on {made.host} by fMRIPrep 23.2.1, {made.when:%d/%m/%Y %I:%M %p}'
        "</footer></body></html>"
    )


def _figure(values: Floats) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot(values[:40])
    # Bounds and a text that stay, or the drawing scales with what is drawn.
    axes.set_ylim(0, 250)
    axes.set_title(f"mean {values[:40].mean():.9f}")
    return figure


def svg_file(path: Path, values: Floats, made: Made) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": made.token, "svg.fonttype": "none"}):
        _figure(values).savefig(path, metadata={"Date": made.when.isoformat()})


def pdf_file(path: Path, values: Floats, made: Made) -> None:
    _figure(values).savefig(path, metadata={"CreationDate": made.when})


def notebook(path: Path, values: Floats, made: Made) -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout",
         "text": [f"ran on {made.host} at {made.when}\n", f"{float(values[3])!r}\n"]},
        {"output_type": "execute_result", "execution_count": made.process, "metadata": {},
         "data": {"text/plain": [repr(float(values[2]))]}},
    ]  # fmt: skip
    cell = {
        "cell_type": "code",
        "id": made.token[:8],
        "execution_count": made.process,
        "metadata": {"t": str(made.when)},
    }
    path.write_text(json.dumps({"cells": [cell | {"source": ["fit()"], "outputs": outputs}], "metadata": {},
                                "nbformat": 4, "nbformat_minor": 5}))  # fmt: skip


def lcmodel_table(path: Path, values: Floats, made: Made) -> None:
    rows = "\n".join(
        f"  {values[n] / 20:.7E} {n % 9 + 1:3d}%  {values[n + 30] / 100:.7f}  Met{n:02d}" for n in range(25)
    )
    path.write_text(f" LCModel (Version 6.3-1R) Copyright: S.W. Provencher.\n"
                    f" Data of: scan {made.when:%d-%b-%Y %H:%M}\n"
                    f" $$CONC 26 lines in following concentration table = NCONC+1\n"
                    f"    Conc.  %SD /Cr+PCr  Metabolite\n{rows}\n"
                    f" $$MISC  3 lines\n  FWHM = 0.053 ppm    S/N =  14\n")  # fmt: skip


def lcmodel_coord(path: Path, values: Floats, made: Made) -> None:
    rows = "\n".join(" ".join(f"{v:12.5E}" for v in values[10 * n : 10 * n + 10]) for n in range(40))
    path.write_text(f" {made.when:%d-%b-%Y   %H:%M}\n  400 points on ppm-axis = NY\n{rows}\n")


def lcmodel_print(path: Path, values: Floats, made: Made) -> None:
    rows = "\n".join(f" iteration {n}: objective = {values[n]:.9E}" for n in range(20))
    path.write_text(f" Started {made.when:%d-%b-%Y %H:%M:%S} on host: {made.host}, PID {made.process}\n{rows}\n"
                    f" Elapsed time: {made.process / 100:.2f} s\n")  # fmt: skip


def text_report(path: Path, values: Floats, made: Made) -> None:
    path.write_text(f"run_{made.when:%Y%m%d-%H%M%S}_4f1c in {made.folder}\n{made.when:%a, %d %b %Y %H:%M:%S} +0100\n"
                    f"mean {float(values[0])!r}\nmax={float(values[1])!r}mm\n"
                    f"Finished in {made.process / 9:.1f} seconds\n")  # fmt: skip


def png(path: Path, values: Floats, made: Made) -> None:
    words = PngImagePlugin.PngInfo()
    words.add_text("Creation Time", f"{made.when:%a, %d %b %Y %H:%M:%S GMT}")
    words.add_text("Software", "Matplotlib version3.9.2, https://matplotlib.org/")
    Image.fromarray(np.rint(values.reshape(16, 32)).astype("u1")).save(path, pnginfo=words)


def jpeg(path: Path, values: Floats, made: Made) -> None:
    Image.fromarray(np.rint(values.reshape(16, 32)).astype("u1")).save(
        path, quality=95, comment=f"{made.when}".encode()
    )


def tiff(path: Path, values: Floats, made: Made) -> None:
    pages = [Image.fromarray(values.reshape(16, 32).astype("f4") + page) for page in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:], tiffinfo={306: f"{made.when:%Y:%m:%d %H:%M:%S}"})


def gif(path: Path, values: Floats, made: Made) -> None:
    Image.fromarray(np.rint(values.reshape(16, 32)).astype("u1")).save(path)


def archive(path: Path, values: Floats, made: Made) -> None:
    inner = io.BytesIO()
    buffer = io.BytesIO()
    np.save(buffer, values)
    with zipfile.ZipFile(inner, "w") as packed:
        packed.writestr(zipfile.ZipInfo("a.npy", made.when.timetuple()[:6]), buffer.getvalue())
    with tarfile.open(path, "w:gz") as outer:
        info = tarfile.TarInfo("deep/inner.zip")
        info.size, info.mtime, info.uname = len(inner.getvalue()), int(made.when.timestamp()), made.user
        outer.addfile(info, io.BytesIO(inner.getvalue()))


def tar_in_zip(path: Path, values: Floats, made: Made) -> None:
    buffer, inner = io.BytesIO(), io.BytesIO()
    np.save(buffer, values)
    with tarfile.open(fileobj=inner, mode="w:bz2") as packed:
        info = tarfile.TarInfo("results/a.npy")
        info.size, info.mtime, info.uname = len(buffer.getvalue()), int(made.when.timestamp()), made.user
        packed.addfile(info, io.BytesIO(buffer.getvalue()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as outer:
        outer.writestr(zipfile.ZipInfo("deep/inner.tar.bz2", made.when.timetuple()[:6]), inner.getvalue())


def _packed(write: Callable[[Path, Floats, Made], None], pack: Callable[[bytes], bytes]) -> Any:
    def written(path: Path, values: Floats, made: Made) -> None:
        plain = path.with_suffix("")
        write(plain, values, made)
        path.write_bytes(pack(plain.read_bytes()))
        plain.unlink()

    return written


def vtk(path: Path, values: Floats, made: Made) -> None:
    points = "\n".join(" ".join(f"{v:.7f}" for v in values[3 * n : 3 * n + 3]) for n in range(100))
    path.write_text(
        f"# vtk DataFile Version 3.0\nwritten {made.when}\nASCII\nDATASET POLYDATA\nPOINTS 100 float\n{points}\n"
    )


def opaque(path: Path, values: Floats, made: Made) -> None:
    path.write_bytes(b"\x00\x01own format" + values.tobytes())


WRITERS: Mapping[str, tuple[str, Callable[[Path, Floats, Made], None]]] = {
    "NIfTI": ("a.nii", nii),
    "NIfTI, gzip": ("a.nii.gz", nii),
    "NIfTI, float64": ("a.nii.gz", nii_double),
    "NIfTI, scaled int16": ("a.nii.gz", nii_scaled),
    "NIfTI, complex": ("a.nii.gz", nii_complex),
    "NIfTI, RGB": ("a.nii.gz", nii_rgb),
    "NIfTI, labels": ("a.nii.gz", nii_labels),
    "NIfTI, affine alone": ("a.nii.gz", nii_affine),
    "NIfTI-2": ("a.nii.gz", nifti2),
    "NIfTI pair": ("a.img", nifti_pair),
    "NIfTI pair, gzip": ("a.img.gz", nifti_pair),
    "Analyze (SPM)": ("a.img", analyze),
    "MGH": ("a.mgh", mgh),
    "MGZ": ("a.mgz", mgh),
    "MGZ with tags": ("a.mgz", mgz_with_tags),
    "CIFTI dscalar": ("a.dscalar.nii", cifti),
    "CIFTI dtseries": ("a.dtseries.nii", cifti_series),
    "CIFTI dlabel": ("a.dlabel.nii", cifti_labels),
    "GIFTI surface, ASCII": ("a.surf.gii", _gifti("GIFTI_ENCODING_ASCII")),
    "GIFTI surface, base64": ("a.surf.gii", _gifti("GIFTI_ENCODING_B64BIN")),
    "GIFTI surface, gzip": ("a.surf.gii", _gifti("GIFTI_ENCODING_B64GZ")),
    "GIFTI shape": ("a.shape.gii", gifti_shape),
    "GIFTI label": ("a.label.gii", gifti_labels),
    "MINC 1": ("a.mnc", minc1),
    "MINC 2": ("a.mnc", minc2),
    "AFNI BRIK/HEAD": ("a+orig.BRIK", afni),
    "NRRD": ("a.nrrd", nrrd),
    "NRRD, gzip": ("a.nrrd", nrrd_gzip),
    "NRRD, detached": ("a.nhdr", nhdr),
    "MetaImage": ("a.mha", mha),
    "MRtrix image": ("a.mif", mif),
    "DICOM": ("a.dcm", dicom),
    "FreeSurfer surface": ("lh.white", surface),
    "FreeSurfer curvature": ("lh.thickness", curvature),
    "FreeSurfer annotation": ("lh.aparc.annot", annotation),
    "FreeSurfer label": ("lh.cortex.label", label_file),
    "FreeSurfer aseg.stats": ("aseg.stats", aseg_stats),
    "FreeSurfer aparc.stats": ("lh.aparc.stats", aparc_stats),
    "FreeSurfer LTA": ("a.lta", lta),
    "FSL matrix": ("flirt.mat", flirt),
    "ITK transform, text": ("a.txt", itk_text),
    "ANTs transform, MAT": ("a0GenericAffine.mat", ants_mat),
    "ITK transform, HDF5": ("aComposite.h5", itk_h5),
    "displacement field": ("a1Warp.nii.gz", warp),
    "MNI transform": ("a.xfm", xfm),
    "b-values": ("dwi.bval", bval),
    "b-vectors": ("dwi.bvec", bvec),
    "AFNI 1D": ("motion.1D", one_d),
    "MRtrix tracks": ("a.tck", tck),
    "TrackVis": ("a.trk", trk),
    "MATLAB 4": ("a.mat", mat4),
    "MATLAB 5": ("a.mat", mat5),
    "MATLAB 7.3": ("a.mat", mat73),
    "HDF5": ("a.h5", hdf5),
    "NetCDF 3": ("a.nc", netcdf),
    "Zarr 2": ("a.zarr", _zarr(2)),
    "Zarr 3": ("a.zarr", _zarr(3)),
    "NumPy": ("a.npy", npy),
    "NumPy, records": ("a.npy", npy_record),
    "NumPy archive": ("a.npz", npz),
    "Parquet": ("a.parquet", parquet),
    "Feather": ("a.feather", feather),
    "CSV, rows in any order": ("a.csv", _csv(",")),
    "TSV, rows in any order": ("a.tsv", _csv("\t")),
    "TSV, gzip": ("a.tsv.gz", _packed(confounds, gzip.compress)),
    "TSV, confounds": ("a.tsv", confounds),
    "JSON": ("a.json", json_file),
    "JSON lines": ("a.jsonl", json_lines),
    "YAML": ("a.yaml", yaml_file),
    "XML": ("a.xml", xml_file),
    "HTML": ("report.html", html_file),
    "SVG": ("figure.svg", svg_file),
    "PDF": ("figure.pdf", pdf_file),
    "Jupyter notebook": ("a.ipynb", notebook),
    "LCModel table": ("sv.table", lcmodel_table),
    "LCModel coord": ("sv.coord", lcmodel_coord),
    "LCModel print": ("sv.print", lcmodel_print),
    "text": ("report.txt", text_report),
    "text, bzip2": ("report.txt.bz2", _packed(text_report, bz2.compress)),
    "text, xz": ("report.txt.xz", _packed(text_report, lzma.compress)),
    "PNG": ("a.png", png),
    "JPEG": ("a.jpg", jpeg),
    "TIFF, three pages": ("a.tif", tiff),
    "GIF": ("a.gif", gif),
    "zip in tar.gz": ("a.tar.gz", archive),
    "tar.bz2 in zip": ("a.zip", tar_in_zip),
    "VTK, ASCII": ("a.vtk", vtk),
    "unknown binary": ("a.dat", opaque),
}
# Stored as whole numbers of up to 250: noise of one in a million moves few of them, so it is larger here.
COARSE = {
    "NIfTI, RGB", "NIfTI, labels", "CIFTI dlabel", "GIFTI label", "FreeSurfer annotation", "PNG", "JPEG", "GIF", "HTML",
    "NIfTI, scaled int16", "MINC 2", "DICOM",
}  # fmt: skip

EXPERIMENTS = {
    "time stamp only": (False, 1.0, "within"),
    "noise": (True, 1.0, "within"),
    "noise + 5 %": (True, CHANGE, "changed"),
    "deterministic + 5 %": (False, CHANGE, "changed"),
}


def judged(name: str, experiment: str, seed: int, folder: Path) -> tuple[str, str]:
    """Make one experiment and judge it.

    Args:
        name: Name of a format.
        experiment: Name of an experiment.
        seed: Seed of the noise.
        folder: An empty folder.

    Returns:
        The outcome, and the sentence.
    """
    file, write = WRITERS[name]
    is_noisy, factor, _ = EXPERIMENTS[experiment]
    generator = np.random.default_rng([seed, zlib.crc32(f"{name} {experiment}".encode())])
    base = generator.uniform(50.0, 200.0, POINTS)
    scale = (3e-2 if name in COARSE else NOISE) * is_noisy
    runs: dict[str, Path] = {}
    for number in range(REFERENCES + RUNS):
        run = runs[f"run {number}"] = folder / str(number)
        run.mkdir(parents=True)
        values = base * (1.0 + scale * generator.standard_normal(POINTS))
        if number >= REFERENCES:
            values *= factor
        write(run / file, values, Made.drawn(generator, number))
    names = list(runs)
    judgement = judge_runs(
        {n: runs[n] for n in names[:REFERENCES]}, {n: runs[n] for n in names[REFERENCES:]}, level=LEVEL
    )
    return outcome_of(judgement), judgement.sentence


def outcome_of(judgement: Any) -> str:
    """Name the outcome of a judgement in one word or two."""
    return str(judgement.outcome)


_TITLE = f"""# Formats and what becomes of them

Made by `python -m benchmarks.formats --table docs/formats.md`: {REFERENCES} reference runs and {RUNS} new ones of each
format, judged at a level of {LEVEL:g}, so that one of a hundred with noise is called changed by chance. *Time stamp
only*: times, hosts, users, process numbers and identifiers differ. *Noise*: one in a million, or three in a hundred
where whole numbers are stored. *5 %*: the new runs are that much larger. Expected are within, within, changed, changed;
what is neither that nor *not judged* is wrong.

"""


def main() -> int:
    """Print the table; the exit status says whether anything was judged wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=1, help="experiments for each cell")
    parser.add_argument("--only", default="", help="formats whose name holds this")
    parser.add_argument("--table", type=Path, help="where the table goes, as Markdown")
    given = parser.parse_args()
    rows, right, total, wrong = [], 0, 0, []
    began = time.monotonic()
    for name in WRITERS:
        if given.only.lower() not in name.lower():
            continue
        cells = []
        for experiment, (_, _, expected) in EXPERIMENTS.items():
            found = []
            for seed in range(given.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    outcome, sentence = judged(name, experiment, seed, Path(folder))
                found.append(outcome)
                total += 1
                right += outcome == expected
                if outcome not in (expected, "not judged"):
                    wrong.append(f"{name}, {experiment}, seed {seed}: {sentence}")
                elif outcome != expected:
                    print(f"{name}, {experiment}: {sentence[:300]}", file=sys.stderr)
            cells.append(", ".join(f"{found.count(o)} {o}" if given.seeds > 1 else o for o in dict.fromkeys(found)))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    table = [f"| format | {' | '.join(EXPERIMENTS)} |", "|---" * (1 + len(EXPERIMENTS)) + "|", *rows]
    print("\n".join(table))
    share = 100 * right / max(total, 1)
    hidden = sum(" 5 %, " in case for case in wrong)
    chance = LEVEL * total / len(EXPERIMENTS)
    summary = (
        f"{right} of {total} experiments came out as expected ({share:.1f} %). {hidden} changes were called within, "
        f"and {len(wrong) - hidden} times noise or a stamp was called changed; by chance it would be {chance:.1f} of "
        "the experiments with noise."
    )
    print(f"\n{summary} {time.monotonic() - began:.0f} s")
    print("\n".join(wrong), file=sys.stderr)
    if given.table:
        given.table.write_text(_TITLE + "\n".join([summary, "", *table]) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
