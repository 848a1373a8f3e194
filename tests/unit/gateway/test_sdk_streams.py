"""The official SDKs accumulate each streamed answer to the object that the unstreamed request returns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

from tests.fixtures.live_gateway import BASH, live_gateway
from tests.fixtures.wire_client import CALL, SECOND_CALL
from upspiral.types import Rollout

QUESTION = "How many files?"
BY_CHANCE = {"id", "call_id", "created", "created_at", "completed_at"}
HELPERS = {"parsed", "parsed_arguments", "parsed_output", "upspiral"}
"""What stream helpers add to an answer, and the extension that they do not accumulate."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a request that all three APIs have, each in its own words."""

    tools: bool = False
    max_tokens: int = 500
    stop: Sequence[str] = ()


class Chat:
    def __init__(self, url: str, key: str) -> None:
        self._create = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).chat.completions

    def options(self, asked: Asked) -> dict[str, Any]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        tools = {"tools": [BASH]} if asked.tools else {}
        stop = {"stop": list(asked.stop)} if asked.stop else {}
        return {"model": "m", "messages": messages, "max_completion_tokens": asked.max_tokens, **tools, **stop}

    async def whole(self, options: dict[str, Any]) -> Any:
        return await self._create.create(**options)

    async def streamed(self, options: dict[str, Any]) -> Any:
        async with self._create.stream(**options, stream_options={"include_usage": True}) as stream:
            try:
                return await stream.get_final_completion()
            except openai.LengthFinishReasonError as error:
                return error.completion


class Responses:
    def __init__(self, url: str, key: str) -> None:
        self._create = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).responses

    def options(self, asked: Asked) -> dict[str, Any]:
        assert not asked.stop, "the Responses API has no stop strings"
        tools = {"tools": [{"type": "function", "strict": False, **BASH["function"]}]} if asked.tools else {}
        thinking = {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}
        said = {"model": "m", "instructions": "Be brief.", "input": QUESTION}
        return {**said, "max_output_tokens": asked.max_tokens, **tools, **thinking}

    async def whole(self, options: dict[str, Any]) -> Any:
        response = await self._create.create(**options)
        return response

    async def streamed(self, options: dict[str, Any]) -> Any:
        last: Any = None
        async with self._create.stream(**options) as stream:
            async for event in stream:
                last = event
        if last.type == "response.failed":
            raise openai.APIError(last.response.error.message, request=None, body=None)  # pyright: ignore
        # The helper's own accumulation refuses answers that are cut off.
        return await stream.get_final_response() if last.type == "response.completed" else last.response


class Messages:
    def __init__(self, url: str, key: str) -> None:
        self._create = anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0).messages

    def options(self, asked: Asked) -> dict[str, Any]:
        function = BASH["function"]
        schema = {"name": function["name"], "input_schema": function["parameters"]}
        tools = {"tools": [schema]} if asked.tools else {}
        stop = {"stop_sequences": list(asked.stop)} if asked.stop else {}
        thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
        said = {"model": "m", "system": "Be brief.", "messages": [{"role": "user", "content": QUESTION}]}
        return {**said, "max_tokens": asked.max_tokens, **tools, **stop, **thinking}

    async def whole(self, options: dict[str, Any]) -> Any:
        return await self._create.create(**options)

    async def streamed(self, options: dict[str, Any]) -> Any:
        async with self._create.stream(**options) as stream:
            return await stream.get_final_message()


DIALECTS = [Chat, Responses, Messages]
CASES: dict[str, tuple[str, Asked]] = {
    "text": ("There are 3 files.\n\nGrüße, 你好 😀. \n", Asked()),
    "nothing": ("", Asked()),
    "refusal": ("I can't help with that.", Asked(tools=True)),
    "thinking": ("<think>Let me see:\n3, 你</think>\n\nThree.", Asked()),
    "thinking alone": ("<think>only this</think>", Asked()),
    "one call": (CALL, Asked(tools=True)),
    "several calls": (f"<think>so</think>Looking.\n{CALL}\n{SECOND_CALL}", Asked(tools=True)),
    "text between calls": (f"First. {CALL} then {SECOND_CALL} and last.", Asked(tools=True)),
    "broken call": ('<tool_call>{"name": "bash"</tool_call>', Asked(tools=True)),
    "empty arguments": ('<tool_call>{"name": "bash", "arguments": {}}</tool_call>', Asked(tools=True)),
    "cut off in text": ("one two three four five six", Asked(max_tokens=4)),
    "cut off in thinking": ("<think>one two three four five six", Asked(max_tokens=12)),
    "cut off in a call": (CALL, Asked(tools=True, max_tokens=9)),
    "stop string": ("one two STOP three", Asked(stop=("STOP", "HALT"))),
}
PAIRS = [
    (dialect, case)
    for case, (_, asked) in CASES.items()
    for dialect in DIALECTS
    if not (dialect is Responses and asked.stop)
]


@pytest.mark.parametrize(("dialect", "case"), PAIRS)
def test_a_stream_adds_up_to_the_whole(tmp_path: Path, dialect: type[Any], case: str) -> None:
    answer, asked = CASES[case]

    async def main() -> None:
        async with live_gateway(tmp_path, [answer] * 2, tokens_per_chunk=1) as live:
            client = dialect(live.url, live.gateway.open_rollout(Rollout("r1", "t", "g")))
            options = client.options(asked)
            whole, streamed = await client.whole(options), await client.streamed(options)
            assert plain(streamed) == plain(whole)
            first, second = live.nodes()[-2:]
            assert first.token_ids.tolist() == second.token_ids.tolist()
            assert str(first.num_sampled) in str(whole.usage) and not live.engine.stats().running

    asyncio.run(main())


def plain(model: Any) -> Any:
    """The object as JSON, without what is absent, differs by chance, or only stream helpers add."""
    return stripped(model.model_dump(mode="json", warnings=False))


def stripped(value: Any) -> Any:
    if isinstance(value, dict):
        dropped = BY_CHANCE | HELPERS | ({"index"} if "function" in value else set())
        return {key: stripped(each) for key, each in value.items() if each is not None and key not in dropped}
    return [stripped(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_engine_that_breaks_is_the_same_error(tmp_path: Path, dialect: type[Any]) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live:
            complaints: list[str] = []
            for kind in ("whole", "streamed"):
                client = dialect(live.url, live.gateway.open_rollout(Rollout(kind, "t", "g")))
                complaints.append(await complaint(getattr(client, kind), client.options(Asked())))
            assert all("the script has 0 lines" in each for each in complaints)

    asyncio.run(main())


async def complaint(ask: Callable[[dict[str, Any]], Awaitable[Any]], options: dict[str, Any]) -> str:
    with pytest.raises((openai.APIError, anthropic.APIError)) as caught:
        await ask(options)
    return str(caught.value)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_request_that_is_refused_is_the_same_error(tmp_path: Path, dialect: type[Any]) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, context_length=60) as live:
            client = dialect(live.url, live.gateway.open_rollout(Rollout("r1", "t", "g")))
            for change, expected in [({"temperature": -1}, "temperature must be a number"), ({}, "context holds 60")]:
                options = {**client.options(Asked(tools=True)), "extra_body": change}
                for ask in (client.whole, client.streamed):
                    with pytest.raises((openai.BadRequestError, anthropic.BadRequestError), match=expected):
                        await ask(options)
            stranger = dialect(live.url, "sk-none")
            for ask in (stranger.whole, stranger.streamed):
                with pytest.raises((openai.AuthenticationError, anthropic.AuthenticationError), match="no rollout"):
                    await ask(stranger.options(Asked()))

    asyncio.run(main())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_rollout_that_ends_while_it_streams_is_an_error(tmp_path: Path, dialect: type[Any]) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["long " * 400], tokens_per_chunk=1, pause_s=0.01) as live:
            client = dialect(live.url, live.gateway.open_rollout(Rollout("r1", "t", "g")))
            asking = asyncio.create_task(complaint(client.streamed, client.options(Asked())))
            async with asyncio.timeout(5):
                while live.engine.stats().sampled_tokens < 5:
                    await asyncio.sleep(0.01)
            await live.gateway.seal_rollout("r1")
            assert "rollout r1 ended while this request was answered" in await asking

    asyncio.run(main())
