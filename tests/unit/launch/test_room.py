"""What a run asks a cluster for, all at once, against what the cluster has."""

from __future__ import annotations

import pytest

from upspiral.config.models import ClusterConfig
from upspiral.errors import ConfigError
from upspiral.launch.ray.cluster import check_room

THERE = {"CPU": 8.0, "GPU": 6.0}


@pytest.mark.parametrize(
    ("asked", "ranks", "says"),
    [
        (
            {"sandbox_hosts": 8},
            0,
            r"10 CPUs \(1 for cluster.engines = 1 .*, 8 for cluster.sandbox_hosts, 1 for the run",
        ),
        ({"rank_cpus": 2.0}, 4, r"8 for 4 ranks with cluster.rank_cpus = 2, 1 for the run\), and the cluster has 8;"),
        ({"engine_gpus": 3.5, "rank_gpus": 1.0}, 3, r"6.5 GPUs \(3.5 for .*, 3 for 3 ranks with .*cluster has 6;"),
    ],
)
def test_what_will_never_find_room_is_refused(asked: dict[str, float], ranks: int, says: str) -> None:
    """Sandboxes and the run itself included."""
    with pytest.raises(ConfigError, match=says):
        check_room(ClusterConfig.model_validate(asked), ranks, THERE)


def test_what_fills_the_cluster_has_room() -> None:
    check_room(ClusterConfig(engines=2, sandbox_hosts=1, engine_gpus=2.0, rank_gpus=0.5), 4, THERE)
