"""A Ray cluster of two nodes, which are processes of this machine: what has to come from one to the other does."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="needs the [train] extra")
pytest.importorskip("ray", reason="needs the [ray] extra")

from tests.fixtures.publications import changed, received, same_bits, weights
from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe
from tests.integration.test_ray import HERE, finish, is_actor, learned, sampled, started, until
from upspiral.config.loader import load_run_config
from upspiral.config.models import ClusterConfig
from upspiral.errors import EngineError
from upspiral.launch.ray.cluster import joined
from upspiral.launch.ray.courier import Courier
from upspiral.launch.ray.placement import RayPlacement
from upspiral.launch.ray.weights_host import make_weights_host
from upspiral.loop.placement import Setting, trainer_setup
from upspiral.trainer.ranks import Ranks
from upspiral.weights.publication import Publication, PublisherSettings
from upspiral.weights.publisher import Publisher
from upspiral.weights.receiver import Receiver, StaleBase
from upspiral.weights.shared_folder import PREFIX, shared_folder

ROOT = Path(__file__).parents[2]
NODE = ("--num-cpus", "4", "--object-store-memory", str(200 << 20), "--disable-usage-stats")
NODE += ("--include-log-monitor", "false")
NODE += ("--min-worker-port", "0", "--max-worker-port", "0")  # or both nodes would give out the same ports
START_DEADLINE_S = 120.0
ON_NODES = HERE | {"cluster.address": "auto", "cluster.engines": "2", "cluster.sandbox_hosts": "1",
                   "weights.form": "delta"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True, slots=True)
class Nodes:
    """The cluster."""

    folder: Path

    def raylets(self) -> set[int]:
        """Process ids, one for each node: the parents of its actors."""
        found = psutil.process_iter(["name", "cmdline"])
        return {each.pid for each in found if each.info["name"] == "raylet" and self._is_own(each.info["cmdline"])}

    def actors(self, name: str) -> list[psutil.Process]:
        raylets = self.raylets()
        found = psutil.process_iter(["cmdline", "ppid"])
        return [each for each in found if is_actor(each, name) and each.info["ppid"] in raylets]

    def _is_own(self, words: list[str] | None) -> bool:
        return any(str(self.folder) in word for word in words or ())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two. A folder and ports of their own: other clusters of this machine go on."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie in it, so its path must be short
    port = free_port()
    head = ["--head", "--port", str(port), "--temp-dir", str(folder), "--include-dashboard", "false"]
    variables = pytest.MonkeyPatch()
    variables.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")  # what "auto" means
    # By itself, a head wants a token from everybody as soon as the user has one, which this process has not read.
    variables.setenv("RAY_AUTH_MODE", "disabled")
    variables.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.callback(variables.undo)
        for number, place in enumerate((head, ["--address", f"127.0.0.1:{port}"])):
            log = folder / f"node-{number}.log"
            stack.enter_context(node([*place, *NODE], log))
        yield Nodes(folder)


@contextmanager
def node(arguments: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        until(lambda: "block forever" in log.read_text() or process.poll() is not None, START_DEADLINE_S)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()  # it ends what it has started
        process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_results_as_on_one_machine_without_ray(tmp_path: Path, model: Path, nodes: Nodes) -> None:
    """Engines and ranks on both nodes; new weights come to the engine on the other node as differences."""
    file = recipe(tmp_path, model, steps=3)
    finish(started(file, tmp_path / "here", HERE), 180)
    process = started(file, tmp_path / "nodes", ON_NODES)
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
