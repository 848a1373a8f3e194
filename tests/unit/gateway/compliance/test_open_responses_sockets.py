"""The cases of the Open Responses acceptance suite that go over WebSockets, made again over a real one.

Same ids, same requests in substance, same demands. Source: as for test_open_responses.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.live_gateway import live_gateway
from tests.fixtures.wire_client import SocketClient, StreamEvent, WireClient, wire_client
from tests.unit.gateway.compliance.open_responses import check_completed, check_events, check_fields, said

OUTPUT_OF_NOTHING = {"type": "function_call_output", "call_id": "call_missing", "output": "No such call was made."}


def completed(events: Sequence[StreamEvent]) -> Any:
    response = check_events(events)
    check_completed(response)
    return response


def check_error(events: Sequence[StreamEvent], code: str) -> None:
    """The whole answer is one error of the documented shape."""
    assert [event.name for event in events] == ["error"]
    check_fields(events[0].data, {"status": (int,), "error": (dict,)})
    assert 400 <= events[0].data["status"] < 500
    assert events[0].data["error"]["code"] == code and events[0].data["error"]["message"]


async def response(client: WireClient) -> None:
    async with client.connect() as socket:
        completed(await socket.create(**said(("user", "Count from 1 to 3."))))


async def sequential_responses(client: WireClient) -> None:
    async with client.connect() as socket:
        for word in ("first", "second"):
            answer = completed(await socket.create(store=False, input=f"Reply with exactly: {word}"))
            assert answer["output"][0]["content"][0]["text"] == word


async def remembered(socket: SocketClient, word: str) -> str:
    """The id of a response with store=false."""
    answer = completed(await socket.create(store=False, input=f"Remember the code word: {word}. Reply with OK."))
    return answer["id"]


async def continuation(client: WireClient) -> None:
    async with client.connect() as socket:
        first = await remembered(socket, "cobalt")
        answer = completed(await socket.create(store=False, previous_response_id=first, input="What is the code word?"))
    assert answer["previous_response_id"] == first
    await check_continued(client)


async def check_continued(client: WireClient) -> None:
    """The suite trusts the status; here the second prompt is one that begins with the first prompt and answer."""
    first, second = client.live.engine.calls
    before = (*first.prompt_ids, *first.answer_ids)
    assert tuple(second.prompt_ids[: len(before)]) == before


async def reconnect_store_false_recovery(client: WireClient) -> None:
    async with client.connect() as socket:
        first = await remembered(socket, "copper")
    async with client.connect() as socket:
        events = await socket.create(store=False, previous_response_id=first, input="Try to continue.")
        check_error(events, "previous_response_not_found")
        completed(await socket.create(store=False, **said(("user", "Start a new response."))))


async def generate_false(client: WireClient) -> None:
    async with client.connect() as socket:
        warm = check_events(
            await socket.create(store=False, generate=False, input="Remember the code word: amber.", tools=[])
        )
        assert warm["id"] and warm["status"] == "completed" and warm["output"] == []
        assert not client.live.engine.calls
        completed(await socket.create(store=False, previous_response_id=warm["id"], input="What is the code word?"))
    assert "amber" in client.live.renderer.decode(client.live.engine.calls[0].prompt_ids)


async def previous_response_not_found(client: WireClient) -> None:
    async with client.connect() as socket:
        events = await socket.create(store=False, previous_response_id="resp_missing", input="This should fail.")
        check_error(events, "previous_response_not_found")


async def failed_continuation_evicts_cache(client: WireClient) -> None:
    async with client.connect() as socket:
        first = await remembered(socket, "ember")
        events = await socket.create(store=False, previous_response_id=first, input=[OUTPUT_OF_NOTHING])
        check_error(events, "invalid_request")
        events = await socket.create(store=False, previous_response_id=first, input="Try to continue.")
        check_error(events, "previous_response_not_found")


async def compact_new_chain(client: WireClient) -> None:
    talk = said(
        ("user", [{"type": "input_text", "text": "Remember the compaction code word: slate."}]),
        ("assistant", [{"type": "output_text", "text": "OK."}]),
        ("user", [{"type": "input_text", "text": "Compress this conversation for later continuation."}]),
    )
    compacted = await client.post("/v1/responses/compact", talk)
    assert compacted.status == 200 and "compaction" in [item["type"] for item in compacted.body["output"]]
    async with client.connect() as socket:
        follow = said(("user", "Continue from here."))["input"]
        completed(await socket.create(store=False, input=[*compacted.body["output"], *follow], tools=[]))


CASES: dict[str, tuple[Callable[[WireClient], Awaitable[None]], list[str]]] = {
    "websocket-response": (response, ["1 2 3"]),
    "websocket-sequential-responses": (sequential_responses, ["first", "second"]),
    "websocket-continuation": (continuation, ["OK", "cobalt"]),
    "websocket-reconnect-store-false-recovery": (reconnect_store_false_recovery, ["OK", "recovered"]),
    "websocket-generate-false": (generate_false, ["amber"]),
    "websocket-previous-response-not-found": (previous_response_not_found, []),
    "websocket-failed-continuation-evicts-cache": (failed_continuation_evicts_cache, ["OK"]),
    "websocket-compact-new-chain": (compact_new_chain, ["The code word is slate.", "compacted"]),
}


@pytest.mark.parametrize("name", CASES)
def test_case(tmp_path: Path, name: str) -> None:
    case, script = CASES[name]

    async def main() -> None:
        async with live_gateway(tmp_path, script, tokens_per_chunk=2) as live, wire_client(live) as client:
            await case(client)
            assert live.engine.remaining == 0 and not live.engine.stats().running

    asyncio.run(main())
