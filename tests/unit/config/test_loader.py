"""The loader: values come through, and every kind of mistake is named with its key, what was given and a fix."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upspiral.config.combinations import ranks_beside
from upspiral.config.keys import all_keys, nearest_keys
from upspiral.config.loader import dump_toml, load_run_config, toml_value
from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError

SURFACE = Path(__file__).parent / "surface.txt"
COLOCATED = {"trainer.kind": "fsdp", "engine.colocated": "true"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "agent.py").write_text("async def agent(task): ...\n")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "demo.toml"
    path.write_text(text if "[agent]" in text else f'{text}\n[agent]\nfile = "agent.py"\n')
    return path


def problem(folder: Path, text: str, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(folder, text), overrides or {})
    return str(caught.value)


def test_values_come_through_and_flags_win(folder: Path) -> None:
    path = write(folder, 'name = "mine"\nsteps = 3\n[trainer]\nlr = 1e-5\n')
    config = load_run_config(path, {"steps": "7", "env.levels": "[2, 3]", "model.device": "cpu", "name": "5"})
    assert (config.name, config.steps, config.trainer.lr) == ("5", 7, 1e-5)
    assert (config.env.levels, config.model.device) == ((2, 3), "cpu")


def test_a_section_that_may_be_absent(folder: Path) -> None:
    assert load_run_config(write(folder, "")).trainer.lora is None
    path = write(folder, "[trainer.lora]\n")
    for overrides, rank in (({}, 16), ({"trainer.lora.rank": "4"}, 4)):
        config = load_run_config(path, overrides)
        assert config.trainer.lora is not None and config.trainer.lora.rank == rank
        (folder / "resolved.toml").write_text(dump_toml(config))
        assert load_run_config(folder / "resolved.toml") == config


def test_the_agent_file_is_found_beside_the_run_file(folder: Path) -> None:
    assert load_run_config(write(folder, "")).agent.file == str((folder / "agent.py").resolve())


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[trainer]\nlrr = 1e-5", {}, "trainer.lrr = 1e-05 in demo.toml: no such key; did you mean trainer.lr?"),
        ("[trainr]\nlr = 1", {}, "trainr.lr = 1 in demo.toml: no such key; did you mean trainer.lr?"),
        ("group_size = 4", {}, "group_size = 4 in demo.toml: no such key; did you mean algorithm.group_size?"),
        ("", {"zzz": "1"}, "zzz = 1 on the command line: no such key; valid are name, seed, steps"),
        ("", {"name.x": "1"}, "name.x = 1 on the command line: no such key; name is not a section"),
        ("", {"trainer.lr": "fast"}, 'trainer.lr = "fast" on the command line: input should be a valid number'),
        ("steps = 0", {}, "steps = 0 in demo.toml: input should be greater than 0"),
        ("trainer = 3", {}, "trainer = 3 in demo.toml: it is a section"),
        ("[agent]\ntimeout_s = 9", {}, "set exactly one of agent.file, agent.command and agent.kind; none is set"),
        ("[agent]\nkind = 'codex'\ncommand = 'x'", {}, "agent.command and agent.kind is set"),
        ("[agent]\nkind = 'claude'", {}, 'did you mean "claude-code"?'),
        ("[agent]\nkind = 'codex'\nworkers = 2", {}, "agent.workers = 2 in demo.toml does nothing"),
        ("[agent]\nfile = 'gone.py'", {}, "agent.file"),
        ("[env]\nkind = 'python'\nfile = 'gone.py'", {}, 'env.file = "gone.py" in demo.toml: no file at'),
        ("[env]\nkind = 'python'", {}, 'env.file belongs to env.kind = "python"'),
        ("steps = ", {}, "demo.toml is not valid TOML"),
        ("", {"engine.kind": "scripted"}, 'engine.kind = "scripted" on the command line: a scripted engine has no'),
        ("", {"trainer.minibatches": "9"}, "more than algorithm.groups_per_step = 8"),
        ("[warm_start]\nlr = 1e-3", {}, "warm_start.lr = 0.001 in demo.toml does nothing"),
        ("", {"eval.tasks": "0", "eval.every": "2"}, "eval.every = 2 on the command line does nothing"),
        ("[agent]\ncommand = 'x'\nworkers = 2", {}, "agent.workers = 2 in demo.toml does nothing"),
        ("steps = 2", {"trainer.lr_warmup_steps": "3"}, "more than steps = 2"),
        ("steps = 2", {"eval.every": "3"}, "more than steps = 2, so it never happens"),
        ("", {"engine.context_length": "128"}, "agent.max_completion_tokens = 128 (the default): leaves no room"),
        ("[trainer.lora]\nrank = 0", {}, "trainer.lora.rank = 0 in demo.toml: input should be greater than 0"),
        (
            "[trainer.lora]\nrnk = 8",
            {},
            "trainer.lora.rnk = 8 in demo.toml: no such key; did you mean trainer.lora.rank?",
        ),
        ("[trainer]\nlora = 8", {}, "trainer.lora = 8 in demo.toml: it is a section; write its keys below a line [tra"),
        ("[trainer.lora]", {"trainer.master_weights": "none"}, "the factors of [trainer.lora] are always float32"),
        ("", {"trainer.master_weights": "none", "model.dtype": "float32"}, "weights are their own masters; drop this"),
        (
            "[trainer.parallel]\nranks = 3\ntensor = 2",
            {"trainer.kind": "fsdp"},
            "ranks = 3 is no multiple of trainer.par",
        ),
        (
            "[trainer.parallel]\nranks = 2",
            {},
            'trainer.parallel.ranks = 2 in demo.toml does nothing: trainer.kind = "local"',
        ),
        (
            "[trainer.parallel]\nzero_stage = 3",
            {"trainer.kind": "fsdp"},
            "trainer.parallel.zero_stage = 3 in demo.toml do",
        ),
        (
            "[trainer.parallel]\ntensor = 1",
            {"trainer.kind": "deepspeed"},
            "trainer.parallel.tensor = 1 in demo.toml does",
        ),
        ("[trainer.parallel]\nlisten = 'head'", {"trainer.kind": "fsdp"}, 'listen = "head" is not HOST:PORT, such as'),
        (
            "[trainer.parallel]\nlisten = 'head:29400'",
            {"trainer.kind": "fsdp", "cluster.address": "auto"},
            'trainer.parallel.listen = "head:29400" in demo.toml does nothing: with cluster.address',
        ),
        (
            "[trainer.parallel]\nlisten = 'head:29400'",
            {"trainer.kind": "fsdp", "weights.transport": "shared"},
            'weights.transport = "shared" on the command line: the first rank publishes',
        ),
        ("[trainer.lora]\nrank = 4", {"trainer.kind": "megatron"}, 'trainer.kind = "megatron" trains whole weights'),
        ("", {"trainer.kind": "fsdp", "trainer.master_weights": "none"}, 'trainer.kind = "fsdp" keeps float32 weights'),
        ("", {"engine.kind": "vllm", "engine.exact": "true"}, "engine.exact = true on the command line does nothing"),
        ("[cluster]\nengines = 2", {}, "cluster.engines = 2 in demo.toml does nothing: without cluster.address"),
        ("[engine.server]\nreplicas = 2", {}, "engine.server.replicas = 2 in demo.toml does nothing"),
        (
            "[engine.server]\nurls = ['http://a']\nreplicas = 2",
            {"engine.kind": "vllm"},
            "the servers of engine.server.ur",
        ),
        (
            "[engine.server]\nurls = ['http://a']\n[cluster]\naddress = 'auto'\nengines = 2",
            {"engine.kind": "vllm"},
            "each of 2 actors would route to the same servers of engine.server.urls",
        ),
        ("[cluster]\naddress = 'auto'", {"model.device": "cuda"}, "no GPU of the cluster with cluster.rank_gpus = 0"),
        (
            "[cluster]\naddress = 'auto'",
            COLOCATED | {"model.device": "cuda"},
            "no GPU of the cluster with cluster.engine_gpus = 0",
        ),
        ("", {"engine.kind": "vllm", "engine.cache_slots": "256"}, 'engine.kind = "vllm" decides that itself'),
        (
            "",
            {"engine.colocated": "true"},
            "engine and trainer share one copy of the weights and take turns; drop this",
        ),
        (
            "[cluster]\naddress = 'auto'\nengine_gpus = 1.0\nrank_gpus = 1.0",
            COLOCATED,
            "cluster.rank_gpus = 1.0 in demo.toml: with engine.colocated, ranks compute on the GPUs of their engines",
        ),
        (
            "[cluster]\naddress = 'auto'\nengines = 2\nengine_gpus = 2.0\n[trainer.parallel]\nranks = 2",
            COLOCATED,
            "takes turns with 1 of trainer.parallel.ranks = 2, and every rank wants a GPU; set 1",
        ),
        (
            "[cluster]\naddress = 'auto'\nengines = 2\n[trainer.parallel]\nranks = 3",
            COLOCATED,
            "trainer.parallel.ranks = 3 cannot be divided among cluster.engines = 2",
        ),
        (
            "[cluster]\naddress = 'auto'\nengines = 2\nengine_gpus = 4.0",
            {"engine.colocated": "true"},
            'which has no GPU of the cluster; use "fsdp" with trainer.parallel.ranks = 8',
        ),
        (
            "[cluster]\naddress = 'auto'\nsandbox_hosts = 1\n[agent]\nkind = 'codex'",
            {},
            "cluster.sandbox_hosts = 1 in demo.toml: an agent inside its sandbox",
        ),
        ("", {"weights.form": "delta"}, 'weights.form = "delta" on the command line does nothing'),
        ("[sandbox]\nbackend = 'dokcer'", {}, 'did you mean "docker"?'),
        ("[sandbox]\nbackend = 'remote'", {}, 'sandbox.url belongs to sandbox.backend = "remote"'),
        ("[sandbox]\nurl = 'http://box:8100'", {}, 'sandbox.url belongs to sandbox.backend = "remote"'),
        ("[sandbox]\nbackend = 'process'", {}, "sandbox.trust_commands = true"),
        ("[sandbox]\ntrust_commands = true", {}, "sandbox.trust_commands = true in demo.toml does nothing"),
        ("", {"engine.cache_slots": "3"}, "engine.cache_slots = 3 is less than engine.max_running = 64"),
    ],
)
def test_a_mistake_is_named(folder: Path, text: str, overrides: dict[str, str], message: str) -> None:
    assert message in problem(folder, text, overrides)


ON_RAY = "[cluster]\naddress = 'auto'\n"


@pytest.mark.parametrize(
    ("text", "overrides", "beside"),
    [
        (ON_RAY + "engines = 4\nengine_gpus = 2.0\n[trainer.parallel]\nranks = 8", COLOCATED, 2),
        (ON_RAY + "engines = 2\n[trainer.parallel]\nranks = 6", COLOCATED, 3),
        (ON_RAY + "engine_gpus = 1.0\nrank_gpus = 1.0", {"trainer.kind": "fsdp"}, 0),
        (ON_RAY, {"engine.colocated": "true"}, 0),
        ("[trainer.parallel]\nranks = 6", COLOCATED, 0),
        (
            ON_RAY + "rank_gpus = 1.0\n[trainer.parallel]\nranks = 3\n[engine.server]\nurls = ['http://a']",
            {**COLOCATED, "engine.kind": "vllm"},
            0,
        ),
    ],
)
def test_ray_places_ranks_beside_engines_that_it_places_and_that_give_way(
    folder: Path, text: str, overrides: dict[str, str], beside: int
) -> None:
    assert ranks_beside(load_run_config(write(folder, text), overrides)) == beside


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    text = problem(folder, "stepps = 3\n[trainer]\nlr = -1.0\nlrr = 2", {"model.dtype": "int8"})
    assert text.startswith("4 problems")
    assert all(key in text for key in ("stepps", "trainer.lr =", "trainer.lrr", "model.dtype"))


def test_a_missing_run_file_and_a_missing_agent_section_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run file at"):
        load_run_config(tmp_path / "nothing.toml")
    (tmp_path / "bare.toml").write_text("steps = 1\n")
    with pytest.raises(ConfigError, match=r"set agent\.file, agent\.command or agent\.kind"):
        load_run_config(tmp_path / "bare.toml")


def test_a_dumped_config_loads_to_itself(folder: Path) -> None:
    config = load_run_config(write(folder, ""), {"budget_minutes": "3.5", "trainer.betas": "[0.8, 0.99]"})
    copy = folder / "elsewhere" / "config.resolved.toml"
    copy.parent.mkdir()
    copy.write_text(dump_toml(config))
    assert load_run_config(copy) == config


def test_a_section_with_sections_inside_survives_too(folder: Path) -> None:
    inside = '[trainer]\nlr = 1e-3\nkind = "fsdp"\n[trainer.parallel]\nranks = 4\ntensor = 2'
    config = load_run_config(write(folder, inside))
    (folder / "resolved.toml").write_text(dump_toml(config))
    assert load_run_config(folder / "resolved.toml") == config


@given(text=st.text(st.characters(exclude_categories=("Cs",))), number=st.floats(allow_nan=False), whole=st.integers())
def test_any_value_survives_toml(text: str, number: float, whole: int) -> None:

    values: dict[str, Any] = {"text": text, "number": number, "list": [whole, whole], "yes": True}
    written = "\n".join(f"{key} = {toml_value(value)}" for key, value in values.items())
    assert tomllib.loads(written) == values


def test_every_key_says_what_it_means() -> None:
    assert [key.name for key in all_keys().values() if not key.doc] == []


@given(key=st.sampled_from(sorted(all_keys())), position=st.integers(0, 60))
def test_one_lost_letter_still_finds_the_key(key: str, position: int) -> None:
    leaf_start = key.rfind(".") + 1
    lost = leaf_start + position % (len(key) - leaf_start)
    wrong = key[:lost] + key[lost + 1 :]
    if len(key) - leaf_start > 3 and wrong not in all_keys():
        assert key in nearest_keys(wrong)


def test_the_surface_is_frozen() -> None:
    """A new key, or a new default, shows in review as a change of surface.txt."""
    surface = "".join(f"{key.name} = {toml_value(key.default)}\n" for key in all_keys().values())
    assert surface == SURFACE.read_text(), f"the run file's keys changed; write this to {SURFACE}:\n{surface}"


def test_the_models_build_without_a_file() -> None:
    config = RunConfig.model_validate({"agent": {"command": "true"}})
    assert "workers" not in dump_toml(config)
