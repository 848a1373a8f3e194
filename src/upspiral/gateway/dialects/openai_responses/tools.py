"""Tools of the Responses API: which the model may know of, by what name, and what a call of each looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from upspiral.gateway.dialects.fields import (
    FieldError,
    choice_field,
    list_field,
    object_field,
    optional_text,
    shown,
    text_field,
)
from upspiral.gateway.dialects.tool_choice import allowed_tools, named_choice, simple_choice
from upspiral.gateway.request import ToolChoice
from upspiral.types import ToolCall, ToolSpec

IGNORED_TOOLS: Mapping[str, str] = {
    "web_search": "the model is not told of it, as if it never chose to search",
    "web_search_preview": "the same",
    "web_search_2025_08_26": "the same",
    "image_generation": "the model is not told of it",
    "tool_search": "all tools are offered at once, so there is nothing to search for",
}
"""Tools that agents offer beside their own whether they need them or not, and what leaving them out means."""

REFUSED_TOOLS: Mapping[str, str] = {
    "file_search": "it runs on OpenAI's servers",
    "code_interpreter": "it runs on OpenAI's servers",
    "computer": "the model reads no images",
    "computer_use_preview": "the model reads no images",
    "mcp": "the gateway calls no tool servers; let the agent call them and offer functions",
    "shell": "offer a function or local_shell",
    "apply_patch": "offer a function or a custom tool",
    "programmatic_tool_calling": "it runs on OpenAI's servers",
}
"""Tools without which an agent would not work as it means to, and why they are refused."""

_CUSTOM_INPUT = "input"
"""The one argument of a custom tool."""
_LOCAL_SHELL = ToolSpec(
    "local_shell",
    "Runs a command on this machine and returns what it prints.",
    {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}, "description": "The program and its arguments."},
            "working_directory": {"type": "string"},
            "timeout_ms": {"type": "integer"},
        },
        "required": ["command"],
    },
)

Kind = Literal["function", "custom", "local_shell"]


@dataclass(frozen=True, slots=True)
class _Origin:
    """What the agent calls a tool that the model knows by one flat name."""

    kind: Kind
    name: str
    namespace: str = ""


class OfferedTools:
    """The tools of one request."""

    def __init__(self) -> None:
        self.specs: tuple[ToolSpec, ...] = ()
        self._origins: dict[str, _Origin] = {}

    def add(self, spec: ToolSpec, origin: _Origin) -> None:
        self.specs = (*self.specs, spec)
        self._origins[spec.name] = origin

    def origin(self, name: str) -> _Origin:
        """A name that nobody offered is taken for a function: the agent will say that there is none."""
        return self._origins.get(name) or _Origin("function", name)


def read_tools(body: Mapping[str, Any]) -> OfferedTools:
    """Raises FieldError for a tool that is refused or malformed."""
    offered = OfferedTools()
    for index, entry in enumerate(list_field(body, "tools", "")):
        _read_tool(entry, f"tools[{index}]", "", offered)
    return offered


def _read_tool(entry: Mapping[str, Any], where: str, namespace: str, offered: OfferedTools) -> None:
    kind = optional_text(entry, "type", where)
    if kind == "function":
        offered.add(_function(entry, where, namespace), _Origin("function", entry["name"], namespace))
    elif kind == "custom":
        offered.add(_custom(entry, where, namespace), _Origin("custom", entry["name"], namespace))
    elif kind == "namespace" and not namespace:
        name = text_field(entry, "name", where)
        for index, inner in enumerate(list_field(entry, "tools", where)):
            _read_tool(inner, f"{where}.tools[{index}]", name, offered)
    elif kind == "local_shell":
        offered.add(_LOCAL_SHELL, _Origin("local_shell", _LOCAL_SHELL.name))
    elif kind not in IGNORED_TOOLS:
        why = REFUSED_TOOLS.get(str(kind), "supported are function, custom, namespace and local_shell")
        raise FieldError(f"{where}.type", f"is {shown(kind)}, which is not supported: {why}")


def _function(entry: Mapping[str, Any], where: str, namespace: str) -> ToolSpec:
    name = flat_name(namespace, text_field(entry, "name", where))
    return ToolSpec(name, optional_text(entry, "description", where), object_field(entry, "parameters", where))


def _custom(entry: Mapping[str, Any], where: str, namespace: str) -> ToolSpec:
    """A tool that takes free text, as a function of one string."""
    name = flat_name(namespace, text_field(entry, "name", where))
    input_format = object_field(entry, "format", where)
    description = optional_text(entry, "description", where)
    if definition := optional_text(input_format, "definition", f"{where}.format"):
        syntax = optional_text(input_format, "syntax", f"{where}.format") or "following"
        description = f"{description}\n\nThe input follows this {syntax} grammar:\n{definition}".strip()
    parameters = {"type": "object", "properties": {_CUSTOM_INPUT: {"type": "string"}}, "required": [_CUSTOM_INPUT]}
    return ToolSpec(name, description, parameters)


def flat_name(namespace: str, name: str) -> str:
    """How the model knows a tool of a namespace: templates have one flat list."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def read_tool_choice(body: Mapping[str, Any], tools: tuple[ToolSpec, ...]) -> tuple[ToolChoice, tuple[ToolSpec, ...]]:
    """The choice, and the tools that the model may know of."""
    value = body.get("tool_choice")
    if (simple := simple_choice(value, tools)) is not None:
        return simple, tools
    choice: Mapping[str, Any] = value if isinstance(value, dict) else {}
    kind = choice.get("type")
    if kind == "allowed_tools":
        mode = choice_field(choice, "mode", ("auto", "required"), "tool_choice")
        entries = list_field(choice, "tools", "tool_choice")
        names = [_chosen_name(entry, f"tool_choice.tools[{i}]") for i, entry in enumerate(entries)]
        tools = allowed_tools(names, tools, "tool_choice.tools")
        return ToolChoice("required" if mode == "required" else "auto"), tools
    if kind in ("function", "custom", "local_shell"):
        return named_choice(_chosen_name(choice, "tool_choice"), tools, "tool_choice.name"), tools
    raise FieldError(
        "tool_choice",
        f'= {shown(value)} is not supported; use "auto", "none", "required", a function, custom tool or allowed_tools',
    )


def _chosen_name(entry: Mapping[str, Any], where: str) -> str:
    if entry.get("type") == "local_shell":
        return _LOCAL_SHELL.name
    return flat_name(optional_text(entry, "namespace", where), text_field(entry, "name", where))


@dataclass(frozen=True, slots=True)
class CallItem:
    """A tool call as the item of an answer."""

    item: dict[str, Any]
    """Complete."""
    opened: dict[str, Any]
    """As it stands before its text arrives."""
    delta: str | None
    """The event that brings the text, without ".delta" or ".done"; None: there is none."""
    text_key: str
    text: str


def call_item(call: ToolCall, offered: OfferedTools, item_id: str) -> CallItem:
    origin = offered.origin(call.name)
    return _CALL_ITEMS[origin.kind](call, origin, item_id)


def _function_item(call: ToolCall, origin: _Origin, item_id: str) -> CallItem:
    item = {"type": "function_call", "id": f"fc_{item_id}", "call_id": call.id, **_named(origin)}
    item |= {"arguments": call.arguments, "status": "completed"}
    opened = {**item, "arguments": "", "status": "in_progress"}
    return CallItem(item, opened, "response.function_call_arguments", "arguments", call.arguments)


def _custom_item(call: ToolCall, origin: _Origin, item_id: str) -> CallItem:
    arguments = orjson.loads(call.arguments)
    given = arguments.get(_CUSTOM_INPUT)
    # A model that does not keep to the one string says something all the same.
    text = given if isinstance(given, str) and len(arguments) == 1 else call.arguments
    item = {"type": "custom_tool_call", "id": f"ctc_{item_id}", "call_id": call.id, **_named(origin), "input": text}
    item |= {"status": "completed"}
    opened = {**item, "input": "", "status": "in_progress"}
    return CallItem(item, opened, "response.custom_tool_call_input", "input", text)


def _local_shell_item(call: ToolCall, origin: _Origin, item_id: str) -> CallItem:
    del origin
    arguments = orjson.loads(call.arguments)
    action = {"type": "exec", "command": [], "env": {}, "timeout_ms": None, "working_directory": None, "user": None}
    action |= {key: value for key, value in arguments.items() if key in action and key != "type"}
    item = {"type": "local_shell_call", "id": f"lsh_{item_id}", "call_id": call.id, "action": action}
    return CallItem({**item, "status": "completed"}, {**item, "status": "in_progress"}, None, "", "")


_CALL_ITEMS: Mapping[Kind, Callable[[ToolCall, _Origin, str], CallItem]] = {
    "function": _function_item,
    "custom": _custom_item,
    "local_shell": _local_shell_item,
}


def _named(origin: _Origin) -> dict[str, str]:
    return {"name": origin.name, "namespace": origin.namespace} if origin.namespace else {"name": origin.name}


def custom_arguments(text: str) -> str:
    """The arguments of a custom tool's call, from its input."""
    return orjson.dumps({_CUSTOM_INPUT: text}).decode()


def local_shell_arguments(action: Mapping[str, Any]) -> str:
    """The arguments of a local_shell call, from its action."""
    said = {key: value for key, value in action.items() if key != "type" and value not in (None, {})}
    return orjson.dumps(said).decode()


def shown_tools(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tools as a response repeats them: the API names every field of a function."""
    empty = {"description": None, "parameters": None, "strict": None}
    return [{**empty, **entry} if entry.get("type") == "function" else entry for entry in entries]
