"""Collections, coordinate frames, experiments and channels of the Boss, and who may see them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,255}$")
DATATYPES = ("uint8", "uint16", "uint32", "uint64")


class BossProblem(Exception):
    """An answer with the Boss's error body.

    Args:
        status: HTTP status.
        code: The Boss's own number.
        message: Text for the caller.
    """

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Resources:
    """The four kinds of named resources."""

    collections: dict[str, dict[str, Any]] = field(default_factory=dict)
    frames: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    channels: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    _last_id: int = 3
    numbers: dict[tuple[str, ...], int] = field(default_factory=dict)

    def add_collection(self, creator: str, name: str, description: str = "") -> dict[str, Any]:
        """Make a collection."""
        self._check_new(name, name in self.collections)
        self.numbers[(name,)] = self._next_id()
        self.collections[name] = {
            "name": name,
            "public": False,
            "description": description,
            "experiments": [],
            "creator": creator,
        }
        return self.collections[name]

    def add_frame(self, creator: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make a coordinate frame; every extent field is required."""
        self._check_new(name, name in self.frames)
        bounds = [f"{axis}_{end}" for axis in "xyz" for end in ("start", "stop", "voxel_size")]
        for key in bounds:
            if not isinstance(body.get(key), (int, float)):
                raise BossProblem(400, 1003, f"{key}: This field is required.")
        frame = {"name": name, "description": body.get("description", "")}
        frame |= {key: body[key] for key in bounds}
        frame["voxel_unit"] = body.get("voxel_unit", "nanometers")
        self.frames[name] = frame
        return frame

    def add_experiment(self, creator: str, collection: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make an experiment in a collection, within a coordinate frame."""
        self.collection(collection)
        self._check_new(name, (collection, name) in self.experiments)
        frame = str(body.get("coord_frame"))
        self.frame(frame)
        self.numbers[(collection, name)] = self._next_id()
        self.experiments[collection, name] = {
            "channels": [],
            "name": name,
            "public": False,
            "description": body.get("description", ""),
            "collection": collection,
            "coord_frame": frame,
            "num_hierarchy_levels": int(body.get("num_hierarchy_levels", 1)),
            "hierarchy_method": body.get("hierarchy_method", "anisotropic"),
            "num_time_samples": int(body.get("num_time_samples", 1)),
            "time_step": body.get("time_step"),
            "time_step_unit": body.get("time_step_unit", ""),
            "creator": creator,
        }
        self.collections[collection]["experiments"].append(name)
        return self.experiments[collection, name]

    def add_channel(
        self, creator: str, collection: str, experiment: str, name: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        """Make a channel in an experiment."""
        self.experiment(collection, experiment)
        self._check_new(name, (collection, experiment, name) in self.channels)
        if body.get("datatype") not in DATATYPES:
            raise BossProblem(400, 1003, f"datatype: one of {', '.join(DATATYPES)} is required.")
        if body.get("type") not in ("image", "annotation"):
            raise BossProblem(400, 1003, "type: image or annotation is required.")
        self.numbers[(collection, experiment, name)] = self._next_id()
        self.channels[collection, experiment, name] = {
            "name": name,
            "public": False,
            "description": body.get("description", ""),
            "experiment": experiment,
            "default_time_sample": int(body.get("default_time_sample", 0)),
            "type": body["type"],
            "base_resolution": int(body.get("base_resolution", 0)),
            "datatype": body["datatype"],
            "creator": creator,
            "sources": body.get("sources", []),
            "downsample_status": "NOT_DOWNSAMPLED",
            "related": body.get("related", []),
            "storage_type": "spdb",
            "bucket": None,
            "cv_path": None,
        }
        self.experiments[collection, experiment]["channels"].append(name)
        return self.channels[collection, experiment, name]

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def collection(self, name: str) -> dict[str, Any]:
        """Look up; 404/4000 when there is none."""
        return _found(self.collections.get(name), name)

    def frame(self, name: str) -> dict[str, Any]:
        """Look up; 404/4000 when there is none."""
        return _found(self.frames.get(name), name)

    def experiment(self, collection: str, name: str) -> dict[str, Any]:
        """Look up; 404/4000 when there is none."""
        self.collection(collection)
        return _found(self.experiments.get((collection, name)), name)

    def channel(self, collection: str, experiment: str, name: str) -> dict[str, Any]:
        """Look up; 404/4000 when there is none."""
        self.experiment(collection, experiment)
        return _found(self.channels.get((collection, experiment, name)), name)

    def lookup_key(self, collection: str, experiment: str, channel: str) -> str:
        """The numbers of the three, joined as the Boss joins them."""
        path = (collection, experiment, channel)
        return "&".join(str(self.numbers[path[: depth + 1]]) for depth in range(3))

    @staticmethod
    def _check_new(name: str, taken: bool) -> None:
        if not _NAME.match(name):
            raise BossProblem(400, 1003, f"Invalid name: {name}")
        if taken:
            raise BossProblem(400, 1003, f"{name} already exists.")


def _found(item: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if item is None:
        raise BossProblem(404, 4000, f"{name} does not exist.")
    return item
