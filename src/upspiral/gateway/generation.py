"""One answer while the engine samples it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from upspiral.engine.base import GenerationChunk
from upspiral.rendering.answer import ParsedAnswer, Piece, ReadingRules
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TokenRun
from upspiral.types import UNKNOWN_EXPERT, FinishReason

AnswerEnd = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """What became certain with one chunk."""

    answer: int
    """Which of the request's answers, from 0."""
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    """How many tokens were sampled since the event before."""
    end: AnswerEnd | None = None
    """Set on the last event of an answer."""


class Generation:
    """Collects the tokens of one answer and reads them. Everything sampled is recorded, also what a stop string cuts
    off; the text ends before it."""

    def __init__(
        self, index: int, renderer: Renderer, rules: ReadingRules, prompt_ids: NDArray[np.int32] | None = None
    ) -> None:
        """`prompt_ids` stand before what is sampled and belong to the answer's turn; without them, the generation
        prompt."""
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.end: AnswerEnd | None = None
        """How the answer ends for the agent, who is not told that we stopped the engine at a stop string."""
        self.prompt_routes: NDArray[np.int16] | None = None
        """Of the tokens before each of the prompt's; see Node.routes. None: the engine does not say."""
        self._routes: list[NDArray[np.int16]] = []
        self._versions: list[int] = []
        self._renderer = renderer
        self._prompt_ids = renderer.generation_prompt if prompt_ids is None else prompt_ids
        self._reader = renderer.answer_reader(rules)

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    def take(self, chunk: GenerationChunk) -> AnswerEvent:
        """Records a chunk. Afterwards `ended` may be true although the engine would go on: then it is to be stopped."""
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self._versions.extend(chunk.versions)
        self._take_routes(chunk)
        pieces = self._reader.push(self._renderer.without_stop_token(chunk.token_ids, chunk.finish_reason))
        if chunk.finish_reason is not None or self._reader.stopped:
            pieces = [*pieces, *self._end(chunk.finish_reason or "cancelled")]
        return AnswerEvent(self.index, tuple(pieces), len(chunk.token_ids), self.end)

    def cancel(self) -> None:
        """Ends the answer where it stands."""
        if not self.ended:
            self._end("cancelled")

    def answer(self) -> ParsedAnswer:
        return self._reader.answer()

    def tokens(self) -> TokenRun:
        """What opens the turn and what was sampled, as one run."""
        return TokenRun.answer(
            self._prompt_ids,
            self.token_ids,
            self.logprobs,
            self._versions,
            self.finish_reason or "cancelled",
            self._answer_routes(),
        )

    def _take_routes(self, chunk: GenerationChunk) -> None:
        if chunk.prompt_routes is not None:
            before_the_first = np.full((1, *chunk.prompt_routes.shape[1:]), UNKNOWN_EXPERT, np.int16)
            self.prompt_routes = np.concatenate([before_the_first, chunk.prompt_routes])
        if chunk.routes is not None:
            self._routes.append(chunk.routes)

    def _answer_routes(self) -> NDArray[np.int16] | None:
        if self.prompt_routes is None:
            return None
        opening = self.prompt_routes[len(self.prompt_routes) - len(self._prompt_ids) :]
        return np.concatenate([opening, *self._routes])

    def _end(self, reason: FinishReason) -> list[Piece]:
        self.finish_reason = reason
        pieces = self._reader.finish()
        if reason == "length" and not self._reader.stopped:
            self.end = "length"
        else:
            self.end = "tool_calls" if self.answer().message.tool_calls else "stop"
        return pieces
