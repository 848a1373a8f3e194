from __future__ import annotations

from upspiral.config.models import RunConfig
from upspiral.loop.placement import num_lanes


def test_a_gpu_computes_one_microbatch_at_a_time() -> None:
    for device, lanes in (("cpu", 5), ("cuda", 1)):
        agent = {"file": "agent.py"}
        config = RunConfig.model_validate({"name": "n", "model": {"device": device, "threads": 5}, "agent": agent})
        assert num_lanes(config) == lanes
