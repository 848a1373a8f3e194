"""Conversations in which templates and parsers are known to go wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from typing import Any

from upspiral.types import Message, ToolCall, ToolSpec

_PROPERTIES = {
    "command": {"type": "string"},
    "background": {"type": "boolean"},
    "timeout": {"type": "number"},
    "lines": {"type": "integer"},
    "env": {"type": "object"},
    "paths": {"type": "array", "items": {"type": "string"}},
    "user": {"type": ["string", "null"]},
}
TOOLS = (
    ToolSpec("bash", "Run a command.", {"type": "object", "properties": _PROPERTIES, "required": ["command"]}),
    ToolSpec("finish", "End the task.", {"type": "object", "properties": {}}),
)
_SYSTEM = Message("system", "Be brief.")
_QUESTION = Message("user", "How many files are there?")
_ANSWER = Message("assistant", "There are 3.")
_THANKS = Message("user", "And directories?")


@dataclass(frozen=True, slots=True)
class HardConversation:
    """A conversation and what is hard about it."""

    name: str
    messages: tuple[Message, ...]
    essential: bool = False
    """A template that fails here cannot be trained on. Elsewhere training goes on, at a cost that `certify` names."""
    truncated: int | None = None
    """The index of an answer that ended at the token limit."""

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return TOOLS if any(message.tool_calls for message in self.messages) else ()


def hard_conversations() -> list[HardConversation]:
    """The corpus, the plainest first."""
    return [
        HardConversation("questions and answers", (_SYSTEM, _QUESTION, _ANSWER, _THANKS, _ANSWER, _THANKS), True),
        HardConversation("tool turns", (_SYSTEM, _QUESTION, *_turn("ls"), *_turn("ls -a"), _ANSWER, _THANKS), True),
        HardConversation(
            "tool turns without a system prompt", (_QUESTION, *_turn("ls"), *_turn("ls -a"), _ANSWER), True
        ),
        HardConversation("parallel calls, results in a row", (_QUESTION, *_parallel(3), _ANSWER, _THANKS)),
        HardConversation("text beside a call", (_QUESTION, *_turn("ls", text="Let me look."), _ANSWER, _THANKS)),
        HardConversation("booleans, numbers, null, lists, objects", (_QUESTION, *_call(_typed_arguments()), _ANSWER)),
        HardConversation("no arguments", (_QUESTION, *_call({}, "finish"), _ANSWER, _THANKS)),
        HardConversation("empty strings", (_QUESTION, *_call({"command": ""}), Message("assistant"), _THANKS)),
        HardConversation("empty results", (_QUESTION, *_turn("true", result=""), *_turn("ls"), _ANSWER)),
        HardConversation(
            "quotes, line breaks, backslashes", (_QUESTION, *_turn("grep \"a\\b\" <<'E'\n\tx\nE\n"), _ANSWER)
        ),
        HardConversation("white space at the ends", (_QUESTION, *_turn("  ls \n", result="\n a.txt \n\n"), _ANSWER)),
        HardConversation(
            "unicode", (_QUESTION, *_turn("echo né 你好 👩‍👩‍👧 א", result="né 你好 👩‍👩‍👧 א\u200d"), _ANSWER)
        ),
        HardConversation("numbers and booleans as strings", (_QUESTION, *_turn("true"), *_turn("17"), _ANSWER)),
        HardConversation("marks of calls inside arguments", (_QUESTION, *_turn("echo '</tool_call>'"), _ANSWER)),
        HardConversation(
            "thinking between tools", (_QUESTION, *_turn("ls", "I wonder."), *_turn("ls -a", "Hm."), _ANSWER)
        ),
        HardConversation("thinking before a new question", (_QUESTION, *_thought(), _THANKS, *_thought(), _THANKS)),
        HardConversation("an answer cut off, then a question", (_QUESTION, _ANSWER, _THANKS), truncated=1),
        HardConversation("a call cut off, then its result", (_QUESTION, *_turn("ls"), _ANSWER), truncated=1),
        HardConversation(
            "a system message in the middle", (_QUESTION, _ANSWER, Message("system", "Now in French."), _THANKS)
        ),
        HardConversation("questions in a row", (_SYSTEM, _QUESTION, _THANKS, _ANSWER, _QUESTION, _THANKS)),
        HardConversation(
            "a question after tool results", (_QUESTION, *_turn("ls"), Message("user", "Hurry."), _ANSWER)
        ),
        HardConversation("answers in a row", (_QUESTION, _ANSWER, Message("assistant", "Or 4."), _THANKS)),
    ]


def _typed_arguments() -> dict[str, Any]:
    return {
        "command": "ls",
        "background": False,
        "timeout": 1.5,
        "lines": 17,
        "env": {"A": None, "b": [1, True]},
        "paths": [],
        "user": None,
    }


def _turn(command: str, thinking: str | None = None, *, text: str = "", result: str = "3 files") -> list[Message]:
    return _call({"command": command}, thinking=thinking, text=text, result=result)


def _call(
    arguments: dict[str, Any],
    name: str = "bash",
    *,
    thinking: str | None = None,
    text: str = "",
    result: str = "done",
) -> list[Message]:
    call = _tool_call(name, arguments)
    return [Message("assistant", text, thinking, (call,)), Message("tool", result, tool_call_id=call.id)]


def _parallel(number: int) -> list[Message]:
    calls = [_tool_call("bash", {"command": f"ls {index}"}) for index in range(number)]
    results = [Message("tool", f"result {index}", tool_call_id=call.id) for index, call in enumerate(calls)]
    return [Message("assistant", tool_calls=tuple(calls)), *results]


def _thought() -> list[Message]:
    return [Message("assistant", "There are 3.", "Let me count them.")]


_NUMBERS = count()


def _tool_call(name: str, arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(f"call_{next(_NUMBERS):016x}", name, json.dumps(arguments, ensure_ascii=False))
