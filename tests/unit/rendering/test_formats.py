"""Tool-call formats: what is written is read back, what is broken stays text and is named, and cuts never matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from upspiral.errors import TemplateError
from upspiral.rendering.answer import AnswerParser, CallPiece, Piece, ReadingRules, TextPiece, ThinkingPiece
from upspiral.rendering.formats import deepseek
from upspiral.rendering.formats.base import Found, Reading, ToolFormat
from upspiral.rendering.formats.registry import FORMATS
from upspiral.types import ToolCall, ToolSpec

BY_NAME = {each.name: each for each in FORMATS}
TYPED = ("qwen-xml", "glm", "glm-compact")
"""Formats that write all arguments as text."""
BASH = ToolSpec("bash", "", {"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "integer"}}})
LS = ToolCall("1", "bash", '{"command": "ls"}')
WC = ToolCall("2", "bash", '{"command": "wc \\"é\\"", "n": 17}')


def read(text: str, tool_format: ToolFormat, tools: tuple[ToolSpec, ...] = (BASH,)) -> tuple[list[Piece], list[str]]:
    parser = AnswerParser(ReadingRules(tools=tools), tool_format)
    return [*parser.push(text), *parser.finish()], parser.errors


def calls_of(pieces: list[Piece]) -> list[tuple[str, Any]]:
    return [(p.call.name, json.loads(p.call.arguments)) for p in pieces if isinstance(p, CallPiece)]


def text_of(pieces: list[Piece]) -> str:
    return "".join(p.text for p in pieces if isinstance(p, TextPiece))


def merged(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, Any]]]:
    return text_of(pieces), "".join(p.text for p in pieces if isinstance(p, ThinkingPiece)), calls_of(pieces)


all_formats = pytest.mark.parametrize("tool_format", FORMATS, ids=BY_NAME)

names = st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
nasty_text = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "x\n",
        "\n\nx",
        "true",
        "17",
        "null",
        '{"a": 1}',
        '"',
        "\\",
        "</tool_call>",
        "[TOOL_CALLS]",
        "; {",
        "```",
    ]
)
arguments = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), json_values | nasty_text, max_size=4)


def schema_of(value: Any) -> dict[str, Any]:
    kinds = [(bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (dict, "object"), (list, "array")]
    return {"type": next((name for kind, name in kinds if isinstance(value, kind)), "null")}


@all_formats
@settings(max_examples=150, deadline=None)
@given(made=st.dictionaries(names, arguments, min_size=1, max_size=3))
def test_written_calls_are_read_back(tool_format: ToolFormat, made: dict[str, dict[str, Any]]) -> None:
    calls = [ToolCall("", name, json.dumps(values)) for name, values in made.items()]
    tools = tuple(
        ToolSpec(name, "", {"properties": {key: schema_of(value) for key, value in values.items()}})
        for name, values in made.items()
    )
    try:
        text = tool_format.format_calls(calls)
    except TemplateError:
        assume(False)
        return
    pieces, errors = read(text, tool_format, tools)
    assert calls_of(pieces) == list(made.items())
    assert not errors and text_of(pieces) == ""
    assert len({piece.call.id for piece in pieces if isinstance(piece, CallPiece)}) == len(calls)


@pytest.mark.parametrize("name", ["hermes", "llama3", "llama3-python-tag", "mistral-list", "mistral-args"])
def test_json_formats_can_write_their_own_marks(name: str) -> None:
    tool_format = BY_NAME[name]
    value = " ".join([*tool_format.tags, "</tool_call>"])
    call = ToolCall("", "bash", json.dumps({"command": value}))
    pieces, errors = read(tool_format.format_call(call) + tool_format.format_call(LS), tool_format)
    assert calls_of(pieces)[0] == ("bash", {"command": value}) and not errors


@pytest.mark.parametrize("name", TYPED)
def test_what_a_format_cannot_express_is_refused(name: str) -> None:
    broken = "x</parameter>\n<parameter=y>" if name == "qwen-xml" else "x</arg_value><arg_key>y"
    with pytest.raises(TemplateError, match="knows no escapes"):
        BY_NAME[name].format_call(ToolCall("", "bash", json.dumps({"command": broken})))


@all_formats
def test_text_before_between_and_behind(tool_format: ToolFormat) -> None:
    if tool_format.name == "llama3":
        pytest.skip("a bare call is one only where an answer begins")
    one, two = tool_format.format_call(LS), tool_format.format_call(WC)
    pieces, errors = read(f"First. \n{one}\n{two}\nLast.", tool_format)
    assert calls_of(pieces) == [("bash", {"command": "ls"}), ("bash", {"command": 'wc "é"', "n": 17})]
    assert not errors and text_of(pieces) == "First.\nLast."


@all_formats
def test_calls_behind_a_thought(tool_format: ToolFormat) -> None:
    pieces, errors = read(f"<think>I look.</think>\n\n{tool_format.format_calls([LS, WC])}", tool_format)
    assert merged(pieces)[:2] == ("", "I look.") and len(calls_of(pieces)) == 2 and not errors


@all_formats
def test_a_call_that_breaks_off_stays_text_and_is_named(tool_format: ToolFormat) -> None:
    whole = tool_format.format_call(WC)
    begun = len(tool_format.forced_text("bash")) + 2
    for end in range(begun, whole.rindex("17")):
        pieces, errors = read(whole[:end], tool_format)
        assert not calls_of(pieces) and text_of(pieces) == whole[:end]
        assert len(errors) == 1 and errors[0].startswith("tool call 1 is not closed")


@all_formats
def test_only_the_first_call_if_calls_are_not_parallel(tool_format: ToolFormat) -> None:
    parser = AnswerParser(ReadingRules(parallel_tool_calls=False, tools=(BASH,)), tool_format)
    pieces = [*parser.push(tool_format.format_calls([LS, WC]) + "more"), *parser.finish()]
    assert calls_of(pieces) == [("bash", {"command": "ls"})] and parser.ended


@all_formats
def test_without_tools_everything_is_text(tool_format: ToolFormat) -> None:
    parser = AnswerParser(ReadingRules(tool_calls=False), tool_format)
    text = tool_format.format_call(LS)
    assert [*parser.push(text), *parser.finish()] == [TextPiece(text)]


@all_formats
@pytest.mark.parametrize("name", [None, "bash"])
def test_a_forced_beginning_is_read_with_what_follows(tool_format: ToolFormat, name: str | None) -> None:
    whole = tool_format.format_call(WC)
    begin = tool_format.forced_text(name)
    if tool_format.name == "glm-compact" and name:
        begin = begin.removesuffix("\n")
    assert whole.startswith(begin) and "bash" not in whole.removeprefix(begin) if name else "bash" not in begin
    parser = AnswerParser(ReadingRules(tools=(BASH,), forced_text=tool_format.forced_text(name)), tool_format)
    pieces = [*parser.push(whole.removeprefix(begin)), *parser.finish()]
    assert merged(pieces) == ("", "", [("bash", {"command": 'wc "é"', "n": 17})])


BROKEN = [
    ("hermes", '<tool_call>{"name": "bash", "arguments": "ls"}</tool_call>', '"arguments" is not a JSON object'),
    ("hermes", '<tool_call>{"name": "bash, "arguments": {}}</tool_call>', "is not valid JSON"),
    ("qwen-xml", "<tool_call>bash</tool_call>", "is not <function=NAME>"),
    ("qwen-xml", "<tool_call><function=bash>ls</function></tool_call>", "has something else than <parameter=KEY>"),
    (
        "qwen-xml",
        "<tool_call><function=a><parameter=x>1</parameter><parameter=x>2</parameter></function></tool_call>",
        "'x' is given twice",
    ),
    ("glm", "<tool_call>\n</tool_call>", "does not begin with the name"),
    ("glm", "<tool_call>bash\nls</tool_call>", "does not begin with the name"),
    ("glm", "<tool_call>bash<arg_key>x</arg_key></tool_call>", "has something else than <arg_key>"),
    ("llama3", '{"name": "bash", "parameters": "ls"}', '"parameters" is not a JSON object'),
    ("llama3", '{"name": "bash", "parameters": {]}', "is not valid JSON"),
    ("llama3", "<|python_tag|>print(1)", "is not a JSON object behind"),
    ("llama3", '<|python_tag|>{"tool": "bash"}', 'has no "name"'),
    ("mistral-list", "[TOOL_CALLS] []", "is an empty list"),
    ("mistral-list", '[TOOL_CALLS] ["bash"]', "is not a JSON object but str"),
    ("mistral-args", "[TOOL_CALLS]bash[ARGS]{,}", "is not valid JSON"),
    ("mistral-args", "[TOOL_CALLS]bash and more", "has neither a list nor a name"),
    ("mistral-args", '[TOOL_CALLS]bash[ARGS]{"a": 1', "is not closed"),
    ("deepseek-v3.1", f"{deepseek.CALL_BEGIN}bash{deepseek.CALL_END}", "has no <"),
    ("deepseek-v3.1", f"{deepseek.CALL_BEGIN}bash{deepseek.SEPARATOR}[]{deepseek.CALL_END}", "is not a JSON object"),
    ("deepseek-v3", f"{deepseek.CALLS_BEGIN}bash", "has no <"),
]


@pytest.mark.parametrize(("name", "text", "complaint"), BROKEN)
def test_a_broken_call_stays_in_the_text_and_is_named(name: str, text: str, complaint: str) -> None:
    pieces, errors = read(text, BY_NAME[name])
    assert text_of(pieces) == text and not calls_of(pieces)
    assert len(errors) == 1 and errors[0].startswith("tool call 1 ") and complaint in errors[0]


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _ in BROKEN if "not closed" not in text])
def test_a_broken_call_does_not_hide_the_next_one(name: str, text: str) -> None:
    if name in ("llama3", "mistral-args"):
        text += "" if name == "mistral-args" else "<|python_tag|>"
    pieces, _ = read(f"{text}{BY_NAME[name].format_call(LS)}", BY_NAME[name])
    assert calls_of(pieces) == [("bash", {"command": "ls"})]


def test_an_answer_in_json_is_no_call() -> None:
    for text in ('{"name": "Ada", "born": 1815}', '{"type": "object"', '{"names": []}', "{}", '["x"]'):
        pieces, errors = read(text, BY_NAME["llama3"])
        assert text_of(pieces) == text and not errors and not calls_of(pieces)
    pieces, _ = read(f"Look: {BY_NAME['llama3'].format_call(LS)}", BY_NAME["llama3"])
    assert not calls_of(pieces)


def test_spellings_that_models_also_use() -> None:
    typed = '{"type": "function", "name": "bash", "parameters": {"command": "ls"}}'
    for name, text in [
        ("llama3", typed),
        ("llama3", f"<|python_tag|>{typed}"),
        ("llama3", '{\n  "name": "bash",\n  "arguments": {"command": "ls"}\n}'),
        ("mistral-args", '[TOOL_CALLS]bash[CALL_ID]abc123XYZ[ARGS]{"command": "ls"}'),
        ("mistral-args", '[TOOL_CALLS]bash{"command": "ls"}'),
        ("mistral-args", '[TOOL_CALLS] [{"name": "bash", "arguments": {"command": "ls"}, "id": "abc123XYZ"}]'),
        ("qwen-xml", "<tool_call><function=bash><parameter=command>ls</parameter></function></tool_call>"),
        ("glm", "<tool_call>bash\n<arg_key>command</arg_key><arg_value>ls</arg_value></tool_call>"),
        ("deepseek-v3", BY_NAME["deepseek-v3.1"].format_call(LS)),
        ("deepseek-v3.1", BY_NAME["deepseek-v3"].format_call(LS)),
    ]:
        pieces, errors = read(text, BY_NAME[name])
        assert calls_of(pieces) == [("bash", {"command": "ls"})], text
        assert not errors and text_of(pieces) == ""


def test_ids_that_the_model_writes_are_kept_while_they_are_unique() -> None:
    entry = '{"name": "a", "arguments": {}, "id": "abc123XYZ"}'
    text = f"[TOOL_CALLS] [{entry}, {entry}]"
    first, second = (piece.call.id for piece in read(text, BY_NAME["mistral-list"])[0] if isinstance(piece, CallPiece))
    assert first == "abc123XYZ" and second.startswith("call_")


SCHEMA = {
    "text": {"type": "string"},
    "flag": {"type": "boolean"},
    "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "name": {"type": ["string", "null"]},
    "kind": {"enum": ["17", 17]},
    "any": {},
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "17", "17"),
        ("text", "true", "true"),
        ("text", ' "x" ', ' "x" '),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "perhaps", "perhaps"),
        ("size", "17", 17),
        ("size", "None", None),
        ("size", "big", "big"),
        ("name", "null", None),
        ("name", "17", "17"),
        ("kind", "17", 17),
        ("any", "[1, 2]", [1, 2]),
        ("any", '"x"', '"x"'),
        ("any", "NaN", "NaN"),
        ("unknown", "1.5", 1.5),
        ("unknown", "x", "x"),
    ],
)
@pytest.mark.parametrize("name", TYPED)
def test_types_come_from_the_schema(name: str, key: str, text: str, value: Any) -> None:
    tool = ToolSpec("bash", "", {"type": "object", "properties": SCHEMA})
    bodies = {
        "qwen-xml": f"\n<function=bash>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n",
        "glm": f"bash\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n",
        "glm-compact": f"bash<arg_key>{key}</arg_key><arg_value>{text}</arg_value>",
    }
    pieces, errors = read(f"<tool_call>{bodies[name]}</tool_call>", BY_NAME[name], (tool,))
    assert calls_of(pieces) == [("bash", {key: value})] and not errors


def parts_of(tool_format: ToolFormat) -> st.SearchStrategy[str]:
    whole, several = tool_format.format_call(WC), tool_format.format_calls([LS, WC])
    halves = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    loose = ["<think>", "</think>", "<", "[", "{", "}", '"', "\\", "\n", " ", ";", "x", "é", "😀", "</parameter>", "]"]
    return st.sampled_from([*tool_format.tags, *halves, *loose, whole, several, tool_format.forced_text()])


@all_formats
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_how_text_is_cut_never_matters(tool_format: ToolFormat, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(parts_of(tool_format), max_size=10)))
    widths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=20))
    rules = ReadingRules(tools=(BASH,), parallel_tool_calls=data.draw(st.booleans()))
    at_once, in_parts = AnswerParser(rules, tool_format), AnswerParser(rules, tool_format)
    whole = [*at_once.push(text), *at_once.finish()]
    pieces: list[Piece] = []
    start = number = 0
    while start < len(text):
        width = widths[number % len(widths)]
        pieces += in_parts.push(text[start : start + width])
        start, number = start + width, number + 1
    pieces += in_parts.finish()
    assert merged(pieces) == merged(whole)
    assert in_parts.errors == at_once.errors and in_parts.ended == at_once.ended


@all_formats
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_character_is_lost(tool_format: ToolFormat, data: st.DataObject) -> None:
    """Without a call that is read, the text is the text."""
    text = "".join(data.draw(st.lists(parts_of(tool_format), max_size=8)))
    pieces, _ = read(text, tool_format)
    assume(not calls_of(pieces) and "think>" not in text)
    dropped = deepseek.CALLS_END if tool_format.name.startswith("deepseek") else ""
    squeeze = str.maketrans("", "", " \n")
    assert text_of(pieces).replace(dropped, "").translate(squeeze) == text.replace(dropped, "").translate(squeeze)


class Counting(ToolFormat):
    """Passes everything on and counts how often a call was read."""

    def __init__(self, inner: ToolFormat) -> None:
        self.name, self.tags, self.endings = inner.name, inner.tags, inner.endings
        self.reads = 0
        self._inner = inner

    def find_call(self, text: str, *, boundary: bool) -> Found:
        return self._inner.find_call(text, boundary=boundary)

    def read(self, text: str, tools: Sequence[ToolSpec] = (), *, final: bool = False) -> Reading | None:
        self.reads += 1
        return self._inner.read(text, tools, final=final)

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        return self._inner.format_calls(calls)

    def forced_text(self, name: str | None = None) -> str:
        return self._inner.forced_text(name)


@all_formats
def test_long_arguments_are_not_read_again_and_again(tool_format: ToolFormat) -> None:
    """A call of 140,000 characters that arrives in small pieces."""
    counting = Counting(tool_format)
    text = counting.format_call(ToolCall("", "bash", json.dumps({"command": "echo x\n" * 20_000})))
    parser = AnswerParser(ReadingRules(tools=(BASH,)), counting)
    pieces = [piece for start in range(0, len(text), 40) for piece in parser.push(text[start : start + 40])]
    assert len(calls_of([*pieces, *parser.finish()])) == 1
    assert counting.reads < 10
