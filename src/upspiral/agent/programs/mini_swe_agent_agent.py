"""mini-swe-agent's default agent, with the configuration that its `mini` command uses, in a local shell."""

# pyright: reportMissingImports=false

import os
import sys
from pathlib import Path

import yaml
from minisweagent.agents.default import DefaultAgent
from minisweagent.config import builtin_config_dir
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

config = yaml.safe_load(Path(builtin_config_dir / "mini.yaml").read_text())
model = LitellmModel(
    **{
        **config.get("model", {}),
        "model_name": f"openai/{os.environ['OPENAI_MODEL']}",
        "model_kwargs": {"drop_params": True, "api_base": os.environ["OPENAI_BASE_URL"]},
        "cost_tracking": "ignore_errors",
    }
)
agent = DefaultAgent(model, LocalEnvironment(**config.get("environment", {})), **config["agent"])
print(agent.run(sys.stdin.read()))
