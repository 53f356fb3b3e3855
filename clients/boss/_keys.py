"""Object keys of the Boss: what they say, and whether they can be right.

An upload message names its tile and its chunk by keys that carry an MD5 of themselves, the numbers of collection,
experiment and channel, and the position. The server checks none of it, so a damaged message would put pixels where
they do not belong.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

CUBOID_X, CUBOID_Y, CUBOID_Z = 512, 512, 16
_TILE_FIELDS = 8
_CHUNK_FIELDS = 9
_CUBOID_FIELDS = 6
_MORTON_BITS = 21
_MAX_DIGITS = 19


class PoisonMessage(ValueError):
    """A message of the upload queue that cannot be right."""


class Position(NamedTuple):
    """Where a tile (or chunk) belongs: tile indices, absolute slice (or chunk index), sample."""

    x: int
    y: int
    z: int
    t: int

    def __str__(self) -> str:
        return f"x={self.x} y={self.y} z={self.z} t={self.t}"


class ChunkKey(NamedTuple):
    """A chunk: how many tiles it has and where it belongs."""

    tiles: int
    position: Position


def encode(*fields: int | str) -> str:
    """Make a key of its fields."""
    base = "&".join(str(field) for field in fields)
    return f"{hashlib.md5(base.encode(errors='surrogatepass'), usedforsecurity=False).hexdigest()}&{base}"


def parse_tile(key: object, lookup_key: str, resolution: int) -> Position:
    """Read a tile key and check it.

    Raises:
        PoisonMessage: The hash, the numbers or the shape are wrong.
    """
    fields = _fields(key, _TILE_FIELDS, "tile")
    _check_owner(fields[:4], lookup_key, resolution)
    return Position(*fields[4:])


def parse_chunk(key: object, lookup_key: str, resolution: int) -> ChunkKey:
    """Read a chunk key and check it; raises as `parse_tile`."""
    fields = _fields(key, _CHUNK_FIELDS, "chunk")
    _check_owner(fields[1:5], lookup_key, resolution)
    return ChunkKey(fields[0], Position(*fields[5:]))


def parse_cuboid(key: object, lookup_key: str, resolution: int) -> Position:
    """Read a cuboid key and check it; the position counts cuboids. Raises as `parse_tile`."""
    fields = _fields(key, _CUBOID_FIELDS, "cuboid")
    _check_owner(fields[:4], lookup_key, resolution)
    axes = [0, 0, 0]
    for bit in range(_MORTON_BITS):
        for axis in range(3):
            axes[axis] |= (fields[5] >> 3 * bit + axis & 1) << bit
    return Position(axes[0], axes[1], axes[2], fields[4])


def _fields(key: object, count: int, kind: str) -> list[int]:
    if not isinstance(key, str):
        raise PoisonMessage(f"it has no {kind} key")
    digest, _, base = key.partition("&")
    # JSON can spell half a surrogate pair, which has no bytes.
    if hashlib.md5(base.encode(errors="surrogatepass"), usedforsecurity=False).hexdigest() != digest:
        raise PoisonMessage(f"the {kind} key does not fit its own hash")
    parts = base.split("&")
    if len(parts) != count or not all(part.isascii() and part.isdigit() and len(part) <= _MAX_DIGITS for part in parts):
        raise PoisonMessage(f"the {kind} key does not have {count} numbers")
    return [int(part) for part in parts]


def _check_owner(fields: list[int], lookup_key: str, resolution: int) -> None:
    if "&".join(map(str, fields[:3])) != lookup_key or fields[3] != resolution:
        raise PoisonMessage("its key names another channel or resolution")
