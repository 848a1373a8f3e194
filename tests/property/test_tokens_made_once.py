"""Law 1: tokens are made once. Whatever an agent does with its history, the engine gets exactly the stored tokens of
the answer's path, and what was sampled is never tokenized again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.engine.scripted import ScriptedEngine, ScriptLine
from upspiral.gateway.http import serve_app
from upspiral.gateway.server import Gateway
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SYSTEM = {"role": "system", "content": "Be brief."}


@dataclass(frozen=True)
class Move:
    """One thing an agent does; `place` picks a branch and a message in it."""

    kind: str
    place: int
    text: str
    answer: ScriptLine
    stream: bool
    renames: bool


@dataclass
class Branch:
    """What one line of conversation looks like to the agent."""

    messages: list[dict[str, Any]]
    answers: int = 0
    edited: bool = False
    tools: bool = True
    pending: list[str] = field(default_factory=list)
    """Ids of calls that wait for results."""


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)
VALUES = st.one_of(TEXTS, st.booleans(), st.integers(), st.none())
CALLS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=2), max_size=2)
TEXT_ANSWERS = st.builds(
    lambda text, calls: ScriptLine(
        text=text + "\n".join(f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': c})}\n</tool_call>" for c in calls)
    ),
    TEXTS,
    CALLS,
)
# Mostly invalid UTF-8 and never what the tokenizer itself would make of the text.
RANDOM_ANSWERS = st.builds(
    lambda ids, stops: ScriptLine(token_ids=(*ids, 2) if stops else tuple(ids)),
    st.lists(st.integers(0, 554), min_size=1, max_size=16),
    st.booleans(),
)
MOVES = st.builds(
    Move,
    kind=st.sampled_from(["continue", "continue", "continue", "retry", "fork", "edit", "drop_tools", "start"]),
    place=st.integers(0, 1000),
    text=TEXTS,
    answer=st.one_of(TEXT_ANSWERS, RANDOM_ANSWERS),
    stream=st.booleans(),
    renames=st.booleans(),
)


@dataclass
class Stage:
    """One gateway for all examples; each opens a rollout of its own with a script of its own."""

    runner: asyncio.Runner
    gateway: Gateway
    store: TrajectoryStore
    renderer: Renderer
    url: str
    rollouts: int = 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("law-one")
    renderer = Renderer.from_folder(make_tokenizer(folder / "model"))
    store = TrajectoryStore(folder / "trajectories.db")
    with asyncio.Runner() as runner:
        unused = ScriptedEngine([], encode=renderer.encode_answer)
        gateway = Gateway(renderer, unused, store, model_name="tiny")
        server = serve_app(gateway.app)
        yield Stage(runner, gateway, store, renderer, runner.run(server.__aenter__()))
        runner.run(server.__aexit__(None, None, None))
    store.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves=st.lists(MOVES, min_size=1, max_size=10))
def test_the_engine_gets_exactly_the_stored_tokens(stage: Stage, moves: list[Move]) -> None:
    stage.runner.run(_play(stage, moves))


async def _play(stage: Stage, moves: list[Move]) -> None:
    stage.rollouts += 1
    rollout = f"r{stage.rollouts}"
    renderer = stage.renderer
    engine = ScriptedEngine([move.answer for move in moves], encode=renderer.encode_answer, tokens_per_chunk=2)
    key = stage.gateway.open_rollout(Rollout(rollout, "task", "group"), engine=engine)
    async with aiohttp.ClientSession(stage.url, headers={"Authorization": f"Bearer {key}"}) as client:
        branches: list[Branch] = []
        for number, move in enumerate(moves):
            branch = _next_branch(move, branches)
            message, usage = await _ask(client, branch, move)
            _check_last_answer(stage.store.graph(rollout), engine, renderer, branch, usage)
            branch.messages.append(message)
            branch.answers += 1
            branch.pending = [call["id"] for call in message.get("tool_calls") or []]
            branches.append(branch)
            assert len(engine.calls) == number + 1
    graph = stage.store.graph(rollout)
    assert graph.num_sampled == engine.stats().sampled_tokens
    _check_equal(graph, stage.gateway.graph(rollout))
    await stage.gateway.seal_rollout(rollout)


def _next_branch(move: Move, branches: list[Branch]) -> Branch:
    """The conversation that this move sends; its last message is the agent's."""
    if move.kind == "start" or not branches:
        return Branch([SYSTEM, {"role": "user", "content": move.text}])
    old = branches[move.place % len(branches)]
    branch = Branch(_copy(old.messages), old.answers, old.edited, old.tools, list(old.pending))
    answered = [index for index, message in enumerate(branch.messages) if message["role"] == "assistant"]
    cut = answered[move.place // 7 % len(answered)]
    if move.kind == "retry":
        return Branch(branch.messages[:cut], answered.index(cut), old.edited, old.tools)
    if move.kind == "fork":
        branch = Branch(branch.messages[: cut + 1], answered.index(cut) + 1, old.edited, old.tools)
    if move.kind == "edit":
        branch.messages[cut]["content"] = (branch.messages[cut].get("content") or "") + "!"
        branch.edited = True
    if move.kind == "drop_tools":
        branch.tools = not branch.tools
        branch.edited = True
    if move.kind != "fork" and branch.pending:
        branch.messages += [{"role": "tool", "tool_call_id": i, "content": move.text} for i in branch.pending]
    else:
        branch.messages.append({"role": "user", "content": move.text})
    if move.renames:
        _rename(branch.messages)
    return branch


def _rename(messages: list[dict[str, Any]]) -> None:
    """What SDKs do to a history: new ids, other JSON spacing, "" for null."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or []:
            names[call["id"]] = call["id"] = f"renamed-{len(names)}"
            call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=2)
        if "tool_call_id" in message:
            message["tool_call_id"] = names[message["tool_call_id"]]
        if message["role"] == "assistant":
            message["content"] = message.get("content") or ""
            message.pop("reasoning_content", None)


async def _ask(client: aiohttp.ClientSession, branch: Branch, move: Move) -> tuple[dict[str, Any], dict[str, int]]:
    """The served message, streamed or not, and the usage."""
    body: dict[str, Any] = {"model": "m", "messages": branch.messages}
    if branch.tools:
        body["tools"] = TOOLS
    if not move.stream:
        async with client.post("/v1/chat/completions", json=body) as response:
            value = await response.json()
        assert response.status == 200, value
        return value["choices"][0]["message"], value["usage"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    usage: dict[str, int] = {}
    async with client.post("/v1/chat/completions", json=body) as response:
        events = await response.text()
    for line in events.split("\n\n"):
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line[6:])
        usage = chunk["usage"] or usage
        for choice in chunk["choices"]:
            message["content"] += choice["delta"].get("content") or ""
            message["tool_calls"] += choice["delta"].get("tool_calls") or []
    return message, usage


def _check_last_answer(
    graph: TrajectoryGraph, engine: ScriptedEngine, renderer: Renderer, branch: Branch, usage: dict[str, int]
) -> None:
    node = graph.nodes[-1]
    prompt = renderer.generation_prompt
    stored = graph.path_ids(node.parent) if node.parent is not None else np.empty(0, np.int32)
    assert (*stored.tolist(), *prompt.tolist()) == engine.calls[-1].prompt_ids
    assert node.token_ids[: len(prompt)].tolist() == prompt.tolist()
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(stored) + len(prompt), node.num_sampled)
    path = graph.path(node.id)
    assert len(path) == len(branch.messages) + 1
    assert [n.role for n in path[:-1]] == [m["role"] for m in branch.messages]
    if not branch.edited:
        # Every answer that the agent repeated is there as sampled, none as rendered text.
        assert sum(bool(n.sampled.any()) for n in path) == branch.answers + 1


def _check_equal(stored: TrajectoryGraph, live: TrajectoryGraph) -> None:
    for a, b in zip(stored.nodes, live.nodes, strict=True):
        assert (a.parent, a.reason, a.message) == (b.parent, b.reason, b.message)
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.sampled.tolist() == b.sampled.tolist()


def _copy(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return json.loads(json.dumps(messages))
