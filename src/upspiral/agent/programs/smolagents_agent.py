"""A tool-calling agent of smolagents with one tool, a shell."""

# pyright: reportMissingImports=false

import os
import subprocess
import sys

from smolagents import LogLevel, OpenAIModel, ToolCallingAgent, tool


@tool
def shell(command: str) -> str:
    """Runs a shell command and returns what it printed.

    Args:
        command: A command line for bash.
    """
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr or f"exit code {done.returncode}"


model = OpenAIModel(
    os.environ["OPENAI_MODEL"], api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
)
agent = ToolCallingAgent([shell], model, max_steps=50, verbosity_level=LogLevel.OFF)
print(agent.run(sys.stdin.read()))
