"""Chat templates: messages to text, the way Hugging Face renders them, without transformers.

Names and options of the Jinja environment follow transformers' documentation of chat templates: `raise_exception`,
`strftime_now`, `tojson` that escapes nothing, loop controls, trimmed blocks, and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from upspiral.errors import TemplateError
from upspiral.rendering.answer import AnswerParser, CallPiece, ReadingRules
from upspiral.types import Message, ToolCall, ToolSpec


class ChatTemplate:
    """A compiled template. `name` says in errors where it came from."""

    def __init__(self, source: str, *, name: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except JinjaError as error:
            raise TemplateError(f"chat template {name} is not valid Jinja: {error}; fix the file") from error

    def text(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generation_prompt: bool = False
    ) -> str:
        """The rendered conversation. Raises TemplateError when the template refuses it."""
        variables = {
            **self._special_tokens,
            "messages": [template_message(message) for message in messages],
            "tools": [template_tool(tool) for tool in tools] or None,
            "add_generation_prompt": generation_prompt,
        }
        try:
            return self._template.render(variables)
        # A template is a program from a model's author: besides Jinja's own errors it can raise any of these.
        except (JinjaError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateError(f"chat template {self.name} cannot render roles [{roles}]: {error}") from error

    def knows_tools(self) -> bool:
        """Whether it lists offered tools, writes calls in the format that we read, and renders their results."""
        tool = ToolSpec("probe_tool", "probe", {"type": "object", "properties": {}})
        question = Message("user", "question")
        try:
            if "probe_tool" not in self.text([question], [tool]):
                return False
            text = self.text([question, *_probe_exchange()], [tool])
        except TemplateError:
            return False
        pieces = AnswerParser(ReadingRules()).push(text)
        calls = [piece.call for piece in pieces if isinstance(piece, CallPiece)]
        return "probe_result" in text and any("probe_argument" in call.arguments for call in calls)


def template_message(message: Message) -> dict[str, Any]:
    """The dictionary that templates expect. Arguments go in as an object: templates write them with `tojson`."""
    entry: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.thinking is not None:
        entry["reasoning_content"] = message.thinking
    if message.tool_calls:
        entry["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    return entry


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _arguments(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def template_tool(tool: ToolSpec) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": function}


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TemplateError(f"the arguments of a tool call are not valid JSON ({error}): {text[:80]!r}") from error


def _probe_exchange() -> list[Message]:
    call = ToolCall("call00000", "probe_tool", '{"key": "probe_argument"}')
    return [Message("assistant", tool_calls=(call,)), Message("tool", "probe_result", tool_call_id=call.id)]


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's words for training masks. We render what is inside."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a plain attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, it escapes no HTML characters: the reader is a model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise JinjaError(message)
