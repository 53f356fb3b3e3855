"""From a folder or a volume to the configuration of an ingest: what the files say, and what follows from it."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.clients.boss.config import Database, IngestConfig
from prefect_biomed.clients.boss.decoding import opened
from prefect_biomed.clients.boss.pictures import MAX_PIXELS, Conversion, Description
from prefect_biomed.clients.boss.preflight import hierarchy_levels
from prefect_biomed.clients.boss.storage import StorageOptions
from prefect_biomed.clients.boss.volume_formats import kind_of, open_volume
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.files import atomic_write

__all__ = ["Proposal", "SourceChoices", "propose", "write_configuration"]

Datatype = Literal["uint8", "uint16", "uint32", "uint64"]
Triple = tuple[int, int, int]

_BITS: dict[int, Datatype] = {8: "uint8", 16: "uint16", 32: "uint32", 64: "uint64"}
_IMAGES = {"png", "tif", "tiff", "jpg", "jpeg", "jp2", "bmp", "pgm"}
_NUMBER = re.compile(r"\d+")
_CATMAID = re.compile(r"(\d+)_(\d+)_0")
_LOOKED_AT = 32
_SMALL, _LARGE = 512, 1024
_CHUNK: Triple = (512, 512, 64)
_STACK = "ingestclient.plugins.stack.ZindexStack"
_VOLUME = "prefect_biomed.clients.boss.plugins.volume.Volume"


class SourceChoices(BaseModel):
    """What is not left to the files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: str | None = Field(default=None, title="Template of file names")
    """Of a stack of slices, without its ending, as boss-ingest has it: `slice_<o:200p:4>`. Told from the names when
    empty."""
    parameters: dict[str, Any] = Field(default={}, title="Parameters of a volume")
    """What chooses in a volume: `kind`, `dataset`, `level`, `t`, `c`, `axes`, `series`, `origin`, `stored`,
    `storage_options`; never keys."""
    datatype: Datatype | None = Field(default=None, title="dtype of the channel")
    """That of the files when empty."""
    kind: Literal["image", "annotation"] = Field(default="image", title="Measured values or labels")
    """Type of the channel."""
    voxel_size: tuple[float, float, float] = Field(default=(1.0, 1.0, 1.0), title="Voxel size")
    """Size of a voxel in x, y and z. It is not looked for in files."""
    voxel_unit: Literal["nanometers", "micrometers", "millimeters", "centimeters"] = "nanometers"
    """Unit of the voxel size."""
    tile: int | None = Field(default=None, ge=512, multiple_of=512, title="Side of a tile (pixels)")
    """512 for small images and 1024 for others when empty."""
    convert: frozenset[Conversion] = Field(default=frozenset(), title="Conversions that are allowed")
    """As for the upload, which has to be told the same."""
    tiles_per_second: float = Field(default=50.0, gt=0, title="Rate for the estimate (tiles/s)")
    """What the hours are reckoned with."""


class Proposal(BaseModel):
    """An ingest as it could be.

    Attributes:
        config: The configuration.
        datatype: dtype of the channel.
        kind: Type of the channel.
        bounds: Upper ends of the coordinate frame in x, y and z.
        voxel_size: Size of a voxel in x, y and z.
        voxel_unit: Unit of it.
        levels: Resolutions of the experiment.
        inferred: Everything that was told from the files, and what it was told from.
        holes: Sources that are missing, as far as names tell.
        tiles: Tiles, or chunks.
        bytes: Bytes of the values.
        hours: Duration at the rate that was assumed.
    """

    model_config = ConfigDict(frozen=True)

    config: IngestConfig
    datatype: Datatype
    kind: Literal["image", "annotation"]
    bounds: Triple
    voxel_size: tuple[float, float, float]
    voxel_unit: Literal["nanometers", "micrometers", "millimeters", "centimeters"]
    levels: int
    inferred: tuple[str, ...]
    holes: tuple[str, ...] = ()
    tiles: int
    bytes: int
    hours: float

    def summary(self) -> str:
        """Some lines for a person."""
        x, y, z = self.bounds
        size = " x ".join(f"{length:g}" for length in self.voxel_size)
        lines = [
            f"{self.config.channel_path}: {x} x {y} x {z} voxels of {self.datatype}, {self.kind}, each {size} "
            f"{self.voxel_unit}, {self.levels} resolutions",
            f"{self.tiles:,} {'chunks' if self.config.volumetric else 'tiles'}, {self.bytes / 1e9:.3g} GB, about "
            f"{self.hours:.2g} hours",
            *(f"- {said}" for said in self.inferred),
        ]
        if self.holes:
            lines.append(f"- {len(self.holes)} sources are missing, such as {self.holes[0]}: choose on_bad_source")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Found:
    """What a source is."""

    plugin: str
    parameters: dict[str, Any]
    shape: Triple
    datatype: Datatype
    inferred: list[str]
    holes: list[str] = field(default_factory=list)
    tile: tuple[int, int] | None = None
    first: Triple = (0, 0, 0)


def propose(
    source: Path | str,
    database: Database,
    *,
    host: str,
    protocol: str = "https",
    choices: SourceChoices | None = None,
    storage: StorageOptions | None = None,
) -> Proposal:
    """Look at a folder of images, a file or a volume, and propose how to ingest it.

    Nothing is written, and no Boss is asked. Safe to repeat.

    Args:
        source: A folder of slices (one number in their names), of tiles (`x`, `y` and `z` before their numbers, or as
            CATMAID lays them out), of DICOM slices; a volume of any format; or a URL of one.
        database: Collection, experiment and channel.
        host: Host of the Boss.
        protocol: `https` or `http`.
        choices: What is not left to the files.
        storage: Keys of the source, when it is no file.

    Returns:
        What was found and what follows from it.

    Raises:
        ConfigurationError: What the source is cannot be told, or its images differ among themselves; the message says
            what to choose.
        SourceUnreadable: An image that was looked at is damaged.
        PreflightFailed: The configuration that would follow breaks a rule of the Boss.
    """
    choices = choices or SourceChoices()
    found = _found(source, choices, storage)
    datatype = choices.datatype or found.datatype
    width, height = found.tile or (choices.tile or (_SMALL if max(found.shape[:2]) <= _LARGE else _LARGE),) * 2
    volumetric = datatype == "uint64"
    if volumetric and found.plugin != _VOLUME:
        raise ConfigurationError(
            f"{source}: tiles cannot carry uint64. Convert the files to a volume, such as OME-Zarr."
        )
    stops = [first + length for first, length in zip(found.first, found.shape, strict=True)]
    job: dict[str, Any] = {
        "resolution": 0,
        "ingest_type": "volumetric" if volumetric else "tile",
        "extent": {axis: [low, high] for axis, low, high in zip("xyz", found.first, stops, strict=True)}
        | {"t": [0, 1]},
    }
    if volumetric:
        job["chunk_size"] = dict(zip("xyz", _CHUNK, strict=True))
    else:
        job["tile_size"] = {"x": width, "y": height, "z": 1, "t": 1}
    reader = "chunk_processor" if volumetric else "tile_processor"
    config = IngestConfig.load(
        {
            "schema": {"name": "boss-v0.2-schema", "validator": "BossValidatorV02"},
            "client": {
                "backend": {"name": "boss", "class": "BossBackend", "host": host, "protocol": protocol},
                "path_processor": {"class": f"{found.plugin}PathProcessor", "params": found.parameters},
                reader: {
                    "class": f"{found.plugin}{'Chunk' if volumetric else 'Tile'}Processor",
                    "params": found.parameters,
                },
            },
            "database": database.model_dump(),
            "ingest_job": job,
        }
    )
    notes = [*found.inferred, *config.warnings]
    if choices.voxel_size == (1.0, 1.0, 1.0):
        notes.append("The voxel size was not looked for: 1 stands for it")
    return Proposal(
        config=config,
        datatype=datatype,
        kind=choices.kind,
        bounds=(stops[0], stops[1], stops[2]),
        voxel_size=choices.voxel_size,
        voxel_unit=choices.voxel_unit,
        levels=hierarchy_levels({"x": (0, stops[0]), "y": (0, stops[1]), "z": (0, stops[2])}),
        inferred=tuple(notes),
        holes=tuple(found.holes),
        tiles=config.tile_count,
        bytes=math.prod(found.shape) * int(datatype.removeprefix("uint")) // 8,
        hours=config.tile_count / choices.tiles_per_second / 3600,
    )


def write_configuration(proposal: Proposal, path: Path, *, replace: bool = False) -> bool:
    """Write the configuration of a proposal for boss-ingest and for this package.

    Safe to repeat.

    Args:
        proposal: What was proposed.
        path: The file.
        replace: Whether a file that says something else is replaced.

    Returns:
        Whether it was written; it is not when it says the same already.

    Raises:
        ConfigurationError: It says something else, or is no configuration.
        LocalStorageError: It cannot be written.
    """
    body = proposal.config.body()
    if path.exists() and not replace:
        if IngestConfig.load(path).body() == body:
            return False
        raise ConfigurationError(f"{path} is another configuration. Choose another file, or replace it.")
    with atomic_write(path) as file:
        file.write((json.dumps(body, indent=2) + "\n").encode())
    return True


def _found(source: Path | str, choices: SourceChoices, storage: StorageOptions | None) -> _Found:
    text, folder = str(source), Path(source)
    if "://" not in text and not folder.exists():
        raise ConfigurationError(f"{source}: there is no such file or folder.")
    kind = choices.parameters.get("kind") or kind_of(text)
    if kind is not None:
        return _volume(text, kind, choices, storage)
    if "://" in text or not folder.is_dir():
        if folder.suffix.lower().lstrip(".") in _IMAGES:
            return _one_image(folder.absolute(), choices)
        raise ConfigurationError(f"{source}: of which kind it is cannot be told. Say it in parameters, as kind.")
    folder = folder.absolute()
    if any(entry.is_dir() and entry.name.isdigit() for entry in folder.iterdir()):
        return _catmaid(folder, choices)
    return _stack(folder, choices)


def _volume(source: str, kind: str, choices: SourceChoices, storage: StorageOptions | None) -> _Found:
    parameters = {"source": source if "://" in source else str(Path(source).absolute()), "kind": kind}
    parameters |= choices.parameters
    volume = open_volume(parameters | ({"storage": storage} if storage else {}))
    try:
        sizes = dict(zip(volume.axes, volume.shape, strict=False))
        if len(volume.axes) != len(volume.shape) or not {"x", "y"} <= set(sizes):
            raise ConfigurationError(
                f"{volume.name}: has the shape {volume.shape}; say in the parameter axes which axes these are."
            )
        for axis, length in sizes.items():
            if axis not in "xyz" and length > 1 and axis not in choices.parameters:
                raise ConfigurationError(
                    f"{volume.name}: has {length} indices on the axis {axis}. Say in the parameter {axis} which."
                )
        if volume.dtype.kind not in "ub":
            raise ConfigurationError(f"{volume.name}: holds {volume.dtype}, and the Boss unsigned whole numbers only.")
        origin = {**volume.origin, **(choices.parameters.get("origin") or {})}
        first = origin.get("x", 0), origin.get("y", 0), origin.get("z", 0)
        shape = sizes["x"], sizes["y"], sizes.get("z", 1)
        said = f"{kind}, {volume.dtype}, axes {''.join(volume.axes)} of {' x '.join(map(str, volume.shape))}"
        return _Found(_VOLUME, parameters, shape, _BITS[volume.dtype.itemsize * 8], [said], first=first)
    finally:
        volume.close()


def _one_image(path: Path, choices: SourceChoices) -> _Found:
    about = _about(path, choices)
    plugin = "prefect_biomed.clients.boss.plugins.stack.SingleImage"
    shape = about.width, about.height, 1
    return _Found(
        plugin, {"filename": str(path)}, shape, _datatype(path, about, choices), [f"One image: {about.words}"]
    )


def _stack(folder: Path, choices: SourceChoices) -> _Found:
    """Slices, or tiles, that lie in one folder."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower().lstrip(".") in _IMAGES)
    if not names:
        raise ConfigurationError(f"{folder}: there are no images ({', '.join(sorted(_IMAGES))}), and no volume.")
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_NUMBER.sub("#", name)].append(name)
    chosen = max(groups.values(), key=len)
    others = sorted(set(names) - set(chosen))
    if len(chosen) < 2 * len(others):
        raise ConfigurationError(
            f"{folder}: holds images of several kinds, such as {chosen[0]} and {others[0]}. Give each its own folder."
        )
    template = _Template.of(folder, chosen)
    numbers = template.slices
    low, high = min(numbers), max(numbers)
    name, ending = choices.template or template.text(low), Path(chosen[0]).suffix[1:]
    parameters = {"root_dir": str(folder), "base_filename": name, "extension": ending, "filesystem": "local"}
    inferred = [f"Names are {name}.{ending}: slice 0 is number {low}, the last is {high}"]
    if others:
        inferred.append(f"{len(others)} images of other names are left out, such as {others[0]}")
    holes = [f"number {number}" for number in range(low, high + 1) if number not in numbers]
    paths = [folder / name for name in _sample(chosen)]
    if not template.columns:
        about = _alike(paths, choices)
        inferred.append(
            f"{len(paths)} of {len(chosen)} images looked at: {about.words}, {about.width} x {about.height}"
        )
        shape = about.width, about.height, high - low + 1
        return _Found(_STACK, parameters, shape, _datatype(paths[0], about, choices), inferred, holes)

    def place(column: int, row: int) -> Path:
        return folder / f"{template.name(column, row, low)}.{ending}"

    sides = _sides(place, template.columns, template.rows, choices)
    inferred.append(f"Each file is a tile: {template.columns} columns, {template.rows} rows")
    return _tiled(_STACK, parameters, sides, high - low + 1, inferred, holes)


def _catmaid(folder: Path, choices: SourceChoices) -> _Found:
    """Tiles as `{z}/{row}_{column}_0.{ending}`."""
    slices = sorted(int(entry.name) for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit())
    inside = folder / str(slices[0])
    found = {entry.name: _CATMAID.fullmatch(entry.stem) for entry in inside.iterdir()} if inside.is_dir() else {}
    places = [(int(match[1]), int(match[2])) for match in found.values() if match]
    if not places:
        raise ConfigurationError(
            f"{folder}: has folders with numbers, but no tiles such as {slices[0]}/0_0_0.png in them. Lay them out as "
            "CATMAID does in its type 1, or as slices in one folder."
        )
    ending = Path(next(name for name, match in found.items() if match)).suffix[1:]
    rows, columns = (max(numbers) + 1 for numbers in zip(*places, strict=True))
    first = slices[0] // 16 * 16  # where a chunk of the Boss begins
    plugin = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    sides = _sides(lambda column, row: inside / f"{row}_{column}_0.{ending}", columns, rows, choices)
    inferred = [f"CATMAID's type 1: {columns} columns, {rows} rows, slices {slices[0]} to {slices[-1]}"]
    holes = [f"slice {z}" for z in range(first, slices[-1] + 1) if z not in set(slices)]
    parameters = {"root_dir": str(folder), "filetype": ending}
    tiled = _tiled(plugin, parameters, sides, slices[-1] + 1 - first, inferred, holes)
    return _Found(**{**vars(tiled), "first": (0, 0, first)})


@dataclass(frozen=True)
class _Template:
    """How files are numbered: text and, between, runs of digits of which some differ from file to file."""

    parts: list[str]
    meanings: dict[int, str]
    padding: int
    slices: set[int]
    columns: int = 0
    rows: int = 0

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> _Template:
        """Tell the template of names that differ in their numbers only."""
        parts = re.split(r"(\d+)", Path(names[0]).stem)
        runs = [_NUMBER.findall(Path(name).stem) for name in names]
        values = {place: {run[place] for run in runs} for place in range(len(runs[0]))}
        varying = [place for place, texts in values.items() if len(texts) > 1]
        if not varying:
            # A single file: its last number, or none, is that of the slice.
            varying = [len(runs[0]) - 1] if runs[0] else []
        if not varying:
            raise ConfigurationError(f"{folder}: {names[0]} has no number. Give the path of the file itself.")
        meanings = {varying[0]: "z"} if len(varying) == 1 else cls._named(folder, parts, varying)
        by_meaning = {meaning: values[place] for place, meaning in meanings.items()}
        padding = cls._padding(folder, by_meaning["z"])
        slices = {int(text) for text in by_meaning["z"]}
        step = math.gcd(*(number - min(slices) for number in slices))
        if step > 1:
            raise ConfigurationError(f"{folder}: the numbers of the slices are {step} apart. Number them one by one.")
        counts = [cls._count(folder, by_meaning[axis]) if axis in by_meaning else 0 for axis in "xy"]
        if any(counts):
            counts = [max(count, 1) for count in counts]
        return cls(parts, meanings, padding, slices, *counts)

    def text(self, first: int) -> str:
        """The template as boss-ingest has it."""
        options = (f"o:{first}" if first else "") + (f"p:{self.padding}" if self.padding else "")
        return self._filled({"z": f"<{options}>", "x": "<x>", "y": "<y>"})

    def name(self, column: int, row: int, number: int) -> str:
        """The name of a tile."""
        return self._filled({"z": str(number).zfill(self.padding), "x": str(column), "y": str(row)})

    def _filled(self, texts: Mapping[str, str]) -> str:
        parts = list(self.parts)
        for place, meaning in self.meanings.items():
            parts[2 * place + 1] = texts[meaning]
        return "".join(parts)

    @staticmethod
    def _named(folder: Path, parts: Sequence[str], varying: Iterable[int]) -> dict[int, str]:
        meanings = {place: parts[2 * place][-1:].lower() for place in varying}
        if "z" not in meanings.values() or not set(meanings.values()) <= set("xyz"):
            raise ConfigurationError(
                f"{folder}: several numbers differ in the names, and which is the slice cannot be told: write x, y "
                "and z before them."
            )
        if len(set(meanings.values())) < len(meanings):
            raise ConfigurationError(f"{folder}: two numbers in the names stand for the same axis.")
        return meanings

    @staticmethod
    def _padding(folder: Path, texts: Iterable[str]) -> int:
        widths = {len(text) for text in texts}
        padded = {len(text) for text in texts if text.startswith("0") and len(text) > 1}
        if len(widths) == 1:
            return widths.pop()
        if not padded:
            return 0
        if padded == {min(widths)}:
            return min(widths)  # 099 and 1000
        raise ConfigurationError(f"{folder}: the numbers of slices are padded in several ways.")

    @staticmethod
    def _count(folder: Path, texts: Iterable[str]) -> int:
        numbers = sorted(int(text) for text in texts)
        if any(text != str(int(text)) for text in texts) or numbers != list(range(len(numbers))):
            raise ConfigurationError(
                f"{folder}: columns and rows of tiles have to be numbered 0, 1, 2 without zeros before."
            )
        return len(numbers)


@dataclass(frozen=True)
class _Sides:
    tile: tuple[int, int]
    size: tuple[int, int]
    datatype: Datatype


def _sides(place: Callable[[int, int], Path], columns: int, rows: int, choices: SourceChoices) -> _Sides:
    """Look at the first tile, and at the last of the first row and column, which may be smaller."""
    first, right, below = (_about(place(x, y), choices) for x, y in ((0, 0), (columns - 1, 0), (0, rows - 1)))
    width, height = (columns - 1) * first.width + right.width, (rows - 1) * first.height + below.height
    return _Sides((first.width, first.height), (width, height), _datatype(place(0, 0), first, choices))


def _tiled(
    plugin: str, parameters: dict[str, Any], sides: _Sides, depth: int, inferred: list[str], holes: list[str]
) -> _Found:
    inferred = [*inferred, f"The first tile has {sides.tile[0]} x {sides.tile[1]} pixels of {sides.datatype}"]
    return _Found(plugin, parameters, (*sides.size, depth), sides.datatype, inferred, holes, tile=sides.tile)


def _sample(names: Sequence[str]) -> list[str]:
    """First, last, and some between."""
    step = max(1, len(names) // _LOOKED_AT)
    return list(dict.fromkeys([*names[::step], names[-1]]))


def _about(path: Path, choices: SourceChoices) -> Description:
    return opened(path, str(path), None, choices.convert, MAX_PIXELS).about


def _alike(paths: Sequence[Path], choices: SourceChoices) -> Description:
    """Describe images that have to be of one size and one kind."""
    first = _about(paths[0], choices)
    for path in paths[1:]:
        about = _about(path, choices)
        same = [(one.width, one.height, one.words) for one in (first, about)]
        if same[0] != same[1]:
            raise ConfigurationError(
                f"{path}: is {about.words} of {about.width} x {about.height} pixels, {paths[0].name} is {first.words} "
                f"of {first.width} x {first.height}. The slices of one ingest are alike."
            )
    return first


def _datatype(path: Path, about: Description, choices: SourceChoices) -> Datatype:
    """The narrowest dtype that holds all values of an image."""
    if about.kind == "float":
        raise ConfigurationError(f"{path}: is {about.words}. Convert the files to whole numbers.")
    special = about.palette or about.channels > 1 or about.bits == 1
    if special and "grey" not in choices.convert:
        raise ConfigurationError(f"{path}: is {about.words}. Convert the files, or allow the conversion grey.")
    if about.kind == "signed" and not {"shift", "clip"} & choices.convert:
        raise ConfigurationError(f"{path}: is {about.words}. Convert the files, or allow the conversion shift or clip.")
    return next(datatype for bits, datatype in _BITS.items() if about.bits <= bits)
