"""kill -9 of `upspiral serve` at random moments, with 32 rollouts running against it (DESIGN law 8)."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
import numpy as np
import pytest

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.cli.serve import INTERRUPTED
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Node, RolloutStatus

ROOT = Path(__file__).parents[2]
ROLLOUTS = 32
SCRIPT_LINES = 3000
LONGEST_LIFE_S = 0.6
DEADLINE_S = 20.0
GONE = (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError, json.JSONDecodeError)
"""How it looks to a client when the server is killed."""


@dataclass
class Life:
    """What clients know about one gateway process when it is killed."""

    opened: set[str] = field(default_factory=set)
    answers: list[tuple[str, str, int]] = field(default_factory=list)
    """(rollout, text, tokens) of every answer that arrived completely."""
    finished: dict[str, float] = field(default_factory=dict)
    """Rewards that were acknowledged."""


@dataclass
class Totals:
    kills: int = 0
    before_ready: int = 0
    rollouts: int = 0
    interrupted: int = 0
    answers: int = 0
    nodes: int = 0


class Nursery:
    """Starts `upspiral serve` in forked processes that have everything imported already."""

    def __init__(self, process: asyncio.subprocess.Process, arguments: list[str]) -> None:
        self._process = process
        self._arguments = arguments
        self.pid = 0

    async def start(self) -> None:
        """Starts the next gateway and sets `pid`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._arguments).encode() + b"\n")
        await self._process.stdin.drain()
        self.pid = 0
        while not self.pid:
            self.pid = (await self._line()).get("pid", 0)

    async def ready(self) -> dict[str, str]:
        while "url" not in (line := await self._line()):
            pass
        return line

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = await self._process.stdout.readline()
        assert line, "the gateway did not start; see its stderr"
        return json.loads(line)


@asynccontextmanager
async def nursery(arguments: list[str], stderr: IO[bytes]) -> AsyncIterator[Nursery]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "tests" / "fixtures" / "command_nursery.py"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    started = Nursery(process, arguments)
    try:
        yield started
    finally:
        if started.pid:
            started.kill()
        process.kill()
        await process.wait()


class Agent:
    """Opens rollouts, talks, and finishes most of them, until the gateway is gone."""

    def __init__(
        self, session: aiohttp.ClientSession, ready: dict[str, str], life: Life, choices: random.Random
    ) -> None:
        self._session = session
        self._url, self._admin_key = ready["url"], ready["admin_key"]
        self._life = life
        self._choices = choices

    async def run(self) -> None:
        try:
            while True:
                await self._rollout()
        except GONE:
            return

    async def _rollout(self) -> None:
        opened = await self._post("/admin/rollouts", self._admin_key, {"task": "t", "group": "g"})
        name = opened["rollout"]
        self._life.opened.add(name)
        messages = [{"role": "user", "content": "How many files?"}]
        for _ in range(self._choices.randint(1, 12)):
            ask = self._stream if self._choices.random() < 0.5 else self._whole
            text, tokens = await ask(opened["key"], messages)
            self._life.answers.append((name, text, tokens))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And now?"}]
        if self._choices.random() < 0.8:
            reward = round(self._choices.random(), 3)
            await self._post(f"/admin/rollouts/{name}/finish", self._admin_key, {"reward": reward})
            self._life.finished[name] = reward

    async def _whole(self, key: str, messages: list[dict[str, str]]) -> tuple[str, int]:
        value = await self._post("/v1/chat/completions", key, {"messages": messages})
        return value["choices"][0]["message"]["content"], value["usage"]["completion_tokens"]

    async def _stream(self, key: str, messages: list[dict[str, str]]) -> tuple[str, int]:
        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        text, tokens, ended = "", 0, False
        headers = {"authorization": f"Bearer {key}"}
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                ended = ended or line.startswith(b"data: [DONE]")
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
        if not ended:
            raise ConnectionError("the stream ended early")
        return text, tokens

    async def _post(self, path: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {key}"}
        async with self._session.post(self._url + path, json=body, headers=headers) as response:
            value = await response.json()
            assert response.status == 200, value
            return value


@dataclass
class Stage:
    """The folder of one run, and what its gateway may say."""

    folder: Path
    renderer: Renderer
    expected: dict[str, tuple[int, ...]]
    """The token ids of each answer, by its text."""

    @property
    def store(self) -> Path:
        return self.folder / "run" / "trajectories.db"

    @property
    def arguments(self) -> list[str]:
        options = {"--model": "model", "--script": "script.jsonl", "--run": "run"}
        paths = [part for flag, name in options.items() for part in (flag, str(self.folder / name))]
        return ["serve", "--engine", "scripted", "--port", "0", *paths]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    folder = make_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 560}))
    renderer = Renderer.from_folder(folder)
    choices = random.Random(0)
    expected: dict[str, tuple[int, ...]] = {}
    with (tmp_path / "script.jsonl").open("w") as script:
        for number in range(SCRIPT_LINES):
            text = f"{number} naïve 😀 files" + choices.choice(["", ".", " in data"])
            # Half of them in tokens that the tokenizer would not choose: the store must have what was sampled.
            pieces = list(text) if number % 2 else [text]
            ids = [index for piece in pieces for index in renderer.encode_answer(piece)]
            expected[text] = (*ids, renderer.stop_token_ids[0])
            line = {"token_ids": expected[text], "pause_s": choices.choice([0, 0, 0.001, 0.004])}
            script.write(json.dumps(line) + "\n")
    return Stage(tmp_path, renderer, expected)


@pytest.mark.parametrize(
    "kills", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["short", "long"]
)
def test_what_was_committed_survives(stage: Stage, kills: int, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    totals = Totals()
    try:
        asyncio.run(live_and_die(stage, kills, random.Random(seed), totals))
    finally:
        with capsys.disabled():
            print(f"\nseed {seed}: {totals}")
    assert totals.kills == kills and totals.answers > 10 * kills and totals.interrupted > 10 * kills
    check_everything(stage, totals)


async def live_and_die(stage: Stage, kills: int, choices: random.Random, totals: Totals) -> None:
    said = stage.folder / "stderr.txt"
    with said.open("wb") as stderr:
        async with nursery(stage.arguments, stderr) as gateway:
            life: Life | None = None
            while totals.kills < kills:
                await gateway.start()
                if choices.random() < 0.1:
                    # In the middle of starting: also of marking what the one before left behind.
                    await asyncio.sleep(choices.uniform(0, 0.1))
                    gateway.kill()
                    totals.before_ready += 1
                else:
                    ready = await gateway.ready()
                    if life is not None:
                        check_life(stage, life, totals)
                    life = await live(gateway, ready, choices)
                totals.kills += 1
            await gateway.start()
            await gateway.ready()
            if life is not None:
                check_life(stage, life, totals)
    assert b"unfinished rollouts" in said.read_bytes() and b"Traceback" not in said.read_bytes()


async def live(gateway: Nursery, ready: dict[str, str], choices: random.Random) -> Life:
    """Lets the agents run for a while, kills the gateway, and returns when all agents have noticed."""
    life = Life()
    timeout = aiohttp.ClientTimeout(DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        agents = [Agent(session, ready, life, random.Random(choices.random())) for _ in range(ROLLOUTS)]
        running = asyncio.gather(*(agent.run() for agent in agents))
        await asyncio.sleep(choices.uniform(0.02, LONGEST_LIFE_S))
        gateway.kill()
        await running
    return life


def check_life(stage: Stage, life: Life, totals: Totals) -> None:
    """What the next gateway finds of the one that was killed."""
    store = TrajectoryStore(stage.store, create=False)
    try:
        sampled: dict[str, list[Node]] = {}
        for name in life.opened:
            rollout = store.rollout(name)
            if name in life.finished:
                assert (rollout.status, rollout.reward) == (RolloutStatus.FINISHED, life.finished[name])
            elif rollout.status is RolloutStatus.FINISHED:
                assert rollout.reward is not None  # recorded, but the agent was not told in time
            else:
                assert (rollout.status, rollout.reason, rollout.reward) == (RolloutStatus.CANCELLED, INTERRUPTED, None)
                totals.interrupted += 1
            sampled[name] = check_nodes(stage, store, name, totals)
        for name, text, tokens in life.answers:
            node = next(node for node in sampled[name] if node.message is not None and node.message.text == text)
            assert node.num_sampled == tokens and node.delivered
    finally:
        store.close()
    totals.rollouts += len(life.opened)
    totals.answers += len(life.answers)


def check_nodes(stage: Stage, store: TrajectoryStore, name: str, totals: Totals) -> list[Node]:
    """No half node. Reading the graph checks its invariants; the answers are checked against the script."""
    nodes = store.graph(name).nodes
    answers = [node for node in nodes if node.num_sampled]
    for node in answers:
        assert node.finish_reason in ("stop", "cancelled") and node.message is not None
        ids = node.token_ids[node.sampled].tolist()
        assert np.isfinite(node.logprobs[node.sampled]).all() and (node.versions[node.sampled] >= 0).all()
        if node.delivered:
            assert tuple(ids) == stage.expected[node.message.text]
        assert not node.sampled[: len(stage.renderer.generation_prompt)].any()
    # Context is committed with the answer to it, never without.
    assert not nodes or nodes[-1].num_sampled
    totals.nodes += len(nodes)
    return answers


def check_everything(stage: Stage, totals: Totals) -> None:
    """The whole file, also rollouts whose opening no client heard of."""
    connection = sqlite3.connect(stage.store)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    store = TrajectoryStore(stage.store, create=False)
    assert not store.rollouts(status=RolloutStatus.RUNNING)
    assert len(store.rollouts()) >= totals.rollouts
    for rollout in store.rollouts():
        store.graph(rollout.id)
    ledger = store.ledger()
    assert ledger.difference == 0 and ledger.masked == {"not_trained": ledger.sampled}
    store.close()
