"""`upspiral serve` as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.cli.serve import serve
from upspiral.errors import ConfigError
from upspiral.trajectory.store import TrajectoryStore


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


def test_it_says_when_it_is_ready_and_stops_on_a_signal(tmp_path: Path, model: Path, script: Path) -> None:
    code = (
        "from pathlib import Path; from upspiral.cli.serve import serve;"
        f"serve(model={str(model)!r}, engine='scripted', script=Path({str(script)!r}),"
        f"run=Path({str(tmp_path / 'run')!r}), port=0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert set(ready) == {"url", "admin_key"}
        admin = openai.OpenAI(base_url=f"{ready['url']}/admin", api_key=ready["admin_key"], timeout=10)
        opened = admin.post("/rollouts", body={"task": "t", "group": "g"}, cast_to=object)
        assert isinstance(opened, dict)
        client = openai.OpenAI(base_url=f"{ready['url']}/v1", api_key=opened["key"], timeout=10)
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == "3 files"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "" and process.wait(timeout=20) == 0
    assert len(TrajectoryStore(tmp_path / "run" / "trajectories.db").graph(opened["rollout"]).nodes) == 2


def test_what_cannot_work_is_said_first(tmp_path: Path, model: Path, script: Path) -> None:
    with pytest.raises(ConfigError, match="--engine scripted needs --script"):
        serve(model=str(model), engine="scripted", run=tmp_path)
    with pytest.raises(ConfigError, match="--script FILE needs --engine scripted"):
        serve(model=str(model), engine="embedded", script=script, run=tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            serve(model=str(model), engine="scripted", script=script, run=tmp_path, port=port)
    script.write_text("oops\n")
    with pytest.raises(ConfigError, match=r"script.jsonl line 1"):
        serve(model=str(model), engine="scripted", script=script, run=tmp_path, port=0)
