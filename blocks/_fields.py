"""Blocks that take no field they do not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.blocks.core import Block
from pydantic import ConfigDict, model_validator

__all__ = ["KnownFields"]

# Prefect adds the slug to what a form or a saved block gives.
_OF_PREFECT = frozenset({"block_type_slug"})


class KnownFields(Block):
    """A block that refuses fields it does not have.

    Prefect's own keep them. A misspelt address would then be the default one, which gets the key; and a misspelt
    password would be kept, shown and saved as no secret.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            unknown = sorted(set(map(str, given)) - cls.model_fields.keys() - _OF_PREFECT)
            if unknown:
                known = ", ".join(cls.model_fields)
                raise ValueError(f"there is no field {', '.join(map(repr, unknown))}; there are: {known}")
        return given
