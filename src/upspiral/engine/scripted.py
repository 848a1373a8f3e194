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

from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.errors import ConfigError, ContextLengthError, EngineError
from upspiral.types import FinishReason, SamplingParams

_LONGEST_PAUSE_S = 3600
SCRIPTED_LOGPROB = -1.0
"""The log-probability of every token that the script plays."""


@dataclass(frozen=True, slots=True)
class ScriptLine:
    """One answer, in one of two forms: `text` is encoded and ended with the stop token, `token_ids` are played as they
    are. With `when` it is kept for a prompt that contains that text."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    when: str | None = None

    pause_s: float = 0.0
    """How long each of its chunks takes, beside the engine's own pause."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise ConfigError('a script line has exactly one of "text" and "token_ids"')

    @classmethod
    def from_json(cls, value: Any) -> ScriptLine:
        """From `{"text": ...}` or `{"token_ids": [...]}`, either with "when" and "pause_s". Raises ConfigError saying
        what is wrong."""
        if not isinstance(value, dict) or {*value} - {"when", "pause_s"} not in ({"text"}, {"token_ids"}):
            raise ConfigError(f'a script line is {{"text": ...}} or {{"token_ids": [...]}}, not {value!r}'[:300])
        for key in ("text", "when"):
            if key in value and not isinstance(value[key], str):
                raise ConfigError(f'"{key}" must be a string, not {value[key]!r}'[:300])
        when, pause_s = value.get("when"), value.get("pause_s", 0)
        if isinstance(pause_s, bool) or not isinstance(pause_s, int | float) or not 0 <= pause_s <= _LONGEST_PAUSE_S:
            raise ConfigError(f'"pause_s" must be a number from 0 to {_LONGEST_PAUSE_S}, not {pause_s!r}'[:300])
        if "text" in value:
            return cls(text=value["text"], when=when, pause_s=pause_s)
        ids = value["token_ids"]
        if not isinstance(ids, list) or not all(type(index) is int and index >= 0 for index in ids):
            raise ConfigError(f'"token_ids" must be a list of integers from 0 on, not {ids!r}'[:300])
        return cls(token_ids=tuple(ids), when=when, pause_s=pause_s)


@dataclass(frozen=True, slots=True)
class ScriptedCall:
    """What the engine was asked, for tests to look at."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    answer_ids: tuple[int, ...]
    """What it plays, the whole of it unless it is cancelled."""


class ScriptedEngine:
    """Plays one line per generation, in order; a prompt that contains the `when` of a line takes the first such line.
    An `endless` one begins again after the last and remembers no calls, for benchmarks.

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
        """Every generation that was started, in order; empty for an endless engine."""
        self.pause_s = pause_s
        """How long each chunk takes."""
        self.endless = False
        """Whether the script begins again after its last line; to be set before the first generation."""
        self._in_order: deque[ScriptLine] = deque()
        self._for_prompts: list[ScriptLine] = []
        for line in script:
            (self._in_order if line.when is None else self._for_prompts).append(line)
        self._started = 0
        self._prefilled = 0
        self._encoded: dict[str, list[int]] = {}
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

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        """Plays the next line for this prompt. Raises ContextLengthError for a prompt that leaves no room, EngineError
        when there is no line left for it."""
        room = self._context_length - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(f"prompt of {len(prompt_ids)} tokens, context of {self._context_length}")
        line = self._take_line(prompt_ids)
        answer, finish = self._answer(line, params, min(room, params.max_tokens))
        self._started += 1
        self._prefilled += len(prompt_ids)
        if not self.endless:
            self.calls.append(ScriptedCall(tuple(int(index) for index in prompt_ids), params, tuple(answer)))
        self._running += 1
        try:
            for start in range(0, max(1, len(answer)), self._tokens_per_chunk):
                await asyncio.sleep(self.pause_s + line.pause_s)
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
            prefilled_tokens=self._prefilled,
        )

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to stop."""

    def _answer(self, line: ScriptLine, params: SamplingParams, limit: int) -> tuple[list[int], FinishReason]:
        if line.text is not None:
            answer = [*self._encoding(line.text), *params.stop_token_ids[:1]]
        else:
            answer = list(line.token_ids or ())
        if len(answer) > limit:
            return answer[:limit], "length"
        return answer, "stop" if answer and answer[-1] in params.stop_token_ids else "length"

    def _encoding(self, text: str) -> list[int]:
        """Kept, so that a line that is played again and again is encoded once."""
        if text not in self._encoded:
            self._encoded[text] = list(self._encode(text))
        return self._encoded[text]

    def _take_line(self, prompt_ids: TokenIds) -> ScriptLine:
        if self._for_prompts and self._decode is not None:
            prompt = self._decode([int(index) for index in prompt_ids])
            for index, line in enumerate(self._for_prompts):
                if line.when is not None and line.when in prompt:
                    return self._for_prompts.pop(index)
        if self._in_order:
            line = self._in_order.popleft()
            if self.endless:
                self._in_order.append(line)
            return line
        played = self._started
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
