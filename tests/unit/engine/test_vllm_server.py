"""Starting vLLM's server in an environment of its own, and what is left when it, or who started it, dies.

The environment's `vllm` is the contract server here, so that this takes no minutes: processes, ports, logs and signals
are real.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.vllm_contract import CONTEXT
from upspiral.cli.main import run_command
from upspiral.config.models import RunConfig
from upspiral.engine.router import Router
from upspiral.engine.vllm import environment
from upspiral.engine.vllm import server as server_module
from upspiral.engine.vllm.server import ServerSettings, VllmServer
from upspiral.errors import ConfigError, DeadlineError, EngineError
from upspiral.loop.servers import Machine, servers
from upspiral.types import SamplingParams

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60
_OWNER = """
import asyncio, sys
from pathlib import Path
from upspiral.engine.vllm.server import ServerSettings, VllmServer

async def own():
    python, model, log = map(Path, sys.argv[1:])
    await VllmServer(ServerSettings(python, model, log, "float32", 64, 4, cpu=True)).start()
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(own())
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment that has a `vllm`."""
    package = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text("from tests.fixtures.vllm_contract import main\nmain()\n")
    path = f"$PYTHONPATH:{tmp_path / 'packages'}:{ROOT}:{ROOT / 'src'}"
    return program(tmp_path / "python", f'PYTHONPATH="{path}" exec {sys.executable} "$@"')


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def settings_of(python: Path, folder: Path, *, start_timeout_s: float = DEADLINE_S) -> ServerSettings:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    return ServerSettings(
        python, model, folder / "logs" / "vllm.log", "float32", 64, 4, cpu=True, start_timeout_s=start_timeout_s
    )


def run(work: Awaitable[None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work

    asyncio.run(within())


def children(log: Path) -> list[int]:
    return [int(number) for number in re.findall(r"CHILD (\d+)", log.read_text())]


def queue_of(log: Path) -> Path:
    (name,) = re.findall(r"QUEUE (\S+)", log.read_text())
    return Path("/dev/shm") / name


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_it_starts_answers_tells_of_its_death_and_leaves_nothing(python: Path, tmp_path: Path) -> None:
    async def check() -> None:
        settings = settings_of(python, tmp_path)
        home = VllmServer(settings)
        engine = await home.start()
        (child,) = children(settings.log)
        try:
            assert engine.context_length == CONTEXT
            generation = engine.generate([1], SamplingParams(max_tokens=50))
            await anext(aiter(generation))
            server = psutil.Process(child).ppid()
            assert os.getpgid(server) == os.getpgid(child) != os.getpgid(0)
            os.kill(server, signal.SIGKILL)
            with pytest.raises(EngineError):
                async for _ in generation:
                    pass
            assert re.search(r"ended \(exit code -9\); the end of .*vllm.log:\nCHILD", await home.gone(), re.DOTALL)
            assert alive(child), "vLLM's engine may outlive its server"
        finally:
            await engine.stop()
            await home.kill()
        await asyncio.to_thread(until, lambda: not alive(child))
        await home.kill()  # does nothing

    run(check())


def test_a_run_waits_longer_for_a_server_than_it_may_take_to_start(python: Path, tmp_path: Path) -> None:
    for server in ({"python": str(python), "start_timeout_s": 900.0}, {"urls": ["http://127.0.0.1:1"]}):
        engine = {"kind": "vllm", "context_length": 64, "server": server}
        config = RunConfig.model_validate({"agent": {"command": "true"}, "engine": engine})
        assert config.engine.server is not None
        router = servers(config, tmp_path, tmp_path / "logs", Machine(cpu=True, threads=1))
        assert isinstance(router, Router) and router._patience_s > config.engine.server.start_timeout_s


def test_a_run_that_replays_routes_asks_its_servers_for_them(python: Path, tmp_path: Path) -> None:
    """Of a model whose second layer of four has no experts."""
    model = tmp_path / "model"
    model.mkdir()
    shape = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    (model / "config.json").write_text(json.dumps(shape))
    engine = {"kind": "vllm", "routes": "replay", "context_length": 64, "server": {"python": str(python)}}
    config = RunConfig.model_validate({"agent": {"command": "true"}, "engine": engine})
    with pytest.raises(ConfigError, match=r"experts anew on a CPU; use engine.kind = \"embedded\""):
        servers(config, model, tmp_path / "logs", Machine(cpu=True, threads=1))

    async def check() -> None:
        router = servers(config, model, tmp_path / "logs", Machine(cpu=False, threads=1))
        try:
            await router.start()
            chunks = [chunk async for chunk in router.generate([7, 8, 9], SamplingParams(max_tokens=3))]
        finally:
            await router.stop()
        told = [each for chunk in chunks for each in (chunk.prompt_routes, chunk.routes)]
        routes = np.concatenate([each for each in told if each is not None])
        assert routes.tolist() == [[[at + 10 * layer, at + 10 * layer + 1] for layer in (0, 2, 3)] for at in range(5)]

    run(check())
    (model / "config.json").write_text('{"num_hidden_layers": 4}')
    with pytest.raises(ConfigError, match="the model has no experts"):
        servers(config, model, tmp_path / "logs", Machine(cpu=False, threads=1))


def test_one_that_cannot_be_ended_or_has_lost_its_log_is_told_of(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        settings = settings_of(python, tmp_path)
        home = VllmServer(settings)
        await (await home.start()).stop()
        (child,) = children(settings.log)
        server = psutil.Process(child).ppid()
        with monkeypatch.context() as patch:
            patch.setattr(server_module, "_KILL_DEADLINE_S", 0.1)
            patch.setattr(server_module, "end_group", lambda group: None)  # as if it hung in its driver
            with pytest.raises(EngineError, match=rf"process {server}\) was killed and still runs after 0\.1 s"):
                await home.kill()
        settings.log.unlink()
        os.killpg(server, signal.SIGKILL)
        assert re.search(r"ended \(exit code killed\), and its log cannot be read", await home.gone())

    run(check())


def test_each_server_sees_gpus_of_its_own(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides that is in loop/devices.py; here it arrives."""
    told = program(tmp_path / "told", f'echo "GPUS $CUDA_VISIBLE_DEVICES"; exec {python} "$@"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,7")
    model, logs = tmp_path / "model", tmp_path / "logs"
    model.mkdir()
    server = {"python": str(told), "replicas": 2, "arguments": ["--tensor-parallel-size", "2"]}
    config = RunConfig.model_validate({"agent": {"command": "true"}, "engine": {"kind": "vllm", "server": server}})

    async def seen(devices: list[str] | None) -> list[str]:
        router = servers(config, model, logs, Machine(cpu=False, threads=1, devices=devices))
        try:
            await router.start()
        finally:
            await router.stop()
        return [re.findall(r"GPUS (\S*)", (logs / f"vllm-{number}.log").read_text())[-1] for number in range(2)]

    async def check() -> None:
        assert await seen(["3", "4", "5", "6", "7"]) == ["4,5", "6,7"], "the local trainer has the first"
        assert await seen(None) == ["3,4,5,6,7"] * 2, "within Ray, which has chosen"

    run(check())


def test_our_build_for_cpus_is_not_started_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path))
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    python = environment.vllm_python()
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (environment.environment_folder() / "upspiral-finished").touch()
    settings = settings_of(python, tmp_path)
    settings.check()
    with pytest.raises(ConfigError, match=r"build for CPUs.*engine\.server\.python"):
        replace(settings, cpu=False).check()
    replace(settings, cpu=False, python=Path(sys.executable)).check()


def test_it_dies_with_an_owner_that_is_killed(python: Path, tmp_path: Path) -> None:
    settings = settings_of(python, tmp_path)
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(python), str(settings.model_folder), str(settings.log)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == "ready\n"
        (child,) = children(settings.log)
        server = psutil.Process(child).ppid()
        assert alive(server) and alive(child)
        copy = Path(psutil.Process(server).cwd())
        assert (copy / "serve.py").is_file() and queue_of(settings.log).exists()
    finally:
        owner.kill()
        owner.wait(DEADLINE_S)
        owner.stdout.close()
    until(lambda: not alive(server) and not alive(child))
    assert not copy.exists() and not queue_of(settings.log).exists()


def test_a_server_that_does_not_start_says_why(python: Path, tmp_path: Path) -> None:
    settings = settings_of(python, tmp_path)
    settings.model_folder.rmdir()
    with pytest.raises(EngineError, match=r"(?s)did not start \(exit code 1\); the end of .*no model in .*model"):
        run(_started(settings))
    slow = settings_of(program(tmp_path / "slow", "sleep 600"), tmp_path, start_timeout_s=0.3)
    with pytest.raises(DeadlineError, match=r"did not answer within 0 s .*engine\.server\.start_timeout_s"):
        run(_started(slow))
    with pytest.raises(ConfigError, match="upspiral engine install vllm"):
        run(_started(settings_of(tmp_path / "nowhere", tmp_path)))


def test_relative_paths_are_those_of_who_starts_it(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has another working folder. A link to an interpreter is started as the link that it is: that is what
    makes it the one of a virtual environment."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    settings_of(python, tmp_path)  # makes the model's folder
    link = Path("venv/bin/python")
    link.parent.mkdir(parents=True)
    link.symlink_to(python)
    settings = replace(settings_of(link, tmp_path), model_folder=Path("model"), log=Path("vllm.log"))

    async def check() -> None:
        home = VllmServer(settings)
        engine = await home.start()
        try:
            (child,) = children(settings.log)
            assert psutil.Process(psutil.Process(child).ppid()).cwd() != str(tmp_path)
        finally:
            await engine.stop()
            await home.kill()

    run(check())
    refused = program(tmp_path / "refused", "exit 0")
    refused.chmod(0o644)
    with pytest.raises(EngineError, match=r"refused cannot be started as vLLM's interpreter: .*Permission denied"):
        run(_started(settings_of(refused, tmp_path)))
    assert list(temporary.iterdir()) == [], "nothing is left of either"


async def _started(settings: ServerSettings) -> None:
    await VllmServer(settings).start()


def test_only_a_server_on_a_gpu_is_told_that_it_may_sleep(tmp_path: Path) -> None:
    settings = settings_of(Path(sys.executable), tmp_path)
    for cpu, sleeps in ((True, True), (False, True), (False, False)):
        command = replace(settings, cpu=cpu, sleeps=sleeps).command(8000)
        assert ("--enable-sleep-mode" in command) == (sleeps and not cpu)


def test_an_environment_counts_when_it_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path))
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    folder = environment.environment_folder()
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "left").touch()
    assert not environment.is_installed(), "who made it was killed"
    assert run_command(["engine", "list"]) == 0
    assert "vllm      not installed: `upspiral engine install vllm`" in capsys.readouterr().out
    unfinished = settings_of(environment.vllm_python(), tmp_path)
    with pytest.raises(ConfigError, match=r"was not finished: install .*`upspiral engine install vllm`"):
        run(_started(unfinished))
    with (
        monkeypatch.context() as patch,
        pytest.raises(EngineError, match=r"could not be made; .* said:\nno space left"),
    ):
        patch.setattr(sys, "executable", str(program(tmp_path / "failing", "echo no space left >&2; exit 1")))
        environment.install(progress=lambda line: None)
    assert not folder.exists(), "nothing is left of a failure, nor of what was there"
    monkeypatch.setenv(environment.VARIABLE, sys.executable)
    assert environment.is_installed() and environment.vllm_python() == Path(sys.executable)
    assert run_command(["engine", "list"]) == 0
    assert f"vllm      {sys.executable}" in capsys.readouterr().out


def test_an_environment_is_made_by_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path))
    begun = tmp_path / "begun"
    slow = program(tmp_path / "slow", f'mkdir -p "$3" && echo $$ > "$3/made" && touch {begun} && exec sleep 600')
    maker = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.executable = {str(slow)!r}\n"
         "from upspiral.engine.vllm.environment import install\ninstall()"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    made = environment.environment_folder() / "made"
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "failing", "exit 1")))
    try:
        until(begun.exists)
        assert run_command(["engine", "install", "vllm"]) == 2
        assert re.search("another `upspiral engine install vllm` is making .*wait for its end", capsys.readouterr().err)
        assert made.exists(), "what the first has made is untouched"
    finally:
        os.killpg(maker.pid, signal.SIGKILL)
        maker.wait(DEADLINE_S)
    with pytest.raises(EngineError, match="could not be made"):
        environment.install(progress=lambda line: None)
    assert not made.exists(), "who was killed holds nothing"
