"""Sampled tokens that are tokenized again, lost, or trained twice: this gateway beside the plain way, on one corpus.

    python benchmarks/exactness.py [--conversations 200] [--seed 0] [--model NAME] [--save]

The corpus is generated from the seed (corpus.py): tool turns, several calls at once, thinking, booleans and numbers and
nothing in arguments, truncated answers, edited history, branches, changed tools, compaction, sub-agents, requests sent
again after a hang-up or after an answer, several answers to one request. A third of the answers are token sequences
that the tokenizer itself would not make of their text, some split inside a character, and a few are no text at all.
Agents repeat answers as SDKs do: other call ids, other JSON spacing, 1 for 1.0, "" for null, no thinking. Without
`--model` the conversations take turns with the tests' tokenizers and templates in the formats of nine model families,
and with one that drops all thinking from the history.

- `ours`: the agents talk HTTP to the gateway; what the engine got and gave is compared with the graph that is read back
  from the store.
- `plain`: each request's messages are rendered with the same chat template and tokenized. Requests are recorded with
  their token ids, and a recording is continued by a request whose prompt begins with all of it (all recordings stay
  open, so sub-agents do not disturb each other). What nobody received is left out.

`sampled`: tokens that the engine sampled. `retokenized`: of an answer that the agent repeated unchanged below an
unchanged history, the tokens from the first one on that a later prompt does not have at its place. `lost`: sampled, but
in no training sequence and under no reason. `trained_twice`: in the loss more than once, or in the loss beside another
answer to a request that the agent made once. `rewritten_by_template`: left out of `retokenized`, on both sides, because
the chat template itself writes differently what stands before these tokens once the conversation goes on (Mistral's
moves the tools to the last user message); nobody can follow the template and keep them. `sequences` and
`forward_tokens` are what a trainer has to compute:
root-to-leaf paths and the tokens of the forest for ours, rows and their tokens for the plain way.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from corpus import AnswerMaker, Play, Request, Sampled
from result import ROOT, report
from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.scripted import SCRIPTED_LOGPROB
from upspiral.errors import EngineError, TemplateError
from upspiral.gateway.http import serve_app
from upspiral.gateway.server import Gateway
from upspiral.rendering.answer import ReadingRules
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Message, Rollout, SamplingParams, ToolCall, ToolSpec

DEADLINE_S = 30.0
THINKING_LINES = """        {%- if message.reasoning_content %}
            {{- "<think>" + message.reasoning_content + "</think>" }}
        {%- endif %}
"""
TARGETS = {"ours": {"retokenized": 0, "lost": 0, "trained_twice": 0}}


@dataclass(eq=False)
class Recording:
    """One answer as the engine sampled it."""

    request: int
    index: int
    prompt_ids: NDArray[np.int32]
    token_ids: list[int] = field(default_factory=list)
    delivered: bool = True

    @property
    def whole(self) -> NDArray[np.int32]:
        return np.concatenate([self.prompt_ids, np.asarray(self.token_ids, np.int32)])


@dataclass
class Count:
    sampled: int = 0
    retokenized: int = 0
    lost: int = 0
    trained_twice: int = 0
    rewritten_by_template: int = 0
    sequences: int = 0
    forward_tokens: int = 0

    def add(self, other: Count) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


# Ours


class CorpusEngine:
    """Plays what the next request is expected to get, and remembers what it was asked and what it gave."""

    context_length = 2**20
    version = 0

    def __init__(self, random: Random) -> None:
        self.recordings: list[Recording] = []
        self.holds, self.let_go = asyncio.Event(), asyncio.Event()
        self._random = random
        self._request: Request | None = None
        self._script: deque[Sampled] = deque()
        self._hold_after: int | None = None

    def expect(self, request: Request, *, hold_after: int | None = None) -> None:
        """After `hold_after` tokens the answer stops coming until it is cancelled."""
        self._request, self._script, self._hold_after = request, deque(request.script), hold_after
        self.holds.clear()
        self.let_go.clear()

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        del params
        if self._request is None or not self._script:
            raise EngineError("an answer was asked for that no agent has requested")
        index, sampled = len(self._request.script) - len(self._script), self._script.popleft()
        recording = Recording(self._request.number, index, np.asarray(prompt_ids, np.int32))
        self.recordings.append(recording)
        hold_after = self._hold_after
        try:
            for part, last in self._parts(sampled.token_ids[:hold_after]):
                recording.token_ids += part
                finish = sampled.finish if last and hold_after is None else None
                yield GenerationChunk(part, [SCRIPTED_LOGPROB] * len(part), [self.version] * len(part), finish)
            if hold_after is not None:
                self.holds.set()
                await asyncio.sleep(DEADLINE_S)
        finally:
            if hold_after is not None:
                recording.delivered = False
                self.let_go.set()

    def _parts(self, token_ids: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        start = 0
        while start < len(token_ids):
            stop = start + self._random.randint(1, 4)
            yield list(token_ids[start:stop]), stop >= len(token_ids)
            start = stop

    def stats(self) -> EngineStats:
        return EngineStats()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Ours:
    """Agents that talk to the gateway over HTTP."""

    def __init__(self, client: aiohttp.ClientSession, stage: Stage, key: str, engine: CorpusEngine) -> None:
        self._client, self._url, self._engine = client, f"{stage.url}/v1/chat/completions", engine
        self._headers = {"authorization": f"Bearer {key}"}
        self._renderer = stage.renderer

    def allows(self, request: Request) -> bool:
        return rendered(request, self._renderer) is not None

    async def answer(self, request: Request) -> list[dict[str, Any]]:
        retry = {"x-stainless-retry-count": "1"}
        if request.lost_after is not None:
            await self._hang_up(request)
        self._engine.expect(request)
        messages = await self._post(request, {} if request.lost_after is None else retry)
        if request.repeated:
            self._engine.expect(request)
            await self._post(request, retry)
        return messages

    async def _post(self, request: Request, headers: dict[str, str]) -> list[dict[str, Any]]:
        async with self._client.post(self._url, json=request.body, headers={**self._headers, **headers}) as response:
            body = await response.json()
        if response.status != 200:
            raise RuntimeError(f"the gateway refused request {request.number}: {body}")
        recorded = [each for each in self._engine.recordings if each.request == request.number and each.delivered]
        sampled = sum(len(each.token_ids) for each in recorded[-len(request.script) :])
        if body["usage"]["completion_tokens"] != sampled:
            raise RuntimeError(f"request {request.number}: usage {body['usage']}, the engine sampled {sampled} tokens")
        return [choice["message"] for choice in body["choices"]]

    async def _hang_up(self, request: Request) -> None:
        self._engine.expect(request, hold_after=request.lost_after)
        async with asyncio.timeout(DEADLINE_S):
            async with self._client.post(
                self._url, json={**request.body, "stream": True}, headers=self._headers
            ) as response:
                await self._engine.holds.wait()
                response.close()
            await self._engine.let_go.wait()


def count_ours(play: Play, recordings: Sequence[Recording], graph: TrajectoryGraph, renderer: Renderer) -> Count:
    """What the store says, against what the engine got and gave."""
    stored = Counter[bytes]()
    for node in graph.nodes:
        if node.num_sampled:
            stored[graph.path_ids(node.id).tobytes()] += node.num_sampled
    count = Count(sampled=sum(len(each.token_ids) for each in recordings))
    in_loss: list[Recording] = []
    for each in recordings:
        key, sampled = each.whole.tobytes(), len(each.token_ids)
        if stored[key] < sampled:
            count.lost += sampled - stored[key]
        stored[key] -= min(sampled, stored[key])
        if each.delivered and sampled:
            in_loss.append(each)
    count.retokenized, count.rewritten_by_template = retokenized(play, recordings, renderer)
    count.trained_twice = stored.total() + surplus(play, in_loss)
    count.sequences = sum(1 for leaf in graph.leaves() if any(node.num_sampled for node in graph.path(leaf.id)))
    count.forward_tokens = sum(len(node.token_ids) for node in graph.nodes)
    return count


# The plain way


class Plain:
    """Agents that talk to a gateway which renders everything each time and records what came of it."""

    def __init__(self, renderer: Renderer) -> None:
        self.recordings: list[Recording] = []
        self._renderer = renderer

    def allows(self, request: Request) -> bool:
        return rendered(request, self._renderer) is not None

    async def answer(self, request: Request) -> list[dict[str, Any]]:
        prompt_ids, tools = rendered(request, self._renderer), tools_of(request)
        assert prompt_ids is not None
        rules = ReadingRules(tool_calls=bool(tools), tools=tools, after=request.entries[-1].message["role"])
        if request.lost_after is not None:
            part = list(request.script[0].token_ids[: request.lost_after])
            self.recordings.append(Recording(request.number, 0, prompt_ids, part, delivered=False))
        for _ in range(2 if request.repeated else 1):
            for index, sampled in enumerate(request.script):
                self.recordings.append(Recording(request.number, index, prompt_ids, list(sampled.token_ids)))
        return [self._wire(sampled, rules) for sampled in request.script]

    def _wire(self, sampled: Sampled, rules: ReadingRules) -> dict[str, Any]:
        message = self._renderer.parse(sampled.token_ids, sampled.finish, rules).message
        wire: dict[str, Any] = {"role": "assistant", "content": message.text}
        if message.thinking is not None:
            wire["reasoning_content"] = message.thinking
        if message.tool_calls:
            wire["content"] = message.text or None
            wire["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        return wire


@dataclass(eq=False)
class Row:
    """A training sequence of the plain way."""

    token_ids: NDArray[np.int32]
    loss: list[tuple[Recording, int]]


def merged(recordings: Sequence[Recording]) -> list[Row]:
    """One row for each chain of recordings that continue each other token by token."""
    rows: list[Row] = []
    for each in recordings:
        begun = [row for row in rows if _starts_with(each.prompt_ids, row.token_ids)]
        row = max(begun, key=lambda row: len(row.token_ids), default=None)
        if row is None:
            row = Row(each.prompt_ids, [])
            rows.append(row)
        row.token_ids = each.whole
        row.loss += [(each, position) for position in range(len(each.token_ids))]
    return rows


def count_plain(play: Play, recordings: Sequence[Recording], renderer: Renderer) -> Count:
    received = [each for each in recordings if each.delivered]
    rows = merged(received)
    in_loss = Counter(place for row in rows for place in row.loss)
    sampled = sum(len(each.token_ids) for each in received)
    again, rewritten = retokenized(play, recordings, renderer)
    return Count(
        sampled=sum(len(each.token_ids) for each in recordings),
        retokenized=again,
        rewritten_by_template=rewritten,
        lost=sampled - len(in_loss),
        trained_twice=in_loss.total() - len(in_loss) + surplus(play, received),
        sequences=len(rows),
        forward_tokens=sum(len(row.token_ids) for row in rows),
    )


# What both are judged by


def retokenized(play: Play, recordings: Sequence[Recording], renderer: Renderer) -> tuple[int, int]:
    """Tokens that were made again, and those for which the template is to blame."""
    received = {(each.request, each.index): each for each in recordings if each.delivered}
    kept: dict[Recording, int] = {}
    rewritten: set[Recording] = set()
    for request in play.requests:
        prompt_ids = received[request.number, 0].prompt_ids
        for place, entry in enumerate(request.entries):
            if entry.answers is None:
                continue
            asked = play.requests[entry.answers]
            if request.entries[:place] != asked.entries or request.tools != asked.tools:
                continue  # the agent has changed what stands before
            answer = received[asked.number, entry.index]
            same = max(0, _shared(prompt_ids, answer.whole) - len(answer.prompt_ids))
            if same < len(answer.token_ids) and is_rewritten(asked, request, renderer):
                rewritten.add(answer)
            else:
                kept[answer] = min(kept.get(answer, len(answer.token_ids)), same)
    again = sum(len(answer.token_ids) - same for answer, same in kept.items())
    return again, sum(len(answer.token_ids) for answer in rewritten)


def is_rewritten(asked: Request, later: Request, renderer: Renderer) -> bool:
    """Whether the template writes a conversation differently once it goes on, thinking left aside."""
    before, after = (
        renderer.render([replace(_message(entry.message), thinking=None) for entry in request.entries], tools_of(asked))
        for request in (asked, later)
    )
    ids, longer = (np.concatenate([segment.token_ids for segment in segments]) for segments in (before, after))
    return not _starts_with(longer, ids)


def surplus(play: Play, in_loss: Sequence[Recording]) -> int:
    """Tokens in the loss of answers beyond those that a request asked for."""
    answers: dict[int, list[Recording]] = {}
    for each in in_loss:
        answers.setdefault(each.request, []).append(each)
    return sum(
        len(each.token_ids) for number, given in answers.items() for each in given[len(play.requests[number].script) :]
    )


def _shared(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _starts_with(a: NDArray[np.int32], b: NDArray[np.int32]) -> bool:
    return len(a) >= len(b) and bool(np.array_equal(a[: len(b)], b))


def rendered(request: Request, renderer: Renderer) -> NDArray[np.int32] | None:
    """The whole prompt from the chat template; None where the template refuses the conversation."""
    messages = [_message(entry.message) for entry in request.entries]
    try:
        segments = [segment.token_ids for segment in renderer.render(messages, tools_of(request))]
    except TemplateError:
        return None
    return np.concatenate([*segments, renderer.generation_prompt_after(messages[-1].role)])


def tools_of(request: Request) -> tuple[ToolSpec, ...]:
    return tuple(ToolSpec(**_tool(entry["function"])) for entry in request.body.get("tools", []))


def _message(wire: dict[str, Any]) -> Message:
    calls = tuple(
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in wire.get("tool_calls", [])
    )
    text, thinking = wire.get("content") or "", wire.get("reasoning_content")
    return Message(wire["role"], text, thinking, calls, wire.get("tool_call_id"))


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "parameters": function["parameters"]}


# The comparison


@dataclass(eq=False)
class Stage:
    """A model's words and a gateway that speaks them."""

    renderer: Renderer
    tokenizer: Tokenizer
    gateway: Gateway
    url: str
    store: TrajectoryStore


async def open_stage(stack: AsyncExitStack, model: Path, folder: Path) -> Stage:
    renderer = Renderer.from_folder(model)
    store = TrajectoryStore(folder / "trajectories.db")
    stack.callback(store.close)
    gateway = Gateway(renderer, CorpusEngine(Random(0)), store, model_name=model.name)
    url = await stack.enter_async_context(serve_app(gateway.app))
    return Stage(renderer, Tokenizer.from_file(str(model / "tokenizer.json")), gateway, url, store)


async def compare(stage: Stage, client: aiohttp.ClientSession, name: str) -> tuple[Count, Count, Counter[str]]:
    """Plays one conversation both ways."""

    def maker() -> AnswerMaker:
        return AnswerMaker(Random(f"{name} answers"), stage.renderer, stage.tokenizer)

    engine = CorpusEngine(Random(f"{name} chunks"))
    key = stage.gateway.open_rollout(Rollout(name, "corpus", "corpus"), engine=engine)
    play = Play(Random(name), maker(), Ours(client, stage, key, engine))
    await play.run()
    await stage.gateway.seal_rollout(name)
    ours = count_ours(play, engine.recordings, stage.store.graph(name), stage.renderer)

    plain = Plain(stage.renderer)
    again = Play(Random(name), maker(), plain)
    await again.run()
    if again.happened != play.happened or len(again.requests) != len(play.requests):
        raise RuntimeError(f"conversation {name} took another course the plain way: the comparison would be unfair")
    return ours, count_plain(again, plain.recordings, stage.renderer), play.happened


async def measure(models: Sequence[Path], folder: Path, seed: int, conversations: int) -> dict[str, Any]:
    ours, plain, happened = Count(), Count(), Counter[str]()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)))
        stages = [await open_stage(stack, model, folder / f"store-{i}") for i, model in enumerate(models)]
        for number in range(conversations):
            one, other, what = await compare(stages[number % len(stages)], client, f"{seed}-{number}")
            ours.add(one)
            plain.add(other)
            happened += what
    return {
        "ours": asdict(ours),
        "plain": asdict(plain),
        "conversations": conversations,
        "seed": seed,
        "happened": dict(sorted(happened.items())),
    }


def small_models(folder: Path) -> list[Path]:
    """Tokenizers and templates in the formats of the model families, and one whose template drops all thinking."""
    import sys

    sys.path.insert(0, str(ROOT))
    from tests.fixtures.model_families import FAMILIES, make_family
    from tests.fixtures.tiny_model import make_tokenizer

    drops = make_tokenizer(folder / "drops-thinking")
    shipped = resources.files("upspiral.rendering").joinpath("templates/chatml_tools.jinja").read_text("utf-8")
    if THINKING_LINES not in shipped:
        raise RuntimeError("the shipped template has changed; look where it renders thinking")
    (drops / "chat_template.jinja").write_text(shipped.replace(THINKING_LINES, ""), encoding="utf-8")
    return [drops, *(make_family(folder / name, name) for name in FAMILIES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a name from `upspiral model list` or a Hugging Face folder")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/exactness.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upspiral-exactness-") as temporary:
        folder = Path(temporary)
        models = small_models(folder) if options.model is None else [_resolved(options.model)]
        figures = asyncio.run(measure(models, folder, options.seed, options.conversations))
    report("exactness", {**figures, "model": options.model or "families"}, TARGETS, save=options.save)


def _resolved(model: str) -> Path:
    from upspiral.weights.models import resolve_model

    return resolve_model(model, weights=False)


if __name__ == "__main__":
    main()
