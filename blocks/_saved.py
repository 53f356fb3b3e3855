"""Secrets of saved blocks as they are now, so that a key can be replaced while flows run."""

from __future__ import annotations

from typing import Any, TypeVar

from prefect.blocks.core import Block
from pydantic import SecretStr

from prefect_biomed.clients.texts import logger_of

__all__ = ["with_saved_secrets"]

logger = logger_of(__name__)

B = TypeVar("B", bound=Block)


def with_saved_secrets(block: B) -> B:
    """Read the secrets of a saved block again.

    Args:
        block: The block, as it was read when the flow run began.

    Returns:
        The block with the secrets that are saved now; the same one when it was never saved, or Prefect cannot be asked.
    """
    name = block._block_document_name
    if name is None:
        return block
    load: Any = type(block).load  # its type is that of the asynchronous twin
    try:
        saved = load(name, _sync=True)
    except Exception as error:  # whatever keeps Prefect from answering must not stop the work on the platform
        logger.warning("Credentials %s were not read again, the known ones are used: %s", name, error)
        return block
    secrets = {
        field: value for field in type(block).model_fields if isinstance(value := getattr(saved, field), SecretStr)
    }
    return block.model_copy(update=secrets)
