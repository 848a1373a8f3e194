"""Chat templates: messages to text, the way Hugging Face renders them, without transformers.

Names and options of the Jinja environment follow transformers' documentation of chat templates: `raise_exception`,
`strftime_now`, `tojson` that escapes nothing, loop controls, trimmed blocks, and `{% generation %}` blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from itertools import chain
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from upspiral.errors import TemplateError
from upspiral.rendering.answer import AnswerParser, CallPiece, ReadingRules
from upspiral.rendering.formats.base import ToolFormat
from upspiral.rendering.formats.registry import FORMATS
from upspiral.rendering.segments import shared_length
from upspiral.rendering.thinking import ThinkingTags, tags_around
from upspiral.types import Message, ToolCall, ToolSpec


@dataclass(frozen=True, slots=True)
class MessageStyle:
    """How a template wants to be given messages. Templates differ, and say so only by failing or leaving things out."""

    arguments_as_text: bool = False
    """Arguments of calls as the text of a JSON object instead of the object."""
    none_beside_calls: bool = False
    """`content` is none beside tool calls, whatever was said: the template writes either the text or the calls."""
    short_ids: bool = False
    """Ids of tool calls have nine letters or digits."""
    several_as_text: ToolFormat | None = None
    """The template refuses several calls in one message: they then go in as text of this format, as the model wrote
    them."""
    thinking_key: str = "reasoning_content"
    """The field of the message that holds thinking; "": a part of `content` of type "thinking"."""


_STYLES = tuple(
    MessageStyle(arguments_as_text=as_text, none_beside_calls=as_none)
    for as_text in (False, True)
    for as_none in (False, True)
)
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking", "")
_PROBE_TOOL = ToolSpec("probe_tool", "probe", {"type": "object", "properties": {"key": {"type": "string"}}})
_PROBE_CALL = ToolCall("call00000", _PROBE_TOOL.name, '{"key": "probe_argument"}')
_LONG_ID, _TWO_IDS = "call_0123456789abcdef", ("call00000", "call00001")
_QUESTION, _THOUGHT, _REPLY = "question", "probe_thought", "probe_reply"


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
        self._style = MessageStyle()
        self._style, self.tool_format = self._probe_style()
        """`tool_format`: how it writes calls; None when it does not list tools, write calls or render their results."""
        self._style, self.thinking_tags = self._probe_thinking()
        """`thinking_tags`: what it puts around the thinking of an answer; None when it leaves thinking out."""

    def text(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generation_prompt: bool = False
    ) -> str:
        """The rendered conversation. Raises TemplateError when the template refuses it."""
        variables = {
            **self._special_tokens,
            "messages": [template_message(message, self._style) for message in messages],
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
        """Whether it lists offered tools, writes calls in a format that we read, and renders their results."""
        return self.tool_format is not None

    def answer_text(self, answer: Message, tools: Sequence[ToolSpec] = ()) -> str:
        """What it writes for an answer to a question, from behind the generation prompt to the end.

        Where the generation prompt ends cannot be told from it alone, since it may open a thought that a rendered
        answer does not have; so it is where an answer of plain text begins.
        """
        question = Message("user", _QUESTION)
        plain = self.text([question, Message("assistant", _REPLY)], tools).rpartition(_REPLY)[0]
        whole = self.text([question, answer], tools)
        if whole.startswith(plain):
            return whole[len(plain) :]
        shared = shared_length(plain, whole)
        # Both may go on with a tag and share its first letters: the cut is behind the last mark or space.
        return whole[max(map(whole[:shared].rfind, ">] \n\t")) + 1 :]

    def _probe_style(self) -> tuple[MessageStyle, ToolFormat | None]:
        """The first style in which calls come out readable, and their format."""
        for style in _STYLES:
            self._style = style
            try:
                found = self._find_format()
            except TemplateError:
                continue
            if found is not None:
                short_ids, one_call = self._refuses(_LONG_ID), self._refuses(*_TWO_IDS)
                return replace(style, short_ids=short_ids, several_as_text=found if one_call else None), found
        return MessageStyle(), None

    def _find_format(self) -> ToolFormat | None:
        """The format that reads a probe call back exactly, if possible one that also writes it the same."""
        question, call = Message("user", _QUESTION), Message("assistant", tool_calls=(_PROBE_CALL,))
        listed = self.text([question], [_PROBE_TOOL])
        answered = self.text([question, call, _result(_PROBE_CALL.id)], [_PROBE_TOOL])
        if _PROBE_TOOL.name not in listed or "probe_result" not in answered:
            return None
        text = self.answer_text(call, [_PROBE_TOOL])
        readable = [each for each in FORMATS if _reads(each, text)]
        written = (each for each in readable if each.format_call(_PROBE_CALL) in text)
        begun = (each for each in readable if each.forced_text(_PROBE_CALL.name) in text)
        return next(chain(written, begun, readable), None)

    def _refuses(self, *call_ids: str) -> bool:
        """Whether it cannot render an answer with calls of these ids, and their results."""
        call = Message("assistant", tool_calls=tuple(replace(_PROBE_CALL, id=each) for each in call_ids))
        try:
            self.text([Message("user", _QUESTION), call, *map(_result, call_ids)], [_PROBE_TOOL])
        except TemplateError:
            return True
        return False

    def _probe_thinking(self) -> tuple[MessageStyle, ThinkingTags | None]:
        style = self._style
        for key in _THINKING_KEYS:
            self._style = replace(style, thinking_key=key)
            try:
                text = self.text([Message("user", _QUESTION), Message("assistant", _REPLY, thinking=_THOUGHT)])
            except TemplateError:
                continue
            if (tags := tags_around(_THOUGHT, text)) is not None:
                return self._style, tags
        return style, None


def template_message(message: Message, style: MessageStyle = MessageStyle()) -> dict[str, Any]:
    """The dictionary that templates expect. Arguments go in as an object: most templates write them with `tojson`."""
    if style.several_as_text is not None and len(message.tool_calls) > 1:
        calls = style.several_as_text.format_calls(message.tool_calls)
        message = replace(message, text=f"{message.text}\n{calls}" if message.text else calls, tool_calls=())
    content: Any = None if style.none_beside_calls and message.tool_calls else message.text
    entry: dict[str, Any] = {"role": message.role, "content": content}
    if message.thinking is not None and style.thinking_key:
        entry[style.thinking_key] = message.thinking
    elif message.thinking:
        entry["content"] = [{"type": "thinking", "thinking": message.thinking}, {"type": "text", "text": content or ""}]
    if message.tool_calls:
        entry["tool_calls"] = [_template_call(call, style) for call in message.tool_calls]
    if message.tool_call_id is not None:
        entry["tool_call_id"] = _call_id(message.tool_call_id, style)
    return entry


def _template_call(call: ToolCall, style: MessageStyle) -> dict[str, Any]:
    arguments = _arguments(call.arguments)
    if style.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": _call_id(call.id, style), "type": "function", "function": function}


def template_tool(tool: ToolSpec) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": function}


def _call_id(call_id: str, style: MessageStyle) -> str:
    """The id, or nine characters that stand for it."""
    if not style.short_ids or (len(call_id) == 9 and call_id.isascii() and call_id.isalnum()):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TemplateError(f"the arguments of a tool call are not valid JSON ({error}): {text[:80]!r}") from error


def _result(call_id: str) -> Message:
    return Message("tool", "probe_result", tool_call_id=call_id)


def _reads(tool_format: ToolFormat, text: str) -> bool:
    parser = AnswerParser(ReadingRules(tools=(_PROBE_TOOL,)), tool_format)
    pieces = [*parser.push(text), *parser.finish()]
    calls = [(piece.call.name, piece.call.arguments) for piece in pieces if isinstance(piece, CallPiece)]
    return calls == [(_PROBE_CALL.name, _PROBE_CALL.arguments)]


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
