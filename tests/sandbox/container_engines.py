"""Real engines of containers for tests: this machine's, or a Docker daemon that the tests start for themselves."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from upspiral.sandbox.container import DockerBackend, PodmanBackend

_TIMEOUT_S = 60.0
_PODMAN_STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'


def docker_backend(root: Path) -> DockerBackend:
    return DockerBackend(root, program=docker_program())


def podman_backend(root: Path) -> PodmanBackend:
    return PodmanBackend(root, runtime=shutil.which("runc") or "")


def command_of(engine: str) -> list[str]:
    """To ask it in a test's own words."""
    runc = shutil.which("runc")
    return [docker_program()] if engine == "docker" else ["podman", *(["--runtime", runc] if runc else [])]


@functools.cache
def why_no_docker() -> str:
    """Empty when there is a daemon, which this starts where it has to and can."""
    if shutil.which("docker") is None:
        return "there is no docker program"
    if _succeeds([docker_program(), "info"]):
        return ""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        return "no Docker daemon is reached, and none can be started (which takes root and dockerd)"
    return _start_daemon()


@functools.cache
def why_no_podman() -> str:
    """Empty when Podman runs a container. Its images are kept apart from this user's."""
    if shutil.which("podman") is None:
        return "there is no podman program"
    folder = _memory_folder("podman-")
    (folder / "storage.conf").write_text(_PODMAN_STORAGE.format(folder=folder))
    os.environ["CONTAINERS_STORAGE_CONF"] = str(folder / "storage.conf")
    atexit.register(_remove, folder)
    trial = [*command_of("podman"), "run", "--rm", "--network=none", "--log-driver=none", "--ulimit=nofile=1024:1024"]
    trial += ["--ulimit=nproc=1000:1000", "--rootfs", "/:O", "true"]
    return "" if _succeeds(trial) else f"it does not run a container: {_complaint(trial)}"


@functools.cache
def docker_program() -> str:
    """That of the daemon, should there be several: a newer program may refuse an older daemon."""
    daemon = shutil.which("dockerd")
    beside = Path(daemon or "/").with_name("docker")
    return str(beside) if beside.exists() else "docker"


def _start_daemon() -> str:
    folder = _memory_folder("dockerd-")
    os.environ["DOCKER_HOST"] = address = f"unix://{folder}/docker.sock"
    with open(folder / "log", "wb") as log:
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec",
             f"--pidfile={folder}/pid", "-H", address, "--bridge=none", "--iptables=false", "--ip6tables=false"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    atexit.register(_stop_daemon, daemon, folder)
    deadline = time.monotonic() + _TIMEOUT_S
    while not _succeeds([docker_program(), "info"]):
        if daemon.poll() is not None or time.monotonic() > deadline:
            return f"dockerd does not start: {(folder / 'log').read_text(errors='replace')[-500:]}"
        time.sleep(0.1)
    return ""


def _stop_daemon(daemon: subprocess.Popen[bytes], folder: Path) -> None:
    daemon.terminate()
    try:
        daemon.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
    _remove(folder)


def _memory_folder(prefix: str) -> Path:
    memory = "/dev/shm"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if os.access(memory, os.W_OK) else None))


def _remove(folder: Path) -> None:
    """With what is mounted in it."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in sorted((each for each in mounted if each.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", path], check=False, capture_output=True, timeout=_TIMEOUT_S)
    shutil.rmtree(folder, ignore_errors=True)


def _succeeds(command: list[str]) -> bool:
    return _run(command).returncode == 0


def _complaint(command: list[str]) -> str:
    return _run(command).stderr.decode(errors="replace").strip()[-300:]


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, b"", b"it gave no answer")
