"""The server of sandboxes over HTTP on a real port: leases, tenants, quotas, and what becomes of lost answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.unit.sandbox.live_server import ALICE, BOB, LiveServer, live_server
from upspiral.errors import CapabilityError, ConfigError, ImageError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import Snapshot
from upspiral.sandbox.fake import FakeBackend, Faults
from upspiral.sandbox.pool import PoolLimits
from upspiral.sandbox.server.tenants import Quota, Tenants
from upspiral.sandbox.server.wire import error_answer, raised

Client = aiohttp.ClientSession
Check = Callable[[LiveServer, Client, Client], Awaitable[None]]
DEADLINE_S = 60.0


def serve(check: Check, backend: FakeBackend | None = None, limits: PoolLimits | None = None, **options: Any) -> None:
    """Runs a check against a server, with a client of Alice's and one of Bob's."""

    async def run() -> None:
        limit = limits or PoolLimits(warm_max=0)
        async with (
            live_server(backend or FakeBackend(), limit, **options) as live,
            live.client(ALICE) as alice,
            live.client(BOB) as bob,
        ):
            await asyncio.wait_for(check(live, alice, bob), DEADLINE_S)

    asyncio.run(run())


async def create(client: Client, key: str = "k", spec: Any = None) -> tuple[int, dict[str, Any]]:
    headers = {"Idempotency-Key": key}
    async with client.post("/sandboxes", json={"spec": spec or {}}, headers=headers) as response:
        return response.status, await response.json()


async def ask(client: Client, method: str, path: str, body: Any = None, key: str = "k") -> tuple[int, Any]:
    async with client.request(method, path, json=body, headers={"Idempotency-Key": key}) as response:
        return response.status, await response.json() if response.content_length else None


async def until(condition: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_at, f"waited 10 s for {what}"
        await asyncio.sleep(0.01)


def test_a_lease_is_made_listed_and_ended() -> None:
    backend = FakeBackend(faults=Faults(stop_s=0.3))

    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        status, lease = await create(alice, spec={"labels": {"task": "t"}, "files": {"a": "eA=="}})
        assert status == 201 and lease["heartbeat_s"] == 60.0 and 0 < lease["ends_in_s"] <= 4 * 3600
        assert backend.sandboxes[0].files == {"a": b"x"}
        assert backend.sandboxes[0].spec.labels["tenant"] == "alice"
        _, listing = await ask(alice, "GET", "/sandboxes")
        assert [each["id"] for each in listing["sandboxes"]] == [lease["id"]]
        assert listing["sandboxes"][0]["labels"] == {"task": "t"}
        assert (await ask(alice, "DELETE", f"/sandboxes/{lease['id']}"))[0] == 204
        assert backend.sandboxes[0].is_stopped, "told before it was so"
        status, gone = await ask(alice, "GET", f"/sandboxes/{lease['id']}")
        assert (status, gone["code"]) == (410, "gone") and "stopped by its owner" in gone["message"]
        # Again: the first answer may have been lost.
        assert (await ask(alice, "DELETE", f"/sandboxes/{lease['id']}"))[0] == 204

    serve(check, backend)


def test_a_create_whose_answer_is_lost_makes_one_sandbox() -> None:
    backend = FakeBackend(faults=Faults(start_s=0.3))

    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(create(alice, "lost"), 0.05)
        first, again = await create(alice, "lost"), await create(alice, "lost")
        assert first[0] == again[0] == 201 and first[1]["id"] == again[1]["id"]
        assert len(backend.sandboxes) == 1
        # Another key, and the same key of another tenant, are other sandboxes.
        others = [await create(alice, "other"), await create(bob, "lost")]
        assert len({first[1]["id"], *(each[1]["id"] for each in others)}) == 3
        status, error = await create(alice, "lost", {"env": {"A": "1"}})
        assert (status, error["code"]) == (409, "key_reused")

    serve(check, backend)


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.5])
def test_a_create_that_is_cancelled_leaves_nothing(delay_s: float) -> None:
    backend = FakeBackend(faults=Faults(start_s=0.3))

    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        creating = asyncio.create_task(create(alice, "c"))
        await asyncio.sleep(delay_s)
        assert (await ask(alice, "DELETE", "/creations/c"))[0] == 204
        status, answer = await creating
        assert status == 201 if delay_s == 0.5 else (status, answer["code"]) == (410, "gone")
        # The request that was overtaken by its cancellation makes nothing either.
        assert (await create(alice, "c"))[0] == 410
        await until(lambda: live.pool.stats.live == 0, "everything to stop")

    serve(check, backend)


def test_a_failed_create_can_be_tried_again_with_its_key() -> None:
    backend = FakeBackend(faults=Faults(start_failures=1))

    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        status, error = await create(alice)
        assert (status, error["code"]) == (502, "sandbox") and "as it was told to" in error["message"]
        assert (await create(alice))[0] == 201

    serve(check, backend, PoolLimits(warm_max=0, attempts=1))


def test_a_lease_ends_without_heartbeats_and_at_its_deadline() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, silent = await create(alice, "1")
        _, beating = await create(alice, "2")
        _, short = await create(alice, "3", {"limits": {"lifetime_s": 0.7}})
        gone: dict[str, str] = {}
        for _ in range(20):
            await asyncio.sleep(0.1)
            _, answer = await ask(alice, "POST", "/heartbeat", {"sandboxes": [beating["id"], short["id"]]})
            gone.update(answer["gone"])
        assert list(gone) == [short["id"]] and "its lifetime ended" in gone[short["id"]]
        status, answer = await ask(alice, "GET", f"/sandboxes/{silent['id']}")
        assert status == 410 and "no sign of its client came for 0.5 s" in answer["message"]
        assert live.pool.stats.live == 1
        # Bob's heartbeat keeps nothing of Alice's alive.
        for _ in range(10):
            await asyncio.sleep(0.1)
            _, answer = await ask(bob, "POST", "/heartbeat", {"sandboxes": [beating["id"]]})
            assert "has no sandbox" in answer["gone"][beating["id"]]
        assert (await ask(alice, "GET", f"/sandboxes/{beating['id']}"))[0] == 410

    serve(check, heartbeat_s=0.5)


def test_a_wrong_token_opens_nothing() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, lease = await create(alice)
        paths = [
            ("GET", "/capabilities"),
            ("GET", "/sandboxes"),
            ("POST", "/sandboxes"),
            ("POST", "/heartbeat"),
            ("DELETE", "/creations/k"),
            ("DELETE", f"/sandboxes/{lease['id']}"),
            ("POST", f"/sandboxes/{lease['id']}/fork"),
            ("GET", f"/sandboxes/{lease['id']}/frames"),
        ]
        for headers in ({"authorization": f"Bearer {ALICE}x"}, {"authorization": f"Basic {ALICE}"}, {}):
            async with aiohttp.ClientSession(live.url, headers=headers) as stranger:
                for method, path in paths:
                    status, answer = await ask(stranger, method, path)
                    assert status == 401 or (path.endswith("frames") and status == 404), (path, status)
                    assert ALICE not in str(answer)
                with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
                    await stranger.ws_connect(f"/sandboxes/{lease['id']}/frames?session=12345678")
                for path in ("/health", "/metrics"):
                    async with stranger.get(path) as response:
                        text = await response.text()
                        assert response.status == 200 and lease["id"] not in text and "alice" not in text
        assert (await ask(alice, "GET", f"/sandboxes/{lease['id']}"))[0] == 200

    serve(check)


def test_tenants_see_nothing_of_each_other() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, lease = await create(alice)
        missing = await ask(bob, "GET", "/sandboxes/sb-000000000000000000000000")
        for method, path, body in (
            ("GET", "", None),
            ("DELETE", "", None),
            ("POST", "/snapshot", None),
            ("POST", "/fork", {"count": 2}),
            ("POST", "/restore", {"snapshot": "s"}),
        ):
            status, answer = await ask(bob, method, f"/sandboxes/{lease['id']}{path}", body)
            assert (status, answer["code"]) == (404, "unknown_sandbox"), path
            # It looks as one does that never was.
            assert answer["message"].replace(lease["id"], "X") == missing[1]["message"].replace("sb-" + "0" * 24, "X")
        with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
            await bob.ws_connect(f"/sandboxes/{lease['id']}/frames?session=12345678")
        assert (await ask(bob, "GET", "/sandboxes"))[1] == {"sandboxes": []}
        assert (await ask(alice, "GET", f"/sandboxes/{lease['id']}"))[0] == 200

    serve(check)


def test_who_comes_too_much_is_told_when_to_come_back() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        assert (await create(bob, "1"))[0] == (await create(bob, "2"))[0] == 201
        waiting = asyncio.create_task(create(bob, "3"))
        await until(lambda: live.pool.stats.queued == 1, "a request to wait")
        headers = {"Idempotency-Key": "4"}
        async with alice.post("/sandboxes", json={"spec": {}}, headers=headers) as response:
            answer = await response.json()
            assert response.status == 429 and int(response.headers["retry-after"]) >= 1
        assert answer["code"] == "busy" and answer["retry_after_s"] > 0
        assert "2 of 2 sandboxes are live" in answer["message"] and "1 requests wait" in answer["message"]
        status, answer = await waiting
        assert (status, answer["code"]) == (429, "busy")

    serve(check, limits=PoolLimits(live=2, queued=1, wait_s=1.0, warm_max=0))


def test_quotas_are_of_one_tenant() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, first = await create(alice, "1", {"limits": {"memory_mb": 600}})
        status, answer = await create(alice, "2", {"limits": {"memory_mb": 600}})
        assert status == 429 and "1 of 3 sandboxes are live with 600 of 1000 MB" in answer["message"]
        status, answer = await ask(alice, "POST", f"/sandboxes/{first['id']}/fork", {"count": 1})
        assert status == 429
        assert (await create(bob, "1", {"limits": {"memory_mb": 600}}))[0] == 201
        assert (await create(alice, "3", {"limits": {"memory_mb": 100}}))[0] == 201
        status, forked = await ask(alice, "POST", f"/sandboxes/{first['id']}/fork", {"count": 3}, key="f")
        assert status == 429 and "2 of 3" in forked["message"]
        for spec, word in (
            ({"limits": {"lifetime_s": 20_001}}, "lifetime_s = 20001"),
            ({"limits": {"memory_mb": 2000}}, "memory_mb = 2000"),
            ({"limits": {"memory_mb": 1, "disk_mb": 2000}}, "disk_mb = 2000"),
            ({"network": {"hosts": ["example.org"]}}, "may not have a network"),
            ({"mounts": {"/etc": "/opt/etc"}}, "mounts name paths"),
            ({"forward_sockets": {"80": "/run/x"}}, "forward_sockets name paths"),
        ):
            status, answer = await create(alice, "x" + word, spec)
            assert (status, answer["code"]) == (422, "capability") and word in answer["message"]
        # What was refused or has ended counts no more.
        await ask(alice, "DELETE", f"/sandboxes/{first['id']}")
        await until(lambda: live.pool.stats.live == 2, "the first to stop")
        assert (await create(alice, "2", {"limits": {"memory_mb": 600}}))[0] == 201

    serve(check, quota=Quota(live=3, memory_mb=1000, lifetime_s=20_000.0), limits=PoolLimits(warm_max=0))


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"spec": {"imagee": "x"}}, "imagee"),
        ({"spec": {"limits": {"memory": 5}}}, "memory"),
        ({"spec": {"limits": {"memory_mb": -5}}}, "memory_mb must be positive"),
        ({"spec": {"limits": {"cpus": 1e308}}}, "cpus must be positive, and at most"),
        ({"spec": {"limits": {"inodes": 10**30}}}, "inodes"),
        ({"spec": {"env": {"A=B": "1"}}}, "A=B"),
        ({"spec": {"env": {"A": "\0"}}}, "env: 'A' cannot be"),
        ({"spec": {"limits": {"memory_mb": "lots"}}}, "memory_mb"),
        ({"spec": {"files": {"a": "not base64!"}}}, "files"),
        ({"spec": {"network": {"hosts": [], "all": True}}}, "all"),
        ({"spec": {}, "more": 1}, "more"),
        ({}, "spec"),
        ([], "object"),
        ("[" * 5000, "body"),
    ],
)
def test_a_body_that_is_none_is_refused_by_name(body: Any, word: str) -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        raw = body if isinstance(body, str) else json.dumps(body)
        async with alice.post("/sandboxes", headers={"Idempotency-Key": "k"}, data=raw) as response:
            answer = await response.json()
        assert (response.status, answer["code"]) == (400, "invalid_request") and word in answer["message"], answer

    serve(check)


def test_a_create_needs_a_key() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        for key in ("", "x" * 201):
            status, answer = await create(alice, key)
            assert status == 400 and "Idempotency-Key" in answer["message"]

    serve(check)


def test_forks_are_leases_of_their_own() -> None:
    backend = FakeBackend()

    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, lease = await create(alice)
        _, forked = await ask(alice, "POST", f"/sandboxes/{lease['id']}/fork", {"count": 3}, key="f")
        _, again = await ask(alice, "POST", f"/sandboxes/{lease['id']}/fork", {"count": 3}, key="f")
        ids = [each["id"] for each in forked["sandboxes"]]
        assert [each["id"] for each in again["sandboxes"]] == ids and len({lease["id"], *ids}) == 4
        assert live.pool.stats.live == 4
        await ask(alice, "DELETE", f"/sandboxes/{lease['id']}")
        await until(lambda: live.pool.stats.live == 3, "the first to stop")
        assert (await ask(alice, "GET", f"/sandboxes/{ids[0]}"))[0] == 200
        status, answer = await ask(alice, "POST", f"/sandboxes/{ids[0]}/fork", {"count": 1000}, key="g")
        assert status == 400 and "count must be from 1 to" in answer["message"]

    serve(check, backend)


def test_snapshots_are_of_their_tenant_and_dropped_without_heartbeats() -> None:
    backend = FakeBackend()

    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, lease = await create(alice, spec={"files": {"a": "eA=="}})
        _, others = await create(bob, "b")
        _, snapshot = await ask(alice, "POST", f"/sandboxes/{lease['id']}/snapshot", key="s")
        _, again = await ask(alice, "POST", f"/sandboxes/{lease['id']}/snapshot", key="s")
        assert snapshot == again and snapshot["how"] == "copied"
        status, answer = await ask(alice, "POST", f"/sandboxes/{lease['id']}/snapshot", key="t")
        assert (status, answer["code"]) == (429, "busy") and "1 of 1 snapshots" in answer["message"]
        await backend.sandboxes[0].write("a", b"later")
        status, _ = await ask(alice, "POST", f"/sandboxes/{lease['id']}/restore", {"snapshot": snapshot["id"]}, key="r")
        assert status == 204 and await backend.sandboxes[0].read("a") == b"x"
        status, _ = await create(alice, "from", {"image": snapshot})
        assert status == 201 and await backend.sandboxes[-1].read("a") == b"x"
        # Bob may know the id and has no use for it.
        status, answer = await ask(bob, "POST", f"/sandboxes/{others['id']}/restore", {"snapshot": snapshot["id"]})
        assert (status, answer["code"]) == (410, "gone")
        assert (await create(bob, "from", {"image": snapshot}))[0] == 410
        assert (await ask(bob, "DELETE", f"/snapshots/{snapshot['id']}"))[0] == 204
        kept = {"sandboxes": [lease["id"]], "snapshots": [snapshot["id"]]}
        for _ in range(12):
            await asyncio.sleep(0.1)
            await ask(alice, "POST", "/heartbeat", kept)
            await ask(bob, "POST", "/heartbeat", kept)
        assert (await create(alice, "from 2", {"image": snapshot}))[0] == 201
        for _ in range(12):
            await asyncio.sleep(0.1)
            await ask(bob, "POST", "/heartbeat", kept)
        status, answer = await create(alice, "from 3", {"image": snapshot})
        assert status == 410 and "may have been dropped" in answer["message"]

    serve(check, backend, heartbeat_s=0.5, quota=Quota(snapshots=1))


def test_snapshots_that_are_being_taken_count() -> None:
    backend = FakeBackend()

    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, lease = await create(alice)
        take = backend.sandboxes[0].snapshot

        async def take_slowly() -> Snapshot:
            await asyncio.sleep(0.2)
            return await take()

        backend.sandboxes[0].snapshot = take_slowly  # type: ignore[method-assign]
        path = f"/sandboxes/{lease['id']}/snapshot"
        answers = await asyncio.gather(*(ask(alice, "POST", path, key=f"s{number}") for number in range(6)))
        assert sorted(status for status, _ in answers) == [200, 200, 429, 429, 429, 429]

    serve(check, backend, quota=Quota(snapshots=2))


@pytest.mark.parametrize(
    ("network", "code", "word"),
    [
        ({"hosts": ["example.org"], "networks": ["10.0.0.0/8"]}, "capability", "10.0.0.0/8"),
        ({"hosts": ["example.org", "169.254.169.254:80"]}, "capability", "169.254.169.254:80"),
        ({"hosts": ["[::1]:22"]}, "capability", "::1"),
        ({"hosts": ["*"]}, "config", "allowed host"),
    ],
)
def test_a_tenant_reaches_nothing_of_the_servers_own(network: Any, code: str, word: str) -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        status, answer = await create(alice, spec={"network": network})
        assert (answer["code"], status) == (code, 400 if code == "config" else 422) and word in answer["message"]

    serve(check, quota=Quota(egress=True))


def test_nothing_large_is_kept_of_what_was_leased() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        leases = live.server._leases
        _, lease = await create(alice, spec={"files": {"a": "eA=="}})
        (held,) = leases._live.values()
        assert held.spec.files == {}
        # The same again is the same, though its files are not kept to compare.
        assert (await create(alice, spec={"files": {"a": "eA=="}}))[1]["id"] == lease["id"]
        assert (await create(alice, spec={"files": {"a": "eQ=="}}))[0] == 409
        await ask(alice, "DELETE", f"/sandboxes/{lease['id']}")
        status, answer = await create(alice, spec={"files": {"a": "eA=="}})
        assert status == 410 and "stopped by its owner" in answer["message"]
        (creation,) = leases._creations.values()
        assert creation.lease.exception() is not None, "it keeps the sandbox"

    serve(check)


def test_errors_are_of_the_same_kind_at_the_client() -> None:
    for error in (
        ImageError("there is no image 'x'"),
        ConfigError("allowed host '*'"),
        CapabilityError("mounts"),
        SandboxGoneError("gone"),
        SandboxError("broken"),
        OSError("larger than the disk"),
    ):
        status, answer = error_answer(error)
        again = raised(answer)
        assert type(again) is type(error) and str(again) == str(error) and 400 <= status < 600


def test_a_server_that_is_drained_gives_nothing_out_and_waits() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        _, lease = await create(alice)
        draining = asyncio.create_task(live.server.drain(timeout_s=30.0))
        await asyncio.sleep(0.1)
        status, answer = await create(alice, "2")
        assert (status, answer["code"]) == (429, "busy") and "is being drained" in answer["message"]
        assert (await ask(alice, "GET", "/health"))[1]["status"] == "draining"
        assert (await ask(alice, "GET", f"/sandboxes/{lease['id']}"))[0] == 200
        await ask(alice, "DELETE", f"/sandboxes/{lease['id']}")
        await asyncio.wait_for(draining, 5)
        assert live.pool.stats.live == 0

    serve(check)


def test_metrics_tell_what_happens() -> None:
    async def check(live: LiveServer, alice: Client, bob: Client) -> None:
        await create(alice)
        async with alice.get("/metrics") as response:
            text = await response.text()
        for line in (
            'upspiral_sandbox_server_answers_total{status="201"} 1.0',
            "upspiral_sandbox_server_leases 1.0",
            'upspiral_sandbox_pool{state="live"} 1.0',
            "upspiral_sandbox_create_seconds_count 1.0",
            'upspiral_sandbox_acquire_seconds_count{warm="no"} 1.0',
        ):
            assert line in text

    serve(check)


def test_the_file_of_tenants(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"

    def load(text: str, mode: int = 0o600) -> Tenants:
        path.write_text(text)
        path.chmod(mode)
        return Tenants.from_file(path)

    good = f'[alice]\ntoken = "{ALICE}"\nlive = 3\n[bob]\ntoken = "{BOB}"\n'
    alice, bob = load(good).of_token(ALICE), load(good).of_token(BOB)
    assert alice and bob and (alice.name, alice.quota.live, bob.name) == ("alice", 3, "bob")
    assert load(good).of_token("") is load(good).of_token(ALICE[:-1]) is None
    for text, mode, word in (
        (good, 0o644, "chmod 600"),
        (f'[alice]\ntoken = "{ALICE}"\nlives = 3', 0o600, "lives"),
        ('[alice]\ntoken = "short"', 0o600, "at least 16"),
        ("[alice]\nlive = 3", 0o600, "needs a table with a token"),
        (f'[alice]\ntoken = "{ALICE}"\n[bob]\ntoken = "{ALICE}"', 0o600, "same token"),
        ("", 0o600, "names no tenant"),
        ("[", 0o600, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=word):
            load(text, mode)
