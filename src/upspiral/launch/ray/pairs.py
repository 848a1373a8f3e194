"""Engines, each with the ranks of the trainer that take turns with it on the same devices."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upspiral.config.combinations import num_ranks, ranks_beside
from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError, EngineError
from upspiral.launch.ray.reserved import ROOM_DEADLINE_S, reserve, within


@dataclass(frozen=True, slots=True)
class Place:
    """A bundle of the placement group."""

    bundle: int
    node: str
    """Ray's id of it."""
    devices: Sequence[str]
    """As CUDA_VISIBLE_DEVICES names them; none without `cluster.engine_gpus`."""


class Pairs:
    """A place for each engine and its ranks, theirs until `remove`.

    The engine's actor takes the GPUs of its place, so another one that is started when it dies has the same. Ranks take
    none, as Ray would give them others: each is told which of its engine's is its own. Ranks are numbered along the
    places and places along the nodes, so neighbours, which divide layers between them, share a node where they can.
    """

    def __init__(self, config: RunConfig, group: Any, places: Sequence[Place]) -> None:
        self._beside, self._group = ranks_beside(config), group
        self._places = sorted(places, key=lambda place: (place.node, place.bundle))

    @classmethod
    async def reserved(cls, config: RunConfig, *, name: str = "", deadline_s: float = ROOM_DEADLINE_S) -> Pairs:
        """`name`: see `reservation`. Raises ConfigError when there is no room within the deadline, EngineError when a
        node is lost meanwhile."""
        import ray
        from ray.exceptions import RayError

        bundle, count = _bundle(config), config.cluster.engines
        group = reserve(bundle, count, name)
        look: Any = ray.remote(_look)
        found = [
            look.options(
                num_cpus=0, num_gpus=config.cluster.engine_gpus, scheduling_strategy=within(group, number)
            ).remote(number)
            for number in range(count)
        ]
        try:
            async with asyncio.timeout(deadline_s):
                return cls(config, group, await asyncio.gather(*found))
        except BaseException as error:
            ray.util.remove_placement_group(group)
            if isinstance(error, TimeoutError):
                raise ConfigError(
                    f"{_asked(config, bundle)} and found no room within {deadline_s:.0f} s: {_said(bundle)}; lower "
                    "cluster.engines or what they take, end other runs, or add nodes"
                ) from None
            if isinstance(error, RayError):
                raise EngineError(f"a place for an engine and its ranks was lost: {error}") from error
            raise

    def of_engine(self, number: int) -> Any:
        """The scheduling strategy of an engine's actor, which takes all GPUs of the place."""
        return within(self._group, self._places[number].bundle)

    def of_rank(self, rank: int) -> Any:
        """That of a rank's, which takes none."""
        return within(self._group, self._places[rank // self._beside].bundle)

    def variables(self, rank: int) -> dict[str, str]:
        """What it has to have in its environment before anything of CUDA is initialised."""
        devices = self._places[rank // self._beside].devices
        return {"CUDA_VISIBLE_DEVICES": devices[rank % self._beside]} if devices else {}

    def remove(self) -> None:
        """Ends what still runs there, too."""
        import ray

        ray.util.remove_placement_group(self._group)


def check_room_for_pairs(config: RunConfig) -> None:
    """Raises ConfigError when the nodes that the cluster has could never hold them. A run that goes on waits instead:
    a node that was lost may come back."""
    import ray

    if not ranks_beside(config):
        return
    bundle = _bundle(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0.0) / wanted + 1e-6) for name, wanted in bundle.items()) for node in nodes)
    if room < config.cluster.engines:
        raise ConfigError(
            f"{_asked(config, bundle)}, and the cluster has room for {room} such engines: {_said(bundle)}; lower "
            "cluster.engines or what they take, or add nodes"
        )


def _bundle(config: RunConfig) -> dict[str, float]:
    cluster = config.cluster
    cpus = {"CPU": round(cluster.engine_cpus + ranks_beside(config) * cluster.rank_cpus, 4)}  # Ray's precision
    return cpus | ({"GPU": cluster.engine_gpus} if cluster.engine_gpus else {})


def _look(bundle: int) -> Place:
    """Done in a bundle, with the GPUs that its engine will have."""
    import ray

    context = ray.get_runtime_context()
    return Place(bundle, context.get_node_id(), sorted(context.get_accelerator_ids()["GPU"]))


def _asked(config: RunConfig, bundle: Mapping[str, float]) -> str:
    return (
        f"engine.colocated with cluster.engines = {config.cluster.engines} and trainer.parallel.ranks = "
        f"{num_ranks(config)} wants {_words(bundle, bundle)} on one node for each engine and its ranks"
    )


def _said(bundle: Mapping[str, float]) -> str:
    """What the cluster has of that."""
    import ray

    nodes = " and ".join(_words(node["Resources"], bundle) for node in ray.nodes() if node["Alive"])
    return f"its nodes have {nodes}, of which {_words(ray.available_resources(), bundle)} are free"


def _words(resources: Mapping[str, float], names: Mapping[str, float]) -> str:
    return " with ".join(f"{resources.get(name, 0.0):g} {name}s" for name in names)
