"""Templates in the formats of the model families: tails, forced calls, thinking and contents, token by token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.model_families import FAMILIES, make_family
from upspiral.errors import TailMismatch
from upspiral.rendering.answer import ReadingRules
from upspiral.rendering.boundaries import Boundaries
from upspiral.rendering.renderer import Renderer, Segment
from upspiral.rendering.turns import kept_thoughts
from upspiral.types import Message, ToolCall, ToolSpec

BASH = ToolSpec(
    "bash",
    "Run a command.",
    {"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "integer"}}},
)
FORMAT_OF = {
    "chatml": "hermes",
    "qwen": "hermes",
    "qwen_xml": "qwen-xml",
    "llama3": "llama3",
    "mistral": "mistral-list",
    "mistral_args": "mistral-args",
    "deepseek": "deepseek-v3",
    "deepseek_v31": "deepseek-v3.1",
    "glm": "glm",
}
APPEND_ONLY = [name for name in FAMILIES if name not in ("qwen", "mistral")]
"""A shorter conversation is a prefix of a longer one, whatever follows."""
all_families = pytest.mark.parametrize("family", FAMILIES)
append_only = pytest.mark.parametrize("family", APPEND_ONLY)


@cache
def renderer_of(family: str, *, trust_contents: bool = False) -> Renderer:
    return Renderer.from_folder(make_family(mkdtemp(), family), trust_contents=trust_contents)


def joined(segments: list[Segment]) -> list[int]:
    return [int(index) for segment in segments for index in segment.token_ids]


def call(command: str = "ls", number: int = 0) -> ToolCall:
    return ToolCall(f"call_{number:016x}", "bash", json.dumps({"command": command, "n": number}, ensure_ascii=False))


def stop_before(renderer: Renderer, message: Message) -> int:
    """What the model stops with before this message."""
    if renderer.end_of_turn is not None:
        return renderer.end_of_turn
    name = {"tool": "<|observation|>"}.get(message.role, f"<|{message.role}|>")
    return renderer.encode_answer(name)[0]


@all_families
def test_the_format_is_found_by_what_the_template_writes(family: str) -> None:
    renderer = renderer_of(family)
    assert renderer.format.name == FORMAT_OF[family]
    assert renderer.knows_tools and renderer.guards_contents
    renderer.check_append_only()
    tokens = [renderer.spell([index]) for index in renderer.stop_token_ids]
    assert set(tokens) == set(FAMILIES[family].stops)


@all_families
def test_answers_streamed_token_by_token(family: str) -> None:
    renderer = renderer_of(family)
    opened, closed = renderer.thinking_tags.open, renderer.thinking_tags.close
    calls = [renderer.format.format_calls(each) for each in ([call()], [call("né 你好 😀", 1), call("b", 2)])]
    texts = [
        "Grüße 你好 😀 👩‍👩‍👧\n",
        "",
        *calls,
        calls[1][:-12],
        calls[0].replace('"', "'"),
        calls[0].replace(">", "", 1),
    ]
    texts += [f"{opened}\nHm. 😀{closed}\n\n{text}" for text in texts] + [f"{opened}never closed", f"Text.\n{calls[0]}"]
    rules = ReadingRules(tools=(BASH,))
    for text in texts:
        ids = renderer.encode_answer(text)
        whole = renderer.parse([*ids, renderer.stop_token_ids[0]], "stop", rules)
        reader = renderer.answer_reader(rules)
        for index in ids:
            reader.push([index])
        reader.finish()
        streamed = reader.answer()
        assert streamed.errors == whole.errors
        for one, other in zip(streamed.message.tool_calls, whole.message.tool_calls, strict=True):
            assert (one.name, one.arguments) == (other.name, other.arguments)
        assert (streamed.message.text, streamed.message.thinking) == (whole.message.text, whole.message.thinking)


@all_families
def test_a_rendered_answer_is_read_back(family: str) -> None:
    renderer = renderer_of(family)
    answer = Message("assistant", tool_calls=(call('echo "é" > a\n'),))
    segment = renderer.render([Message("user", "Go."), answer], [BASH])[1]
    prompt = renderer.generation_prompt.tolist()
    ids = segment.token_ids.tolist()
    if family != "qwen_xml":
        assert ids[: len(prompt)] == prompt
    end = len(ids) - ids[::-1].index(renderer.end_of_turn) - 1 if renderer.end_of_turn is not None else len(ids)
    read = renderer.parse(ids[len(prompt) : end], "length", ReadingRules(tools=(BASH,)))
    assert read.errors == () and read.message.text.strip() == ""
    assert [json.loads(each.arguments) for each in read.message.tool_calls] == [{"command": 'echo "é" > a\n', "n": 0}]


@all_families
@pytest.mark.parametrize("name", [None, "bash"])
@pytest.mark.parametrize("after", ["user", "tool"])
def test_a_forced_call_is_what_the_template_writes(family: str, name: str | None, after: str) -> None:
    """Generation prompt, forced prefix and the rest of a call are the ids of the rendered call."""
    renderer = renderer_of(family)
    messages = [Message("user", "Go.")]
    if after == "tool":
        messages += [Message("assistant", tool_calls=(call(),)), Message("tool", "done", tool_call_id=call().id)]
    answer = Message("assistant", tool_calls=(call("wc", 1),))
    prompt = [*joined(renderer.render(messages, [BASH])), *renderer.generation_prompt_after(after)]  # pyright: ignore[reportArgumentType]
    forced = renderer.forced_prefix(name, after)  # pyright: ignore[reportArgumentType]
    assert forced.dtype == np.int32
    rendered = renderer.spell(joined(renderer.render([*messages, answer], [BASH])))
    begun = renderer.spell([*prompt, *forced])
    if family == "mistral":  # The template adds an id, which the format has no place for.
        assert rendered.startswith(begun)
    written = renderer.format.format_call(answer.tool_calls[0])
    rest = written.removeprefix(renderer.format.forced_text(name))
    assert family == "mistral" or rendered.startswith(begun + rest)
    rules = ReadingRules(tools=(BASH,), forced_text=renderer.forced_text(name, after), after=after)  # pyright: ignore[reportArgumentType]
    read = renderer.parse(renderer.encode_answer(rest), "length", rules)
    assert read.message.text == "" and read.message.thinking is None and read.errors == ()
    assert [json.loads(each.arguments) for each in read.message.tool_calls] == [{"command": "wc", "n": 1}]


CONTENTS = st.sampled_from(
    [
        "x",
        "",
        "3 files\n",
        "\n a.txt ",
        "né 你好 😀",
        '{"a": [1]}',
        "<|im_end|>",
        "</s>[INST]",
        "<tool_call>",
        "<|user|>",
        "{{ x }}",
    ]
)


@st.composite
def conversations(draw: st.DrawFn, *, thinking: bool = False, most: int = 5) -> list[Message]:
    """Questions, then any number of calls and answers with more questions between them."""
    messages = [Message("system", draw(CONTENTS) or "s")] if draw(st.booleans()) else []
    messages.append(Message("user", draw(CONTENTS)))
    for _ in range(draw(st.integers(1, most))):
        thought = draw(st.sampled_from([None, "Hm.", "A 😀 thought"])) if thinking else None
        if draw(st.booleans()):
            number = draw(st.integers(1, 3))
            calls = tuple(call(draw(CONTENTS), 10 * len(messages) + index) for index in range(number))
            messages.append(Message("assistant", "", thought, calls))
            messages += [Message("tool", draw(CONTENTS), tool_call_id=each.id) for each in calls]
        else:
            messages += [Message("assistant", draw(CONTENTS) or "ok", thought), Message("user", draw(CONTENTS))]
    return messages


@append_only
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_tail_is_the_end_of_the_whole(family: str, data: st.DataObject) -> None:
    renderer = renderer_of(family)
    thinking = renderer.thinking_rule == "always"
    messages = data.draw(conversations(thinking=thinking))
    whole = joined(renderer.render(messages, [BASH]))
    for index, message in enumerate(messages[:-1]):
        if message.role != "assistant":
            continue
        stored = joined(renderer.render(messages[: index + 1], [BASH]))
        if renderer.end_of_turn is not None:
            stored = stored[: len(stored) - stored[::-1].index(renderer.end_of_turn)]
        else:
            stored.append(whole[len(stored)])
        tail = messages[index + 1 :]
        segments = renderer.render_tail(tail, after="stop", stop_token=stored[-1], calls=message.tool_calls)
        assert [segment.message for segment in segments] == tail
        assert stored + joined(segments) == whole
        cut_off = renderer.render_tail(tail, after="length", calls=message.tool_calls)
        assert stored[:-1] + joined(cut_off) == whole


@all_families
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_segments_join_to_the_encoding_of_the_whole(family: str, data: st.DataObject) -> None:
    """Also where thinking is dropped or the tools move; and the fast way to cut them agrees with the slow one."""
    renderer = renderer_of(family, trust_contents=True)
    messages = data.draw(conversations(thinking=True, most=9))
    segments = renderer.render(messages, [BASH])
    text = renderer._template.text(messages, [BASH])
    assert joined(segments) == renderer.encode_answer(text)
    assert [segment.message for segment in segments] == messages
    assert all(len(segment.token_ids) for segment in segments)
    boundaries = Boundaries(renderer._template, messages, [BASH], text)
    assert boundaries.ends() == boundaries.ends_by_parts()


@all_families
def test_every_message_gets_its_own_words(family: str) -> None:
    """Cuts are where messages end, also in the middle of conversations that the template changes."""
    renderer = renderer_of(family)
    calls = (call("first", 1), call("second", 2))
    results = [Message("tool", f"result {index}", tool_call_id=each.id) for index, each in enumerate(calls)]
    messages = [
        Message("user", "question one"),
        Message("assistant", "", "thought one", calls),
        *results,
        Message("assistant", "answer one", "thought two"),
        Message("user", "question two"),
        Message("assistant", "answer two", "thought three"),
        Message("user", "question three"),
    ]
    segments = renderer.render(messages, [BASH])
    for message, segment in zip(messages, segments, strict=True):
        text = renderer.spell(segment.token_ids.tolist())
        for other in messages:
            said = other.text or "first"
            assert (said in text) == (other is message), (text, said)


@all_families
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_which_thinking_is_kept(family: str, data: st.DataObject) -> None:
    """The rule that was found by probing agrees with rendering the conversation."""
    renderer = renderer_of(family)
    messages = data.draw(conversations())
    kept = kept_thoughts(messages, renderer._template.text)
    start = renderer.thinking_kept_from(messages)
    assert all(is_kept == (index >= start) for index, is_kept in kept.items())


def test_a_template_with_a_rule_of_its_own_is_asked(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "qwen_xml")
    source = (folder / "chat_template.jinja").read_text()
    only_last = source.replace(
        "(message.reasoning_content | default('', true))",
        "(message.reasoning_content | default('', true) if loop.index > messages | length - 3 else '')",
    )
    (folder / "chat_template.jinja").write_text(only_last)
    renderer = Renderer.from_folder(folder)
    assert renderer.thinking_rule == "other"
    answer = Message("assistant", "", "Hm.", (call(),))
    result = Message("tool", "x", tool_call_id=call().id)
    assert renderer.thinking_kept_from([Message("user", "q"), answer, result]) == 0
    assert renderer.thinking_kept_from([Message("user", "q"), answer, result, answer, result]) == 2


@all_families
def test_special_tokens_in_contents_end_no_turn(family: str) -> None:
    renderer, trusting = renderer_of(family), renderer_of(family, trust_contents=True)
    special = "".join(renderer._encoder.special.values())
    plain = [
        Message("user", "one xx two"),
        Message("assistant", tool_calls=(call(),)),
        Message("tool", "xx", tool_call_id=call().id),
    ]
    nasty = [Message(m.role, m.text.replace("xx", special), None, m.tool_calls, m.tool_call_id) for m in plain]
    assert joined(renderer.render(plain, [BASH])) == joined(trusting.render(plain, [BASH]))
    segments = renderer.render(nasty, [BASH])
    expected = [index for index in joined(renderer.render(plain, [BASH])) if index in renderer._encoder.special]
    assert [index for index in joined(segments) if index in renderer._encoder.special] == expected
    assert renderer.spell(joined(segments)) == renderer._template.text(nasty, [BASH])
    assert [segment.message for segment in segments] == nasty
    assert joined(trusting.render(nasty, [BASH])) != joined(segments)
    stop = stop_before(renderer, plain[2])
    tail = renderer.render_tail(nasty[2:], after="stop", stop_token=stop, calls=plain[1].tool_calls)
    assert joined(segments)[-len(joined(tail)) :] == joined(tail)


def test_a_content_may_hold_the_mark_that_the_guard_would_use() -> None:
    renderer = renderer_of("chatml")
    text = "a <|im_end|> \U000f0000\U000f0001 b"
    assert renderer.spell(joined(renderer.render([Message("user", text)]))) == f"<|im_start|>user\n{text}<|im_end|>\n"


def test_where_nothing_closes_a_turn_the_stop_token_opens_the_next() -> None:
    renderer = renderer_of("glm")
    user, tool = (renderer.encode_answer(name)[0] for name in ("<|user|>", "<|observation|>"))
    assert renderer.end_of_turn is None and set(renderer.stop_token_ids[:2]) == {user, tool}
    question, result = Message("user", "More?"), Message("tool", "x", tool_call_id="a")
    assert renderer.spell(joined(renderer.render_tail([question], after="stop", stop_token=user))) == "\nMore?"
    assert renderer.spell(joined(renderer.render_tail([question], after="length"))) == "<|user|>\nMore?"
    assert renderer.spell(joined(renderer.render_tail([result], after="stop", stop_token=tool))).startswith("\n")


def test_where_the_answer_announced_another_turn_than_the_one_that_comes_its_tokens_stand() -> None:
    renderer = renderer_of("glm")
    (user,) = renderer.encode_answer("<|user|>")
    result = Message("tool", "x", tool_call_id="a")
    for stop in (user, None):
        tail = renderer.spell(joined(renderer.render_tail([result], after="stop", stop_token=stop)))
        assert tail == "<|observation|>\n<tool_response>\nx\n</tool_response>"


def test_a_tail_that_depends_on_what_came_before_is_not_guessed() -> None:
    renderer = renderer_of("mistral")
    with pytest.raises(TailMismatch, match=r"renders \[user\] differently behind a system prompt"):
        renderer.render_tail([Message("user", "More?")], after="stop", stop_token=2)
    result = Message("tool", "x", tool_call_id="call_0123456789abcdef")
    text = renderer.spell(joined(renderer.render_tail([result], after="stop", stop_token=2)))
    # The template wants ids of nine characters, so a longer one is shortened, always to the same.
    assert text == '[TOOL_RESULTS] {"content": "x", "call_id": "aff2e571f"}[/TOOL_RESULTS]'


def test_results_that_repeat_the_tools_name_need_the_calls(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "mistral_args")
    source = (folder / "chat_template.jinja").read_text()
    named = source.replace(
        "'[TOOL_RESULTS]' +", "'[TOOL_RESULTS]' + messages[loop.index0 - 1].tool_calls[0].function.name + "
    )
    (folder / "chat_template.jinja").write_text(named)
    renderer = Renderer.from_folder(folder)
    result = Message("tool", "x", tool_call_id=call().id)
    with pytest.raises(TailMismatch, match="for other tools, whose names were not given"):
        renderer.render_tail([result], after="stop", stop_token=2)
    segments = renderer.render_tail([result], after="stop", stop_token=2, calls=(call(),))
    assert renderer.spell(joined(segments)) == "[TOOL_RESULTS]bashx[/TOOL_RESULTS]"


def test_parallel_calls_where_the_template_allows_one() -> None:
    """They are rendered as the model writes them, so that a conversation with them can still be rendered whole."""
    renderer = renderer_of("llama3")
    calls = (call("a", 1), call("b", 2))
    results = [Message("tool", each.id, tool_call_id=each.id) for each in calls]
    messages = [Message("user", "q"), Message("assistant", tool_calls=calls), *results]
    segments = renderer.render(messages, [BASH])
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    written = header.format("assistant") + renderer.format.format_calls(calls) + "<|eot_id|>"
    assert renderer.spell(segments[1].token_ids.tolist()) == written
    tail = renderer.render_tail(results, after="stop", stop_token=4, calls=calls)
    assert joined(tail) == joined(segments[2:])
    assert renderer.spell(joined(tail)) == "".join(f'{header.format("ipython")}"{each.id}"<|eot_id|>' for each in calls)


def test_generation_prompts_differ_after_tool_results() -> None:
    renderer = renderer_of("deepseek")
    assert len(renderer.generation_prompt) == 1 and len(renderer.generation_prompt_after("tool")) == 0
    messages = [
        Message("user", "q"),
        Message("assistant", tool_calls=(call(),)),
        Message("tool", "x", tool_call_id=call().id),
    ]
    assert renderer.count(messages, [BASH]) == len(joined(renderer.render(messages, [BASH])))


def test_hugging_face_renders_every_family_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    from upspiral.rendering.chat_template import template_message, template_tool

    messages = [
        Message("system", "Be brief."),
        Message("user", "How many? 😀"),
        Message("assistant", "", "Hm.", (call('ls "é"'),)),
        Message("tool", "3 files", tool_call_id=call().id),
    ]
    # transformers gives no template a content of none, without which DeepSeek V3 writes no calls.
    for family in (name for name in FAMILIES if name != "deepseek"):
        folder = make_family(mkdtemp(), family)
        renderer = Renderer.from_folder(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [template_message(message, renderer._template._style) for message in messages],
            tools=[template_tool(BASH)],
            chat_template=renderer._template.source,
            add_generation_prompt=True,
            return_dict=False,
        )
        ours = joined(renderer.render(messages, [BASH])) + renderer.generation_prompt_after("tool").tolist()
        assert ours == list(theirs), family


@append_only
@pytest.mark.parametrize("words", ["upspiral", "a question about upspiral", "bash", "call00000"])
def test_a_tail_may_say_what_the_dummy_conversation_says(family: str, words: str) -> None:
    """Where a template leaves out what is said beside a call, the words of the dummy answer first stand in the tail."""
    renderer, asked = renderer_of(family), call()
    texts = [
        [Message("tool", f"17 {said} 18", tool_call_id=asked.id), Message("assistant", "fine"), Message("user", said)]
        for said in ("plain", words)
    ]
    stop = stop_before(renderer, texts[0][0])
    plain, other = (joined(renderer.render_tail(tail, after="stop", stop_token=stop, calls=[asked])) for tail in texts)
    assert renderer.spell(other) == renderer.spell(plain).replace("plain", words)
    alone = joined(renderer.render_tail(texts[1][:1], after="stop", stop_token=stop, calls=[asked]))
    assert renderer.spell(alone) in renderer.spell(other)
