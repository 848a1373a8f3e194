"""`--on ray://HOST:PORT`: a run in a cluster of which the machine that starts it is no part."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")
pytest.importorskip("ray", reason="needs the [ray] extra")

from tests.fixtures.ray_nodes import Nodes, free_port, node
from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe, steps_of
from tests.integration.test_ray import finish, learned, sampled, started, until
from upspiral.config.models import ClusterConfig
from upspiral.errors import ConfigError
from upspiral.launch.ray.cluster import joined, leave

ROOT = Path(__file__).parents[2]
EXACT = {"engine.exact": "true"}
HEAD = ("--num-cpus", "4", "--object-store-memory", str(200 << 20), "--disable-usage-stats")
HEAD += ("--include-dashboard", "false", "--min-worker-port", "0", "--max-worker-port", "0")  # free ones
ACTORS = ("RunHost", "EngineHost")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True, slots=True)
class Cluster:
    address: str
    nodes: Nodes

    @property
    def actors(self) -> list[int]:
        return [each.pid for name in ACTORS for each in self.nodes.actors(name)]


@contextmanager
def cluster_of_one() -> Iterator[Cluster]:
    """With a folder and ports of its own: other clusters of this machine go on."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie in it, so its path must be short
    clients, variables = free_port(), pytest.MonkeyPatch()
    variables.setenv("RAY_AUTH_MODE", "disabled")
    variables.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    head = ["--head", "--port", str(free_port()), "--ray-client-server-port", str(clients), "--temp-dir", str(folder)]
    try:
        with node([*head, *HEAD], folder / "head.log"):
            yield Cluster(f"ray://127.0.0.1:{clients}", Nodes(folder))
    finally:
        variables.undo()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of_one() as made:
        yield made


def at(address: str) -> AbstractContextManager[None]:
    return joined(ClusterConfig(address=address))


@pytest.mark.parametrize("address", ["ray://127.0.0.1", "ray://:10001", "ray://127.0.0.1:many", "ray://[::1:10001"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match="lacks a host or a port; write ray://HOST:10001"), at(address):
        pass


def test_an_address_where_nobody_listens_is_named_at_once() -> None:
    address, began = f"ray://127.0.0.1:{free_port()}", time.monotonic()
    says = re.escape(f'cluster.address = "{address}": nobody answers there ([Errno 111] Connection refused)')
    with pytest.raises(ConfigError, match=says), at(address):
        pass
    assert time.monotonic() - began < 5


def test_a_cluster_that_does_not_let_go_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    lets_go = threading.Event()
    monkeypatch.setattr(ray, "shutdown", lets_go.wait)
    began = time.monotonic()
    leave("ray://127.0.0.1:10001", deadline_s=0.2)
    assert time.monotonic() - began < 5
    lets_go.set()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_results_as_without_ray_and_its_progress_here(tmp_path: Path, model: Path, cluster: Cluster) -> None:
    file = recipe(tmp_path, model, steps=2)
    finish(started(file, tmp_path / "here", EXACT), 120)
    done = run(file, tmp_path / "there", cluster, EXACT)
    assert done.returncode == 0, done.stderr
    assert "step 1/2 |" in done.stdout and "step 2/2 |" in done.stdout and "report: " in done.stdout
    assert sampled(tmp_path / "here") == sampled(tmp_path / "there")
    assert learned(tmp_path / "here") == learned(tmp_path / "there")
    until(lambda: cluster.actors == [], 30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_user_can_mend_is_told_as_without_ray(tmp_path: Path, model: Path, cluster: Cluster) -> None:
    file = recipe(tmp_path, model, steps=2)
    for number, (flags, says) in enumerate((
        ({"model.path": "/nowhere"}, "error: no model '/nowhere'; known models"),
        ({"cluster.engines": "9"}, "1 for the run), and the cluster has 4; lower them, or add nodes"),
    )):  # fmt: skip
        done = run(file, tmp_path / str(number), cluster, flags)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupt_ends_the_run_there_and_it_can_go_on(tmp_path: Path, model: Path, cluster: Cluster) -> None:
    file, folder = recipe(tmp_path, model, steps=300), tmp_path / "run"
    process = subprocess.Popen(command(file, folder, cluster, {}), stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: has_step(folder), 120)
        assert len(cluster.actors) == 2
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"--on {cluster.address} --run {folder} --resume" in told and "Traceback" not in told
    until(lambda: cluster.actors == [], 30)
    before = len(steps_of(folder))
    done = run(file, folder, cluster, {"steps": str(before + 1)}, "--resume")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in steps_of(folder)] == list(range(1, before + 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_that_goes_is_told(tmp_path: Path, model: Path) -> None:
    file, folder = recipe(tmp_path, model, steps=300), tmp_path / "run"
    with cluster_of_one() as cluster:
        process = subprocess.Popen(command(file, folder, cluster, {}), stderr=subprocess.PIPE, text=True)
        try:
            until(lambda: has_step(folder), 120)
        except BaseException:
            process.kill()
            raise
    try:
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2 and "Traceback" not in told, told
    assert f'the run in cluster.address = "{cluster.address}" is lost' in told
    assert f"the run so far is in {folder}; when mended: add --resume" in told


def command(file: Path, folder: Path, cluster: Cluster, flags: Mapping[str, str], *more: str) -> list[str]:
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    where = ["--run", str(folder), "--on", cluster.address]
    return [sys.executable, "-m", "upspiral", "run", str(file), *where, *words, *more]


def run(
    file: Path, folder: Path, cluster: Cluster, flags: Mapping[str, str], *more: str
) -> subprocess.CompletedProcess[str]:
    """From another folder: none of its paths may be relative to this one."""
    words = command(file, folder, cluster, flags, *more)
    return subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=240, check=False)


def has_step(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and len(steps_of(folder)) > 0
