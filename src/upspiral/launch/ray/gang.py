"""Room for all ranks of a trainer at once, near each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from upspiral.config.models import ClusterConfig
from upspiral.errors import ConfigError
from upspiral.launch.ray.reserved import ROOM_DEADLINE_S, reserve, within

_LOOK_AGAIN_S = 0.1


class Gang:
    """A place for each rank, theirs until `remove`: all of them or none, so that two runs cannot wait for each other
    with half of their GPUs taken. Ranks are numbered along the nodes, so neighbours, which divide layers between them,
    share a node where they can."""

    def __init__(self, group: Any, nodes: Sequence[str]) -> None:
        """`nodes`: Ray's id of each bundle's."""
        self._group = group
        self._bundles = sorted(range(len(nodes)), key=lambda bundle: (nodes[bundle], bundle))

    @classmethod
    async def reserved(
        cls, cluster: ClusterConfig, count: int, *, name: str = "", deadline_s: float = ROOM_DEADLINE_S
    ) -> Gang:
        """`name`: see `reservation`. Raises ConfigError when the cluster has no room within the deadline."""
        import ray

        bundle = {"CPU": cluster.rank_cpus} | ({"GPU": cluster.rank_gpus} if cluster.rank_gpus else {})
        group = reserve(bundle, count, name)
        gives_up = time.monotonic() + deadline_s
        try:
            while (table := ray.util.placement_group_table(group))["state"] != "CREATED":
                if time.monotonic() > gives_up:
                    raise ConfigError(
                        f"the cluster had no room for {count} ranks of {cluster.rank_cpus:g} CPUs and "
                        f"{cluster.rank_gpus:g} GPUs within {deadline_s:.0f} s; lower trainer.parallel.ranks, end "
                        "other runs or add nodes"
                    )
                await asyncio.sleep(_LOOK_AGAIN_S)
        except BaseException:
            ray.util.remove_placement_group(group)
            raise
        return cls(group, [table["bundles_to_node_id"][number] for number in range(count)])

    def of_rank(self, rank: int) -> Any:
        """The scheduling strategy of its actor."""
        return within(self._group, self._bundles[rank])

    def variables(self, rank: int) -> dict[str, str]:
        """Ray has set them."""
        return {}

    def remove(self) -> None:
        """Ends what still runs there, too."""
        import ray

        ray.util.remove_placement_group(self._group)
