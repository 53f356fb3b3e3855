"""What a look at pixels that arrived is to be like, and what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.clients.boss._keys import Position

__all__ = ["Box", "Region", "Verification", "VerifySettings", "WrongTile", "upper_bound"]

Range = tuple[int, int]

_LEVEL = 0.95


class Box(NamedTuple):
    """Voxels of one sample: half-open ranges in x, y and z."""

    x: Range
    y: Range
    z: Range
    t: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Lengths in z, y and x."""
        return self.z[1] - self.z[0], self.y[1] - self.y[0], self.x[1] - self.x[0]


class Region(BaseModel):
    """A part of what a configuration describes: half-open ranges in voxels and samples; all of an axis when empty."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    x: Range | None = Field(default=None, title="Columns")
    """From and to, in x."""
    y: Range | None = Field(default=None, title="Rows")
    """From and to, in y."""
    z: Range | None = Field(default=None, title="Slices")
    """From and to, in z."""
    t: Range | None = Field(default=None, title="Samples")
    """From and to, in time."""


class VerifySettings(BaseModel):
    """How much of what arrived is compared with its source."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    share: float = Field(default=0.01, ge=0, le=1, title="Share of the cuboids")
    """Share of the cuboids (512 x 512 x 16 voxels) that is compared with the source, at random; 1 compares all."""
    least: int = Field(default=100, ge=0, title="At least so many cuboids")
    """So many are compared at least, if there are that many."""
    most: int = Field(default=3000, ge=0, title="At most so many cuboids")
    """So many are compared at most, unless `share` is 1."""
    seed: int = Field(default=0, title="Seed of the choice")
    """The same seed chooses the same cuboids."""
    every_chunk: bool = Field(default=True, title="Look at every chunk")
    """Whether a small window of every chunk is read, so that tiles and chunks that are not there are found for sure.
    Takes one small request for each sixteen tiles; the source is read only where the Boss has nothing but zeros."""
    compare_windows: bool = Field(default=False, title="Compare every chunk")
    """Whether that window is compared with the source, too: it finds what happened to a whole tile, such as values that
    were cut off or another tile in its place. It reads little of the Boss, but all sources."""
    threads: int = Field(default=8, ge=1, le=64, title="Requests at once")
    """Chunks that are looked at at the same time."""
    manifest: Path | None = Field(default=None, title="File of digests")
    """Where a SHA-256 of all that was compared is written, one line of JSON for each block. Nowhere when empty."""


class WrongTile(BaseModel):
    """A tile (chunk of a volumetric job) that is not in the Boss as its source has it.

    Attributes:
        x: Column of the tile.
        y: Row of the tile.
        z: Slice of the tile, or index of the chunk.
        t: Sample.
        kind: `missing` when the Boss has nothing but zeros where the source has more, `damaged` when what a volume has
            in its place cannot be decoded, else `different`.
        detail: Where, and what was found.
    """

    model_config = ConfigDict(frozen=True)

    x: int
    y: int
    z: int
    t: int
    kind: Literal["missing", "different", "damaged"]
    detail: str

    @property
    def position(self) -> Position:
        """Where it belongs."""
        return Position(self.x, self.y, self.z, self.t)

    def __str__(self) -> str:
        return f"{self.position}: {self.kind}, {self.detail}"


class Verification(BaseModel):
    """What a look at pixels that arrived says.

    Attributes:
        channel: `collection/experiment/channel`.
        region: Half-open ranges that were looked at, by axis.
        cuboids: Cuboids of it.
        compared: Cuboids chosen at random (or all) and compared with the source in each voxel.
        wrong_cuboids: Those of them that differ, or lie in a chunk that cannot be decoded.
        chunks_looked_at: Chunks of which a window was read, to see whether they are there.
        wrong: Tiles that are missing, different or damaged, whichever look found them.
        verified_tiles: Tiles of which every voxel was compared and is equal.
        padded_tiles: Tiles that were compared and of which the source lacks a part within the extent: there it was the
            fill value that was compared.
        left_out: Tiles that were not compared, because they were left out of the ingest on purpose.
        unreadable_tiles: Tiles that could not be compared because their source cannot be read.
        unreadable: These with reasons; at most 1,000.
        requests: Requests made.
        bytes_read: Bytes of voxels read back.
        seconds: Duration.
        seed: Of the choice.
        manifest: File of digests; empty without one.
    """

    model_config = ConfigDict(frozen=True)

    channel: str
    region: dict[str, Range]
    cuboids: int
    compared: int = 0
    wrong_cuboids: int = 0
    chunks_looked_at: int = 0
    wrong: tuple[WrongTile, ...] = ()
    verified_tiles: int = 0
    padded_tiles: int = 0
    left_out: int = 0
    unreadable_tiles: int = 0
    unreadable: dict[str, str] = {}
    requests: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    seed: int = 0
    manifest: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether every cuboid was compared."""
        return self.compared == self.cuboids

    @property
    def is_right(self) -> bool:
        """Whether nothing was found to be wrong, and something was looked at and could be compared."""
        return not self.has_failed and self.compared + self.chunks_looked_at > 0

    @property
    def has_failed(self) -> bool:
        """Whether something was found to be wrong, or nothing could be compared of what was to be."""
        return bool(self.wrong) or (not self.compared and bool(self.unreadable))

    @property
    def bound(self) -> float:
        """The share of wrong cuboids is smaller than this, with 95 %; what is known for sure when all were compared."""
        if self.is_complete:
            return self.wrong_cuboids / self.cuboids if self.cuboids else 0.0
        return upper_bound(self.wrong_cuboids, self.compared)

    def summary(self) -> str:
        """Some sentences for a log or an artifact."""
        parts = []
        if self.is_complete:
            parts.append(f"All {self.cuboids:,} cuboids of {self.channel} were compared: {self.wrong_cuboids:,} wrong.")
        elif self.compared:
            seen = f"{self.wrong_cuboids:,} of {self.compared:,} random cuboids wrong"
            # What cannot be compared was not drawn by lot, and nothing is known of it.
            comparable = ", of those that can be compared" if self.unreadable or self.left_out else ""
            parts.append(
                f"{seen}: fewer than {_percent(self.bound)} % are, with 95 % (of {self.cuboids:,} of "
                f"{self.channel}{comparable})."
            )
        else:
            parts.append(f"None of the {self.cuboids:,} cuboids of {self.channel} was compared.")
        if self.chunks_looked_at:
            parts.append(f"{self.chunks_looked_at:,} chunks were looked at.")
        for kind in ("missing", "different", "damaged"):
            tiles = [tile for tile in self.wrong if tile.kind == kind]
            if tiles:
                parts.append(f"{len(tiles):,} tiles are {kind}, such as {tiles[0]}.")
        if self.padded_tiles:
            parts.append(
                f"{self.padded_tiles:,} tiles are padded: where their sources end, the fill value was compared."
            )
        if self.unreadable_tiles:
            parts.append(f"{self.unreadable_tiles:,} tiles could not be compared: their sources cannot be read.")
        if self.left_out:
            parts.append(f"{self.left_out:,} were left out on purpose.")
        parts.append(f"{self.requests:,} requests, {self.bytes_read / 1e6:.1f} MB, {self.seconds:.1f} s.")
        return " ".join(parts)


def upper_bound(wrong: int, of: int, level: float = _LEVEL) -> float:
    """Largest share that so few wrong ones in a random sample are still compatible with (Clopper and Pearson).

    Args:
        wrong: Wrong ones in the sample.
        of: Size of the sample.
        level: How sure it is to be.

    Returns:
        A share between 0 and 1; 1 when nothing was looked at.
    """
    if of == 0 or wrong >= of:
        return 1.0
    low, high = wrong / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(wrong, of, middle) > 1 - level else (low, middle)
    return high


def _at_most(wrong: int, of: int, share: float) -> float:
    """Probability of no more than so many wrong ones in a sample."""

    def log_of(number: int) -> float:
        ways = math.lgamma(of + 1) - math.lgamma(number + 1) - math.lgamma(of - number + 1)
        return ways + number * math.log(share) + (of - number) * math.log1p(-share)

    return sum(math.exp(log_of(number)) for number in range(wrong + 1)) if 0 < share < 1 else float(share <= 0)


def _percent(share: float) -> str:
    """A share in per cent, rounded up to two digits, so that it stays a bound."""
    percent = 100 * share
    if percent <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(percent)) - 1)
    return f"{math.ceil(round(percent / step, 6)) * step:g}"
