"""What the server accepts as an ingest configuration: the two schemas and the two validators."""

from __future__ import annotations

from typing import Any

import jsonschema

_INTEGERS = {"type": "array", "items": {"type": "integer"}}
_STRING = {"type": "string"}
_INTEGER = {"type": "integer"}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
    }


_PLUGIN = _object({"class": _STRING, "params": {"type": "object"}})
_BACKEND = _object(dict.fromkeys(("name", "class", "host", "protocol"), _STRING))
_SIZE = _object(dict.fromkeys("xyzt", _INTEGER))
_EXTENT = _object(dict.fromkeys("xyzt", _INTEGERS))
_HEAD = {
    "schema": _object({"name": _STRING, "validator": _STRING}),
    "database": _object(dict.fromkeys(("collection", "experiment", "channel"), _STRING)),
}
_INGEST_TYPE = {"enum": ["tile", "volumetric"]}
_SCHEMAS = {
    "boss-v0.1-schema": _object(
        _HEAD
        | {
            "client": _object({"backend": _BACKEND, "path_processor": _PLUGIN, "tile_processor": _PLUGIN}),
            "ingest_job": _object({"resolution": _INTEGER, "extent": _EXTENT, "tile_size": _SIZE}),
        }
    ),
    "boss-v0.2-schema": _object(
        _HEAD
        | {
            "client": _object(
                {"backend": _BACKEND, "path_processor": _PLUGIN},
                {"tile_processor": _PLUGIN, "chunk_processor": _PLUGIN},
            ),
            "ingest_job": _object(
                {"ingest_type": _INGEST_TYPE, "resolution": _INTEGER, "extent": _EXTENT},
                {"tile_size": _SIZE, "chunk_size": _object(dict.fromkeys("xyz", _INTEGER))},
            ),
        }
    ),
}
_CUBOID = {"x": 512, "y": 512, "z": 16}


def problem(config: Any) -> str | None:
    """Why the server refuses a configuration; None when it takes it.

    Like the real one it looks at the shape alone: no extent, alignment or dtype is checked.
    """
    name = config.get("schema", {}).get("name") if isinstance(config, dict) else None
    schema = _SCHEMAS.get(name) if isinstance(name, str) else None
    if schema is None:
        return "Could not validate the schema file."
    try:
        jsonschema.Draft4Validator(schema).validate(config)
    except jsonschema.ValidationError as error:
        return f"Could not validate the schema: {error.message}"
    if config["schema"]["validator"] not in ("BossValidatorV01", "BossValidatorV02"):
        return "Could not validate the schema file."
    if config["schema"]["validator"] == "BossValidatorV02":
        errors = _second_version_errors(config)
        if errors:
            return "Could not validate the schema: " + " - ".join(errors)
    return None


def _second_version_errors(config: dict[str, Any]) -> list[str]:
    job, client = config["ingest_job"], config["client"]
    if job.get("ingest_type", "tile") == "tile":
        missing = [("tile_size", job), ("tile_processor", client)]
        return [f"{key} is required for tile ingest" for key, where in missing if key not in where]
    errors = []
    if "chunk_size" not in job:
        errors.append("chunk_size is required for volumetric ingest")
    else:
        errors += [
            f"chunk_size {axis} must be a multiple of {step}"
            for axis, step in _CUBOID.items()
            if job["chunk_size"][axis] % step
        ]
    if "chunk_processor" not in client:
        errors.append("chunk_processor is required for volumetric ingest")
    return errors


def tile_count(job: dict[str, Any]) -> int:
    """How many messages the job has; ZeroDivisionError for a size of zero, as theirs."""
    volumetric = job.get("ingest_type", "tile") == "volumetric"
    sizes = job["chunk_size"] | {"t": 1} if volumetric else job["tile_size"] | {"z": 1}
    count = 1
    for axis in "xyzt":
        start, stop = job["extent"][axis]
        count *= -(-(stop - start) // sizes[axis])
    return count
