from __future__ import annotations

from pathlib import Path

import pytest

from upspiral.config.models import RunConfig
from upspiral.loop.placement import num_lanes, trainer_setup


def test_a_gpu_computes_one_microbatch_at_a_time() -> None:
    for device, lanes in (("cpu", 5), ("cuda", 1)):
        agent = {"file": "agent.py"}
        config = RunConfig.model_validate({"name": "n", "model": {"device": device, "threads": 5}, "agent": agent})
        assert num_lanes(config) == lanes


@pytest.mark.parametrize(
    ("sections", "threads"),
    [
        ({}, 0),
        ({"model": {"threads": 5}}, 5),
        ({"model": {"threads": 5}, "cluster": {"address": "auto", "rank_cpus": 3.0}}, 3),
        ({"cluster": {"address": "auto", "rank_cpus": 0.5}}, 1),
    ],
)
def test_ranks_compute_with_the_threads_that_the_run_file_gives_them(sections: dict, threads: int) -> None:
    config = RunConfig.model_validate({"agent": {"file": "agent.py"}, "trainer": {"kind": "fsdp"}, **sections})
    assert trainer_setup(config, Path("model")).threads == threads
