"""Engines and ranks of a run as actors, wherever the cluster has room for them, or in pairs."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upspiral.config.combinations import ranks_beside
from upspiral.config.models import ClusterConfig, RunConfig
from upspiral.engine.base import UpdatableEngine
from upspiral.engine.kept import KeptEngine
from upspiral.engine.router import Router, patience_beyond
from upspiral.errors import TrainerError, UpspiralError
from upspiral.launch.ray.courier import Courier
from upspiral.launch.ray.devices import hidden_without
from upspiral.launch.ray.engine_actor import START_DEADLINE_S as ENGINE_START_DEADLINE_S
from upspiral.launch.ray.engine_actor import EngineActor
from upspiral.launch.ray.engine_host import EngineHost
from upspiral.launch.ray.gang import Gang
from upspiral.launch.ray.mark import Mark
from upspiral.launch.ray.pairs import Pairs
from upspiral.launch.ray.placed_sandboxes import PlacedSandboxes
from upspiral.launch.ray.rank_host import RankHost, RayRank
from upspiral.launch.ray.reserved import reservation
from upspiral.launch.ray.sandbox_host import SandboxHost
from upspiral.launch.ray.weights_host import make_weights_host
from upspiral.loop.placement import Setting
from upspiral.sandbox.base import SandboxBackend
from upspiral.trainer.ranks import START_DEADLINE_S, Rank
from upspiral.weights.shared_folder import shared_folder


class RayPlacement:
    """See `Placement`. Actors belong to the process that makes them and end with it. One is for one run."""

    def __init__(self) -> None:
        self._courier = Courier(make_weights_host)
        self._publisher: RayRank | None = None
        """The first rank, which publishes; None: the trainer is in this process."""
        self._pairs: Pairs | None = None
        """Where engines and ranks take turns; None: each goes where there is room."""

    async def engine(self, setting: Setting) -> UpdatableEngine:
        if ranks_beside(setting.config):
            self._pairs = await Pairs.reserved(setting.config, name=reservation(setting.folder))
            setting.stack.callback(self._pairs.remove)
        setting.stack.callback(self._courier.stop)
        engines = [self._placed(setting, number) for number in range(setting.config.cluster.engines)]
        router = Router(engines, patience_s=patience_beyond(ENGINE_START_DEADLINE_S))
        setting.stack.push_async_callback(router.stop)
        await router.start()
        return router

    async def ranks(self, count: int, setting: Setting) -> Sequence[Rank]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        cluster, places = setting.config.cluster, self._pairs
        if places is None:
            places = await Gang.reserved(cluster, count, name=reservation(setting.folder))
            setting.stack.callback(places.remove)
        host: Any = ray.remote(RankHost)
        actors = [
            host.options(
                num_cpus=cluster.rank_cpus, num_gpus=cluster.rank_gpus, scheduling_strategy=places.of_rank(rank)
            ).remote()
            for rank in range(count)
        ]
        mark = Mark.made(setting.folder)
        told = [hidden_without(cluster.rank_gpus) | places.variables(rank) for rank in range(count)]
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                address, port = await actors[0].meeting_point.remote()
                group = {"WORLD_SIZE": str(count), "MASTER_ADDR": address, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
                await asyncio.gather(
                    *(
                        actor.join.remote(group | {"RANK": str(rank)} | told[rank], mark)
                        for rank, actor in enumerate(actors)
                    )
                )
        except TimeoutError:
            raise TrainerError(f"{count} ranks of the trainer did not start within {START_DEADLINE_S:.0f} s") from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, UpspiralError) else error from None
        except RayError as error:
            raise TrainerError(f"a rank of the trainer died before it had met the others: {error}") from error
        ranks = [RayRank(actor) for actor in actors]
        self._publisher = ranks[0]
        return ranks

    async def weights_root(self, setting: Setting) -> Path:
        import ray

        if self._publisher is None:
            self._courier.source = ray.get_runtime_context().get_node_id()
            return setting.stack.enter_context(shared_folder())
        self._courier.source, root = await self._publisher.weights_root()
        return root

    def share(self, argument: Any) -> Any:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.put(argument)  # read in place by all ranks of a node, and sent once to each other node
        except RayError as error:
            raise TrainerError(f"a step's batches found no room in Ray's object store: {error}") from error

    async def sandboxes(self, config: RunConfig, egress_log: Path) -> SandboxBackend | None:
        import ray

        count, token = config.cluster.sandbox_hosts, secrets.token_hex(16)
        if count == 0:
            return None
        host: Any = ray.remote(SandboxHost).options(num_cpus=1, scheduling_strategy="SPREAD")
        return await PlacedSandboxes(lambda: host.remote(config.sandbox, egress_log, token), count, token).start()

    def _options_of_engine(self, number: int, cluster: ClusterConfig) -> Mapping[str, Any]:
        taken = {"num_cpus": cluster.engine_cpus, "num_gpus": cluster.engine_gpus}
        return taken | {"scheduling_strategy": self._pairs.of_engine(number) if self._pairs else "SPREAD"}

    def _placed(self, setting: Setting, number: int) -> KeptEngine:
        import ray

        config, key = setting.config, secrets.token_hex(16)
        cluster = config.cluster
        threads = max(1, int(cluster.engine_cpus))
        own = config.model_copy(update={"model": config.model.model_copy(update={"threads": threads})})
        host: Any = ray.remote(EngineHost).options(**self._options_of_engine(number, cluster))

        def make_actor() -> Any:
            return host.remote(own, setting.model_folder, setting.folder, key)

        return KeptEngine(lambda: EngineActor(make_actor, key, self._courier))
