"""opencode: a command line agent. Speaks chat completions."""

from __future__ import annotations

import json
from dataclasses import dataclass

from upspiral.agent.base import AgentTask
from upspiral.agent.launchers.base import FOLDER, GATEWAY_URL, Launch, auxiliary_model

_QUIET = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
}


@dataclass(frozen=True, slots=True)
class OpenCode:
    """Satisfies Launcher."""

    name: str = "opencode"

    def launch(self, task: AgentTask) -> Launch:
        models = {name: {"name": name} for name in (task.model, auxiliary_model(task))}
        if task.context_length:
            limit = {"context": task.context_length, "output": task.context_length // 4}
            models = {name: {**entry, "limit": limit} for name, entry in models.items()}
        config = {
            "autoupdate": False,
            "share": "disabled",
            "permission": "allow",
            "model": f"gateway/{task.model}",
            "small_model": f"gateway/{auxiliary_model(task)}",
            "agent": {"title": {"disable": True}},
            "enabled_providers": ["gateway"],
            "provider": {
                "gateway": {
                    "npm": "@ai-sdk/openai-compatible",
                    "options": {"baseURL": GATEWAY_URL, "apiKey": "{env:OPENAI_API_KEY}"},
                    "models": models,
                }
            },
        }
        return Launch(
            f"exec {FOLDER}/node_modules/opencode-linux-*/bin/opencode run",
            {**_QUIET, "OPENAI_API_KEY": task.api_key},
            {".config/opencode/opencode.json": json.dumps(config)},
        )
