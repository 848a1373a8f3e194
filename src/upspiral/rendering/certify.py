"""Whether a model's chat template can be trained on, tried out on hard conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from upspiral.errors import TailMismatch, TemplateError
from upspiral.rendering.answer import AnswerParser, CallPiece, ReadingRules, TextPiece
from upspiral.rendering.hard_conversations import HardConversation, hard_conversations
from upspiral.rendering.renderer import Renderer, Segment
from upspiral.rendering.segments import first_difference
from upspiral.types import FinishReason, Message, Role

Verdict = Literal["holds", "costs", "breaks"]
_CONTEXT_ROLES = ("user", "tool", "system")
_THINKING = {
    "always": "keeps that of all past answers",
    "since_last_user": "keeps that of answers behind the last question, drops the rest",
    "never": "is not rendered in past answers",
    "other": "is kept by a rule of its own, which is asked for each conversation",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one hard conversation."""

    name: str
    verdict: Verdict
    """"costs": training goes on, and `advice` says what it costs. "breaks": the template cannot be trained on."""
    found: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known of a template."""

    template: str
    facts: tuple[tuple[str, str], ...]
    """Name and value: tool format, stop tokens, thinking, forced calls."""
    findings: tuple[Finding, ...]

    @property
    def trainable(self) -> bool:
        return not any(finding.verdict == "breaks" for finding in self.findings)


def certify(renderer: Renderer) -> Certificate:
    """Renders the corpus in one piece and turn by turn, and compares. Raises nothing: what goes wrong is a finding."""
    findings = [_append_only(renderer)]
    for conversation in hard_conversations():
        if conversation.tools and not renderer.knows_tools:
            continue
        findings.append(_examine(renderer, conversation))
    if not renderer.knows_tools:
        advice = "agents can be trained that use no tools of the wire API; else add a chat_template.jinja with tools"
        findings.append(Finding("tools", "costs", "the template knows none in a format that upspiral reads", advice))
    findings.append(_forced_calls(renderer))
    findings.append(_special_tokens(renderer))
    return Certificate(renderer.template_name, tuple(_facts(renderer)), tuple(findings))


class _Broken(Exception):
    """Something does not hold. Private to this file: `_examine` makes a finding of it."""

    def __init__(self, found: str, advice: str, *, verdict: Verdict = "costs", is_fork: bool = False) -> None:
        super().__init__(found)
        self.found, self.advice, self.is_fork = found, advice, is_fork
        self.verdict: Verdict = verdict


def _append_only(renderer: Renderer) -> Finding:
    try:
        renderer.check_append_only()
    except TemplateError as error:
        return Finding("what came before an answer stays", "breaks", str(error), "use another template")
    return Finding("what came before an answer stays", "holds")


def _examine(renderer: Renderer, conversation: HardConversation) -> Finding:
    try:
        segments = _rendered(renderer, conversation)
        _check_tails(renderer, conversation, segments)
        _check_complete(renderer, conversation, segments)
        _check_answers(renderer, conversation, segments)
    except _Broken as broken:
        verdict = "breaks" if conversation.essential and not broken.is_fork else broken.verdict
        found = broken.found.replace(f"chat template {renderer.template_name} ", "the template ")
        return Finding(conversation.name, verdict, found, broken.advice)
    return Finding(conversation.name, "holds")


def _rendered(renderer: Renderer, conversation: HardConversation) -> list[Segment]:
    try:
        return renderer.render(conversation.messages, conversation.tools)
    except TemplateError as error:
        advice = "an agent that sends this gets HTTP 400; if yours does, use a template that allows it"
        raise _Broken(f"is refused: {error}", advice) from error


def _check_tails(renderer: Renderer, conversation: HardConversation, segments: Sequence[Segment]) -> None:
    """The messages behind each answer, rendered as a tail, must be what the whole conversation has there."""
    messages = conversation.messages
    for index, end in _tails(messages):
        after: FinishReason = "length" if index == conversation.truncated else "stop"
        whole = _ids(renderer.render(messages[:end], conversation.tools)) if end < len(messages) else _ids(segments)
        start, stop_token = _end_of_answer(renderer, messages[:end], conversation, index, whole)
        expected = whole[start if after == "stop" else start - 1 :]
        try:
            tail = _ids(
                renderer.render_tail(
                    messages[index + 1 : end], after=after, stop_token=stop_token, calls=messages[index].tool_calls
                )
            )
        except TailMismatch as error:
            advice = "the whole conversation is rendered there: exact, but a fork, and its past is computed again"
            raise _Broken(str(error), advice, is_fork=True) from error
        if not np.array_equal(tail, expected):
            at = first_difference(expected.tolist(), tail.tolist())
            was, now = (renderer.spell(ids[at : at + 6].tolist()) for ids in (expected, tail))
            raise _Broken(
                f"behind message {index + 1} the whole conversation has {was!r} at token {at}, a tail {now!r}",
                "new messages would stand differently in training than the template writes them; report this template",
                verdict="breaks",
            )


def _tails(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Each answer that something follows, and where the next answer is to be sampled."""
    for index, message in enumerate(messages[:-1]):
        following = index + 1
        while following < len(messages) and messages[following].role in _CONTEXT_ROLES:
            following += 1
        if message.role == "assistant" and following > index + 1:
            yield index, following


def _end_of_answer(
    renderer: Renderer,
    messages: Sequence[Message],
    conversation: HardConversation,
    index: int,
    whole: NDArray[np.int32],
) -> tuple[int, int]:
    """The first token behind the one that ends the answer, and that token, in the whole conversation."""
    segments = renderer.render(messages, conversation.tools)
    end = sum(len(segment.token_ids) for segment in segments[: index + 1])
    if renderer.end_of_turn is None:
        return end + 1, int(whole[end])
    closing = np.flatnonzero(whole[:end] == renderer.end_of_turn)
    if not len(closing):
        raise _Broken(f"message {index + 1} is not closed", "use a template that closes each answer", verdict="breaks")
    return int(closing[-1]) + 1, int(whole[closing[-1]])


def _check_complete(renderer: Renderer, conversation: HardConversation, segments: Sequence[Segment]) -> None:
    """Whatever was said is somewhere in the text."""
    text = renderer.spell(_ids(segments).tolist())
    for index, message in enumerate(conversation.messages):
        said = message.text.strip()
        # Some templates write contents as JSON.
        if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            what = f"message {index + 1} (role {message.role}) says {said[:40]!r}, which is not rendered"
            raise _Broken(what, "what was sampled is kept; only where a conversation is rendered whole this is lost")


def _check_answers(renderer: Renderer, conversation: HardConversation, segments: Sequence[Segment]) -> None:
    """Rendered answers must be read back as they were."""
    for index, (message, segment) in enumerate(zip(conversation.messages, segments, strict=True)):
        if message.role != "assistant":
            continue
        text, calls = _read_back(renderer, conversation, index, segment)
        wanted = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
        if calls != wanted:
            advice = (
                "calls that the model writes so are read so; the values differ when a conversation is rendered whole"
            )
            raise _Broken(f"message {index + 1} calls {wanted} and is read back as {calls}", advice)
        if text.strip() != message.text.strip():
            advice = "text that agents put into the history themselves is read back differently"
            raise _Broken(f"message {index + 1} says {message.text!r} and is read back as {text!r}", advice)


def _read_back(
    renderer: Renderer, conversation: HardConversation, index: int, segment: Segment
) -> tuple[str, list[tuple[str, object]]]:
    ids = segment.token_ids.tolist()
    if renderer.end_of_turn in ids:
        ids = ids[: len(ids) - ids[::-1].index(renderer.end_of_turn) - 1]
    before: Role = conversation.messages[index - 1].role
    prompt = renderer.generation_prompt_after(before).tolist()
    shared = first_difference(prompt, ids)
    is_open = renderer.thinking_tags.opened_by(renderer.spell(ids[:shared]))
    rules = ReadingRules(thinking_is_open=is_open, tools=conversation.tools)
    parser = AnswerParser(rules, renderer.format, renderer.thinking_tags)
    pieces = [*parser.push(renderer.decode(ids[shared:])), *parser.finish()]
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    return text, [(p.call.name, json.loads(p.call.arguments)) for p in pieces if isinstance(p, CallPiece)]


def _forced_calls(renderer: Renderer) -> Finding:
    """A forced beginning and what the template writes behind it must be one call."""
    name = "forced tool choice"
    if not renderer.knows_tools:
        return Finding(name, "costs", "is not possible without tools", "requests with tool_choice required are refused")
    conversation = next(each for each in hard_conversations() if each.tools)
    call = next(message.tool_calls[0] for message in conversation.messages if message.tool_calls)
    written = renderer.format.format_call(call)
    for tool in (None, call.name):
        text = renderer.format.forced_text(tool)
        if not written.startswith(text):
            return Finding(name, "breaks", f"{text!r} does not begin {written!r}", "report this template")
        rules = ReadingRules(tools=conversation.tools, forced_text=renderer.forced_text(tool))
        answer = renderer.parse(renderer.encode_answer(written[len(text) :]), "length", rules).message
        if [each.name for each in answer.tool_calls] != [call.name]:
            return Finding(name, "breaks", f"a call behind {text!r} is not read", "report this template")
    return Finding(name, "holds")


def _special_tokens(renderer: Renderer) -> Finding:
    """A special token inside a content must not be one in the prompt."""
    name = "special tokens inside contents"
    plain = Message("user", "What does x mean?")
    marked = [replace(plain, text=plain.text.replace("x", renderer.spell([each]))) for each in renderer.stop_token_ids]
    advice = "a user or a tool can end its own turn by writing that token; keep untrusted text from it"
    try:
        expected = _specials(renderer, renderer.render([plain]))
        found = [_specials(renderer, renderer.render([each])) for each in marked]
    except TemplateError as error:
        return Finding(name, "costs", str(error), advice)
    if any(each != expected for each in found):
        return Finding(name, "costs", "are recognised: this tokenizer cannot spell them out", advice)
    return Finding(name, "holds")


def _specials(renderer: Renderer, segments: Sequence[Segment]) -> int:
    return int(np.isin(_ids(segments), renderer.stop_token_ids).sum())


def _facts(renderer: Renderer) -> Iterator[tuple[str, str]]:
    yield "tool format", renderer.format.name if renderer.knows_tools else "none"
    yield "stop tokens", ", ".join(f"{renderer.spell([each])} ({each})" for each in renderer.stop_token_ids) or "none"
    closed = renderer.end_of_turn is not None
    yield "an answer ends with", "a token of its own" if closed else "the first token of the next turn"
    yield "generation prompt", repr(renderer.spell(renderer.generation_prompt.tolist()))
    yield "thinking", f"in {renderer.thinking_tags.open}, {_THINKING[renderer.thinking_rule]}"
    if renderer.knows_tools:
        yield "forced call", f"{renderer.forced_text()!r}, of a tool {renderer.forced_text('bash')!r}"
    if renderer.writes_dates:
        yield "dates", "the template writes today's date: a conversation that is rendered whole tomorrow differs"
    guarded = "spelled out" if renderer.guards_contents else "recognised"
    yield "special tokens in contents", guarded


def _ids(segments: Sequence[Segment]) -> NDArray[np.int32]:
    return np.concatenate([segment.token_ids for segment in segments]) if segments else np.empty(0, np.int32)
