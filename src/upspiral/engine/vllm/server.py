"""Starts vLLM's API server in its own environment, notices when it dies, and leaves nothing of it behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upspiral.engine.routed_layers import RoutedLayers
from upspiral.engine.vllm.client import VllmEngine
from upspiral.engine.vllm.environment import check_interpreter
from upspiral.engine.vllm.inside.group import end_group
from upspiral.errors import DeadlineError, EngineError

_INSIDE = Path(__file__).parent / "inside"
_RECEIVER = Path(__file__).parents[2] / "weights" / "receiver.py"
_LOOK_AGAIN_S = 0.2
_KILL_DEADLINE_S = 20.0
_LOG_TAIL_BYTES = 3000


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server is started with."""

    python: Path
    """The interpreter of vLLM's environment."""
    model_folder: Path
    log: Path
    dtype: str
    context_length: int
    max_running: int
    cpu: bool
    cache_gb: float = 2.0
    """On a CPU, for keys and values."""
    threads: int = 1
    """On a CPU."""
    arguments: Sequence[str] = ()
    """Further ones, which win."""
    start_timeout_s: float = 600.0
    version: int = 0
    """Of the weights in the model's folder."""
    sleeps: bool = False
    """Whether it can give its memory up, on GPUs."""
    routes: RoutedLayers | None = None
    """Asks which experts computed each token."""
    devices: Sequence[str] = ()
    """The GPUs that it sees, as CUDA names them; none: all that this process sees."""

    def check(self) -> None:
        """Raises ConfigError when there is no such environment, or none for this device."""
        check_interpreter(self.python, cpu=self.cpu)

    def command(self, port: int) -> list[str]:
        """Without the interpreter and its program."""
        flags = {
            "--model": str(self.model_folder.absolute()),
            "--port": str(port),
            "--host": "127.0.0.1",
            "--dtype": self.dtype,
            "--max-model-len": str(self.context_length),
            "--max-num-seqs": str(self.max_running),
            # Of the distribution that was sampled from: after temperature and filters.
            "--logprobs-mode": "processed_logprobs",
            "--generation-config": "vllm",
            "--worker-extension-cls": "worker.Worker",
        }
        words = [word for flag in flags.items() for word in flag]
        if self.cpu:
            # On a CPU, vLLM 0.32.0 dies of a prompt with a seed that it computes in parts.
            words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(2048, self.context_length))]
        elif self.sleeps:
            words.append("--enable-sleep-mode")
        if self.routes is not None:
            words.append("--enable-return-routed-experts")
        return [*words, "--enable-scale-out", "--disable-uvicorn-access-log", *self.arguments]

    def variables(self, inside: str) -> Mapping[str, str]:
        """Its environment variables. Ours that say where Python's packages are would mix the two environments."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        own = {
            "PYTHONPATH": inside,
            "UPSPIRAL_VLLM_COPY": inside,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # After its 5 s, a busy server closes connections whose next request it has not read yet.
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        }
        if self.routes is not None:
            own["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the other one does not tell them
        if self.devices:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        if self.cpu:
            own |= {
                "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(self.cache_gb))),
                # By itself vLLM keeps one core free, and half of a laptop's two idle.
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(self.threads),
            }
        return kept | own


class VllmServer:
    """See `EngineHome`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._inside: str | None = None

    async def start(self) -> VllmEngine:
        """Raises EngineError with the end of its log when the server ends, and DeadlineError when it does not answer in
        time."""
        settings = self._settings
        settings.check()
        port = _free_port()
        tolerance = 0.005 if settings.dtype == "float32" else 0.25
        client = VllmEngine(
            f"http://127.0.0.1:{port}", probe_tolerance=tolerance, version=settings.version, routes=settings.routes
        )
        try:
            self._launch(port)
            await self._until_ready(client)
        except BaseException:
            await client.stop()
            await self.kill()
            raise
        return client

    async def gone(self) -> str:
        while (process := self._process) is not None and process.poll() is None:
            await asyncio.sleep(_LOOK_AGAIN_S)
        return self._told("ended")

    async def kill(self) -> None:
        """Raises EngineError when the process does not end."""
        process, self._process = self._process, None
        try:
            if process is not None:
                await self._end(process)
        finally:
            if self._inside is not None:
                shutil.rmtree(self._inside, ignore_errors=True)

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            await asyncio.to_thread(end_group, process.pid)
        try:
            await asyncio.to_thread(process.wait, _KILL_DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"vLLM's server (process {process.pid}) was killed and still runs after {_KILL_DEADLINE_S:g} s; look "
                "with `dmesg` whether its device answers"
            ) from error

    def _launch(self, port: int) -> None:
        settings = self._settings
        self._inside = tempfile.mkdtemp(prefix="upspiral-vllm-")
        for source in (_INSIDE / "serve.py", _INSIDE / "group.py", _INSIDE / "worker.py", _RECEIVER):
            shutil.copy(source, self._inside)
        settings.log.parent.mkdir(parents=True, exist_ok=True)
        python = settings.python.absolute()  # and not resolved: a virtual environment's is a link out of it
        with settings.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [str(python), f"{self._inside}/serve.py", *settings.command(port)],
                    env=dict(settings.variables(self._inside)), cwd=self._inside, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise EngineError(f"{python} cannot be started as vLLM's interpreter: {error}") from error

    async def _until_ready(self, client: VllmEngine) -> None:
        deadline = time.monotonic() + self._settings.start_timeout_s
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                raise EngineError(self._told("did not start"))
            try:
                return await client.start()
            except EngineError as error:
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"vLLM did not answer within {self._settings.start_timeout_s:.0f} s ({error}); see "
                        f"{self._settings.log}, or raise engine.server.start_timeout_s"
                    ) from error
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _told(self, what: str) -> str:
        status = self._process.poll() if self._process is not None else "killed"
        said = f"vLLM's server {what} (exit code {status})"
        try:
            tail = self._settings.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError as error:
            return f"{said}, and its log cannot be read: {error}"
        return f"{said}; the end of {self._settings.log}:\n{tail}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
