"""The pipelines of the VIP sandbox: their definitions, and the computations they do on real files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zlib import compressobj, crc32

from prefect_biomed.sandbox.vip._model import VipSwitches

if TYPE_CHECKING:
    import numpy as np

    Volume = np.ndarray[Any, np.dtype[np.float64]]

Kind = Literal["File", "String", "Boolean", "Int64", "Double"]


class ToolFailed(Exception):
    """The computation ended with an exit status other than 0.

    Args:
        exit_status: of the tool.
        message: what it wrote to its standard error.
    """

    def __init__(self, exit_status: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Parameter:
    """One input of a pipeline.

    Attributes:
        name: its id.
        kind: type of one value.
        description: for the user.
        optional: may be left out.
        default: taken when it is left out; None is no default.
        is_list: listed with type `List`, whatever its kind.
    """

    name: str
    kind: Kind
    description: str
    optional: bool = False
    default: str | float | bool | None = None
    is_list: bool = False


@dataclass
class Call:
    """One job, as the computation sees it.

    Attributes:
        values: parameter to value, as text; files are the platform paths.
        files: File parameter to local copy.
        folder: an empty folder to write to.
        switches: of the sandbox.
        random: seeded with the seed of the sandbox, the execution and the job.
        execution_number: how many executions of this application there have been, this one included.
        stopped: set when the execution is killed.
        stamp: seconds since the epoch, different in every job.
        stdout: lines of standard output.
        stderr: lines of standard error.
    """

    values: Mapping[str, str]
    files: Mapping[str, Path]
    folder: Path
    switches: VipSwitches
    random: random.Random
    execution_number: int
    stopped: threading.Event
    stamp: int
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of the result and return its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


# Output id -> (name below the directory of results, file)
Results = Mapping[str, list[tuple[str, Path]]]


@dataclass(frozen=True)
class Pipeline:
    """One version of an application.

    Attributes:
        name: of the application.
        version: of the application.
        description: for the user; may hold HTML.
        parameters: its inputs.
        outputs: id to description of its outputs.
        tool: the computation.
        groups: whose members may use it.
        visible: hidden versions are as good as absent.
        public: listed without a key.
        dot: parameters whose values are taken pairwise; all others are combined with each other.
        directories: File parameters for which a directory stands for the files in it that match the pattern.
        counters: Int64 parameters for which N stands for 0 ... N-1.
        results_suffix: directory made in the results location; None is the time of the launch, "" none at all.
    """

    name: str
    version: str
    description: str
    parameters: tuple[Parameter, ...]
    outputs: Mapping[str, str]
    tool: Callable[[Call], Results]
    groups: tuple[str, ...] = ("Neuroimaging",)
    visible: bool = True
    public: bool = True
    dot: tuple[str, ...] = ()
    directories: Mapping[str, str] = field(default_factory=dict)
    counters: tuple[str, ...] = ()
    results_suffix: str | None = None

    @property
    def identifier(self) -> str:
        """Application and version, joined by a slash."""
        return f"{self.name}/{self.version}"

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of that name."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    def boutiques(self) -> dict[str, Any]:
        """Return the Boutiques descriptor, schema 0.5."""
        types = {"File": "File", "String": "String", "Boolean": "Flag", "Int64": "Number", "Double": "Number"}
        inputs = []
        for parameter in self.parameters:
            entry: dict[str, Any] = {
                "id": parameter.name,
                "name": parameter.name,
                "type": types[parameter.kind],
                "description": parameter.description,
                "value-key": f"[{parameter.name.upper()}]",
                "optional": parameter.optional,
            }
            if parameter.kind in ("Int64", "Double"):
                entry["integer"] = parameter.kind == "Int64"
            if parameter.is_list:
                entry["list"] = True
            if parameter.default is not None:
                entry["default-value"] = parameter.default
            inputs.append(entry)
        custom: dict[str, Any] = {}
        if self.dot:
            custom["vip:dot"] = list(self.dot)
        if self.directories:
            custom["vip:directoryInputs"] = dict(self.directories)
        if self.counters:
            custom["vip:intIteratorInputs"] = list(self.counters)
        if self.results_suffix is not None:
            custom["vip:resultsDirectorySuffix"] = self.results_suffix
        return {
            "schema-version": "0.5",
            "name": self.name,
            "tool-version": self.version,
            "description": self.description,
            "command-line": " ".join(["run", *(f"[{parameter.name.upper()}]" for parameter in self.parameters)]),
            "inputs": inputs,
            "output-files": [
                {"id": name, "name": text, "path-template": name, "optional": False}
                for name, text in self.outputs.items()
            ],
            "custom": custom,
        }


def gzipped(content: bytes | Iterable[bytes], stamp: int) -> bytes:
    """Compress with a time stamp in the header, as command-line gzip does: equal content, different bytes.

    Args:
        content: anything; in pieces, when it is larger than memory should be.
        stamp: seconds since the epoch.
    """
    deflate = compressobj(6, wbits=-15)
    parts = [b"\x1f\x8b\x08\x00" + stamp.to_bytes(4, "little") + b"\x00\x03"]
    checksum = size = 0
    for piece in [content] if isinstance(content, bytes) else content:
        checksum = crc32(piece, checksum)
        size += len(piece)
        parts.append(deflate.compress(piece))
    parts += [deflate.flush(), checksum.to_bytes(4, "little"), (size & 0xFFFFFFFF).to_bytes(4, "little")]
    return b"".join(parts)


def tar(members: Iterable[tuple[str, bytes]], stamp: int) -> bytes:
    """Make a gzipped tar archive whose members were all written at `stamp`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = stamp
            archive.addfile(info, io.BytesIO(content))
    return gzipped(buffer.getvalue(), stamp)


def table(rows: Iterable[Iterable[object]]) -> bytes:
    """Write rows as CSV, floats with all their digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [repr(float(cell)) if isinstance(cell, float) else cell for cell in row] for row in rows
    )
    return text.getvalue().encode()


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii").removesuffix(".tar")


def _load(call: Call, name: str) -> tuple[Volume, Any]:
    """Return voxels, shape (x, y, z), and the nibabel image of a File parameter."""
    try:
        import nibabel
        import numpy as np
    except ImportError as error:
        raise ToolFailed(127, "this pipeline needs numpy and nibabel: pip install 'prefect-biomed[sandbox]'") from error
    try:
        image: Any = nibabel.load(call.files[name])
        voxels = np.asarray(image.dataobj, dtype=np.float64)
    except Exception as error:  # nibabel raises many kinds for files that are no images
        raise ToolFailed(2, f"{call.files[name].name} is not a readable image: {error}") from error
    while voxels.ndim > 3:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or not voxels.size:
        raise ToolFailed(2, f"{call.files[name].name} is not a volume")
    call.stdout.append(f"{name}: {call.files[name].name}, {'x'.join(map(str, voxels.shape))} voxels")
    return voxels, image


def _volume_bytes(voxels: Any, like: Any, stamp: int) -> bytes:
    """Return a NIfTI file, gzipped, with the geometry of another image."""
    import nibabel

    # nibabel annotates only half of its functions.
    nifti: Any = nibabel.Nifti1Image
    content: bytes = nifti(voxels, like.affine).to_bytes()
    return gzipped(content, stamp)


def _smoothed(voxels: Volume) -> Volume:
    """Average over the six neighbours and the voxel itself."""
    import numpy as np

    total = voxels.copy()
    for axis in range(3):
        total += np.roll(voxels, 1, axis) + np.roll(voxels, -1, axis)
    return total / 7.0


def _number(call: Call, name: str) -> float:
    try:
        return float(call.values[name])
    except ValueError as error:
        raise ToolFailed(2, f"{name}: not a number: {call.values[name]}") from error


def _grey_matter(call: Call, *, smooth: bool) -> Results:
    import numpy as np

    voxels, image = _load(call, "t1")
    threshold = _number(call, "threshold")
    top = float(np.percentile(voxels, 99.0)) or 1.0
    scaled = (_smoothed(voxels) if smooth else voxels) / top
    mask = (scaled > threshold) & (scaled <= 2.0 * threshold)
    size = float(np.prod(image.header.get_zooms()[:3]))
    inside = voxels[mask]
    centre = np.argwhere(mask).mean(axis=0) if inside.size else np.zeros(3)
    measures: list[tuple[object, ...]] = [
        ("measure", "value", "unit"),
        ("voxels", int(mask.sum()), "1"),
        ("volume", float(mask.sum()) * size, "mm3"),
        ("mean_intensity", float(inside.mean()) if inside.size else 0.0, "1"),
        ("sd_intensity", float(inside.std()) if inside.size else 0.0, "1"),
        *((f"centre_{axis}", float(value), "voxel") for axis, value in zip("ijk", centre, strict=True)),
    ]
    if call.switches.odd_execution == call.execution_number:
        measures.append(("odd", 1, "1"))
    settings = {
        "label": call.values.get("label"),
        "smoothed": smooth,
        "threshold": threshold,
        "input_sha256": hashlib.sha256(call.files["t1"].read_bytes()).hexdigest(),
    }
    members = [
        ("measures.csv", table(measures)),
        ("mask.nii.gz", _volume_bytes(mask.astype(np.uint8), image, call.stamp)),
        ("settings.json", json.dumps(settings, indent=2, sort_keys=True).encode()),
    ]
    call.stdout.append(f"{int(mask.sum())} voxels of grey matter")
    name = f"{_stem(call.files['t1'])}_greymatter.tar.gz"
    return {"archive": [(name, call.write(name, tar(members, call.stamp)))]}


def _skull_strip(call: Call, *, is_noisy: bool) -> Results:
    import numpy as np

    voxels, image = _load(call, "t1")
    mask = _smoothed(voxels) > _number(call, "fraction") * float(voxels.mean())
    # As another version of a mathematical library would: the last digits differ from run to run.
    generator = np.random.default_rng(call.random.getrandbits(64))
    noise = 10.0**-call.switches.noise_digits * generator.standard_normal(voxels.shape) if is_noisy else 0.0
    shift = call.switches.math_library_shift if call.switches.math_library == "alternative" else 0.0
    brain = np.where(mask, voxels * (1.0 + noise) * (1.0 + shift), 0.0)
    size = float(np.prod(image.header.get_zooms()[:3]))
    rows = [
        ("region", "volume_mm3", "mean_intensity"),
        ("brain", float(mask.sum()) * size, float(brain[mask].mean()) if mask.any() else 0.0),
        ("background", float((~mask).sum()) * size, float(voxels[~mask].mean()) if (~mask).any() else 0.0),
    ]
    stem = _stem(call.files["t1"])
    return {
        "brain": [
            (f"{stem}_brain.nii.gz", call.write("brain", _volume_bytes(brain, image, call.stamp))),
        ],
        "volumes": [(f"{stem}_volumes.csv", call.write("volumes", table(rows)))],
    }


def _fail(call: Call) -> Results:
    call.stdout.append("reading the parameters")
    call.stderr.append("the solver did not converge")
    raise ToolFailed(int(_number(call, "exit_status")), call.values["reason"])


def _slow(call: Call) -> Results:
    given = call.values.get("duration")
    seconds = call.switches.duration_seconds if given is None else _number(call, "duration")
    steps = 20
    for step in range(steps):
        if call.stopped.wait(seconds / steps):
            raise ToolFailed(143, "terminated")
        call.stdout.append(f"{100 * (step + 1) // steps} %")
    digest = hashlib.sha256(call.files["image"].read_bytes()).hexdigest()
    content = json.dumps({"image": call.files["image"].name, "sha256": digest, "labels": [0, 1, 2]}).encode()
    name = f"{_stem(call.files['image'])}_segmentation.json"
    return {"segmentation": [(name, call.write(name, content))]}


def _slice_statistics(call: Call) -> Results:
    index = int(_number(call, "slice"))
    if call.values.get("fail_on") == call.values["slice"]:
        raise ToolFailed(1, f"slice {index} is corrupt")
    voxels, _ = _load(call, "image")
    if not 0 <= index < voxels.shape[2]:
        raise ToolFailed(2, f"there is no slice {index}: the volume has {voxels.shape[2]}")
    plane = voxels[:, :, index]
    rows = [
        ("slice", "minimum", "mean", "maximum"),
        (index, float(plane.min()), float(plane.mean()), float(plane.max())),
    ]
    name = f"{_stem(call.files['image'])}_slice{index:03d}.csv"
    return {"statistics": [(name, call.write(name, table(rows)))]}


def _pairwise_difference(call: Call) -> Results:
    import numpy as np

    fixed, _ = _load(call, "fixed")
    moving, _ = _load(call, "moving")
    if fixed.shape != moving.shape:
        raise ToolFailed(2, f"shapes differ: {fixed.shape} and {moving.shape}")
    difference = fixed - moving
    rows = [
        ("fixed", "moving", "mean_difference", "rmse"),
        (
            call.files["fixed"].name,
            call.files["moving"].name,
            float(difference.mean()),
            float(np.sqrt((difference**2).mean())),
        ),
    ]
    name = f"{_stem(call.files['fixed'])}_{_stem(call.files['moving'])}_difference.csv"
    return {"difference": [(name, call.write(name, table(rows)))]}


def _free_surf(call: Call) -> Results:
    import numpy as np

    voxels, image = _load(call, "nifti")
    if "directives" in call.values and not call.values["directives"].startswith("-"):
        raise ToolFailed(2, f"unknown directive: {call.values['directives']}")
    if not call.files["license"].stat().st_size:
        raise ToolFailed(3, "the license file is empty")
    size = float(np.prod(image.header.get_zooms()[:3]))
    edges = np.percentile(voxels, [50, 75, 90, 100])
    lines = ["# Measure, NVoxels, Volume_mm3"]
    lower = float(voxels.min())
    for label, upper in zip(("CSF", "Cortex", "White-Matter", "Vessels"), edges, strict=True):
        count = int(((voxels > lower) & (voxels <= upper)).sum())
        lines.append(f"{label} {count} {count * size:.6f}")
        lower = float(upper)
    members = [
        ("subject/stats/aseg.stats", "\n".join(lines).encode()),
        ("subject/mri/norm.nii.gz", _volume_bytes(voxels.astype(np.float32), image, call.stamp)),
        ("subject/scripts/recon-all.log", "\n".join(call.stdout).encode()),
    ]
    name = f"{_stem(call.files['nifti'])}.tgz"
    return {"subject": [(name, call.write(name, tar(members, call.stamp)))]}


def _every_type(call: Call) -> Results:
    seen: dict[str, object] = dict(sorted(call.values.items()))
    for name, path in sorted(call.files.items()):
        content = path.read_bytes()
        seen[name] = {"name": path.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    content = json.dumps(seen, indent=2).encode()
    # Jobs of one execution share a directory, and each combination of values must keep its own file.
    name = f"values_{hashlib.sha256(content).hexdigest()[:12]}.json"
    return {"values": [(name, call.write(name, content))]}


def _monte_carlo(call: Call) -> Results:
    run = int(_number(call, "run"))
    photons = int(_number(call, "photons"))
    generator = random.Random(f"{call.values['random_seed']}/{run}")
    absorbed = sum(generator.expovariate(1.0) < 1.0 for _ in range(photons))
    content = json.dumps({"run": run, "photons": photons, "absorbed": absorbed}).encode()
    name = f"run{run:04d}.json"
    return {"run_file": [(name, call.write(name, content))]}


def _checksum(call: Call) -> Results:
    digest = hashlib.sha256()
    with call.files["folder"].open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    rows = [
        ("file", "bytes", "sha256"),
        (call.files["folder"].name, call.files["folder"].stat().st_size, digest.hexdigest()),
    ]
    name = f"{call.files['folder'].name}.csv"
    return {"checksum": [(name, call.write(name, table(rows)))]}


def _copy(call: Call) -> Results:
    path = call.files["file"]
    return {"copy": [(path.name, path)]}


def _hostile(call: Call) -> Results:
    kind, stamp, text = call.values["kind"], call.stamp, b"harmless"
    others: dict[str, Callable[[], tuple[str, bytes]]] = {
        "not_a_tar": lambda: ("result.tgz", b"this is not an archive"),
        "no_suffix": lambda: ("result", tar([("inside.txt", text)], stamp)),
        "colon": lambda: ("12:30:00/result.txt", text),
        "outside": lambda: ("/vip/Home/outside/result.txt", text),
        "many": lambda: ("result.tar.gz", gzipped(_many(), stamp)),
        "bomb": lambda: ("result.tar.gz", gzipped(_zeros(), stamp)),
    }
    if kind in _HOSTILE_MEMBERS:
        name, content = "result.tar.gz", gzipped(_packed(_HOSTILE_MEMBERS[kind], text, stamp), stamp)
    elif kind in others:
        name, content = others[kind]()
    else:
        raise ToolFailed(2, f"unknown kind: {kind}")
    return {"result": [(name, call.write("file0", content))]}


# Name, type and target of the members of an archive.
_HOSTILE_MEMBERS = {
    "parent": [("good.txt", tarfile.REGTYPE, ""), ("../escaped.txt", tarfile.REGTYPE, "")],
    "absolute": [("/tmp/escaped.txt", tarfile.REGTYPE, "")],
    "symlink": [("link", tarfile.SYMTYPE, "../.."), ("link/escaped.txt", tarfile.REGTYPE, "")],
    "hardlink": [("link", tarfile.LNKTYPE, "../../escaped.txt")],
    "device": [("null", tarfile.CHRTYPE, "")],
}


def _packed(members: Iterable[tuple[str, bytes, str]], text: bytes, stamp: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime = kind, target, stamp
            info.size = len(text) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(text) if info.isreg() else None)
    return buffer.getvalue()


def _many() -> Iterable[bytes]:
    """Yield a tar of 150 000 empty files."""
    for number in range(150_000):
        yield tarfile.TarInfo(f"d{number // 1000}/{number}").tobuf()
    yield bytes(1024)


def _zeros() -> Iterable[bytes]:
    """Yield a tar of one member of 1 GiB of zeros; compressed it is 1 MiB."""
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 30
    yield info.tobuf()
    for _ in range(1024):
        yield bytes(1 << 20)
    yield bytes(1024)


_T1 = Parameter("t1", "File", "T1-weighted volume, NIfTI (.nii or .nii.gz).")


def _grey_matter_version(version: str, *, smooth: bool, visible: bool = True) -> Pipeline:
    return Pipeline(
        name="GreyMatter",
        version=version,
        description="Measures grey matter in a T1-weighted volume."
        + (" Smooths over the six neighbours first." if smooth else ""),
        parameters=(
            _T1,
            Parameter(
                "threshold", "Double", "Lower limit of grey matter, fraction of the 99th percentile.", default=0.35
            ),
            Parameter("label", "String", "Free text that is kept in settings.json.", optional=True),
        ),
        outputs={"archive": "measures.csv, mask.nii.gz and settings.json"},
        tool=lambda call: _grey_matter(call, smooth=smooth),
        visible=visible,
    )


def _skull_strip_version(name: str, repeats: str, *, is_noisy: bool) -> Pipeline:
    return Pipeline(
        name=name,
        version="1.0",
        description=f"Removes the skull. {repeats}",
        parameters=(_T1, Parameter("fraction", "Double", "Fraction of the mean that is still brain.", default=1.0)),
        outputs={"brain": "intensities without the skull", "volumes": "volumes as CSV"},
        tool=lambda call: _skull_strip(call, is_noisy=is_noisy),
    )


PIPELINES: dict[str, Pipeline] = {
    pipeline.identifier: pipeline
    for pipeline in (
        _grey_matter_version("0.9", smooth=False, visible=False),
        _grey_matter_version("1.0", smooth=False),
        _grey_matter_version("1.1", smooth=True),
        _skull_strip_version(
            "SkullStripNoisy", "The last digits of its results differ from run to run.", is_noisy=True
        ),
        _skull_strip_version("SkullStrip", "Its results are the same in every run.", is_noisy=False),
        Pipeline(
            name="AlwaysFails",
            version="1.0",
            description="Every job of it fails.",
            parameters=(
                Parameter("reason", "String", "Written to standard error.", default="division by zero"),
                Parameter("exit_status", "Int64", "Of the tool.", default=3),
            ),
            outputs={"never": "nothing"},
            tool=_fail,
            groups=("Neuroimaging", "Cardiology"),
        ),
        Pipeline(
            name="SlowSegmentation",
            version="1.0",
            description="Takes its time.",
            parameters=(
                Parameter("image", "File", "Any file."),
                Parameter("duration", "Double", "Seconds a job takes.", optional=True),
            ),
            outputs={"segmentation": "JSON with the digest of the image"},
            tool=_slow,
        ),
        Pipeline(
            name="SliceStatistics",
            version="2.0",
            description="One job for each combination of image and slice.",
            parameters=(
                Parameter("image", "File", "Volumes, NIfTI.", is_list=True),
                Parameter("slice", "Int64", "Numbers of axial slices, from 0.", is_list=True),
                Parameter("fail_on", "Int64", "The job with this slice fails.", optional=True),
            ),
            outputs={"statistics": "minimum, mean and maximum as CSV"},
            tool=_slice_statistics,
        ),
        Pipeline(
            name="PairwiseDifference",
            version="1.0",
            description="Compares the first fixed with the first moving volume, the second with the second, ...",
            parameters=(
                Parameter("fixed", "File", "Volumes, NIfTI.", is_list=True),
                Parameter("moving", "File", "As many volumes of the same shape.", is_list=True),
            ),
            outputs={"difference": "mean difference and RMSE as CSV"},
            tool=_pairwise_difference,
            dot=("fixed", "moving"),
        ),
        Pipeline(
            name="Free Surf (x)",
            version="0.3.7",
            description="Reconstructs a subject. <b>Needs a license.</b>",
            parameters=(
                Parameter("nifti", "File", "T1-weighted volume, NIfTI."),
                Parameter("directives", "String", "Options of recon-all.", default="-all"),
                Parameter("license", "File", "License file; any text will do."),
            ),
            outputs={"subject": "the folder of the subject"},
            tool=_free_surf,
        ),
        Pipeline(
            name="EveryType",
            version="1.0",
            description="Has a parameter of every type and writes down what it was given.",
            parameters=(
                Parameter("file", "File", "Any file.", optional=True),
                Parameter("text", "String", "Any text."),
                Parameter("flag", "Boolean", "true or false.", default=False),
                Parameter("count", "Int64", "A whole number.", default=5),
                Parameter("ratio", "Double", "A number.", default=0.5),
                Parameter("words", "String", "Any texts.", optional=True, is_list=True),
                Parameter("files", "File", "Any files.", optional=True, is_list=True),
                Parameter("comment", "String", "Any text.", optional=True),
            ),
            outputs={"values": "what was given, as JSON"},
            tool=_every_type,
            groups=("Neuroimaging", "Cardiology", "Open Science"),
        ),
        Pipeline(
            name="MonteCarlo",
            version="2.3",
            description="Counts absorbed photons, one job for each run; results go straight to the results location.",
            parameters=(
                Parameter("run", "Int64", "Number of runs: N makes jobs 0 ... N-1."),
                Parameter("photons", "Int64", "Photons per run.", default=1000),
                Parameter("random_seed", "Int64", "Seed of the generator.", default=1),
            ),
            outputs={"run_file": "counts as JSON"},
            tool=_monte_carlo,
            counters=("run",),
            results_suffix="",
        ),
        Pipeline(
            name="FolderChecksums",
            version="1.0",
            description="One job for each file of a folder.",
            parameters=(Parameter("folder", "File", "A file, or a folder for all files in it."),),
            outputs={"checksum": "size and digest as CSV"},
            tool=_checksum,
            directories={"folder": ".*"},
        ),
        Pipeline(
            name="CopyFile",
            version="1.0",
            description="Gives back the file it was given, of any size.",
            parameters=(Parameter("file", "File", "Any file."),),
            outputs={"copy": "the same file"},
            tool=_copy,
            results_suffix="copies",
        ),
        Pipeline(
            name="HostileOutputs",
            version="1.0",
            description="Gives back what a client must refuse or handle with care.",
            parameters=(
                Parameter(
                    "kind",
                    "String",
                    "parent, absolute, symlink, hardlink, device, many, bomb, not_a_tar, no_suffix, colon, outside.",
                ),
            ),
            outputs={"result": "see the parameter"},
            tool=_hostile,
        ),
        Pipeline(
            name="CardioFlow",
            version="2.0",
            description="For the members of another group.",
            parameters=(Parameter("text", "String", "Any text."),),
            outputs={"values": "what was given, as JSON"},
            tool=_every_type,
            groups=("Cardiology",),
            public=False,
        ),
    )
}


class Stamps:
    """Seconds since the epoch, never the same twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        """Return the time, or the second after the one returned before."""
        with self._lock:
            self._last = max(self._last + 1, int(time.time()))
            return self._last
