"""The scripted engine keeps the engine protocol."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from upspiral.engine.base import GenerationChunk
from upspiral.engine.scripted import SCRIPTED_LOGPROB, ScriptedEngine, ScriptLine, read_script
from upspiral.errors import ConfigError, ContextLengthError, EngineError
from upspiral.types import SamplingParams

STOP = 2


def params(max_tokens: int = 100) -> SamplingParams:
    return SamplingParams(max_tokens, stop_token_ids=(STOP, 0))


def engine_of(*lines: ScriptLine, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(lines, encode=lambda text: [ord(c) for c in text], **options)


def play(engine: ScriptedEngine, limit: int = 100, prompt: tuple[int, ...] = (1, 5)) -> list[GenerationChunk]:
    async def collect() -> list[GenerationChunk]:
        return [chunk async for chunk in engine.generate(prompt, params(limit))]

    return asyncio.run(collect())


def ids(chunks: list[GenerationChunk]) -> list[int]:
    return [index for chunk in chunks for index in chunk.token_ids]


def test_text_ends_with_the_stop_token() -> None:
    engine = engine_of(ScriptLine(text="hello"))
    engine.version = 7
    chunks = play(engine)
    assert ids(chunks) == [*map(ord, "hello"), STOP]
    assert [chunk.finish_reason for chunk in chunks] == [None, "stop"]
    assert all(list(c.logprobs) == [SCRIPTED_LOGPROB] * len(c.token_ids) for c in chunks)
    assert all(list(c.versions) == [7] * len(c.token_ids) for c in chunks)
    assert engine.calls[0].prompt_ids == (1, 5)
    assert engine.stats().sampled_tokens == 6 and engine.stats().running == 0


def test_token_ids_are_played_as_they_are() -> None:
    engine = engine_of(ScriptLine(token_ids=(9, 8, 7)), ScriptLine(token_ids=(9, 0)), ScriptLine(token_ids=()))
    for expected, finish in [([9, 8, 7], "length"), ([9, 0], "stop"), ([], "length")]:
        chunks = play(engine)
        assert ids(chunks) == expected and chunks[-1].finish_reason == finish
    assert engine.remaining == 0


def test_limits() -> None:
    engine = engine_of(*[ScriptLine(text="hello")] * 3, context_length=6)
    assert ids(play(engine, limit=2)) == [ord("h"), ord("e")]
    assert play(engine, prompt=(1,) * 5)[-1].finish_reason == "length"
    with pytest.raises(ContextLengthError, match="prompt of 6 tokens, context of 6"):
        play(engine, prompt=(1,) * 6)
    assert engine.remaining == 1


def test_an_exhausted_script_says_how_long_it_was() -> None:
    engine = engine_of(ScriptLine(text="a"))
    play(engine)
    with pytest.raises(EngineError, match="the script has 1 lines, and answer 2 was asked for"):
        play(engine)


def test_a_line_waits_for_the_prompt_that_contains_its_text() -> None:
    script = [ScriptLine(text="1"), ScriptLine(text="t", when="title"), ScriptLine(text="2")]
    engine = ScriptedEngine(script, encode=lambda t: [ord(c) for c in t], decode=lambda ids: "".join(map(chr, ids)))
    said = [play(engine, prompt=tuple(map(ord, prompt))) for prompt in ("task", "a title", "task and title")]
    assert ["".join(map(chr, ids(chunks)[:-1])) for chunks in said] == ["1", "t", "2"]
    assert [call.answer_ids for call in engine.calls] == [(ord(c), STOP) for c in "1t2"]


def test_lines_for_other_prompts_are_not_played() -> None:
    line = ScriptLine(text="t", when="title")
    with pytest.raises(ConfigError, match="needs `decode`"):
        engine_of(line)
    engine = ScriptedEngine([line], encode=lambda text: [9], decode=lambda ids: "task")
    with pytest.raises(EngineError, match="has 0 lines and 1 for other prompts, and answer 1 was asked for"):
        play(engine)
    assert engine.remaining == 1


def test_closing_cancels() -> None:
    engine = engine_of(ScriptLine(text="hello world"))

    async def first_only() -> None:
        stream = engine.generate([1], params())
        await anext(stream)
        assert engine.stats().running == 1
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    asyncio.run(first_only())
    assert engine.stats().running == 0 and engine.stats().sampled_tokens == 3


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "script.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"token_ids": [1, 2]}\n{"text": "b", "when": "c"}')
    assert read_script(path)[:2] == [ScriptLine(text="a\u2028b"), ScriptLine(token_ids=(1, 2))]
    assert read_script(path)[2] == ScriptLine(text="b", when="c")
    engine = ScriptedEngine.from_file(path, encode=lambda text: [len(text)], decode=lambda ids: "")
    assert ids(play(engine)) == [3, STOP]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": 1}', r'line 2: "text" must be a string'),
        ('{"token_ids": [1, true]}', 'line 2: "token_ids" must be a list of integers'),
        ('{"txt": "a"}', "line 2: a script line is"),
        ('{"when": "a"}', "line 2: a script line is"),
        ('{"text": "a", "when": 1}', 'line 2: "when" must be a string'),
        ('{"text": "a", "token_ids": []}', "line 2: a script line is"),
        ("{", "line 2: Expecting"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "script.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ConfigError, match=complaint):
        read_script(path)


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the script"):
        read_script(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_script(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="exactly one"):
        ScriptLine()
