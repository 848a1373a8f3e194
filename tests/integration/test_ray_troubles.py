"""What goes wrong in a Ray cluster: actors that make sandboxes die, an engine cannot start at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")
pytest.importorskip("ray", reason="needs the [ray] extra")

from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe
from upspiral.config.loader import load_run_config
from upspiral.config.models import ClusterConfig, SandboxConfig
from upspiral.errors import ConfigError, EngineError, SandboxError, TrainerError
from upspiral.launch.ray.cluster import joined
from upspiral.launch.ray.gang import Gang
from upspiral.launch.ray.placed_sandboxes import PlacedSandboxes
from upspiral.launch.ray.rank_host import RayRank
from upspiral.launch.ray.reserved import give_back, reservation
from upspiral.launch.ray.run_host import run_on_ray
from upspiral.launch.ray.sandbox_host import SandboxHost
from upspiral.sandbox.base import SandboxSpec

DEADLINE_S = 100.0
TOKEN = "a token that nobody guesses"


def with_actors(count: int, check: Callable[[PlacedSandboxes, list[Any]], Awaitable[None]], folder: Path) -> None:
    """`check` gets the actors in the order in which they were made."""
    import ray

    actors: list[Any] = []

    def make() -> Any:
        host: Any = ray.remote(SandboxHost)
        actors.append(host.options(num_cpus=1).remote(SandboxConfig(), folder / "egress.jsonl", TOKEN))
        return actors[-1]

    async def all_of_it() -> None:
        placed = await PlacedSandboxes(make, count, TOKEN, patience_s=60.0).start()
        try:
            await check(placed, actors)
        finally:
            await placed.stop()

    with joined(ClusterConfig(address="local", sandbox_hosts=count)):
        asyncio.run(asyncio.wait_for(all_of_it(), DEADLINE_S))


async def says(placed: PlacedSandboxes, word: str) -> str:
    async with placed.acquire(SandboxSpec()) as sandbox:
        return (await sandbox.exec(f"echo {word}", timeout_s=20)).stdout.decode().strip()


def test_an_actor_that_dies_costs_no_sandbox_that_is_asked_for_then(tmp_path: Path) -> None:
    async def check(placed: PlacedSandboxes, actors: list[Any]) -> None:
        import ray

        assert await says(placed, "before") == "before"
        ray.kill(actors[0])
        words = [f"after{number}" for number in range(8)]
        assert await asyncio.gather(*(says(placed, word) for word in words)) == words
        assert len(actors) == 2

    with_actors(1, check, tmp_path)


def test_two_actors_share_the_sandboxes_and_one_of_them_has_all_when_the_other_dies(tmp_path: Path) -> None:
    async def check(placed: PlacedSandboxes, actors: list[Any]) -> None:
        import ray

        async with placed.acquire(SandboxSpec()) as one, placed.acquire(SandboxSpec()) as other:
            ray.kill(actors[1])
            outcomes = await asyncio.gather(
                *(each.exec("echo here", timeout_s=60) for each in (one, other)), return_exceptions=True
            )
            lost = [outcome for outcome in outcomes if isinstance(outcome, SandboxError)]
            assert len(lost) == 1, outcomes
            assert await says(placed, "on the other one") == "on the other one"

    with_actors(2, check, tmp_path)


def test_an_actor_that_dies_before_it_serves_is_started_again(tmp_path: Path) -> None:
    import ray

    host: Any = ray.remote(SandboxHost)
    made: list[Any] = []

    def make() -> Any:
        made.append(host.options(num_cpus=1).remote(SandboxConfig(), tmp_path / "egress.jsonl", TOKEN))
        if len(made) == 1:
            ray.kill(made[0])
        return made[-1]

    async def check() -> None:
        placed = await PlacedSandboxes(make, 1, TOKEN).start()
        try:
            assert await says(placed, "the second") == "the second"
        finally:
            await placed.stop()

    with joined(ClusterConfig(address="local", sandbox_hosts=1)):
        asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


class Silent:
    """A rank that hangs."""

    def weights_root(self) -> None:
        time.sleep(DEADLINE_S)


def test_a_rank_that_does_not_answer_is_one_that_a_run_goes_on_without() -> None:
    import ray

    async def check() -> None:
        silent: Any = ray.remote(Silent)
        rank = RayRank(silent.options(num_cpus=1).remote())
        with pytest.raises(TrainerError, match="made no folder within 1 s"):
            await rank.weights_root(deadline_s=1.0)
        rank.kill()

    with joined(ClusterConfig(address="local")):
        asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


def test_an_engine_that_can_never_start_is_told_at_once(tmp_path: Path) -> None:
    """And not tried again as often as a run may be."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho there is no vLLM in this environment\nexit 1\n")
    python.chmod(0o755)
    file = recipe(tmp_path, make_model(tmp_path / "model"), steps=1)
    file.write_text(file.read_text().replace("cache_slots = 64\n", ""))
    config = load_run_config(
        file, {"cluster.address": "local", "engine.kind": "vllm", "engine.server.python": str(python)}
    )
    with pytest.raises(EngineError, match="there is no vLLM in this environment"):
        run_on_ray(config, tmp_path / "run", resume=False)


def test_a_run_that_finds_no_place_says_so(tmp_path: Path) -> None:
    file = recipe(tmp_path, make_model(tmp_path / "model"), steps=1)
    config = load_run_config(file, {"cluster.address": "local", "cluster.rank_gpus": "64"})
    with pytest.raises(ConfigError, match=r"no room for the run itself, 1 CPU and 64 GPUs .* within 3 s"):
        run_on_ray(config, tmp_path / "run", resume=False, room_deadline_s=3.0)


class Reserver:
    """Reserves places for ranks, as the actor of a run does."""

    async def reserve(self, cluster: ClusterConfig, count: int, folder: Path) -> None:
        self._gang = await Gang.reserved(cluster, count, name=reservation(folder), deadline_s=30)


def test_what_a_dead_run_had_reserved_is_given_back_by_the_next(tmp_path: Path) -> None:
    import ray

    cluster = ClusterConfig(address="local")
    with joined(cluster, ranks=4):
        count = int(ray.cluster_resources()["CPU"]) - 1
        for attempt in range(3):
            give_back(tmp_path)
            host: Any = ray.remote(Reserver).options(num_cpus=0).remote()
            ray.get(host.reserve.remote(cluster, count, tmp_path), timeout=60)
            ray.kill(host)
            give_back(tmp_path / "another run")
            assert ray.available_resources().get("CPU", 0) < count, f"attempt {attempt}"
