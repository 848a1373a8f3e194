"""Messages to token ids and sampled ids back to messages. The only place that tokenizes (DESIGN law 1).

Like Hugging Face, all text is encoded with special tokens recognised, also inside what users and tools wrote: someone
who writes `<|im_end|>` into a file that a tool prints can end the tool's turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from upspiral.errors import TemplateError
from upspiral.rendering.answer import (
    TAGS,
    THINK_OPEN,
    AnswerReader,
    ParsedAnswer,
    ReadingRules,
    format_tool_call,
)
from upspiral.rendering.chat_template import ChatTemplate
from upspiral.rendering.model_folder import eos_token_ids, load_template, load_tokenizer
from upspiral.rendering.text_decoder import TextDecoder
from upspiral.types import FinishReason, Message, Role, ToolCall, ToolSpec

_SENTINEL = "upspiral"
"""Content of dummy messages: no template treats it specially."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The tokens that one message adds to a prompt."""

    role: Role
    message: Message
    token_ids: NDArray[np.int32]


class Renderer:
    """The words of one model. Immutable; safe to share between threads.

    Raises TemplateError when the chat template cannot render what is asked.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, eos_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._knows_tools = template.knows_tools()
        special = {index: token for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        # Tags that we parse stay visible even where a model declares them special.
        self._special_ids = set(special)
        self._hidden_ids = frozenset(index for index, token in special.items() if token.content not in TAGS)
        self._end_of_turn, self._generation_text = self._probe_turns()
        first = () if self._end_of_turn is None else (self._end_of_turn,)
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*first, *eos_ids]))
        """What ends an answer; the token that the template closes a turn with comes first."""
        self.generation_prompt: NDArray[np.int32] = _ids(self._encode(self._generation_text))
        """[T] what stands before an answer and is not sampled."""

    @classmethod
    def from_folder(cls, folder: Path | str) -> Renderer:
        """From a Hugging Face folder; needs no weights. Raises ModelError when a file is missing or unreadable."""
        folder = Path(folder)
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer, load_template(folder, tokenizer), eos_token_ids(folder, tokenizer))

    @property
    def template_name(self) -> str:
        return self._template.name

    @property
    def vocab_size(self) -> int:
        """Added tokens included. A model may have more rows in its embedding."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_answer(self, text: str) -> list[int]:
        """The ids of an answer that somebody else than the model wrote, without the stop token."""
        return self._encode(text)

    def format_tool_call(self, call: Mapping[str, Any]) -> str:
        """The text of a call `{"name": ..., "arguments": {...}}` as `parse` reads it."""
        return format_tool_call(call)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. Invalid UTF-8 becomes U+FFFD, so encoding it again need not give the ids
        back."""
        visible = [int(index) for index in token_ids if int(index) not in self._hidden_ids]
        return self._tokenizer.decode(visible, skip_special_tokens=False)

    def count(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> int:
        """Tokens of the whole prompt, generation prompt included."""
        rendered = sum(len(segment.token_ids) for segment in self.render(messages, tools))
        return rendered + len(self.generation_prompt)

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[Segment]:
        """One segment per message; joined they are the whole prompt without the generation prompt."""
        self._check_tools(tools)
        texts = [self._template.text(messages[: end + 1], tools) for end in range(len(messages))]
        if not texts:
            return []
        return self._segments(self._encoding(texts[-1]), texts, messages)

    def render_tail(self, messages: Sequence[Message], *, after: FinishReason) -> list[Segment]:
        """Only the new messages after an answer whose sampled ids are stored.

        With `after` "stop" those ids end with the stop token; otherwise the missing end of the turn comes first, not
        sampled. Rendered behind a dummy conversation that is then cut off, so it holds for any append-only template.
        """
        if self._end_of_turn is None:
            raise TemplateError(_no_end_of_turn(self._template.name))
        dummy = _dummy_exchange(messages)
        head = self._template.text(dummy)
        texts = [self._template.text([*dummy, *messages[: end + 1]]) for end in range(len(messages))]
        if not texts:
            return []
        head_ids, whole = self._encode(head), self._encoding(texts[-1])
        if whole.ids[: len(head_ids)] != head_ids:
            raise TemplateError(
                f"chat template {self._template.name} renders an answer differently once messages follow it; "
                f"it is not append-only at token {_first_difference(head_ids, whole.ids)}"
            )
        end_of_turn = len(head_ids) - 1 - head_ids[::-1].index(self._end_of_turn)
        start = end_of_turn + 1 if after == "stop" else end_of_turn
        return self._segments(whole, texts, messages, start)

    def parse(self, token_ids: Sequence[int], finish: FinishReason) -> ParsedAnswer:
        """What the sampled ids say. Never raises: a broken tool call stays in the text and is named in `errors`."""
        reader = self.answer_reader()
        reader.push(self.without_stop_token(token_ids, finish))
        reader.finish()
        return reader.answer()

    def answer_reader(self, rules: ReadingRules | None = None) -> AnswerReader:
        """Reads an answer while it is sampled."""
        thinking_is_open = self._generation_text.rstrip().endswith(THINK_OPEN)
        return AnswerReader(self.text_decoder(), replace(rules or ReadingRules(), thinking_is_open=thinking_is_open))

    def without_stop_token(self, token_ids: Sequence[int], finish: FinishReason | None) -> Sequence[int]:
        """The stop token was sampled and is recorded, but it is not part of the text."""
        stopped = finish == "stop" and len(token_ids) > 0 and int(token_ids[-1]) in self.stop_token_ids
        return token_ids[:-1] if stopped else token_ids

    def text_decoder(self) -> TextDecoder:
        return TextDecoder(self.decode)

    def check_append_only(self) -> None:
        """Raises TemplateError, naming the template and the first difference, when a longer conversation does not
        begin with the tokens of a shorter one. Everything that tokenizes once depends on it."""
        if self._end_of_turn is None:
            raise TemplateError(_no_end_of_turn(self._template.name))
        messages, tools = _probe_conversation()
        tools = tools if self._knows_tools else []
        messages = messages if tools else [m for m in messages if m.role != "tool" and not m.tool_calls]
        before: list[int] = []
        for end in range(1, len(messages) + 1):
            text = self._template.text(messages[:end], tools)
            if messages[end - 1].text not in text:
                role = messages[end - 1].role
                raise TemplateError(f"chat template {self._template.name} leaves out what role {role} says")
            after = self._encode(text)
            self._check_appended(before, after, messages[:end])
            prompt = self._template.text(messages[:end], tools, generation_prompt=True)
            if messages[end - 1].role in ("user", "tool"):
                self._check_appended(after, self._encode(prompt), messages[:end])
            before = after

    def _check_appended(self, before: list[int], after: list[int], messages: Sequence[Message]) -> None:
        at = _first_difference(before, after)
        if at < len(before):
            role = messages[-1].role
            was, now = (self._tokenizer.decode(ids[at : at + 8], False) for ids in (before, after))
            raise TemplateError(
                f"chat template {self._template.name} is not append-only: message {len(messages)} (role {role}) "
                f"changes what was rendered before it at token {at}, from {was!r} to {now!r}. Sampled tokens could "
                "not be kept; use a template that renders a message the same whatever follows it"
            )

    def _check_tools(self, tools: Sequence[ToolSpec]) -> None:
        if tools and not self._knows_tools:
            raise TemplateError(
                f"chat template {self._template.name} ignores tools, or does not write calls in Hermes format, and "
                "the tokenizer has no ChatML tokens for the template that upspiral ships; add a chat_template.jinja "
                "that renders tools to the model folder"
            )

    def _segments(
        self, whole: Encoding, texts: Sequence[str], messages: Sequence[Message], start: int = 0
    ) -> list[Segment]:
        """Cuts the tokens from index `start` on at the end of each message's text.

        `texts[i]` ends with message i. Where a longer rendering changes the end of a shorter one (a template that joins
        tool results into one turn), the message ends where the two part.
        """
        ends = [_shared_length(text, texts[-1]) for text in texts]
        starts = np.array([offset for offset, _ in whole.offsets])
        ids = np.asarray(whole.ids, np.int32)
        segments: list[Segment] = []
        for index, (message, end) in enumerate(zip(messages, ends, strict=True)):
            stop = len(ids) if index == len(ends) - 1 else int(np.searchsorted(starts, end))
            if stop <= start:
                raise TemplateError(
                    f"chat template {self._template.name} renders nothing of its own for message {index} "
                    f"(role {message.role})"
                )
            segments.append(Segment(message.role, message, ids[start:stop]))
            start = stop
        return segments

    def _probe_turns(self) -> tuple[int | None, str]:
        """The token that ends an answer in this template, and the text of the generation prompt."""
        question, answer = Message("user", _SENTINEL), Message("assistant", _SENTINEL)
        closed = self._template.text([question, answer])
        after_answer = self._encode(closed.rpartition(_SENTINEL)[2])
        end_of_turn = next((index for index in after_answer if index in self._special_ids), None)
        asked = self._template.text([question])
        prompted = self._template.text([question], generation_prompt=True)
        if not prompted.startswith(asked):
            raise TemplateError(
                f"chat template {self._template.name} changes the conversation when it adds the generation prompt"
            )
        return end_of_turn, prompted[len(asked) :]

    def _encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def _encoding(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _dummy_exchange(tail: Sequence[Message]) -> list[Message]:
    """A question and an answer; the answer calls the tools whose results the tail begins with, because some templates
    refuse results that nobody asked for."""
    calls: list[ToolCall] = []
    for message in tail:
        if message.role != "tool":
            break
        calls.append(ToolCall(message.tool_call_id or f"call{len(calls):05d}", _SENTINEL, "{}"))
    return [Message("user", _SENTINEL), Message("assistant", _SENTINEL, tool_calls=tuple(calls))]


def _probe_conversation() -> tuple[list[Message], list[ToolSpec]]:
    tool = ToolSpec(_SENTINEL, "A probe.", {"type": "object", "properties": {"word": {"type": "string"}}})
    call = ToolCall("call00000", tool.name, '{"word": "first"}')
    messages = [
        Message("system", "Be brief."),
        Message("user", "first question"),
        Message("assistant", "first answer"),
        Message("user", "second question"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "result", tool_call_id=call.id),
        Message("assistant", "second answer"),
        Message("user", "third question"),
    ]
    return messages, [tool]


def _no_end_of_turn(name: str) -> str:
    return (
        f"chat template {name} does not end an answer with a special token of its own, so upspiral cannot tell where "
        "the sampled tokens end and the next message begins; use a template that closes each turn, as ChatML does"
    )


def _shared_length(text: str, longer: str) -> int:
    return len(text) if longer.startswith(text) else _first_difference(text, longer)


def _first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ids(values: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)
