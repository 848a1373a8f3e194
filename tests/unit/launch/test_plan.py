"""Plans: counts that can be checked exactly, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from upspiral.config.models import ParallelConfig, RunConfig
from upspiral.errors import ConfigError, ModelError
from upspiral.launch.plan.device import GPUS, device
from upspiral.launch.plan.load import StepLoad
from upspiral.launch.plan.memory import trainer_bytes
from upspiral.launch.plan.plan import Plan, alternatives, better_split
from upspiral.launch.plan.shape import ModelShape

DENSE_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936, tied=False)
"""Qwen3-8B's published config."""
MOE_30B = ModelShape(48, 2048, 768, 32, 4, 128, 151936, tied=False, experts=128, experts_per_token=8)
"""Qwen3-30B-A3B's."""


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"agent": {"command": "true"}, **sections})


def plan(shape: ModelShape, name: str = "h100", **sections: Any) -> Plan:
    made = config(**sections)
    return Plan.of(shape, made, StepLoad.of(made), GPUS[name])


def cluster(ranks: int, engines: int, **trainer: Any) -> dict[str, Any]:
    """Ranks and engines on devices of their own."""
    return {
        "engine": {"kind": "vllm", "context_length": 8192},
        "trainer": {"kind": "fsdp", "parallel": {"ranks": ranks}, **trainer},
        "cluster": {"address": "auto", "engines": engines, "engine_gpus": 1.0, "rank_gpus": 1.0},
    }


def test_published_sizes_are_met() -> None:
    assert DENSE_8B.parameters / 1e9 == pytest.approx(8.19, abs=0.01)
    assert MOE_30B.parameters / 1e9 == pytest.approx(30.5, abs=0.1)
    active = MOE_30B.weights_per_token + 2 * MOE_30B.vocabulary * MOE_30B.hidden
    assert active / 1e9 == pytest.approx(3.3, abs=0.1)


def test_parameters_are_those_of_transformers_modules(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the [train] extra")
    from tests.fixtures.tiny_modules import FAMILIES, tiny_module

    for family in FAMILIES:
        module = tiny_module(family, mlp_only_layers=[]) if family == "qwen3-moe" else tiny_module(family)
        (tmp_path / "config.json").write_text(json.dumps(module.config.to_dict()))
        counted = sum(
            parameter.numel()
            for name, parameter in module.named_parameters()
            if not name.endswith(("q_norm.weight", "k_norm.weight"))  # too small to plan for
        )
        assert ModelShape.of_folder(tmp_path).parameters == counted, family


def test_a_config_without_a_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ModelError, match="num_attention_heads"):
        ModelShape.of_folder(tmp_path)


def test_zero_stages_divide_what_they_say() -> None:
    """Rajbhandari et al. 2020, figure 1, with float32 sums of gradients."""
    found = {}
    for stage in (1, 2, 3):
        parallel = ParallelConfig(ranks=64, zero_stage=stage)
        made = config(trainer={"kind": "deepspeed", "parallel": parallel.model_dump()})
        parts = trainer_bytes(DENSE_8B, made, "cuda")
        found[stage] = sum(parts[name] for name in ("weights", "masters", "moments", "gradients")) / DENSE_8B.parameters
    assert found[1] == pytest.approx(2 + 4 + 12 / 64)
    assert found[2] == pytest.approx(2 + 16 / 64)
    assert found[3] == pytest.approx(18 / 64)


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    tight = plan(MOE_30B, "h200", **cluster(2, 14))
    with pytest.raises(
        ConfigError,
        match=r"a rank would need \d+\.\d GB, and h200 has 126\.9 .*it would fit with trainer.parallel.ranks",
    ):
        tight.check()
    hopeless = plan(MOE_30B, **cluster(1, 1))
    with pytest.raises(ConfigError, match=r"cannot fit.*add devices"):
        hopeless.check()


def test_an_engine_that_sleeps_needs_no_room_beside_a_step() -> None:
    parts = {**cluster(8, 8), "cluster": {"address": "auto", "engines": 8, "engine_gpus": 0.5, "rank_gpus": 0.5}}
    awake = plan(DENSE_8B, **parts)
    sleeping = plan(DENSE_8B, **{**parts, "engine": {**parts["engine"], "colocated": True}})
    (both,), (in_turns,) = awake.needed.values(), sleeping.needed.values()
    trainer, engine = sum(awake.trainer.values()), sum(awake.engine.values())
    assert both == trainer + engine
    spared = sum(awake.trainer[part] for part in ("activations", "logits", "gathered"))
    assert in_turns == max(trainer, both - spared) < both


def test_a_better_split_is_faster_and_fits_and_has_as_many_devices() -> None:
    slow = plan(DENSE_8B, "h200", **cluster(15, 1))
    better = better_split(slow)
    assert better is not None and better.fits and better.total_s < slow.total_s
    assert better.ranks + better.engines == 16
    assert better_split(better) is None
    assert all(other.ranks + other.engines == 16 for other in alternatives(slow))


def test_more_devices_never_slow_a_part_that_is_divided() -> None:
    few, many = plan(DENSE_8B, "h200", **cluster(4, 4)), plan(DENSE_8B, "h200", **cluster(8, 8))
    for part in ("prefill", "decode", "train", "optimize"):
        assert many.seconds[part] < few.seconds[part]


def test_the_load_never_exceeds_the_context() -> None:
    for turns, context in ((1, 512), (4, 512), (12, 1024), (60, 2048)):
        made = config(engine={"context_length": context}, agent={"command": "true", "max_calls": turns})
        assert StepLoad.of(made).length <= context


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ConfigError, match="--device h1000: choose one of cpu, a100"):
        device("h1000")
