"""Plans: counts that can be checked exactly, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from upspiral.cli.main import run_command
from upspiral.config.models import ParallelConfig, RunConfig
from upspiral.errors import ConfigError, ModelError
from upspiral.launch.plan.device import GPUS, Device, device
from upspiral.launch.plan.load import StepLoad
from upspiral.launch.plan.memory import engine_bytes, engine_devices, resting_bytes, trainer_bytes
from upspiral.launch.plan.plan import Plan, alternatives, better_split, describe_split
from upspiral.launch.plan.shape import ModelShape

DENSE_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936, tied=False)
"""Qwen3-8B's published config."""
MOE_30B = ModelShape(48, 2048, 768, 32, 4, 128, 151936, tied=False, experts=128, experts_per_token=8)
"""Qwen3-30B-A3B's."""
DENSE_4B = ModelShape(36, 2560, 9728, 32, 8, 128, 151936, tied=True)
"""Qwen3-4B's: 26.2144 million weights of attention and 74.71104 of the block in a layer, 388.95616 of the embedding."""
SMALL = ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True)
"""SmolLM2-135M's."""
LAPTOP = Device("cpu", 16, 1e12, 20e9, 2e9, 10e9, cores=2, module_flops=0.5e12)
LOAD = StepLoad(groups=8, group_size=8, turns=1, prompt_tokens=1000, answer_tokens=1000, result_tokens=0)


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"agent": {"command": "true"}, **sections})


def plan(shape: ModelShape, name: str = "h100", *, load: StepLoad | None = None, **sections: Any) -> Plan:
    made = config(**sections)
    return Plan.of(shape, made, load or StepLoad.of(made), GPUS[name])


def cluster(ranks: int, engines: int, **trainer: Any) -> dict[str, Any]:
    """Ranks and engines on devices of their own."""
    return {
        "engine": {"kind": "vllm", "context_length": 8192},
        "trainer": {"kind": "fsdp", "parallel": {"ranks": ranks}, **trainer},
        "cluster": {"address": "auto", "engines": engines, "engine_gpus": 1.0, "rank_gpus": 1.0},
    }


def on_the_same(ranks: int, engines: int, *, colocated: bool = True, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Ranks and engines on the same devices: in turns, or halves of each."""
    parts, gpus = cluster(ranks, engines), ranks / engines
    parts["engine"] |= {"colocated": colocated, "server": {"arguments": list(arguments)}}
    taken = {"engine_gpus": gpus, "rank_gpus": 0.0} if colocated else {"engine_gpus": 0.5, "rank_gpus": 0.5}
    return parts | {"cluster": parts["cluster"] | taken}


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
        parts = trainer_bytes(DENSE_8B, made, LOAD, GPUS["h100"])
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
    awake, sleeping = plan(DENSE_8B, **on_the_same(8, 8, colocated=False)), plan(DENSE_8B, **on_the_same(8, 8))
    (both,), (in_turns,) = awake.needed.values(), sleeping.needed.values()
    trainer, engine = sum(awake.trainer.values()), sum(awake.engine.values())
    assert both == trainer + engine
    spared = sum(awake.trainer[part] for part in ("activations", "logits", "gathered", "gradients"))
    more = sum(sleeping.engine.values()) - engine  # a server takes what is left, if it has a use for it
    assert more > 0 and in_turns == max(trainer, both - spared + more) <= sleeping.usable


def test_gradients_go_with_a_step_except_those_that_deepspeed_keeps_room_for() -> None:
    parts = {"weights": 2.0, "moments": 8.0, "gradients": 4.0, "activations": 1.0, "logits": 1.0, "gathered": 1.0}
    assert {kind: resting_bytes(parts, kind) for kind in ("local", "fsdp", "megatron", "deepspeed")} == {
        "local": 10.0, "fsdp": 10.0, "megatron": 10.0, "deepspeed": 14.0,
    }  # fmt: skip


def test_engines_and_ranks_that_take_turns_are_on_as_many_devices_as_there_are_ranks() -> None:
    divided = plan(DENSE_8B, **on_the_same(8, 4, arguments=["--tensor-parallel-size", "2"]))
    assert divided.together and list(divided.needed) == ["a rank and an engine"]
    whole = plan(DENSE_8B, **on_the_same(8, 8))
    assert divided.engine["weights"] == whole.engine["weights"] / 2
    for made, engines in ((divided, 4), (whole, 8)):
        others = list(alternatives(made))
        assert others and all((other.ranks, other.engines) == (8, engines) for other in others)
        assert all(other.config.cluster.engine_gpus == 8 / engines for other in others)
    assert describe_split(divided).endswith("cluster.engines = 4, cluster.engine_gpus = 2")


def test_servers_elsewhere_take_nothing_of_the_ranks_devices() -> None:
    parts = cluster(4, 1)
    del parts["cluster"]
    urls = {"urls": ["http://node7:8000", "http://node8:8000"]}
    given = plan(DENSE_8B, **{**parts, "engine": {**parts["engine"], "server": urls}})
    assert given.engines == 2 and not given.together
    assert given.needed == {"a rank": sum(given.trainer.values())}
    assert all((other.ranks, other.engines) == (4, 2) for other in alternatives(given))
    assert describe_split(given).endswith("trainer.activation_checkpointing = false"), "no key says how many there are"
    beside = plan(DENSE_8B, **{**parts, "engine": {**parts["engine"], "server": urls, "colocated": True}})
    assert set(beside.needed) == {"a rank and an engine"}, "servers of one's own, on the ranks' devices"


def test_a_split_is_told_with_the_key_that_this_run_has() -> None:
    parts = cluster(15, 1)
    placed = plan(DENSE_8B, "h200", **parts)
    assert describe_split(placed).endswith("cluster.engines = 1")
    del parts["cluster"]
    started = plan(DENSE_8B, "h200", **parts)
    assert describe_split(started).endswith("engine.server.replicas = 1")
    others = list(alternatives(started))
    assert others and all(describe_split(each).endswith(f"engine.server.replicas = {each.engines}") for each in others)
    embedded = plan(SMALL, trainer={"kind": "fsdp", "parallel": {"ranks": 2}})
    assert {each.engines for each in alternatives(embedded)} == {1} and "engine" not in describe_split(embedded)


def test_without_ray_servers_have_devices_of_their_own_unless_they_are_colocated() -> None:
    parts = cluster(4, 1)
    del parts["cluster"]
    assert set(plan(DENSE_8B, **parts).needed) == {"a rank", "an engine"}
    server = {"replicas": 2, "arguments": ["--tensor-parallel-size", "2"]}
    parts["engine"] |= {"colocated": True, "server": server}
    shared = plan(DENSE_8B, **parts)
    shared.check()
    assert set(shared.needed) == {"a rank and an engine"}
    server["replicas"] = 3
    with pytest.raises(ConfigError, match=r"replicas = 3 of 2 GPUs each have no room on those of .*ranks = 4"):
        plan(DENSE_8B, **parts).check()
    embedded = plan(SMALL, trainer={"kind": "fsdp", "parallel": {"ranks": 2}})
    assert set(embedded.needed) == {"a rank and an engine"}, "of the first rank's device"


def test_ranks_are_never_advised_to_divide_what_a_backend_refuses() -> None:
    """Of 4 key heads, 8 tensor-parallel ranks have none to compute."""
    for kind in ("fsdp", "megatron"):
        parts = cluster(8, 8, kind=kind)
        tensors = {each.config.trainer.parallel.tensor for each in alternatives(plan(MOE_30B, "b200", **parts))}  # type: ignore[union-attr]
        assert tensors and tensors <= {1, 2, 4}, kind
        parts["trainer"]["parallel"]["tensor"] = 8
        with pytest.raises(ConfigError, match=r"trainer\.parallel\.tensor = 8 does not divide the model's 4 key heads"):
            plan(MOE_30B, "b200", **parts).check()


def test_the_advice_for_a_server_has_keys_that_a_server_has() -> None:
    given = {"kind": "vllm", "server": {"cache_gb": 100.0}}
    with pytest.raises(ConfigError, match=r"lower engine\.server\.cache_gb$"):
        Plan.of(SMALL, config(engine=given), LOAD, LAPTOP).check()
    parts = cluster(32, 1)
    parts["engine"]["context_length"] = 1 << 20
    with pytest.raises(ConfigError, match=r"an engine would need .*--tensor-parallel-size") as refused:
        plan(DENSE_8B, load=LOAD, **parts).check()
    assert "cache_slots" not in str(refused.value)


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
    with pytest.raises(ConfigError, match=r"--device h1000: did you mean h100\? There are cpu, a100"):
        device("h1000", DENSE_4B, "bfloat16")
    with pytest.raises(ConfigError, match="--device tpu-v5p: choose one of cpu, a100"):
        device("tpu-v5p", DENSE_4B, "bfloat16")
    assert device("H100", DENSE_4B, "bfloat16") is GPUS["h100"]


def test_a_step_of_4b_on_h100s_is_what_one_works_out_by_hand() -> None:
    """One engine, 8 ranks. 64 rollouts: 64,000 tokens sampled, 72,000 trained on, as a group's prompt counts once."""
    made = plan(DENSE_4B, load=LOAD, **cluster(8, 1))
    assert made.running == 64
    # A step of decoding reads 36 * 100.92544 + 388.95616 = 4,022.272 million weights of 2 bytes at 0.6 * 3.35 TB/s:
    # 4.0023 ms. At the same time it computes 64 tokens, each 2 * 4,022.272 million and 4 * 36 * 4096 * 1500 operations,
    # at 0.3 * 989 TFLOP/s: 1.926 ms. Then it reads keys and values of 64 * 1500 tokens, 2 * 36 * 8 * 128 * 2 bytes
    # each: 7.0426 ms. There are 1000 steps.
    assert made.seconds["decode"] == pytest.approx(1000 * (4.0023e-3 + 7.0426e-3), rel=1e-3)
    # 8,000 tokens are prompts, whose tokens see 500 on average, the others 1500: 1388.9. Layers take 6 * 3633.31584
    # million and 3.5 * 4 * 36 * 4096 * 1388.9 operations a token, the output layer 8 * 388.95616 million a sampled one.
    operations = 72e3 * (6 * 3.63331584e9 + 14 * 36 * 4096 * 1388.89) + 64e3 * 8 * 0.38895616e9
    assert made.seconds["train"] == pytest.approx(operations / (0.4 * 989e12 * 8), rel=1e-4)
    # 9 rounds of 1024 tokens on 8 ranks; of each, 7/8 of all weights arrive twice in 2 bytes, gradients leave in 4.
    assert made.seconds["communicate"] == pytest.approx(9 * 7 / 8 * 4.02246e9 * 8 / 450e9, rel=1e-4)
    assert made.seconds["optimize"] == pytest.approx(46 * 4.02246e9 / 8 / (0.6 * 3.35e12), rel=1e-4)
    # 8.0449 GB summed up, written, summed up and copied.
    assert made.seconds["publish"] == pytest.approx(4 * 8.04491e9 / 18e9, rel=1e-3)
    assert made.trainer["weights"] == made.trainer["gradients"] == pytest.approx(4 * 4.02246e9 / 8, rel=1e-4)
    assert made.trainer["moments"] == pytest.approx(4.02246e9, rel=1e-4)
    # 1024 tokens; a layer keeps 4 * 2560 + 80 * 128 + 3 * 9728 numbers of 2 bytes and two norms 16 * 2560 bytes.
    assert made.trainer["activations"] == 1024 * 36 * (2 * (10240 + 10240 + 29184) + 40960)


def test_a_mixture_reads_the_experts_that_somebody_chose() -> None:
    """64 tokens, 8 of 128 experts each: 128 * (1 - (15 / 16) ** 64) = 125.94 of a layer's experts are read."""
    made = plan(MOE_30B, "b200", load=LOAD, **cluster(8, 1))
    attention, head = 48 * 2048 * 128 * 72 + 48 * 128 * 2048, 151936 * 2048
    read = 2 * (attention + head + 48 * 125.94 * 3 * 2048 * 768) / (0.6 * 8e12)
    cached = 64 * 1500 * 2 * 48 * 4 * 128 * 2 / (0.6 * 8e12)
    assert made.seconds["decode"] == pytest.approx(1000 * (read + cached), rel=1e-3)


def test_a_server_takes_the_memory_that_is_left_and_lets_the_others_wait() -> None:
    """30.5 billion weights are 61.06 GB; of 72 GiB = 77.31 GB, 16.25 are left, 98,304 bytes a token: 165,288 tokens."""
    sections = cluster(8, 8)
    sections["engine"] |= {"context_length": 8192, "max_running": 256}
    sections["agent"] = {"command": "true", "concurrency": 256}
    load = StepLoad(256, 8, 1, 4096, 4096, 0)
    made = plan(MOE_30B, load=load, **sections)
    assert made.engine["cache"] == pytest.approx(16.25e9, rel=1e-3)
    assert made.running == int(made.engine["cache"] / 98304 / 6144) == 26
    sections["engine"] |= {"server": {"arguments": ["--tensor-parallel-size", "2"]}}
    divided = plan(MOE_30B, load=load, **sections)
    assert divided.engine["weights"] == made.engine["weights"] / 2 and divided.running > 4 * made.running
    for given, size in ((["--tensor-parallel-size=4"], 4), (["-tp", "2"], 2), (["--max-num-seqs", "2"], 1)):
        assert engine_devices(config(engine={"kind": "vllm", "server": {"arguments": given}})) == size


def test_processes_of_one_machine_share_its_cores() -> None:
    two = config(trainer={"kind": "fsdp", "parallel": {"ranks": 2}})
    one = config(trainer={"kind": "fsdp", "parallel": {"ranks": 1}})
    shared, alone = (Plan.of(SMALL, each, LOAD, LAPTOP) for each in (two, one))
    for part in ("prefill", "decode", "train", "optimize"):
        assert shared.seconds[part] == pytest.approx(alone.seconds[part]), part
    assert sum(shared.needed.values()) > 1.5 * sum(shared.trainer.values())


def test_one_process_never_needs_what_training_and_sampling_need_together() -> None:
    """An embedded engine beside the local trainer: weights once, and packed ones only while there are no gradients."""
    made = Plan.of(SMALL, config(), LOAD, LAPTOP)
    assert made.shared and "weights" not in made.engine
    (needed,) = made.needed.values()
    assert needed == sum(made.trainer.values()) + made.engine["cache"]
    lanes = trainer_bytes(SMALL, config(model={"threads": 4}), LOAD, LAPTOP)
    assert lanes["activations"] == 2 * made.trainer["activations"], "a microbatch in each"
    assert engine_bytes(SMALL, config(engine={"kind": "vllm"}), LAPTOP)["cache"] == 2 * 2**30, "what it is told to take"


def test_the_plan_of_a_run_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shape = {
        "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(shape))
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\npath = "{model}"\n[agent]\ncommand = "true"\nconcurrency = 256\n[engine]\nkind = "vllm"\n'
        "max_running = 256\ncontext_length = 8192\n"
        '[trainer]\nkind = "fsdp"\nactivation_checkpointing = true\n[trainer.parallel]\nranks = 8\n'
        '[cluster]\naddress = "auto"\nengines = 8\nengine_gpus = 1.0\nrank_gpus = 1.0\n'
    )
    assert run_command(["plan", str(file), "--device", "H100", "--turns", "2"]) == 0
    told = capsys.readouterr().out
    assert "30.532 B weights" in told and "memory of 8 ranks, each" in told and "bottleneck" in told
    assert "sequences decode at the same time" in told
    servers = ["--engine.server.urls", '["http://node7:8000"]', "--cluster.engines", "1"]
    assert run_command(["plan", str(file), "--device", "H100", *servers]) == 0
    assert "1 engine of engine.server.urls: their memory is not counted" in capsys.readouterr().out
    assert run_command(["plan", str(file), "--device", "l40s"]) == 2
    assert "this cannot fit" in capsys.readouterr().err
    assert run_command(["plan", str(file), "--device", "h10"]) == 2
    assert "did you mean h100?" in capsys.readouterr().err


def test_this_machine_is_measured() -> None:
    pytest.importorskip("torch", reason="needs the [train] extra")
    for dtype in ("bfloat16", "float32"):
        found = device("cpu", SMALL, dtype)
        assert found.is_cpu and found.cores >= 1 and found.memory_gb > 1
        rates = (found.flops, found.module_flops, found.bytes_per_s, found.link_bytes_per_s, found.host_bytes_per_s)
        assert min(rates) > 1e7
