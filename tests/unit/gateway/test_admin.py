"""The admin API: rollouts of agents that run elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fixtures.live_gateway import ADMIN_KEY, LiveGateway, live_gateway
from upspiral.types import RolloutStatus

ASK = [{"role": "user", "content": "How many files?"}]


class Admin:
    def __init__(self, live: LiveGateway, session: aiohttp.ClientSession, key: str = ADMIN_KEY) -> None:
        self._url = f"{live.url}/admin/rollouts"
        self._session = session
        self._headers = {"Authorization": f"Bearer {key}"}

    async def call(self, method: str, path: str = "", body: Any = None) -> tuple[int, Any]:
        async with self._session.request(method, self._url + path, json=body, headers=self._headers) as response:
            return response.status, await response.json()


def test_a_rollout_from_opening_to_its_graph(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["3 files"]) as live, aiohttp.ClientSession() as session:
            admin = Admin(live, session)
            status, opened = await admin.call("POST", body={"task": "t", "group": "g"})
            assert status == 200 and set(opened) == {"rollout", "key"}
            client = live.client(opened["key"])
            await client.chat.completions.create(model="m", messages=ASK)  # pyright: ignore[reportArgumentType]
            status, running = await admin.call("GET", f"/{opened['rollout']}/graph")
            assert status == 200 and running["ledger"]["dropped"] == {"running": running["ledger"]["sampled"]}
            status, finished = await admin.call("POST", f"/{opened['rollout']}/finish", {"reward": 1})
            assert (status, finished["status"], finished["reward"]) == (200, "finished", 1.0)
            _, sealed = await admin.call("GET", f"/{opened['rollout']}/graph")
            assert sealed["rollout"] == opened["rollout"] and sealed["nodes"] == running["nodes"]
            check_nodes(sealed, live)
            assert sealed["ledger"]["masked"] == {"not_trained": sealed["ledger"]["sampled"]}
            assert sealed["ledger"]["difference"] == 0
            rollout = live.store.rollout(opened["rollout"])
            assert (rollout.status, rollout.reward, rollout.group_id) == (RolloutStatus.FINISHED, 1.0, "g")
            status, again = await admin.call("POST", f"/{opened['rollout']}/finish", {"reward": 0})
            assert status == 409 and again["error"]["code"] == "rollout_sealed"
            assert live.store.rollout(opened["rollout"]).reward == 1.0

    asyncio.run(main())


def check_nodes(graph: dict[str, Any], live: LiveGateway) -> None:
    user, answer = graph["nodes"]
    assert (user["id"], user["parent"], user["reason"], user["role"]) == (0, None, "root", "user")
    assert user["logprobs"] == user["versions"] == [None] * len(user["token_ids"])
    assert (answer["parent"], answer["role"], answer["finish_reason"]) == (0, "assistant", "stop")
    for key in ("sampled", "logprobs", "versions"):
        assert len(answer[key]) == len(answer["token_ids"])
    assert [x is not None for x in answer["logprobs"]] == answer["sampled"]
    sampled = [i for i, s in zip(answer["token_ids"], answer["sampled"], strict=True) if s]
    assert sampled == [*live.renderer.encode_answer("3 files"), 2]
    assert graph["ledger"]["sampled"] == len(sampled)


def test_the_list_of_rollouts(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["3 files"]) as live, aiohttp.ClientSession() as session:
            admin = Admin(live, session)
            opened = [(await admin.call("POST", body={"task": f"t{i}", "group": "g"}))[1] for i in range(3)]
            await live.client(opened[1]["key"]).chat.completions.create(model="m", messages=ASK)  # pyright: ignore[reportArgumentType]
            await admin.call("POST", f"/{opened[1]['rollout']}/finish", {"reward": 1})
            status, listed = await admin.call("GET")
            assert status == 200 and listed["total"] == 3
            assert [entry["id"] for entry in listed["rollouts"]] == [each["rollout"] for each in opened]
            tokens = len(live.renderer.encode_answer("3 files")) + 1
            wanted = {"task": "t1", "group": "g", "status": "finished", "reason": "", "reward": 1.0, "tokens": tokens}
            assert listed["rollouts"][1] == {"id": opened[1]["rollout"], **wanted}
            assert listed["rollouts"][0]["status"] == "running" and listed["rollouts"][0]["tokens"] == 0
            assert not any(each["key"] in str(listed) for each in opened)
            _, running = await admin.call("GET", "?status=running&limit=1")
            assert [entry["id"] for entry in running["rollouts"]] == [opened[2]["rollout"]] and running["total"] == 2
            for query in ("status=ended", "limit=0", "limit=1e3", "limit=99999", "stat=running"):
                status, answer = await admin.call("GET", f"?{query}")
                assert status == 400 and f"query.{query.partition('=')[0]}" in answer["error"]["message"]

    asyncio.run(main())


def test_limits_and_failures_show_in_the_status(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, context_length=30) as live, aiohttp.ClientSession() as session:
            admin = Admin(live, session)
            for content, status, reward in [("long " * 50, "truncated", 0.5), ("hi", "failed", None)]:
                _, opened = await admin.call("POST", body={"task": "t", "group": "g"})
                client = live.client(opened["key"]).with_options(max_retries=0)
                with pytest.raises(Exception, match=r"context holds 30|script has 0 lines"):
                    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
                _, finished = await admin.call("POST", f"/{opened['rollout']}/finish", {"reward": 0.5})
                assert (finished["status"], finished["reward"]) == (status, reward)

    asyncio.run(main())


def test_what_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live, aiohttp.ClientSession() as session:
            admin = Admin(live, session)
            for body, complaint in [
                ({"group": "g"}, "body.task"),
                ({"task": "t", "group": 3}, "body.group"),
                ({"task": "t", "group": "g", "instruction": 3}, "body.instruction must be a string"),
                ({"task": "t", "group": "g", "Reward": 1}, "body.Reward is not known; known are task, group"),
                ([], "object"),
            ]:
                status, answer = await admin.call("POST", body=body)
                assert status == 400 and complaint in answer["error"]["message"]
            status, answer = await admin.call("GET", "/r-none/graph")
            assert status == 404 and "r-none" in answer["error"]["message"]
            _, opened = await admin.call("POST", body={"task": "t", "group": "g"})
            for body in ({}, {"reward": "good"}, {"reward": True}, {"reward": 1, "rewards": 2}):
                status, answer = await admin.call("POST", f"/{opened['rollout']}/finish", body)
                assert status == 400 and "body.reward" in answer["error"]["message"]
            for key in ("wrong", opened["key"], "é"):
                stranger = Admin(live, session, key)
                for method, path in [("GET", ""), ("POST", ""), ("GET", f"/{opened['rollout']}/graph")]:
                    assert (await stranger.call(method, path, {}))[0] == 401

    asyncio.run(main())


def test_of_two_that_end_a_rollout_at_the_same_time_one_is_told_so(tmp_path: Path) -> None:
    """Ending waits for the engine to let go of what is in flight; a client that is impatient asks again."""

    async def main() -> None:
        async with live_gateway(tmp_path, ["3 files"], pause_s=0.2) as live, aiohttp.ClientSession() as session:
            admin = Admin(live, session)
            _, opened = await admin.call("POST", body={"task": "t", "group": "g"})
            client = live.client(opened["key"])
            asking = asyncio.create_task(client.chat.completions.create(model="m", messages=ASK))  # pyright: ignore[reportArgumentType]
            await asyncio.sleep(0.1)
            ends = [admin.call("POST", f"/{opened['rollout']}/finish", {"reward": reward}) for reward in (1, 0)]
            (first, _), (second, _) = await asyncio.gather(*ends)
            await asyncio.wait([asking])
            assert sorted([first, second]) == [200, 409]
            assert live.store.rollout(opened["rollout"]).reward == (1.0 if first == 200 else 0.0)
            assert asking.exception() is not None

    asyncio.run(main())
