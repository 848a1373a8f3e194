"""Reading answers: the same pieces whether tokens come one by one or all at once, and no exception ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.rendering.answer import AnswerParser, CallPiece, ReadingRules, TextPiece, ThinkingPiece
from upspiral.rendering.renderer import Renderer

CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer.from_folder(make_tokenizer(tmp_path_factory.mktemp("tiny")))


def read(text: str, renderer: Renderer):  # pyright: ignore[reportMissingParameterType]
    return renderer.parse([*renderer.encode_answer(text), 2], "stop")


def test_plain_text(renderer: Renderer) -> None:
    answer = read(" The answer is 4. \n", renderer)
    assert answer.message.text == " The answer is 4. \n"
    assert answer.message.tool_calls == () and answer.message.thinking is None and answer.errors == ()


def test_calls_between_text(renderer: Renderer) -> None:
    answer = read(f"First.\n\n{CALL}\n{CALL}\n Last.", renderer)
    assert answer.message.text == "First.\n Last."
    assert [(c.name, json.loads(c.arguments)) for c in answer.message.tool_calls] == [("bash", {"command": "ls"})] * 2
    assert len({c.id for c in answer.message.tool_calls}) == 2


def test_white_space_beside_calls_is_dropped(renderer: Renderer) -> None:
    assert read(f"\n{CALL}\n", renderer).message.text == ""


def test_thinking(renderer: Renderer) -> None:
    answer = read(f"\n<think>\nhmm <tool_call> </think>\n\nYes.{CALL}", renderer)
    assert answer.message.thinking == "\nhmm <tool_call> "
    assert answer.message.text == "Yes."
    assert len(answer.message.tool_calls) == 1
    assert read("<think>never closed", renderer).message.thinking == "never closed"


def test_thinking_that_the_generation_prompt_opened() -> None:
    parser = AnswerParser(ReadingRules(thinking_is_open=True))
    pieces = [*parser.push("so</think> done"), *parser.finish()]
    assert pieces == [ThinkingPiece("so"), TextPiece("done")]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('{"name": "bash", "arguments": {"command": }}', "is not valid JSON: Expecting value"),
        ('{"name": "bash", "arguments": {"x": NaN}}', "is not valid JSON: NaN"),
        ('{"name": "bash", "arguments": {"x": "\\ud800"}}', "is not valid JSON"),
        ('["bash"]', "is not a JSON object but list"),
        ('{"tool": "bash"}', 'has no "name"'),
        ('{"name": "bash", "arguments": "ls"}', '"arguments" is not a JSON object but str'),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_broken_call_stays_in_the_text_and_is_named(renderer: Renderer, body: str, complaint: str) -> None:
    text = f"Hm. <tool_call>{body}</tool_call> {CALL}"
    answer = read(text, renderer)
    assert answer.message.text == f"Hm. <tool_call>{body}</tool_call>"
    assert len(answer.message.tool_calls) == 1
    assert len(answer.errors) == 1 and answer.errors[0].startswith("tool call 1") and complaint in answer.errors[0]


def test_a_call_that_is_not_closed(renderer: Renderer) -> None:
    answer = read('Hm.\n<tool_call>{"name": "bash"', renderer)
    assert answer.message.text == 'Hm.\n<tool_call>{"name": "bash"'
    assert answer.errors == ("tool call 1 is not closed: </tool_call> is missing",)


def test_formatted_calls_are_read_back(renderer: Renderer) -> None:
    call = {"name": "bash", "arguments": {"command": 'echo "é"\n'}}
    answer = read(renderer.format_tool_call(call), renderer)
    assert json.loads(answer.message.tool_calls[0].arguments) == call["arguments"]


def test_without_tools_a_tag_is_text() -> None:
    parser = AnswerParser(ReadingRules(tool_calls=False))
    assert [*parser.push(CALL), *parser.finish()] == [TextPiece(CALL)]


def test_one_call_at_most() -> None:
    parser = AnswerParser(ReadingRules(parallel_tool_calls=False))
    pieces = [*parser.push(f"a{CALL}{CALL}more"), *parser.finish()]
    assert [type(piece) for piece in pieces] == [TextPiece, CallPiece]
    assert parser.ended


def test_nothing_that_may_become_a_call_leaks() -> None:
    parser = AnswerParser(ReadingRules())
    seen = ""
    for character in f"Look: {CALL}":
        for piece in parser.push(character):
            if isinstance(piece, TextPiece):
                seen += piece.text
    assert seen == "Look:"


def test_stop_strings(renderer: Renderer) -> None:
    reader = renderer.answer_reader(ReadingRules(stop_strings=("END", "\n\n")))
    texts = []
    for token in renderer.encode_answer("one E two EN three\nfour\n\nfive END"):
        texts += [p.text for p in reader.push([token]) if isinstance(p, TextPiece)]
        if reader.stopped:
            break
    reader.finish()
    assert "".join(texts) == reader.answer().message.text == "one E two EN three\nfour"


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<tool",
        "\n",
        " ",
        "x",
        "é",
        "😀",
        CALL,
        '{"name": "a"}',
        "<",
    ]
)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(PIECES, max_size=12), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=60))
def test_how_text_is_cut_never_matters(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    assert_same_reading(text, cuts)


def assert_same_reading(text: str, cuts: list[int]) -> None:
    at_once, in_parts = AnswerParser(ReadingRules()), AnswerParser(ReadingRules())
    whole = [*at_once.push(text), *at_once.finish()]
    pieces = []
    start = 0
    for number in range(len(text)):
        width = cuts[number % len(cuts)]
        pieces += in_parts.push(text[start : start + width])
        start += width
    pieces += in_parts.finish()
    assert merged(pieces) == merged(whole)
    assert in_parts.errors == at_once.errors


def merged(pieces: list) -> tuple[str, str, list[str]]:  # pyright: ignore[reportMissingTypeArgument]
    text = "".join(p.text for p in pieces if isinstance(p, TextPiece))
    thinking = "".join(p.text for p in pieces if isinstance(p, ThinkingPiece))
    return text, thinking, [p.call.name + p.call.arguments for p in pieces if isinstance(p, CallPiece)]


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 560), max_size=60), widths=st.lists(st.integers(1, 4), min_size=1, max_size=20))
def test_incremental_text_is_the_text(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], widths: list[int]
) -> None:
    """Random ids are mostly invalid UTF-8; pieces joined still equal decoding at once, and no half character shows."""
    renderer = shared_renderer(tmp_path_factory)
    decoder = renderer.text_decoder()
    texts, start = [], 0
    for number in range(len(ids)):
        width = widths[number % len(widths)]
        texts.append(decoder.push(ids[start : start + width]))
        start += width
    assert not any(text.endswith("\ufffd") for text in texts)
    assert "".join(texts) + decoder.finish() == renderer.decode(ids)
    renderer.parse(ids, "stop")


_RENDERERS: dict[Path, Renderer] = {}


def shared_renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.getbasetemp() / "shared-tiny"
    if folder not in _RENDERERS:
        _RENDERERS[folder] = Renderer.from_folder(make_tokenizer(folder))
    return _RENDERERS[folder]
