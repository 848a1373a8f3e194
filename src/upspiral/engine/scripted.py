"""An engine that plays a script: for tests, for debugging an agent, and for a first look without a model.

It obeys the whole protocol (streaming, stop tokens, limits, cancellation), so a gateway cannot tell it from a real one.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upspiral.engine.base import EngineStats, GenerationChunk
from upspiral.errors import ConfigError, ContextLengthError, EngineError
from upspiral.types import FinishReason, SamplingParams

SCRIPTED_LOGPROB = -1.0
"""The log-probability of every token that the script plays."""


@dataclass(frozen=True, slots=True)
class ScriptLine:
    """One answer, in one of two forms: `text` is encoded and ended with the stop token, `token_ids` are played as they
    are. With `when` it is kept for a prompt that contains that text."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    when: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise ConfigError('a script line has exactly one of "text" and "token_ids"')

    @classmethod
    def from_json(cls, value: Any) -> ScriptLine:
        """From `{"text": ...}` or `{"token_ids": [...]}`, either with a "when". Raises ConfigError saying what is
        wrong."""
        if not isinstance(value, dict) or {*value} - {"when"} not in ({"text"}, {"token_ids"}):
            raise ConfigError(f'a script line is {{"text": ...}} or {{"token_ids": [...]}}, not {value!r}'[:300])
        for key in ("text", "when"):
            if key in value and not isinstance(value[key], str):
                raise ConfigError(f'"{key}" must be a string, not {value[key]!r}'[:300])
        when = value.get("when")
        if "text" in value:
            return cls(text=value["text"], when=when)
        ids = value["token_ids"]
        if not isinstance(ids, list) or not all(type(index) is int and index >= 0 for index in ids):
            raise ConfigError(f'"token_ids" must be a list of integers from 0 on, not {ids!r}'[:300])
        return cls(token_ids=tuple(ids), when=when)


@dataclass(frozen=True, slots=True)
class ScriptedCall:
    """What the engine was asked, for tests to look at."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    answer_ids: tuple[int, ...]
    """What it plays, the whole of it unless it is cancelled."""


class ScriptedEngine:
    """Plays one line per generation, in order; a prompt that contains the `when` of a line takes the first such line.

    `encode` turns text into token ids: only rendering tokenizes, so the owner of a Renderer hands in its
    `encode_answer`, and its `decode` for scripts with a `when`, which are refused without. A line of token ids that
    does not end with a stop token ends with finish reason "length".
    """

    def __init__(
        self,
        script: Iterable[ScriptLine],
        *,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str] | None = None,
        context_length: int = 8192,
        tokens_per_chunk: int = 3,
        pause_s: float = 0.0,
    ) -> None:
        self.version = 0
        """Policy version of the tokens played from now on; may be set at any time."""
        self.calls: list[ScriptedCall] = []
        """Every generation that was started, in order."""
        self.pause_s = pause_s
        """How long each chunk takes."""
        self._in_order: deque[ScriptLine] = deque()
        self._for_prompts: list[ScriptLine] = []
        for line in script:
            (self._in_order if line.when is None else self._for_prompts).append(line)
        self._encode = encode
        self._decode = decode
        self._context_length = context_length
        self._tokens_per_chunk = tokens_per_chunk
        self._running = 0
        self._sampled = 0
        if decode is None and self._for_prompts:
            raise ConfigError('a script with "when" needs `decode`, to see whether a prompt contains the text')

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> ScriptedEngine:
        """From a file with one JSON line per answer. Raises ConfigError naming the file and line."""
        return cls(read_script(path), encode=encode, decode=decode)

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def remaining(self) -> int:
        """Lines not yet played."""
        return len(self._in_order) + len(self._for_prompts)

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        """Plays the next line for this prompt. Raises ContextLengthError for a prompt that leaves no room, EngineError
        when there is no line left for it."""
        room = self._context_length - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(f"prompt of {len(prompt_ids)} tokens, context of {self._context_length}")
        answer, finish = self._next_answer(prompt_ids, params, min(room, params.max_tokens))
        self._running += 1
        try:
            for start in range(0, max(1, len(answer)), self._tokens_per_chunk):
                await asyncio.sleep(self.pause_s)
                part = answer[start : start + self._tokens_per_chunk]
                self._sampled += len(part)
                last = start + self._tokens_per_chunk >= len(answer)
                yield GenerationChunk(
                    part, [SCRIPTED_LOGPROB] * len(part), [self.version] * len(part), finish if last else None
                )
        finally:
            self._running -= 1

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running,
            sampled_tokens=self._sampled,
            prefilled_tokens=sum(len(call.prompt_ids) for call in self.calls),
        )

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to stop."""

    def _next_answer(
        self, prompt_ids: Sequence[int], params: SamplingParams, limit: int
    ) -> tuple[list[int], FinishReason]:
        line = self._take_line(prompt_ids)
        if line.text is not None:
            answer = [*self._encode(line.text), *params.stop_token_ids[:1]]
        else:
            answer = list(line.token_ids or ())
        finish: FinishReason = "stop" if answer and answer[-1] in params.stop_token_ids else "length"
        if len(answer) > limit:
            answer, finish = answer[:limit], "length"
        self.calls.append(ScriptedCall(tuple(int(index) for index in prompt_ids), params, tuple(answer)))
        return answer, finish

    def _take_line(self, prompt_ids: Sequence[int]) -> ScriptLine:
        if self._for_prompts and self._decode is not None:
            prompt = self._decode(prompt_ids)
            for index, line in enumerate(self._for_prompts):
                if line.when is not None and line.when in prompt:
                    return self._for_prompts.pop(index)
        if self._in_order:
            return self._in_order.popleft()
        played = len(self.calls)
        unfit = f" and {len(self._for_prompts)} for other prompts" if self._for_prompts else ""
        raise EngineError(f"the script has {played} lines{unfit}, and answer {played + 1} was asked for; add lines")


def read_script(path: Path | str) -> list[ScriptLine]:
    """Reads a script. Raises ConfigError naming the file and line."""
    path = Path(path)
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the script {path}: {error}") from error
    script: list[ScriptLine] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            script.append(ScriptLine.from_json(json.loads(line)))
        except ValueError as error:  # ConfigError is one, and so is what json raises
            raise ConfigError(f"{path} line {number}: {error}") from error
    if not script:
        raise ConfigError(f'the script {path} is empty; give one line per answer, such as {{"text": "4"}}')
    return script
