"""A Ray cluster of two nodes, which are processes of this machine: what has to come from one to the other does."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="needs the [train] extra")
pytest.importorskip("ray", reason="needs the [ray] extra")

from tests.fixtures.publications import changed, received, same_bits, weights
from tests.fixtures.ray_nodes import Nodes, two_nodes
from tests.fixtures.seen import Bystander, seen
from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe
from tests.integration.test_ray import HERE, finish, learned, sampled, started, until
from upspiral.config.loader import load_run_config
from upspiral.config.models import ClusterConfig, RunConfig
from upspiral.errors import ConfigError, EngineError
from upspiral.launch.ray.cluster import joined
from upspiral.launch.ray.courier import Courier
from upspiral.launch.ray.gang import Gang
from upspiral.launch.ray.pairs import Pairs, check_room_for_pairs
from upspiral.launch.ray.placement import RayPlacement
from upspiral.launch.ray.weights_host import make_weights_host
from upspiral.loop.placement import Setting, trainer_setup
from upspiral.trainer.ranks import Ranks
from upspiral.weights.publication import Publication, PublisherSettings
from upspiral.weights.publisher import Publisher
from upspiral.weights.receiver import Receiver, StaleBase
from upspiral.weights.shared_folder import PREFIX, shared_folder

ON_NODES = HERE | {"cluster.address": "auto", "cluster.engines": "2", "cluster.sandbox_hosts": "1",
                   "weights.form": "delta"}  # fmt: skip
IN_TURNS = ON_NODES | {"engine.colocated": "true", "cluster.engine_gpus": "1", "cluster.rank_cpus": "1.5",
                       "cluster.sandbox_hosts": "0"}  # fmt: skip
"""A node has room for one engine and the rank that takes turns with it, which has one thread, as the ranks here have:
two would round otherwise."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [ON_NODES, IN_TURNS], ids=["at the same time", "in turns"])
def test_the_same_results_as_on_one_machine_without_ray(
    tmp_path: Path, model: Path, nodes: Nodes, flags: dict[str, str]
) -> None:
    """Engines and ranks on both nodes; new weights come to the engine on the other node as differences."""
    file = recipe(tmp_path, model, steps=3)
    finish(started(file, tmp_path / "here", HERE), 180)
    process = started(file, tmp_path / "nodes", flags)
    places, folders = defaultdict[str, set[int]](set), defaultdict[int, set[Path]](set)
    while process.poll() is None:
        for name in ("EngineHost", "RankHost"):
            for actor in nodes.actors(name):
                with suppress(psutil.Error):
                    places[name].add(actor.ppid())
                    folders[actor.ppid()] |= read_by(actor)
        time.sleep(0.5)
    finish(process, 180)
    assert sampled(tmp_path / "here") == sampled(tmp_path / "nodes")
    assert learned(tmp_path / "here") == learned(tmp_path / "nodes")
    assert places["EngineHost"] == places["RankHost"] == nodes.raylets()
    first, second = folders.values()
    assert first and second and not first & second, "each node has the weights in a folder of its own"
    until(lambda: not any(folder.exists() for folder in first | second), 30)


def read_by(actor: psutil.Process) -> set[Path]:
    """Folders in shared memory with weights that a process has mapped."""
    mapped = (Path(each.path) for each in actor.memory_maps())
    return {Path(*path.parts[:4]) for path in mapped if path.parts[3:4] and path.parts[3].startswith(PREFIX)}


class Counted:
    """A batch that counts how often it is written down for others."""

    times = 0

    def __init__(self, array: NDArray[np.int64]) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        Counted.times += 1
        return Counted, (self.array,)


def test_a_step_goes_into_the_object_store_once(tmp_path: Path, model: Path, nodes: Nodes) -> None:
    config = load_run_config(recipe(tmp_path, model, steps=1), ON_NODES)
    kind, setup = "tests.fixtures.looking_backend:LookingBackend", trainer_setup(config, model)
    with joined(config.cluster):
        placement = RayPlacement()
        found = asyncio.run(placement.ranks(2, Setting(config, model, tmp_path, AsyncExitStack())))
        ranks = Ranks(found, kind, setup, share=placement.share)
        try:
            Counted.times, batches = 0, [Counted(np.arange(10_000))]
            seen: Any = ranks.step(batches)  # type: ignore[arg-type]
        finally:
            ranks.close()
    assert Counted.times == 1
    assert len({node for node, _, _ in seen}) == 2
    assert [(total, writable) for _, total, writable in seen] == [(49_995_000, False)] * 2, "read where it lies"


def test_publications_come_to_the_other_node_and_leave_nothing(model: Path, nodes: Nodes) -> None:
    asyncio.run(publications_come_and_leave_nothing(model, nodes))


async def publications_come_and_leave_nothing(model: Path, nodes: Nodes) -> None:
    import ray

    with joined(ClusterConfig(address="auto", engine_cpus=1)), shared_folder() as root:
        courier = Courier(make_weights_host)
        courier.source = ray.get_runtime_context().get_node_id()
        other = next(each["NodeID"] for each in ray.nodes() if each["NodeID"] != courier.source)
        publisher, receiver, now = Publisher(model), Receiver(), weights()
        settings = PublisherSettings(root, form="delta")
        publication = first = publisher.publish(now.items(), 0, settings)
        for version in range(1, 5):
            assert await courier.at(courier.source, publication) is publication
            first, second = await asyncio.gather(courier.at(other, publication), courier.at(other, publication))
            assert first == second and first.folder.parent != root
            assert same_bits(received(receiver, first.folder), now)
            now = changed(now, 0.1, seed=version)
            publication = publisher.publish(now.items(), version, settings)
        assert publication.base is not None

        until(lambda: is_free(ray), 30)
        await the_hosts_die(nodes, courier, other, publication)
        again = await courier.at(other, publication)
        assert again.folder.parent != first.folder.parent
        until(lambda: not first.folder.parent.exists(), 30)
        with pytest.raises(StaleBase):  # what it is a difference to was lost
            received(Receiver(), again.folder)
        courier.stop()
        until(lambda: not again.folder.parent.exists(), 30)


async def the_hosts_die(nodes: Nodes, courier: Courier, node: str, publication: Publication) -> None:
    """On both nodes. Who asks hears of each, and has another one the next time."""
    here = await courier.at(node, publication)
    for each in nodes.actors("WeightsHost"):
        each.kill()
    until(lambda: not here.folder.parent.exists(), 30)
    for _ in range(2):
        with pytest.raises(EngineError, match="died"):
            await courier.at(node, publication)


def is_free(ray: Any) -> bool:
    """Nothing is in the object store."""
    name = "object_store_memory"
    return ray.available_resources().get(name) == ray.cluster_resources()[name]


def in_turns(model: Path = Path("none"), *, engines: int, ranks: int, **cluster: float) -> RunConfig:
    return RunConfig.model_validate({
        "model": {"path": str(model), "dtype": "float32", "threads": 1},
        "engine": {"colocated": True, "context_length": 128},
        "agent": {"command": "true"},
        "trainer": {"kind": "fsdp", "parallel": {"ranks": ranks}},
        "cluster": {"address": "auto", "engines": engines, **cluster},
    })  # fmt: skip


async def seen_by(actor: Any) -> tuple[str, set[str], int]:
    return await asyncio.wait_for(actor.__ray_call__.remote(seen), 60)


def test_neighbours_share_a_node_and_no_device(nodes: Nodes) -> None:
    asyncio.run(neighbours_share_a_node(in_turns(engines=4, ranks=4, engine_gpus=1.0, rank_cpus=0.5)))


async def neighbours_share_a_node(made: RunConfig) -> None:
    import ray

    with joined(made.cluster, 4):
        pairs = await Pairs.reserved(made, deadline_s=60)
        ranks = [
            ray.remote(Bystander).options(num_cpus=1, scheduling_strategy=pairs.of_rank(rank)).remote()
            for rank in range(4)
        ]
        places = [node for node, _, _ in await asyncio.gather(*map(seen_by, ranks))]
        assert places[0] == places[1] != places[2] == places[3]
        own = [(place, pairs.variables(rank)["CUDA_VISIBLE_DEVICES"]) for rank, place in enumerate(places)]
        assert len(set(own)) == 4 and {device for _, device in own} <= set("012")
        pairs.remove()
        until(lambda: ray.available_resources().get("GPU") == 6, 30)


def test_ranks_by_themselves_come_together_and_are_numbered_along_the_nodes(nodes: Nodes) -> None:
    asyncio.run(ranks_come_together())


async def ranks_come_together() -> None:
    import ray

    cluster = ClusterConfig(address="auto", rank_gpus=1.0)
    with joined(cluster):
        gang = await Gang.reserved(cluster, 5, deadline_s=60)
        ranks = [
            ray.remote(Bystander).options(num_cpus=1, num_gpus=1, scheduling_strategy=gang.of_rank(rank)).remote()
            for rank in range(5)
        ]
        places = [node for node, _, _ in await asyncio.gather(*map(seen_by, ranks))]
        assert len(set(places)) == 2 and places == sorted(places)
        with pytest.raises(ConfigError, match=r"no room for 2 ranks of 1 CPUs and 1 GPUs within 2 s"):
            await Gang.reserved(cluster, 2, deadline_s=2)
        gang.remove()
        (await Gang.reserved(cluster, 2, deadline_s=60)).remove()


def test_a_cluster_without_room_is_told_what_was_asked_and_what_it_has(nodes: Nodes) -> None:
    asyncio.run(no_room())


async def no_room() -> None:
    wide = in_turns(engines=2, ranks=8, engine_gpus=4.0)
    with joined(wide.cluster.model_copy(update={"engine_gpus": 0.0})):
        with pytest.raises(
            ConfigError, match=r"wants 5 CPUs with 4 GPUs on one node .* its nodes have 4 CPUs with 3 G"
        ):
            check_room_for_pairs(wide)
        with pytest.raises(ConfigError, match=r"cluster has room for 2 such engines"):
            check_room_for_pairs(in_turns(engines=3, ranks=3, rank_cpus=2.0))
        all_of_it = in_turns(engines=2, ranks=2, rank_cpus=2.0)
        check_room_for_pairs(all_of_it)
        first = await Pairs.reserved(all_of_it, deadline_s=60)
        waiting = in_turns(engines=1, ranks=1, rank_cpus=1.0)
        with pytest.raises(ConfigError, match=r"found no room within 2 s: .* of which 2 CPUs are free"):
            await Pairs.reserved(waiting, deadline_s=2)
        first.remove()
        (await Pairs.reserved(waiting, deadline_s=60)).remove()


def test_ranks_have_the_devices_of_their_engines_and_an_engine_that_died_has_them_again(
    tmp_path: Path, model: Path, nodes: Nodes
) -> None:
    asyncio.run(
        ranks_have_devices(in_turns(model, engines=2, ranks=2, engine_gpus=1.0, rank_cpus=2.0), model, tmp_path)
    )


async def ranks_have_devices(made: RunConfig, model: Path, folder: Path) -> None:
    import ray

    with joined(made.cluster, 2):
        async with AsyncExitStack() as stack:
            placement, setting = RayPlacement(), Setting(made, model, folder, stack)
            router: Any = await placement.engine(setting)
            kept = [router.engines[number] for number in range(2)]
            engines = [await seen_by(each._home._actor) for each in kept]
            await router.sleep()
            ranks: Any = await placement.ranks(2, setting)
            assert [(await seen_by(rank._actor))[:2] for rank in ranks] == [engine[:2] for engine in engines]
            assert engines[0][0] != engines[1][0]
            assert all(len(devices) == 1 and devices < set("012") for _, devices, _ in engines)

            psutil.Process(engines[0][2]).kill()
            ranks[0].kill()
            kept[0]._awake.set()
            again = await restarted(kept[0], engines[0][2])
            assert again[:2] == engines[0][:2]
        until(lambda: ray.available_resources().get("GPU") == 6, 30)


async def restarted(kept: Any, before: int) -> tuple[str, set[str], int]:
    from ray.exceptions import RayError

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            found = await seen_by(kept._home._actor)
        except (AttributeError, RayError):  # none, or the one that died
            found = ("", set[str](), before)
        if found[2] != before:
            return found
        await asyncio.sleep(0.2)
    raise AssertionError("no engine was started in its place")
