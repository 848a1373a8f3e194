"""An agent library from PyPI, run by a small program that a user of the library could have written.

The programs lie in agent/programs/, one a library. They import nothing of upspiral.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from upspiral.agent.base import AgentTask
from upspiral.agent.launchers.base import FOLDER, GATEWAY_URL, Launch

_PROGRAM = "agent.py"
_QUIET = {
    "DO_NOT_TRACK": "1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "MSWEA_SILENT_STARTUP": "1",
    "MSWEA_COST_TRACKING": "ignore_errors",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class PythonProgram:
    """Satisfies Launcher for the library of that name."""

    name: str

    def launch(self, task: AgentTask) -> Launch:
        file_name = f"{self.name.replace('-', '_')}_agent.py"
        program = resources.files("upspiral.agent").joinpath("programs", file_name).read_text("utf-8")
        return Launch(
            command=f'exec {FOLDER}/bin/python "$HOME/{_PROGRAM}"',
            env={
                **_QUIET,
                "OPENAI_BASE_URL": GATEWAY_URL,
                "OPENAI_API_KEY": task.api_key,
                "OPENAI_MODEL": task.model,
            },
            files={_PROGRAM: program},
        )
