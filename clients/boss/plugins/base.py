"""What a plugin is, and how one is loaded from the dotted path in a configuration."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import IO, Any, ClassVar, NamedTuple

from prefect_biomed.clients.boss.images import ImageWindow
from prefect_biomed.clients.boss.plugins.allowed import check_allowed
from prefect_biomed.clients.boss.storage import StorageOptions
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = [
    "AXES",
    "TZYX_ORDER",
    "XYZT_ORDER",
    "XYZ_ORDER",
    "ZYX_ORDER",
    "ChunkProcessor",
    "Missing",
    "PathProcessor",
    "Placed",
    "TileProcessor",
    "filled_in",
    "load",
    "only_sample",
    "parameter",
    "window",
]

XYZ_ORDER, ZYX_ORDER, XYZT_ORDER, TZYX_ORDER = range(4)
AXES = {XYZ_ORDER: "xyz", ZYX_ORDER: "zyx", XYZT_ORDER: "xyzt", TZYX_ORDER: "tzyx"}
"""Axes of what a chunk processor gives, by the order that it says."""

_BUILT_IN = "prefect_biomed.clients.boss.plugins"
_OFFICIAL = ("ingestclient.plugins.", "ingest.plugins.")
_TEMPLATE = re.compile(r"<(?:o:(\d+))?(?:p:(\d+))?>")
_SHARED = ("catmaid", "stack", "multipage_tiff", "hdf5", "zarr", "cloudvolume")
_import_lock = threading.Lock()


class Placed(NamedTuple):
    """An array that does not begin where its tile or chunk does.

    Attributes:
        values: The array.
        before: How much of the tile or chunk lies before it, by the axes of the array.
    """

    values: Any
    before: tuple[int, ...]


class Missing(NamedTuple):
    """A source that is not there, and for which a parameter of the plugin wants the fill value.

    Attributes:
        name: Of the source.
    """

    name: str


class PathProcessor(ABC):
    """Tells which file holds a tile.

    Attributes:
        thread_safe: Whether `process` may be called from several threads at once; otherwise a lock is held.
        names_files: Whether what `process` returns is always the path of a local file, so that a listing of its folder
            tells whether it is there.
        parameters: What the configuration gives, and `ingest_job`, the section of that name.
    """

    thread_safe: ClassVar[bool] = False
    names_files: ClassVar[bool] = False
    parameters: dict[str, Any]

    @property
    def one_file_per_tile(self) -> bool:
        """Whether each file is one tile, and not a slice that is cut."""
        return False

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the parameters.

        Args:
            parameters: `params` of the configuration and `ingest_job`.

        Raises:
            ConfigurationError: A parameter is missing or wrong.
        """
        self.parameters = parameters

    @abstractmethod
    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file.

        Args:
            x_index: Column of the tile (or chunk).
            y_index: Row of the tile (or chunk).
            z_index: Slice of the tile, or index of the chunk.
            t_index: Sample.

        Returns:
            A path; any string that the tile processor understands.
        """


class TileProcessor(ABC):
    """Reads a tile.

    Attributes:
        thread_safe: Whether `process` may be called from several threads at once; otherwise a lock is held.
        parameters: What the configuration gives, and `ingest_job`, the section of that name.
    """

    thread_safe: ClassVar[bool] = False
    parameters: dict[str, Any]

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the parameters; see `PathProcessor.setup`."""
        self.parameters = parameters

    @abstractmethod
    def process(
        self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0
    ) -> IO[bytes] | bytes | ImageWindow | Any:
        """Read one tile.

        Args:
            file_path: What the path processor said.
            x_index: Column of the tile.
            y_index: Row of the tile.
            z_index: Slice.
            t_index: Sample.

        Returns:
            An encoded image as bytes or as an open file, an `ImageWindow` to be read, an array of shape (y, x), which
            may be `Placed`, or `Missing`.

        Raises:
            SourceUnreadable: The source is missing or damaged.
        """


class ChunkProcessor(ABC):
    """Reads a chunk of a volumetric job.

    Attributes:
        thread_safe: Whether `process` may be called from several threads at once; otherwise a lock is held.
        parameters: What the configuration gives, and `ingest_job`, the section of that name.
    """

    thread_safe: ClassVar[bool] = False
    parameters: dict[str, Any]

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the parameters; see `PathProcessor.setup`."""
        self.parameters = parameters

    @abstractmethod
    def process(self, file_path: str, x_index: int, y_index: int, z_index: int) -> tuple[Any, int]:
        """Read one chunk.

        Args:
            file_path: What the path processor said.
            x_index: Index of the chunk in x.
            y_index: Index of the chunk in y.
            z_index: Index of the chunk in z.

        Returns:
            An array, at most as large as a chunk, which may be `Placed`, and the order of its axes.

        Raises:
            SourceUnreadable: The source is missing or damaged.
        """

    def bounds(self, x_index: int, y_index: int, z_index: int) -> tuple[slice, slice, slice]:
        """Where a chunk lies in the volume, as slices in x, y, z."""
        size = self.parameters["ingest_job"]["chunk_size"]
        indices = (("x", x_index), ("y", y_index), ("z", z_index))
        x, y, z = (slice(index * size[axis], (index + 1) * size[axis]) for axis, index in indices)
        return x, y, z


def parameter(parameters: Mapping[str, Any], name: str, plugin: object, default: Any = ...) -> Any:
    """Take one parameter of a plugin.

    Raises:
        ConfigurationError: It is missing and has no default.
    """
    value = parameters.get(name, default)
    if value is ...:
        given = sorted(set(parameters) - {"ingest_job"})
        raise ConfigurationError(
            f"{type(plugin).__name__} needs the parameter {name!r}; the configuration gives "
            f"{', '.join(given) or 'none'}."
        )
    return value


def only_sample(t_index: int | None, plugin: object) -> None:
    """Refuse samples but the first, for sources that are no time series.

    Raises:
        SourceUnreadable: It is another one.
    """
    if t_index:
        raise SourceUnreadable(
            f"{type(plugin).__name__} has no sample {t_index}: its source is not a time series. Correct the extent."
        )


def filled_in(template: str, index: int, x_index: int, y_index: int, z_index: int) -> str:
    """Put numbers into a file name.

    Args:
        template: `<>` stands for `index`, `<o:200>` adds 200 to it, `<p:4>` pads it with zeros to four digits,
            `<o:200p:4>` does both; `<x>`, `<y>` and `<z>` stand for the others.
        index: Slice or file number.
        x_index: Column of the tile.
        y_index: Row of the tile.
        z_index: Slice of the tile.
    """

    def number(match: re.Match[str]) -> str:
        return str(index + int(match[1] or 0)).zfill(int(match[2] or 0))

    text = _TEMPLATE.sub(number, template)
    return text.replace("<x>", str(x_index)).replace("<y>", str(y_index)).replace("<z>", str(z_index))


def window(
    parameters: Mapping[str, Any], file_path: str, x_index: int, y_index: int, page: int | None = None
) -> ImageWindow:
    """Name the window of a tile in an image of the slice.

    An image no larger than the extent begins where the extent begins, a larger one at (0, 0).

    Args:
        parameters: Of the plugin, with `ingest_job`.
        file_path: The image.
        x_index: Column of the tile.
        y_index: Row of the tile.
        page: Page of the file; None when it must have one only.
    """
    job = parameters["ingest_job"]
    size, (x0, x1), (y0, y1) = job["tile_size"], job["extent"]["x"], job["extent"]["y"]
    extent = (x0, y0, x1, y1) if x0 or y0 else None
    return ImageWindow(file_path, page, x_index * size["x"], y_index * size["y"], extent=extent)


def local_file(parameters: Mapping[str, Any], plugin: object) -> None:
    """Refuse the S3 file system of boss-ingest's plugins, which would need keys in the configuration.

    Raises:
        ConfigurationError: `filesystem` is not `local`.
    """
    kind = parameters.get("filesystem", "local")
    if kind != "local":
        raise ConfigurationError(
            f"{type(plugin).__name__} reads local files; filesystem {kind!r} is not supported. Mount or copy the "
            "bucket, or give a class of your own."
        )


def load(dotted_path: str, parameters: dict[str, Any], storage: StorageOptions | None = None) -> Any:
    """Make the plugin that a configuration names.

    Args:
        dotted_path: Package, module and class. `ingestclient.plugins…` and `ingest.plugins…` mean the built-in class
            of that name where there is one. Other classes have to be allowed, see `check_allowed`.
        parameters: Handed to its `setup`.
        storage: Keys of its source, handed on as the parameter `storage` to the classes of this package only.

    Returns:
        The plugin, set up.

    Raises:
        ConfigurationError: There is no such class, it is not allowed, or it cannot be imported or set up.
    """
    module_name, _, class_name = dotted_path.rpartition(".")
    candidates = [module_name]
    is_known = _is_built_in(module_name)
    for prefix in _OFFICIAL:
        if f"{module_name}.".startswith(prefix):
            candidates.insert(0, f"{_BUILT_IN}.{module_name.removeprefix(prefix)}")
            is_known = True
    if not is_known:
        check_allowed(dotted_path)
    reasons = []
    for candidate in candidates:
        try:
            plugin_class = getattr(_module(candidate), class_name)
        except (ImportError, AttributeError) as error:
            reasons.append(str(error))
            continue
        if not _is_plugin(plugin_class):
            raise ConfigurationError(f"{dotted_path} is no plugin: a class with `setup` and `process` is needed.")
        try:
            plugin = plugin_class()
            has_keys = storage is not None and _is_built_in(candidate)
            plugin.setup(parameters | {"storage": storage} if has_keys else parameters)
        except (ConfigurationError, SourceUnreadable):
            raise
        except Exception as error:  # third-party code may raise anything
            raise ConfigurationError(f"Plugin {dotted_path} could not be set up: {error!r}.") from error
        return plugin
    raise ConfigurationError(
        f"Plugin {dotted_path} could not be loaded: {'; '.join(dict.fromkeys(reasons))}. "
        "Plugins for HDF5, Zarr and arrays come with prefect-biomed[volumetric]."
    )


def _is_built_in(module_name: str) -> bool:
    return f"{module_name}.".startswith(f"{_BUILT_IN}.")


def _is_plugin(found: object) -> bool:
    return isinstance(found, type) and all(callable(getattr(found, name, None)) for name in ("setup", "process"))


def _module(name: str) -> ModuleType:
    if _is_built_in(name):
        return importlib.import_module(name)
    with _import_lock, _base_classes():
        return importlib.import_module(name)


@contextmanager
def _base_classes() -> Iterator[None]:
    """Let classes written for boss-ingest find their base classes when it is not installed, or not usable.

    A fresh boss-ingest does not import, because it needs a part of setuptools that was removed.
    """
    try:
        importlib.import_module("ingestclient.plugins.path")
        missing = False
    except ImportError:
        missing = True
    added = _shim() if missing else {}
    kept = {name: sys.modules[name] for name in added if name in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def _shim() -> dict[str, ModuleType]:
    """Modules by the names of boss-ingest's, with base classes, built-in plugins and file systems of ours."""
    own: dict[str, dict[str, Any]] = {
        "plugins.path": {"PathProcessor": PathProcessor},
        "plugins.tile": {"TileProcessor": TileProcessor},
        "plugins.chunk": {
            "ChunkProcessor": ChunkProcessor,
            "XYZ_ORDER": XYZ_ORDER,
            "ZYX_ORDER": ZYX_ORDER,
            "XYZT_ORDER": XYZT_ORDER,
            "TZYX_ORDER": TZYX_ORDER,
        },
    }
    built_in = {f"plugins.{name}": f"{_BUILT_IN}.{name}" for name in _SHARED} | {
        "utils.filesystem": f"{_BUILT_IN}.filesystem"
    }
    shim: dict[str, ModuleType] = {}
    for package in ("ingestclient", "ingest"):
        for name in (package, f"{package}.plugins", f"{package}.utils"):
            shim[name] = ModuleType(name)
            shim[name].__path__ = []
        for name, attributes in own.items():
            shim[f"{package}.{name}"] = module = ModuleType(f"{package}.{name}")
            vars(module).update(attributes)
        for name, place in built_in.items():
            try:
                found = importlib.import_module(place)
            except ImportError:
                continue  # of an extra that is not installed
            shim[f"{package}.{name}"] = found
    return shim
