"""The whole loop on a tiny model: real engine, gateway, agent process, sandbox, verifier, trainer, checkpoints."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.tiny_model import make_model
from tests.unit.sandbox.live_server import ALICE, server_process
from upspiral.cli.main import run_command
from upspiral.config.loader import load_run_config
from upspiral.errors import ConfigError, LedgerError, RunError
from upspiral.loop.run import run_training
from upspiral.monitor.metrics import read_metrics
from upspiral.monitor.progress import LiveProgress
from upspiral.sandbox.registry import TOKEN_VARIABLE
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import RolloutStatus

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECIPE = """
name = "tiny"
steps = {steps}
[model]
path = "{model}"
dtype = "float32"
threads = 1
[engine]
context_length = 128
cache_slots = 64
[env]
kind = "python"
file = "{fixtures}/letters_env.py"
[agent]
file = "{fixtures}/one_call_agent.py"
max_completion_tokens = 6
[algorithm]
group_size = 8
groups_per_step = 4
max_groups_per_step = 6
[trainer]
lr = 1e-2
[eval]
tasks = 12
temperature = 1.0
[checkpoint]
every = 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def decided_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with embeddings large enough for decided answers: an adapter leaves those as they are."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("decided") / "model"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(folder: Path, model: Path, steps: int) -> Path:
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(model=model, fixtures=FIXTURES, steps=steps))
    return path


def steps_of(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder) if line["kind"] == "step"]


def test_reward_rises_and_the_ledger_closes(tmp_path: Path, model: Path) -> None:
    config = load_run_config(recipe(tmp_path, model, steps=12), ())
    folder = tmp_path / "run"
    result = run_training(config, folder, resume=False, progress=LiveProgress("tiny", 12, quiet=True))

    steps = steps_of(folder)
    assert result.steps == len(steps) == 12
    rewards = [line["reward_mean"] for line in steps]
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.2, rewards
    assert all(line["ledger"]["difference"] == 0 for line in steps)
    assert all(line["mismatch_max_abs"] < 1e-3 for line in steps if line["trained_tokens"]), (
        "float32 engine and trainer must agree"
    )
    assert [line["step"] for line in result.evaluations] == [0, 12]

    store = TrajectoryStore(folder / "trajectories.db", create=False)
    ledger = store.ledger()
    assert ledger.difference == 0 and ledger.trained > 0
    for rollout in store.rollouts(split="train"):
        graph = store.graph(rollout.id)
        assert {int(v) for node in graph.nodes for v in node.versions[node.sampled]} == {rollout.step - 1}
    store.close()


def test_an_adapter_learns_is_resumed_and_exported(tmp_path: Path, decided_model: Path) -> None:
    flags = {"trainer.lora.rank": "8", "trainer.lr": "4e-3", "trainer.activation_checkpointing": "true",
             "engine.exact": "true"}  # fmt: skip
    folder, file = tmp_path / "run", recipe(tmp_path, decided_model, steps=12)
    command = [sys.executable, "-m", "upspiral", "run", str(file), "--run", str(folder), "--steps", "2"]
    command += [word for key, value in flags.items() for word in (f"--{key}", value)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    config = load_run_config(file, flags)
    run_training(config, folder, resume=True, progress=LiveProgress("tiny", 12, quiet=True))
    steps = steps_of(folder)
    rewards = [line["reward_mean"] for line in steps]
    assert len(steps) == 12 and fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.2, rewards
    assert all(line["ledger"]["difference"] == 0 for line in steps)
    assert all(line["mismatch_max_abs"] == 0 for line in steps if line["trained_tokens"]), "exact mode must stay exact"
    assert run_command(["export", str(folder), "--peft", str(tmp_path / "adapter")]) == 0
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip


def test_a_reward_that_no_token_earned_stops_the_run(tmp_path: Path, model: Path) -> None:
    agent = tmp_path / "elsewhere_agent.py"
    agent.write_text('async def agent(task) -> str:\n    """Answers without the model."""\n    return "a"\n')
    path = recipe(tmp_path, model, steps=2)
    path.write_text(path.read_text().replace(f"{FIXTURES}/one_call_agent.py", str(agent)))
    config = load_run_config(path, ())
    with pytest.raises(LedgerError, match=r"rollout eval-0000-000 has reward .* did not call the model"):
        run_training(config, tmp_path / "run", resume=False, progress=LiveProgress("tiny", 2, quiet=True))


@pytest.mark.parametrize(
    ("evaluation", "where"),
    [
        ("tasks = 12", "evaluation after step 0: none of the 12 rollouts"),
        ("tasks = 0", "step 1: none of the 48 rollouts"),
    ],
)
def test_what_nobody_could_judge_stops_the_run_and_is_tried_again(
    tmp_path: Path, model: Path, evaluation: str, where: str
) -> None:
    agent, path = tmp_path / "mended_later.py", recipe(tmp_path, model, steps=2)
    agent.write_text('async def agent(task) -> str:\n    """Never answers."""\n    raise OSError("no way out")\n')
    path.write_text(
        path.read_text()
        .replace(f"{FIXTURES}/one_call_agent.py", str(agent))
        .replace("tasks = 12\ntemperature = 1.0", evaluation)
    )
    config, folder = load_run_config(path, ()), tmp_path / "run"
    with pytest.raises(RunError, match=rf"{where} .*no way out"):
        run_training(config, folder, resume=False, progress=LiveProgress("tiny", 2, quiet=True))

    shutil.copyfile(FIXTURES / "one_call_agent.py", agent)
    result = run_training(config, folder, resume=True, progress=LiveProgress("tiny", 2, quiet=True))
    assert result.steps == 2 and {line["tasks"] for line in result.evaluations} <= {12}
    store = TrajectoryStore(folder / "trajectories.db", create=False)
    assert store.ledger().difference == 0
    assert len(store.rollouts(status=RolloutStatus.CANCELLED)) in (12, 48)
    store.close()


def test_sandboxes_that_cannot_be_had_stop_the_run_before_it_computes(tmp_path: Path, model: Path) -> None:
    config = load_run_config(recipe(tmp_path, model, steps=1), {"sandbox.image": "no-such-image"})
    with pytest.raises(ConfigError, match=r"\[sandbox\] cannot be had.*no-such-image"):
        run_training(config, tmp_path / "run", resume=False, progress=LiveProgress("tiny", 1, quiet=True))


def test_a_run_on_sandboxes_of_a_server(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, ALICE)
    with server_process() as (_, url):
        config = load_run_config(
            recipe(tmp_path, model, steps=1),
            {"sandbox.backend": "remote", "sandbox.url": url, "eval.tasks": "2"},
        )
        run_training(config, tmp_path / "run", resume=False, progress=LiveProgress("tiny", 1, quiet=True))
    (step,) = steps_of(tmp_path / "run")
    assert step["ledger"]["difference"] == 0 and step["trained_tokens"] > 0


def test_kill_9_loses_no_committed_node_and_resume_goes_on(tmp_path: Path, model: Path) -> None:
    folder, file = tmp_path / "run", recipe(tmp_path, model, steps=5)
    command = [sys.executable, "-m", "upspiral", "run", str(file), "--run", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: committed_steps(folder) >= 3, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    before = node_rows(folder)
    assert before

    subprocess.run([*command, "--resume"], env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)

    assert before.items() <= node_rows(folder).items()
    assert [line["step"] for line in steps_of(folder)] == [1, 2, 3, 4, 5]
    store = TrajectoryStore(folder / "trajectories.db", create=False)
    assert store.ledger().difference == 0
    assert not store.rollouts(status=RolloutStatus.RUNNING)
    store.close()


def committed_steps(folder: Path) -> int:
    """The newest step that has committed nodes."""
    if not (folder / "trajectories.db").exists():
        return 0
    with sqlite3.connect(f"file:{folder}/trajectories.db?mode=ro", uri=True, timeout=5) as connection:
        query = "SELECT max(step) FROM rollouts JOIN nodes ON nodes.rollout_id = rollouts.id WHERE split = 'train'"
        try:
            return connection.execute(query).fetchone()[0] or 0
        except sqlite3.OperationalError:
            return 0


def node_rows(folder: Path) -> dict[tuple[str, int], bytes]:
    with sqlite3.connect(folder / "trajectories.db") as connection:
        rows = connection.execute("SELECT rollout_id, id, token_ids FROM nodes").fetchall()
    return {(rollout, node): tokens for rollout, node, tokens in rows}


def wait_until(condition, process: subprocess.Popen, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended early with {process.returncode}"
        assert time.monotonic() < deadline, f"nothing happened within {timeout_s} s"
        time.sleep(0.02)
