"""A pipeline described for people, with an `input_settings` to paste."""

from __future__ import annotations

import re
from html import unescape

from prefect_biomed.clients.texts import inline, inline_code
from prefect_biomed.clients.vip.models import Parameter, ParameterType, Pipeline, Scalar

__all__ = ["describe"]


def describe(pipeline: Pipeline) -> str:
    """Describe a pipeline in Markdown, with an `input_settings` to paste.

    Args:
        pipeline: A pipeline with its parameters.

    Returns:
        A heading, the description, a table of parameters, and a Python dictionary.
    """
    rows = [
        f"| {inline_code(p.key)} | {inline(p.type.value)} | {'yes' if p.is_required else 'no'} "
        f"| {'' if p.default_value is None else inline_code(p.default_value)} | {_plain(p.description)} |"
        for p in sorted(pipeline.inputs, key=lambda p: (not p.is_required, p.key))
    ]
    settings = [
        f"    {p.key!r}: {_example(p)!r},{'' if p.is_required else '  # optional'}"
        for p in sorted(pipeline.inputs, key=lambda p: (not p.is_required, p.key))
    ]
    return "\n".join(
        [
            f"# {inline(pipeline.identifier)}",
            "",
            _plain(pipeline.description),
            "",
            "| parameter | type | required | default | description |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"A list of values makes parallel jobs{_combined(pipeline)}.",
            "",
            "```python",
            "input_settings = {",
            *settings,
            "}",
            "```",
        ]
    )


def _combined(pipeline: Pipeline) -> str:
    if pipeline.undescribed is not None:
        return f"; how several lists are combined is not known ({inline(pipeline.undescribed)})"
    if pipeline.dot_parameters:
        return f"; {inline(', '.join(sorted(pipeline.dot_parameters)))} are combined element by element"
    return ", every value combined with every other"


def _plain(text: str | None) -> str:
    return inline(" ".join(unescape(re.sub(r"<[^>]*>", " ", text or "")).split()))


def _example(parameter: Parameter) -> Scalar | list[str]:
    if parameter.default_value is not None and not isinstance(parameter.default_value, list):
        return parameter.default_value
    examples: dict[ParameterType, Scalar | list[str]] = {
        ParameterType.FILE: f"{parameter.key}.nii.gz",
        ParameterType.BOOLEAN: "true",
        ParameterType.INT64: 1,
        ParameterType.DOUBLE: 1.0,
        ParameterType.LIST: ["a", "b"],
    }
    return examples.get(parameter.type, "text")
