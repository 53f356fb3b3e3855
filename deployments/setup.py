"""Register the block types and save credentials blocks from environment variables.

    PREFECT_BIOMED_VIP_API_KEY=… python deployments/setup.py --name lab

Every field of a block has a variable: `PREFECT_BIOMED_<PLATFORM>_<FIELD>`. A block is saved when at least one of its
variables is set; one that exists is replaced. Secrets are read from the environment only, never from the command line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from prefect.blocks.core import Block

from prefect_biomed import blocks
from prefect_biomed.flows.jobs import BossIngest, Vantage6Algorithm, VipPipeline

PREFIX = "PREFECT_BIOMED"


def credentials_types() -> dict[str, type[Block]]:
    """List the credentials blocks of the package.

    Returns:
        Block types by platform name.
    """
    return {
        name.removesuffix("Credentials").lower(): getattr(blocks, name)
        for name in blocks.__all__
        if name.endswith("Credentials")
    }


def fields_from(environment: Mapping[str, str], platform: str, block_type: type[Block]) -> dict[str, str]:
    """Collect the fields of one block that the environment sets.

    Args:
        environment: The variables.
        platform: Name of the platform.
        block_type: The block type.

    Returns:
        Values by field name.
    """
    variables = {field: f"{PREFIX}_{platform}_{field}".upper() for field in block_type.model_fields}
    return {field: environment[variable] for field, variable in variables.items() if variable in environment}


def save_blocks(environment: Mapping[str, str], name: str) -> dict[str, list[str]]:
    """Register the block types, and save the blocks that the environment describes.

    Safe to repeat: a block that exists is replaced.

    Args:
        environment: The variables.
        name: Name of the saved blocks.

    Returns:
        The fields that were set, by the slug of each block type; none for one that was only registered.

    Raises:
        ValidationError: A variable does not hold what its field takes; without the value.
    """
    saved = {}
    for platform, kind in credentials_types().items():
        # The types of these two are those of their asynchronous twins.
        register: Any = kind.register_type_and_schema
        register(_sync=True)
        fields = fields_from(environment, platform, kind)
        if fields:
            block: Any = kind.model_validate(fields)
            block.save(name, overwrite=True, _sync=True)
        saved[kind.get_block_type_slug()] = sorted(fields)
    for job in (VipPipeline, Vantage6Algorithm, BossIngest):
        register = job.register_type_and_schema
        register(_sync=True)
    return saved


def main() -> None:
    """Register all block types, save the blocks that the environment describes, and say which."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="default", help="name of the saved blocks")
    name = parser.parse_args().name
    for slug, fields in save_blocks(os.environ, name).items():
        print(f"{slug}/{name} saved with {', '.join(fields)}" if fields else f"{slug} registered")


if __name__ == "__main__":
    main()
