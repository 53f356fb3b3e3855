"""Where tiles and chunks come from.

A job names a path processor, which tells the file of a tile, and a tile (or chunk) processor, which reads it. The
classes here carry the names of those of boss-ingest and take the same parameters, so that existing configurations
work; classes that others wrote for boss-ingest are loaded from their dotted path unchanged.
"""

from prefect_biomed.clients.boss.plugins.base import (
    TZYX_ORDER,
    XYZ_ORDER,
    XYZT_ORDER,
    ZYX_ORDER,
    ChunkProcessor,
    PathProcessor,
    TileProcessor,
)

__all__ = [
    "TZYX_ORDER",
    "XYZT_ORDER",
    "XYZ_ORDER",
    "ZYX_ORDER",
    "ChunkProcessor",
    "PathProcessor",
    "TileProcessor",
]
