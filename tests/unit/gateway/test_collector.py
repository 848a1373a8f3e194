"""The process's garbage collector is as it was once nothing is served, and sealed rollouts do not wait for it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fixtures.live_gateway import live_gateway
from upspiral.gateway.collector import seldom_collected
from upspiral.types import Rollout


def test_the_settings_end_with_the_context() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with seldom_collected():
        assert gc.get_threshold()[2] > before[2]
        assert gc.get_freeze_count() > frozen
        assert gc.isenabled()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ["answered", "left", "sealed in flight", "engine failed"])
def test_a_sealed_rollout_is_gone_without_the_collector(tmp_path: Path, stream: bool, ending: str) -> None:
    """Full collections are rare: whatever waited for one would be a leak of a whole history each time."""

    async def scene() -> None:
        script = [] if ending == "engine failed" else ["a long answer " * 20]
        async with live_gateway(tmp_path, script, pause_s=0.0 if ending == "answered" else 0.02) as live:
            key = live.gateway.open_rollout(Rollout("r1", "task", "group"))
            history = weakref.ref(live.gateway._live["r1"]._history)  # pyright: ignore[reportPrivateUsage]
            asking = asyncio.create_task(ask(live.url, key, stream))
            await asyncio.sleep(0.1)
            if ending == "left":
                asking.cancel()
            if ending != "sealed in flight":
                await asyncio.wait([asking])
            await live.gateway.seal_rollout("r1")
            await asyncio.wait([asking])
            async with asyncio.timeout(5):
                while history() is not None:
                    await asyncio.sleep(0.01)

    gc.collect()
    gc.disable()
    try:
        asyncio.run(scene())
    finally:
        gc.enable()


async def ask(url: str, key: str, stream: bool) -> Any:
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": stream}
    async with (
        aiohttp.ClientSession(headers={"x-api-key": key}) as http,
        http.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        return await response.read()
