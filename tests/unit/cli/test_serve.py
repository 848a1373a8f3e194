"""`upspiral serve` as a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.cli.engine_source import EngineSource
from upspiral.cli.main import run_command
from upspiral.cli.serve import ADMIN_KEY_VARIABLE, INTERRUPTED, Exposure, serve
from upspiral.errors import ConfigError
from upspiral.loop.folder import lock_folder
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout, RolloutStatus

OWN_KEY = "a-key-of-my-own-1234"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 560}))
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.jsonl"
    path.write_text('{"text": "3 files"}\n')
    return path


@contextmanager
def serving(tmp_path: Path, *engine: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`engine`: its flags; none: the script."""
    engine = engine or ("--engine", "scripted", "--script", str(tmp_path / "script.jsonl"))
    arguments = ["--model", str(tmp_path / "model"), *engine]
    command = [sys.executable, "-m", "upspiral", "serve", *arguments, "--run", str(tmp_path / "run"), "--port", "0"]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src"), **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=variables, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ready(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def open_rollout(url: str, admin_key: str) -> dict[str, str]:
    admin = openai.OpenAI(base_url=f"{url}/admin", api_key=admin_key, timeout=10)
    opened = admin.post("/rollouts", body={"task": "t", "group": "g"}, cast_to=object)
    assert isinstance(opened, dict)
    return opened


def test_it_says_when_it_is_ready_and_stops_on_a_signal(tmp_path: Path, model: Path, script: Path) -> None:
    with serving(tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        said = ready(process)
        assert set(said) == {"url", "admin_key"}
        opened = open_rollout(said["url"], said["admin_key"])
        client = openai.OpenAI(base_url=f"{said['url']}/v1", api_key=opened["key"], timeout=10)
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == "3 files"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "" and process.wait(timeout=20) == 0
        assert "stopped with 1 unfinished rollout in " in process.stderr.read()
    store = TrajectoryStore(tmp_path / "run" / "trajectories.db")
    assert len(store.graph(opened["rollout"]).nodes) == 2
    rollout = store.rollout(opened["rollout"])
    assert (rollout.status, rollout.reason) == (RolloutStatus.CANCELLED, INTERRUPTED)


def test_a_key_of_ones_own_is_used_and_not_printed(tmp_path: Path, model: Path, script: Path) -> None:
    with serving(tmp_path, **{ADMIN_KEY_VARIABLE: OWN_KEY}) as process:
        said = ready(process)
        assert said["admin_key"] is None
        assert set(open_rollout(said["url"], OWN_KEY)) == {"rollout", "key"}


def test_what_a_killed_gateway_left_is_marked(tmp_path: Path, model: Path, script: Path) -> None:
    store = TrajectoryStore(tmp_path / "run" / "trajectories.db")
    for number in range(3):
        store.create_rollout(Rollout(f"r{number}", "t", "g", split="served"))
    store.finish_rollout("r2", status=RolloutStatus.FINISHED, reward=1.0)
    with serving(tmp_path) as process:
        ready(process)
        with pytest.raises(ConfigError, match="in use by another upspiral process"):
            serve(model=str(model), source=EngineSource("scripted", script), run=tmp_path / "run", port=0)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "an earlier gateway left 2 unfinished rollouts in " in process.stderr.read()
    found = {rollout.id: (rollout.status, rollout.reason) for rollout in store.rollouts()}
    cancelled = (RolloutStatus.CANCELLED, INTERRUPTED)
    assert found == {"r0": cancelled, "r1": cancelled, "r2": (RolloutStatus.FINISHED, "")}
    os.close(lock_folder(tmp_path / "run"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_may_connect_only_with_a_key_that_somebody_chose(
    host: str, tmp_path: Path, model: Path, script: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)
    arguments = ["--model", str(model), "--engine", "scripted", "--script", str(script), "--run", str(tmp_path / "run")]
    assert run_command(["serve", *arguments, "--port", "0", "--host", host]) == 2
    refused = capsys.readouterr().err
    assert f"--host {host} can be reached from other machines" in refused and ADMIN_KEY_VARIABLE in refused
    for key in ("short", "sixteen letters!", "é" * 20):
        monkeypatch.setenv(ADMIN_KEY_VARIABLE, key)
        with pytest.raises(ConfigError, match=f"{ADMIN_KEY_VARIABLE} must have at least 16") as refusal:
            serve(
                model=str(model),
                source=EngineSource("scripted", script),
                run=tmp_path,
                port=0,
                exposure=Exposure(host=host),
            )
        assert key not in str(refusal.value)


def test_limits_that_let_nobody_in(tmp_path: Path, model: Path, script: Path) -> None:
    for exposure in (Exposure(max_body_mb=0), Exposure(max_connections=-1)):
        with pytest.raises(ConfigError, match=r"--max-(body-mb|connections) \S+ lets nobody in"):
            serve(model=str(model), source=EngineSource("scripted", script), run=tmp_path, port=0, exposure=exposure)


URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (EngineSource("scripted"), "--engine scripted needs --script"),
        (EngineSource("embedded", Path("s.jsonl")), "--script FILE needs --engine scripted"),
        (EngineSource("embedded", engine_url=(URL,)), f"--engine-url {URL} needs --engine vllm or"),
        (EngineSource("sglang"), "--engine sglang needs --engine-url"),
    ],
)
def test_what_cannot_work_is_said_first(source: EngineSource, said: str, tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        serve(model=str(model), source=source, run=tmp_path)


def test_the_model_of_a_server_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--engine-url {URL} needs --model"):
        serve(source=EngineSource("vllm", engine_url=(URL,)), run=tmp_path)


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, model: Path, capsys: Any) -> None:
    arguments = ["--model", str(model), "--engine", "vllm", "--engine-url", URL, "--run", str(tmp_path / "run")]
    assert run_command(["serve", *arguments, "--port", "0"]) == 2
    assert URL in capsys.readouterr().err


def test_servers_that_run_already_answer(tmp_path: Path, model: Path) -> None:
    """Here, one that keeps vLLM's contract. Each token comes with minus the server's one weight as its logprob."""
    contract = pytest.importorskip("tests.fixtures.vllm_contract", reason="needs the [train] extra")
    server = contract.ContractServer()
    server.value = 0.25

    def ask(url: str) -> None:
        with serving(tmp_path, "--engine", "vllm", "--engine-url", url, "--engine-url", url) as process:
            said = ready(process)
            opened = open_rollout(said["url"], said["admin_key"])
            client = openai.OpenAI(base_url=f"{said['url']}/v1", api_key=opened["key"], timeout=10)
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        store = TrajectoryStore(tmp_path / "run" / "trajectories.db")
        assert server.label == "default", "its weights are not ours to label"
        answer = list(store.graph(opened["rollout"]).nodes)[-1]
        assert [*answer.logprobs[answer.sampled]] == [-0.25] * 5 and [*answer.versions[answer.sampled]] == [0] * 5

    async def serve_and_ask() -> None:
        async with contract.serving(server) as url:
            await asyncio.to_thread(ask, url)

    asyncio.run(serve_and_ask())
