"""An agent that others made, started inside the rollout's sandbox with a home of its own.

The sandbox has no network but the gateway, nothing of this machine's environment, and the agent's packages read-only.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from upspiral.agent.base import AgentTask
from upspiral.agent.command import answer_of, with_gateway
from upspiral.agent.launchers.base import AGENT_LIMITS, FOLDER
from upspiral.agent.launchers.registry import launcher_of
from upspiral.agent.packages import require_agent
from upspiral.sandbox.base import Sandbox, SandboxSpec

_HOME = "/tmp/home"


class LaunchedAgent:
    """Satisfies AgentRunner.

    Raises AgentError when there is no agent of that name or its packages are not in the cache.
    """

    def __init__(self, name: str) -> None:
        self._launcher = launcher_of(name)
        self._packages = require_agent(name)

    def furnish(self, spec: SandboxSpec, gateway_socket: str) -> SandboxSpec:
        mounts = {**spec.mounts, str(self._packages): FOLDER, **_interpreter(self._packages)}
        return replace(with_gateway(spec, gateway_socket), mounts=mounts, limits=AGENT_LIMITS)

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        return

    async def run(self, task: AgentTask, sandbox: Sandbox, *, timeout_s: float) -> str:
        launch = self._launcher.launch(task)
        command = f"{_lay_out(launch.files)}{launch.command}"
        return await answer_of(command, task, {**launch.env, "HOME": _HOME}, sandbox, timeout_s)


def _interpreter(packages: Path) -> Mapping[str, str]:
    """Where the Python that packages were installed with lies, if the sandbox does not have it anyway: they name it by
    its path."""
    python = (packages / "bin" / "python").resolve()
    prefix = str(python.parent.parent)
    return {} if not python.exists() or prefix.startswith("/usr") else {prefix: prefix}


def _lay_out(files: Mapping[str, str]) -> str:
    """A script that makes the home. It is not in the workspace, where the agent and the verifier would meet it."""
    lines = [f"mkdir -p {_HOME}"]
    for path, content in files.items():
        target = shlex.quote(f"{_HOME}/{path}")
        lines.append(f'mkdir -p "$(dirname {target})" && printf %s {shlex.quote(content)} > {target}')
    return " && ".join(lines) + " || exit 1\n"
