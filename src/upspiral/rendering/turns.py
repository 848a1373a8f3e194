"""What a template puts around answers, found by rendering small conversations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from upspiral.errors import TemplateError
from upspiral.rendering.chat_template import ChatTemplate
from upspiral.rendering.encoder import Encoder
from upspiral.rendering.thinking import KNOWN_TAGS, THINK, ThinkingTags
from upspiral.types import Message, Role, ToolCall

SENTINEL = "upspiral"
"""Content of dummy messages: no template treats it specially."""
QUESTION = "question"

ThinkingRule = Literal["always", "since_last_user", "never", "other"]
"""Of which past answers a template keeps the thinking. "other": it must be asked for each conversation."""


class Turns:
    """Raises TemplateError when the template changes the conversation as it adds the generation prompt."""

    def __init__(self, template: ChatTemplate, encoder: Encoder, eos_ids: Collection[int]) -> None:
        self._template = template
        self._encoder = encoder
        self._generation_texts: dict[Role, str] = {}
        self._leads: dict[Role, str] = {}
        self.end_of_turn = self._find_end_of_turn()
        """The token that the template closes an answer with. None: the next turn's first token ends it."""
        self.openers = () if self.end_of_turn is not None else self._find_openers(eos_ids)
        """Where nothing closes an answer: the special tokens that open the next turn, if the model stops with them."""
        self.thinking_tags = template.thinking_tags or self._tags_of_generation_text() or self._tags_of_vocabulary()
        self.thinking_rule: ThinkingRule = self._find_thinking_rule()

    def generation_text(self, after: Role) -> str:
        """The generation prompt behind a message of this role."""
        if after not in self._generation_texts:
            self._generation_texts[after] = self._find_generation_text(after)
        return self._generation_texts[after]

    def lead(self, after: Role) -> str:
        """What the template writes between the generation prompt and a call at once: white space, empty thinking."""
        if after not in self._leads:
            self._leads[after] = self._find_lead(after)
        return self._leads[after]

    def _find_lead(self, after: Role) -> str:
        text = self.generation_text(after)
        if self.thinking_tags.opened_by(text):
            return f"\n{self.thinking_tags.close}\n\n"
        tool_format = self._template.tool_format
        call = ToolCall("call00000", SENTINEL, "{}")
        if tool_format is None:
            return ""
        try:
            asked, answered = conversation_ending_with(after), Message("assistant", tool_calls=(call,))
            prompt = self._template.text(asked, generation_prompt=True)
            whole = self._template.text([*asked, answered])
        except TemplateError:
            return ""
        found = tool_format.find_call(whole[len(prompt) :], boundary=True)
        between = whole[len(prompt) :][: found.start]
        bare = between.replace(self.thinking_tags.open, "").replace(self.thinking_tags.close, "").strip()
        return between if whole.startswith(prompt) and found.opened and not bare else ""

    def _find_end_of_turn(self) -> int | None:
        closed = self._template.text([Message("user", QUESTION), Message("assistant", SENTINEL)])
        after_answer = self._encoder.ids(closed.rpartition(SENTINEL)[2])
        return next((index for index in after_answer if index in self._encoder.special), None)

    def _find_openers(self, eos_ids: Collection[int]) -> tuple[int, ...]:
        call = ToolCall("call00000", SENTINEL, "{}")
        tails = [
            [Message("assistant", SENTINEL), Message("user", SENTINEL)],
            [Message("assistant", SENTINEL, tool_calls=(call,)), Message("tool", SENTINEL, tool_call_id=call.id)],
        ]
        openers: list[int] = []
        for tail in tails:
            try:
                before = self._template.text([Message("user", QUESTION), *tail[:1]])
                text = self._template.text([Message("user", QUESTION), *tail])
            except TemplateError:
                continue
            added = self._encoder.ids(text[len(before) :]) if text.startswith(before) else []
            openers += [first for first in added[:1] if first in self._encoder.special and first in eos_ids]
        return tuple(dict.fromkeys(openers))

    def _find_generation_text(self, after: Role) -> str:
        try:
            asked = self._template.text(conversation_ending_with(after))
            prompted = self._template.text(conversation_ending_with(after), generation_prompt=True)
        except TemplateError:
            if after == "user":
                raise
            return self.generation_text("user")
        if not prompted.startswith(asked):
            raise TemplateError(
                f"chat template {self._template.name} changes the conversation when it adds the generation prompt"
            )
        return prompted[len(asked) :]

    def _tags_of_generation_text(self) -> ThinkingTags | None:
        text = self.generation_text("user")
        return next((tags for tags in KNOWN_TAGS if tags.open in text), None)

    def _tags_of_vocabulary(self) -> ThinkingTags:
        known = self._encoder.tokenizer.token_to_id
        return next((tags for tags in KNOWN_TAGS if known(tags.open) is not None), THINK)

    def _find_thinking_rule(self) -> ThinkingRule:
        if self._template.thinking_tags is None:
            return "never"
        call = ToolCall("call00000", SENTINEL, "{}")
        with_tools: list[Message] = [
            Message("user", QUESTION),
            Message("assistant", SENTINEL),
            Message("user", QUESTION),
            Message("assistant", SENTINEL, tool_calls=(call,)),
            Message("tool", SENTINEL, tool_call_id=call.id),
            Message("assistant", SENTINEL, tool_calls=(call,)),
            Message("tool", SENTINEL, tool_call_id=call.id),
        ]
        without = [Message("user", QUESTION), Message("assistant", SENTINEL), Message("user", QUESTION)]
        for messages in (with_tools, without) if self._template.knows_tools() else (without,):
            try:
                kept = kept_thoughts(messages, self._template.text)
            except TemplateError:
                continue
            if all(kept.values()):
                return "always"
            if not any(kept.values()):
                return "never"
            return "since_last_user" if list(kept.values()) == [False, True, True] else "other"
        return "other"


def kept_thoughts(messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> dict[int, bool]:
    """For each answer, by its index, whether its thinking is rendered: all of them are given a thought to look for."""
    thoughts = {
        index: f"thought-{index}-{SENTINEL}" for index, message in enumerate(messages) if message.role == "assistant"
    }
    thinking = [
        Message(m.role, m.text, thoughts[i], m.tool_calls) if i in thoughts else m for i, m in enumerate(messages)
    ]
    text = render(thinking)
    return {index: thought in text for index, thought in thoughts.items()}


def last_index(messages: Sequence[Message], roles: Collection[Role]) -> int:
    """The index of the last message with one of the roles; -1: there is none."""
    return next((index for index in range(len(messages) - 1, -1, -1) if messages[index].role in roles), -1)


def conversation_ending_with(role: Role) -> list[Message]:
    """The shortest conversation that ends with a message of this role."""
    question = Message("user", QUESTION)
    if role == "tool":
        call = ToolCall("call00000", SENTINEL, "{}")
        return [question, Message("assistant", tool_calls=(call,)), Message("tool", SENTINEL, tool_call_id=call.id)]
    if role == "user":
        return [question]
    return [question, Message(role, SENTINEL)]
