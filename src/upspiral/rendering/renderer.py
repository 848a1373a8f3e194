"""Messages to token ids and sampled ids back to messages. The only place that tokenizes (DESIGN law 1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from upspiral.errors import TemplateError
from upspiral.rendering.answer import AnswerParser, AnswerReader, ParsedAnswer, ReadingRules
from upspiral.rendering.boundaries import Boundaries
from upspiral.rendering.chat_template import ChatTemplate
from upspiral.rendering.encoder import Encoded, Encoder
from upspiral.rendering.formats.base import ToolFormat
from upspiral.rendering.formats.registry import HERMES
from upspiral.rendering.model_folder import eos_token_ids, load_template, load_tokenizer
from upspiral.rendering.segments import Segment, cut_segments, first_difference
from upspiral.rendering.tail import TailRenderer
from upspiral.rendering.text_decoder import TextDecoder
from upspiral.rendering.thinking import ThinkingTags
from upspiral.rendering.turns import SENTINEL, ThinkingRule, Turns, kept_thoughts, last_index
from upspiral.types import FinishReason, Message, Role, ToolCall, ToolSpec

__all__ = ["Renderer", "Segment"]


class Renderer:
    """The words of one model. Safe to share between threads.

    Special tokens inside what users and tools wrote are spelled out, so that a file that holds `<|im_end|>` cannot end
    the turn of the tool that prints it; `trust_contents` recognises them there as well, as Hugging Face does.

    Raises TemplateError when the chat template cannot render what is asked.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        eos_ids: Sequence[int] = (),
        *,
        trust_contents: bool = False,
    ) -> None:
        self._template = template
        self._encoder = Encoder(tokenizer, trust_contents=trust_contents)
        self._turns = Turns(template, self._encoder, eos_ids)
        self._tail = TailRenderer(template, self._encoder, self._turns)
        self.format: ToolFormat = template.tool_format or HERMES
        """How the model writes tool calls."""
        self._hidden_ids = self._find_hidden_ids()
        first = self._turns.openers if self._turns.end_of_turn is None else (self._turns.end_of_turn,)
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*first, *eos_ids]))
        """What ends an answer; the token that the template closes a turn with comes first."""
        self.generation_prompt: NDArray[np.int32] = self.generation_prompt_after("user")
        """[T] what stands before an answer to a user and is not sampled."""

    @classmethod
    def from_folder(cls, folder: Path | str, *, trust_contents: bool = False) -> Renderer:
        """From a Hugging Face folder; needs no weights. Raises ModelError when a file is missing or unreadable."""
        folder = Path(folder)
        tokenizer = load_tokenizer(folder)
        template = load_template(folder, tokenizer)
        return cls(tokenizer, template, eos_token_ids(folder, tokenizer), trust_contents=trust_contents)

    @property
    def template_name(self) -> str:
        return self._template.name

    @property
    def vocab_size(self) -> int:
        """Added tokens included. A model may have more rows in its embedding."""
        return self._encoder.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def knows_tools(self) -> bool:
        """Whether tools can be offered."""
        return self._template.knows_tools()

    @property
    def end_of_turn(self) -> int | None:
        """The token that the template closes an answer with; None: the next turn's first token ends it."""
        return self._turns.end_of_turn

    @property
    def thinking_tags(self) -> ThinkingTags:
        """What stands around thinking in answers."""
        return self._turns.thinking_tags

    @property
    def thinking_rule(self) -> ThinkingRule:
        """Of which past answers the template keeps the thinking."""
        return self._turns.thinking_rule

    @property
    def writes_dates(self) -> bool:
        """Whether the template can ask for today's date."""
        return "strftime_now" in self._template.source

    @property
    def guards_contents(self) -> bool:
        """Whether special tokens inside what users and tools wrote are spelled out."""
        return self._encoder.guards

    def encode_answer(self, text: str) -> list[int]:
        """The ids of an answer that somebody else than the model wrote, without the stop token."""
        return self._encoder.ids(text)

    def format_tool_call(self, call: Mapping[str, Any]) -> str:
        """The text of a call `{"name": ..., "arguments": {...}}` as `parse` reads it."""
        return self.format.format_call(ToolCall("", call["name"], json.dumps(call["arguments"], ensure_ascii=False)))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. Invalid UTF-8 becomes U+FFFD, so encoding it again need not give the ids
        back."""
        visible = [int(index) for index in token_ids if int(index) not in self._hidden_ids]
        return self._encoder.tokenizer.decode(visible, skip_special_tokens=False)

    def count(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> int:
        """Tokens of the whole prompt, generation prompt included."""
        self._check_tools(tools)
        after = messages[-1].role if messages else "user"
        rendered = len(self._encode(messages, tools).ids) if messages else 0
        return rendered + len(self.generation_prompt_after(after))

    def generation_prompt_after(self, role: Role) -> NDArray[np.int32]:
        """[T] what stands before an answer to a message of this role and is not sampled. Most templates write the same
        after all of them; some write nothing after tool results."""
        return _ids(self._encoder.ids(self._turns.generation_text(role)))

    def forced_text(self, name: str | None = None, after: Role = "user") -> str:
        """What is put behind the generation prompt so that the answer begins with a call of this tool, or of any. Goes
        into `ReadingRules.forced_text`."""
        return self._turns.lead(after) + self.format.forced_text(name)

    def forced_prefix(self, name: str | None = None, after: Role = "user") -> NDArray[np.int32]:
        """[T] the ids of `forced_text`, to stand behind the generation prompt and not to be sampled."""
        prompt, text = self._turns.generation_text(after), self.forced_text(name, after)
        before, whole = self._encoder.ids(prompt), self._encoder.ids(prompt + text)
        return _ids(whole[len(before) :] if whole[: len(before)] == before else self._encoder.ids(text))

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[Segment]:
        """One segment per message; joined they are the whole prompt without the generation prompt.

        Where the template writes a message differently once others follow it (it drops old thinking, or joins tool
        results into one turn), the segments still join to the encoding of the whole text.
        """
        self._check_tools(tools)
        if not messages:
            return []
        guarded, marks = self._encoder.guard(messages)
        text = self._template.text(guarded, tools)
        ends = Boundaries(self._template, guarded, tools, text).ends()
        return cut_segments(self._encoder.encode(text, marks), ends, messages)

    def render_tail(
        self,
        messages: Sequence[Message],
        *,
        after: FinishReason,
        stop_token: int | None = None,
        calls: Sequence[ToolCall] = (),
    ) -> list[Segment]:
        """Only the new messages after an answer whose sampled ids are stored, one segment each.

        With `after` "stop" those ids end with a stop token, which `stop_token` names; otherwise the missing end of the
        turn comes first, not sampled. Where nothing closes a turn (GLM), the stop token is the first token of the next
        turn and not repeated; where another turn follows than it announced, it stands and the turn is opened behind it.
        `calls` are those of the answer, whose names some templates write beside the results.

        Raises TailMismatch when the messages can only be rendered with the whole conversation.
        """
        if self._turns.end_of_turn is None and not self._turns.openers:
            raise TemplateError(_no_end_of_turn(self._template.name))
        return self._tail.render(messages, after, stop_token, calls)

    def thinking_kept_from(self, messages: Sequence[Message]) -> int:
        """The index of the first message from which on all answers keep their thinking when the template renders these
        messages whole; their number, when the last answer loses it. Cheap for the templates in use: the messages are
        rendered only when the template follows no rule that we know."""
        rule = self._turns.thinking_rule
        if rule == "always":
            return 0
        if rule == "never":
            return len(messages)
        if rule == "since_last_user":
            return last_index(messages, ("user",)) + 1
        kept = kept_thoughts(messages, self._template.text)
        return max((index + 1 for index, is_kept in kept.items() if not is_kept), default=0)

    def parse(self, token_ids: Sequence[int], finish: FinishReason, rules: ReadingRules | None = None) -> ParsedAnswer:
        """What the sampled ids say. Never raises: a broken tool call stays in the text and is named in `errors`."""
        reader = self.answer_reader(rules)
        reader.push(self.without_stop_token(token_ids, finish))
        reader.finish()
        return reader.answer()

    def answer_reader(self, rules: ReadingRules | None = None) -> AnswerReader:
        """Reads an answer while it is sampled."""
        rules = rules or ReadingRules()
        tags = self._turns.thinking_tags
        rules = replace(rules, thinking_is_open=tags.opened_by(self._turns.generation_text(rules.after)))
        return AnswerReader(self.text_decoder(), AnswerParser(rules, self.format, tags), rules.stop_strings)

    def without_stop_token(self, token_ids: Sequence[int], finish: FinishReason | None) -> Sequence[int]:
        """The stop token was sampled and is recorded, but it is not part of the text."""
        stopped = finish == "stop" and len(token_ids) > 0 and int(token_ids[-1]) in self.stop_token_ids
        return token_ids[:-1] if stopped else token_ids

    def text_decoder(self) -> TextDecoder:
        return TextDecoder(self.decode)

    def spell(self, token_ids: Sequence[int]) -> str:
        """The text of ids with all special tokens, for messages to people."""
        return self._encoder.tokenizer.decode([int(index) for index in token_ids], skip_special_tokens=False)

    def check_append_only(self) -> None:
        """Raises TemplateError, naming the template and the first difference, when what stood before an answer is
        rendered differently once the answer and a tool's result follow, or when something is left out.

        Everything that tokenizes once depends on it. A template may change the past when a new question comes (it drops
        thinking, or moves the tools); such a conversation is rendered whole.
        """
        if self._turns.end_of_turn is None and not self._turns.openers:
            raise TemplateError(_no_end_of_turn(self._template.name))
        messages, tools = _probe_conversation()
        tools = tools if self.knows_tools else []
        messages = messages if tools else [m for m in messages if m.role != "tool" and not m.tool_calls]
        asked = [end for end in range(1, len(messages) + 1) if messages[end - 1].role in ("user", "tool")]
        before: list[int] = []
        for end in asked:
            text = self._template.text(messages[:end], tools)
            prompt = self._template.text(messages[:end], tools, generation_prompt=True)
            after = self._encoder.ids(text)
            if messages[end - 1].role == "tool" or not tools:
                self._check_appended(before, after, messages[:end])
            self._check_appended(after, self._encoder.ids(prompt), messages[:end])
            before = after
        self._check_complete(messages, tools)

    def _check_complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> None:
        text = self._template.text(messages, tools)
        if left_out := [message.role for message in messages if message.text not in text]:
            raise TemplateError(f"chat template {self._template.name} leaves out what role {left_out[0]} says")

    def _check_appended(self, before: list[int], after: list[int], messages: Sequence[Message]) -> None:
        at = first_difference(before, after)
        if at < len(before):
            role = messages[-1].role
            was, now = (self.spell(ids[at : at + 8]) for ids in (before, after))
            raise TemplateError(
                f"chat template {self._template.name} is not append-only: message {len(messages)} (role {role}) "
                f"changes what was rendered before it at token {at}, from {was!r} to {now!r}. Sampled tokens could "
                "not be kept; use a template that renders a message the same whatever follows it"
            )

    def _check_tools(self, tools: Sequence[ToolSpec]) -> None:
        if tools and not self.knows_tools:
            raise TemplateError(
                f"chat template {self._template.name} ignores tools, or writes calls in no format that upspiral reads; "
                "the tokenizer has no ChatML tokens for the template that upspiral ships; add to the model folder a "
                "chat_template.jinja that renders tools"
            )

    def _encode(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Encoded:
        guarded, marks = self._encoder.guard(messages)
        return self._encoder.encode(self._template.text(guarded, tools), marks)

    def _find_hidden_ids(self) -> frozenset[int]:
        """Special tokens that no agent should see. The marks of calls and thinking are read, so they stay visible."""
        tags = self._turns.thinking_tags
        seen = {*self.format.tags, *HERMES.tags, tags.open, tags.close, "<think>", "</think>"}
        return frozenset(index for index, text in self._encoder.special.items() if text not in seen)


def _probe_conversation() -> tuple[list[Message], list[ToolSpec]]:
    tool = ToolSpec(SENTINEL, "A probe.", {"type": "object", "properties": {"word": {"type": "string"}}})
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


def _ids(values: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)
