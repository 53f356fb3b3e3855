"""What the queues of a job say: upload messages read and checked, index messages written."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from prefect_biomed.clients.boss import _keys
from prefect_biomed.clients.boss._aws import UploadMessage
from prefect_biomed.clients.boss._keys import PoisonMessage, Position
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.ledger import LedgerEntry, TileState
from prefect_biomed.clients.boss.models import JoinedJob

__all__ = ["Messages", "Work"]

_METADATA_BYTES = 2048


@dataclass
class Work:
    """A message on its way through the upload.

    Attributes:
        message: The message.
        tile: Name of its tile, or of its chunk where the job is volumetric.
        chunk: Key of its chunk.
        position: Where it belongs.
        body: What the message says.
        entry: What the ledger knew of the tile when the message came.
        path: Name of the source.
        was_patched: Whether the fill value was sent before in its place, or in that of a part of it.
    """

    message: UploadMessage
    tile: str
    chunk: str
    position: Position
    body: dict[str, Any]
    entry: LedgerEntry | None = None
    path: str = ""
    was_patched: bool = False

    @property
    def row(self) -> tuple[str, str, str]:
        """What the ledger keeps of it."""
        return self.tile, self.chunk, self.message.id

    @property
    def is_known(self) -> bool:
        """Whether the tile was worked on for this very message, or for another one that was sent no earlier.

        A message that was sent before the Boss was told of the tile asks for nothing more, whatever its name: queues
        deliver twice, and a job may be filled, or completed, twice.
        """
        entry, sent_at = self.entry, self.message.sent_at
        if entry is None:
            return False
        is_earlier = sent_at is not None and entry.done_at is not None and sent_at < entry.done_at
        return entry.message == self.message.id or is_earlier

    @property
    def is_done(self) -> bool:
        """Whether the Boss was told of the tile, so that only its message is left to be deleted."""
        return self.is_known and self.entry is not None and self.entry.state in (TileState.INDEXED, TileState.FINISHED)

    @property
    def is_requeued(self) -> bool:
        """Whether the Boss asks again for a tile that was finished."""
        return self.entry is not None and self.entry.state == TileState.FINISHED and not self.is_known


class Messages:
    """The language of the queues of one job.

    Args:
        config: Configuration of the job.
        joined: An answer to a join.
    """

    def __init__(self, config: IngestConfig, joined: JoinedJob) -> None:
        self._config = config
        self._joined = joined
        self._parameters = json.dumps(joined.parameters, separators=(",", ":"))

    def read(self, message: UploadMessage) -> Work:
        """Read and verify an upload message.

        Args:
            message: As it came from the queue.

        Returns:
            What it asks for.

        Raises:
            PoisonMessage: It cannot be right.
        """
        joined = self._joined
        try:
            body = json.loads(message.body)
        except (ValueError, RecursionError):
            raise PoisonMessage("it is not JSON") from None
        if not isinstance(body, dict):
            raise PoisonMessage("it is not a JSON object")
        chunk = _keys.parse_chunk(body.get("chunk_key"), joined.lookup_key, joined.base_resolution)
        if self._config.volumetric:
            self._check_cuboids(body.get("cuboids"), chunk.position)
            position = chunk.position
        else:
            position = _keys.parse_tile(body.get("tile_key"), joined.lookup_key, joined.base_resolution)
            same = (position.x, position.y, position.t) == (chunk.position.x, chunk.position.y, chunk.position.t)
            if not same or position.z // _keys.CUBOID_Z != chunk.position.z or not 1 <= chunk.tiles <= 16:
                raise PoisonMessage("tile and chunk do not belong together")
            if "job_id" in body and str(body["job_id"]) != str(joined.job.id):
                raise PoisonMessage(f"it belongs to job {body['job_id']}")
        if not self._inside(position):
            raise PoisonMessage(f"{position} lies outside the extent of the job")
        return Work(message, str(position), body["chunk_key"], position, body)

    def index_body(self, item: Work, *, full: bool = True) -> str:
        """Write what the lambdas are told of a tile.

        Args:
            item: The tile.
            full: False leaves `parameters` out, where room is scarce.

        Returns:
            Compact JSON.
        """
        size = self._config.piece_size
        parameters = f'"parameters":{self._parameters},' if full else ""
        return (
            f'{{"chunk_key":{json.dumps(item.chunk)},"tile_key":{json.dumps(item.body["tile_key"])},'
            f'"ingest_job":{self._joined.job.id},{parameters}"x_size":{size["x"]},"y_size":{size["y"]}}}'
        )

    def tile_metadata(self, item: Work) -> dict[str, str]:
        """Write the metadata of a tile's object; slim where the whole would be more than S3 takes."""
        known = {"message_id": item.message.id, "receipt_handle": item.message.handle}
        full = known | {"metadata": self.index_body(item)}
        if sum(len(name) + len(value) for name, value in full.items()) <= _METADATA_BYTES:
            return full
        return known | {"metadata": self.index_body(item, full=False)}

    def cuboid_metadata(self, item: Work) -> dict[str, str]:
        """Write the metadata of the objects of a chunk; slim as for `tile_metadata`."""
        known = f'"ingest_job":{self._joined.job.id},"chunk_key":{json.dumps(item.chunk)}'
        text = f'{{{known},"parameters":{self._parameters}}}'
        return {"metadata": text if len("metadata") + len(text) <= _METADATA_BYTES else f"{{{known}}}"}

    def _check_cuboids(self, cuboids: object, chunk: Position) -> None:
        if not isinstance(cuboids, list) or not cuboids:
            raise PoisonMessage("it lists no cuboids")
        listed: set[tuple[int, int, int]] = set()
        size = self._config.piece_size
        steps = {"x": _keys.CUBOID_X, "y": _keys.CUBOID_Y, "z": _keys.CUBOID_Z}
        for cuboid in cuboids:
            try:
                offset = {axis: int(cuboid[axis]) for axis in ("x", "y", "z")}
                where = _keys.parse_cuboid(cuboid["key"], self._joined.lookup_key, self._joined.base_resolution)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise PoisonMessage(f"a cuboid is wrong: {error}") from None
            origin = {"x": chunk.x * size["x"], "y": chunk.y * size["y"], "z": chunk.z * size["z"]}
            expected = tuple((origin[axis] + offset[axis]) // steps[axis] for axis in ("x", "y", "z"))
            if (where.x, where.y, where.z) != expected or any(offset[axis] % steps[axis] for axis in steps):
                raise PoisonMessage("the key of a cuboid does not fit its place")
            listed.add((offset["x"], offset["y"], offset["z"]))
        lacking = self._cuboids_of(chunk) - listed
        if lacking:
            raise PoisonMessage(f"its list of cuboids lacks {len(lacking)}, such as {min(lacking)}")

    def _cuboids_of(self, chunk: Position) -> set[tuple[int, int, int]]:
        """Offsets of the cuboids of a chunk that the job has voxels for."""
        size, extent = self._config.piece_size, self._config.ingest_job.extent
        x = range(0, min(size["x"], extent.x[1] - chunk.x * size["x"]), _keys.CUBOID_X)
        y = range(0, min(size["y"], extent.y[1] - chunk.y * size["y"]), _keys.CUBOID_Y)
        z = range(0, min(size["z"], extent.z[1] - chunk.z * size["z"]), _keys.CUBOID_Z)
        return set(itertools.product(x, y, z))

    def _inside(self, position: Position) -> bool:
        size, extent = self._config.piece_size, self._config.ingest_job.extent
        depth = size["z"] if self._config.volumetric else 1
        return (
            extent.x[0] // size["x"] <= position.x < -(-extent.x[1] // size["x"])
            and extent.y[0] // size["y"] <= position.y < -(-extent.y[1] // size["y"])
            and extent.z[0] // depth <= position.z < -(-extent.z[1] // depth)
            and extent.t[0] <= position.t < extent.t[1]
        )
