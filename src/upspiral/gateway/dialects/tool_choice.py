"""Tool choice as every dialect means it: modes, a name, and a subset of tools that may be called."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from upspiral.gateway.dialects.fields import FieldError, shown
from upspiral.gateway.request import ToolChoice
from upspiral.types import ToolSpec


def simple_choice(value: object, tools: Sequence[ToolSpec]) -> ToolChoice | None:
    """What OpenAI's APIs say with one word, or by saying nothing; None for anything else."""
    if value is None or value == "auto":
        return ToolChoice()
    if value == "none":
        return ToolChoice("none")
    return required_choice(tools, "tool_choice") if value == "required" else None


def named_choice(name: str, tools: Sequence[ToolSpec], field: str) -> ToolChoice:
    """Raises FieldError when no such tool is offered."""
    _check_offered([name], tools, field)
    return ToolChoice("named", name)


def required_choice(tools: Sequence[ToolSpec], field: str) -> ToolChoice:
    """Raises FieldError when no tool is offered at all."""
    if not tools:
        raise FieldError(field, "asks for a tool call, but tools offers none; offer some or leave it out")
    return ToolChoice("required")


def allowed_tools(names: Collection[str], tools: Sequence[ToolSpec], field: str) -> tuple[ToolSpec, ...]:
    """Only the tools that may be called. The model sees no others: nothing else could keep it from calling them.

    Raises FieldError when a name is not offered or nothing is left.
    """
    _check_offered(names, tools, field)
    if not names:
        raise FieldError(field, 'allows no tool; name some, or use "none"')
    return tuple(tool for tool in tools if tool.name in names)


def _check_offered(names: Collection[str], tools: Sequence[ToolSpec], field: str) -> None:
    offered = [tool.name for tool in tools]
    for name in names:
        if name not in offered:
            raise FieldError(field, f"names {shown(name)}, and tools offers {', '.join(offered) or 'none'}")
