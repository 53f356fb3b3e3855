"""The ingest configuration: every file that the official client takes, and the rules that nobody checks.

`IngestConfig` reads versions 0.1 and 0.2 unchanged. Beyond the shape it checks what the Boss does not notice until
pixels are in the wrong place, and reports all problems at once, each with what would have happened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictInt,
    ValidationError,
    model_validator,
)

from prefect_biomed.clients.boss._keys import CUBOID_X, CUBOID_Y, CUBOID_Z, Position
from prefect_biomed.clients.boss.storage import StorageOptions
from prefect_biomed.clients.errors import ConfigurationError, PreflightFailed

__all__ = ["Backend", "Extent", "IngestConfig", "IngestSection", "Plugin", "Size"]

Axis = Literal["x", "y", "z", "t"]
_AXES: tuple[Axis, ...] = ("x", "y", "z", "t")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,255}")
_SECRET_NAME = re.compile(
    r"token|secret|passw|api_?key|access_?key|account_?key|private_?key|credential|authorization|connection_?string",
    re.IGNORECASE,
)
# What drivers of fsspec call their keys.
_SECRET_OPTION = re.compile(r"key|auth|user(name)?|sas_?\w*|cookies?|headers", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"[0-9a-f]{40}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|-----BEGIN [\s\S]*")
_SECRET_URL = re.compile(
    r"://[^/?#\s]*:[^/?#\s@]+@|[?&#][^=&#]*(?:token|secret|passw|key|sig|signature|credential)[^=&#]*=[^&#]",
    re.IGNORECASE,
)
_VERSIONS = {"boss-v0.1-schema": "BossValidatorV01", "boss-v0.2-schema": "BossValidatorV02"}
_SAFE_TILE = 2048

Bounds = Annotated[tuple[StrictInt, StrictInt], Field(description="Half-open range: start, stop.")]


class _Section(BaseModel):
    # Unknown keys are allowed everywhere by the Boss's own schemas and travel back to it.
    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, serialize_by_alias=True)


class SchemaName(_Section):
    """Which version of the format this is."""

    name: str = Field(description="`boss-v0.1-schema` or `boss-v0.2-schema`.")
    validator: str = Field(description="`BossValidatorV01` or `BossValidatorV02`.")


class Backend(_Section):
    """The server that the file was written for. Requests go to the host of the credentials."""

    name: str = Field(default="boss", description="Always `boss`.")
    class_: str = Field(default="BossBackend", alias="class", description="Always `BossBackend`.")
    host: str = Field(description="Host name, with a port where needed.")
    protocol: str = Field(default="https", description="`https` or `http`.")


class Plugin(_Section):
    """A class that finds or reads the source, and its parameters."""

    class_: str = Field(alias="class", description="Dotted path of a Python class.")
    params: dict[str, Any] = Field(default={}, description="Handed to the class. Stored by the server: no secrets.")


class Client(_Section):
    """Where to send and how to read the source."""

    backend: Backend
    path_processor: Plugin
    tile_processor: Plugin | None = None
    chunk_processor: Plugin | None = None


class Database(_Section):
    """The channel that is written to."""

    collection: str
    experiment: str
    channel: str


class Extent(_Section):
    """What is ingested, in voxels of the channel's base resolution and samples."""

    x: Bounds
    y: Bounds
    z: Bounds
    t: Bounds


class Size(_Section):
    """Size of one tile in pixels."""

    x: StrictInt
    y: StrictInt
    z: StrictInt = 1
    t: StrictInt = 1


class ChunkSize(_Section):
    """Size of one chunk of a volumetric job in voxels."""

    x: StrictInt
    y: StrictInt
    z: StrictInt


class IngestSection(_Section):
    """How much is ingested and in which pieces."""

    resolution: StrictInt = Field(default=0, description="Only used in file names; the Boss ignores it.")
    ingest_type: Literal["tile", "volumetric"] = "tile"
    extent: Extent
    tile_size: Size | None = None
    chunk_size: ChunkSize | None = None


class IngestConfig(_Section):
    """A Boss ingest configuration, version 0.1 or 0.2.

    Building one checks everything that can be checked without the server.

    Raises:
        ValidationError: With all problems, those of shape and those of meaning, in one text. `load` raises them as
            `PreflightFailed`.
    """

    schema_: SchemaName = Field(alias="schema")
    client: Client
    database: Database
    ingest_job: IngestSection
    _storage: StorageOptions | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | IngestConfig) -> Self:
        """Read a configuration.

        Args:
            source: Path of a JSON file, its content, or a configuration already read.

        Returns:
            The configuration.

        Raises:
            ConfigurationError: The file cannot be read or is not JSON.
            PreflightFailed: With one sentence for each problem.
        """
        name = "Ingest configuration"
        if isinstance(source, cls):
            return source
        if isinstance(source, str | Path):
            name = f"Ingest configuration {source}"
            try:
                source = json.loads(Path(source).read_text(encoding="utf-8"))
            except OSError as error:
                raise ConfigurationError(f"{name} cannot be read: {error.strerror}.") from error
            except (ValueError, RecursionError) as error:
                raise ConfigurationError(f"{name} is not JSON: {error}.") from error
        found = problems(source)
        if found:
            raise PreflightFailed(name, found)
        return cls.model_validate(source)

    @model_validator(mode="wrap")
    @classmethod
    def _check_everything(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls):
            return value
        found = problems(value, handler)
        if found:
            raise ValueError(f"{len(found)} problem{'s' * (len(found) > 1)}: " + " ".join(found))
        return handler(value)

    @property
    def storage(self) -> StorageOptions | None:
        """Keys of the sources; no part of what is written, sent or compared."""
        return self._storage

    def with_storage(self, storage: StorageOptions | None) -> Self:
        """Make the same configuration with keys of its sources.

        Args:
            storage: The keys; None for those of the machine.
        """
        copy = self.model_copy()
        copy._storage = storage
        return copy

    @property
    def volumetric(self) -> bool:
        """Whether chunks of cuboids are uploaded rather than tiles."""
        return self.ingest_job.ingest_type == "volumetric"

    @property
    def channel_path(self) -> str:
        """`collection/experiment/channel`."""
        return f"{self.database.collection}/{self.database.experiment}/{self.database.channel}"

    @property
    def piece_size(self) -> dict[Axis, int]:
        """Size of one tile or chunk by axis."""
        job = self.ingest_job
        piece: Size | ChunkSize | None = job.chunk_size if self.volumetric else job.tile_size
        if piece is None:
            raise ConfigurationError("The configuration has no tile or chunk size.")
        depth = piece.z if self.volumetric else 1
        return {"x": piece.x, "y": piece.y, "z": depth, "t": 1}

    @property
    def tile_count(self) -> int:
        """Number of tiles (chunks of a volumetric job)."""
        size, extent = self.piece_size, self.ingest_job.extent
        bounds: dict[Axis, tuple[int, int]] = {"x": extent.x, "y": extent.y, "z": extent.z, "t": extent.t}
        return math.prod(len(range(*bounds[axis], size[axis])) for axis in _AXES)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but worth knowing."""
        notes = []
        size, extent = self.piece_size, self.ingest_job.extent
        if not self.volumetric:
            notes += [
                f"Tiles are {length} pixels in {axis}, which is no multiple of 512. It works because the job is one "
                "tile across; a later job beside this one would not line up."
                for axis, length in (("x", size["x"]), ("y", size["y"]))
                if length % 512
            ]
            if max(size["x"], size["y"]) > _SAFE_TILE:
                notes.append("Tiles larger than 2048 x 2048 may exceed the memory of the Boss's ingest lambda.")
        if extent.x[1] % size["x"] or extent.y[1] % size["y"]:
            notes.append("The last tiles in x or y are not full; they are padded with the fill value.")
        return tuple(notes)

    def padding(self, fill: int, padded: Collection[str] = ()) -> tuple[str, ...]:
        """Count the tiles (chunks) that are padded, and name the rules; nothing where all are full.

        Args:
            fill: Value that tiles are padded with.
            padded: Those whose source lacks a part that lies within the extent.
        """
        size, extent = self.piece_size, self.ingest_job.extent
        bounds: dict[Axis, tuple[int, int]] = {"x": extent.x, "y": extent.y, "z": extent.z, "t": extent.t}
        open_ends = [axis for axis, (_, end) in bounds.items() if end % size[axis]]
        what, value = ("chunks", 0) if self.volumetric else ("tiles", fill)
        rules = []
        if open_ends:
            full = math.prod(len(range(*bounds[axis], size[axis])) - (axis in open_ends) for axis in _AXES)
            last = ", ".join(f"{bounds[axis][1] % size[axis]} of {size[axis]} in {axis}" for axis in open_ends)
            rules.append(
                f"The last {what} are not full ({last}): {self.tile_count - full} of {self.tile_count}; the rest of "
                f"each is {value}."
            )
        if padded:
            rules.append(
                f"Of {len(padded)} {what} the source lacks a part that lies within the extent; 'pad' made it {value}."
            )
        return tuple(rules)

    def positions(self) -> Iterator[Position]:
        """All tiles (chunks) of the job, in the order in which the Boss queues them."""
        size, extent = self.piece_size, self.ingest_job.extent
        group = 1 if self.volumetric else CUBOID_Z
        for t in range(*extent.t):
            for z in range(*extent.z, size["z"] * group):
                for y in range(*extent.y, size["y"]):
                    for x in range(*extent.x, size["x"]):
                        for slice_z in range(z, min(z + group, extent.z[1])) if group > 1 else (z // size["z"],):
                            yield Position(x // size["x"], y // size["y"], slice_z, t)

    def of_extent(self, extent: Mapping[str, tuple[int, int]]) -> Self:
        """Make the configuration of a part.

        Args:
            extent: Half-open ranges by axis.

        Raises:
            PreflightFailed: It is not aligned, or empty.
        """
        body = self.body()
        part = self.load(
            body | {"ingest_job": body["ingest_job"] | {"extent": {a: list(r) for a, r in extent.items()}}}
        )
        return part.with_storage(self.storage)

    def body(self) -> dict[str, Any]:
        """What is posted: the configuration as it was given."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def problems(source: Any, handler: ModelWrapValidatorHandler[Any] | None = None) -> list[str]:
    """Find everything that is wrong with a configuration.

    Args:
        source: The configuration as plain JSON.
        handler: pydantic's own validation, when called from within it.

    Returns:
        One sentence for each problem, those of shape first.
    """
    if not isinstance(source, Mapping):
        return ["The configuration is not a JSON object."]
    source = {"schema" if key == "schema_" else key: value for key, value in source.items()}
    found: list[str] = []
    sections: dict[str, type[_Section]] = {
        "schema": SchemaName,
        "client": Client,
        "database": Database,
        "ingest_job": IngestSection,
    }
    parsed: dict[str, Any] = {}
    for name, model in sections.items():
        if name not in source:
            found.append(f"{name}: missing.")
            continue
        try:
            parsed[name] = model.model_validate(source[name])
        except ValidationError as error:
            for item in error.errors(include_url=False):
                where = ".".join(str(part) for part in (name, *item["loc"]))
                found.append(f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}.")
    found += _problems_of_schema(parsed.get("schema"), parsed.get("ingest_job"))
    found += _problems_of_client(parsed.get("client"), parsed.get("ingest_job"))
    found += _problems_of_names(parsed.get("database"))
    # Sizes and extents are checked axis by axis from the raw values, so that one wrong axis hides no other.
    raw = source.get("ingest_job")
    if isinstance(raw, Mapping):
        found += _problems_of_geometry(raw)
    return found


def _problems_of_schema(schema: SchemaName | None, job: IngestSection | None) -> Iterator[str]:
    if schema is None:
        return
    expected = _VERSIONS.get(schema.name)
    if expected is None:
        yield f"schema.name: {schema.name!r} is unknown; there are {' and '.join(_VERSIONS)}."
    elif schema.validator != expected:
        yield f"schema.validator: {schema.name} goes with {expected}, not {schema.validator!r}."
    if job and job.ingest_type == "volumetric" and schema.name == "boss-v0.1-schema":
        yield "ingest_job.ingest_type: volumetric jobs need boss-v0.2-schema; the server would refuse this one."


def _problems_of_client(client: Client | None, job: IngestSection | None) -> Iterator[str]:
    if client is None:
        return
    if client.backend.class_ != "BossBackend":
        yield f"client.backend.class: {client.backend.class_!r} is unknown; it is always BossBackend."
    if client.backend.protocol not in ("http", "https"):
        yield f"client.backend.protocol: {client.backend.protocol!r} is neither http nor https."
    if job:
        needed, size = ("chunk", "chunk_size") if job.ingest_type == "volumetric" else ("tile", "tile_size")
        if getattr(client, f"{needed}_processor") is None:
            yield f"client.{needed}_processor: required for {job.ingest_type} jobs."
        if getattr(job, size) is None:
            yield f"ingest_job.{size}: required for {job.ingest_type} jobs."
    for name in ("path_processor", "tile_processor", "chunk_processor"):
        plugin = getattr(client, name)
        if plugin is None:
            continue
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", plugin.class_):
            yield f"client.{name}.class: {plugin.class_!r} is not the dotted path of a class."
        for path in _secrets(plugin.params, f"client.{name}.params"):
            yield (
                f"{path}: looks like a secret. The server stores the configuration where others can read it; take it "
                "out and give it by storage credentials, or to a plugin of yours by an environment variable."
            )


def _secrets(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            is_option = path.endswith((".storage_options", ".client_kwargs"))
            if (isinstance(inner, str) and inner and _SECRET_NAME.search(str(key))) or (
                is_option and inner and _SECRET_OPTION.fullmatch(str(key))
            ):
                yield f"{path}.{key}"
            else:
                yield from _secrets(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _secrets(inner, f"{path}[{index}]")
    elif isinstance(value, str) and (_SECRET_VALUE.fullmatch(value) or _SECRET_URL.search(value)):
        yield path


def _problems_of_names(database: Database | None) -> Iterator[str]:
    if database is None:
        return
    for kind in ("collection", "experiment", "channel"):
        name = getattr(database, kind)
        if not _NAME.fullmatch(name):
            yield f"database.{kind}: {name[:80]!r} is not a name the Boss allows (letters, digits, _ and -, up to 255)."


def _problems_of_geometry(job: Mapping[str, Any]) -> Iterator[str]:
    volumetric = job.get("ingest_type", "tile") == "volumetric"
    extent = job.get("extent")
    sizes = job.get("chunk_size" if volumetric else "tile_size")
    extent = extent if isinstance(extent, Mapping) else {}
    sizes = sizes if isinstance(sizes, Mapping) else {}
    for axis in _AXES:
        bounds = _bounds(extent.get(axis))
        if bounds is None:
            continue
        start, stop = bounds
        if start < 0 or stop <= start:
            yield (
                f"ingest_job.extent.{axis}: [{start}, {stop}) is empty or negative; the job would have no tiles or "
                "never end."
            )
            continue
        size = sizes.get(axis)
        if volumetric:
            yield from _problems_of_chunk(axis, start, stop, size)
        else:
            yield from _problems_of_tile(axis, start, stop, size)


def _bounds(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(bound) is int for bound in value):
        return value[0], value[1]
    return None


def _problems_of_tile(axis: Axis, start: int, stop: int, size: Any) -> Iterator[str]:
    where = f"ingest_job.tile_size.{axis}"
    if axis == "z" and start % CUBOID_Z:
        yield (
            f"ingest_job.extent.z: starts at {start}, which is no multiple of 16; every slice would land "
            f"{start % CUBOID_Z} slices too early."
        )
    if type(size) is not int:
        return
    if axis in ("z", "t"):
        if size != 1:
            result = "the server would fail with a division by zero and leave an orphaned job behind"
            if size != 0:
                result = "the server would count fewer tiles than it queues"
            yield f"{where}: {size}, but a tile is one slice of one sample (1): {result}."
        return
    if size <= 0:
        yield f"{where}: {size}; the server would fail and leave an orphaned job behind."
        return
    if start % size:
        yield (
            f"ingest_job.extent.{axis}: starts at {start}, which is no multiple of the tile size {size}; all pixels "
            f"would land {start % size} voxels off."
        )
    elif size % 512 and (stop - start > size or start):
        yield (
            f"{where}: {size} is no multiple of 512 and the job is more than one tile across (or does not start at "
            f"0); the second tile would land at {-(-size // 512) * 512} instead of {size}."
        )


def _problems_of_chunk(axis: Axis, start: int, stop: int, size: Any) -> Iterator[str]:
    if axis == "t":
        if (start, stop) != (0, 1):
            yield f"ingest_job.extent.t: [{start}, {stop}), but volumetric jobs write sample 0 only."
        return
    step = {"x": CUBOID_X, "y": CUBOID_Y, "z": CUBOID_Z}[axis]
    where = f"ingest_job.chunk_size.{axis}"
    if type(size) is not int:
        return
    if size <= 0 or size % step:
        yield f"{where}: {size} must be a multiple of {step}; the server would refuse it."
    elif start % size:
        yield (
            f"ingest_job.extent.{axis}: starts at {start}, which is no multiple of the chunk size {size}; all voxels "
            f"would land {start % size} off."
        )
