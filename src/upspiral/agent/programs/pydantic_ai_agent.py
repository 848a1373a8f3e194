"""An agent of Pydantic AI with one tool, a shell."""

# pyright: reportMissingImports=false

import os
import subprocess
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel

agent = Agent(
    OpenAIChatModel(os.environ["OPENAI_MODEL"]),
    instructions="You work with files through a shell. Answer when the task is done.",
)


@agent.tool_plain
def shell(command: str) -> str:
    """Run a shell command and return what it printed."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr or f"exit code {done.returncode}"


print(agent.run_sync(sys.stdin.read()).output)
