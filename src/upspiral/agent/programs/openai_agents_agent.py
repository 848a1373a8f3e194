"""An agent of OpenAI's Agents SDK with one tool, a shell. Speaks Responses, the SDK's default."""

# pyright: reportMissingImports=false

import os
import subprocess
import sys

from agents import Agent, Runner, function_tool


@function_tool
def shell(command: str) -> str:
    """Run a shell command and return what it printed."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr or f"exit code {done.returncode}"


agent = Agent(
    name="worker",
    instructions="You work with files through a shell. Answer when the task is done.",
    model=os.environ["OPENAI_MODEL"],
    tools=[shell],
)
print(Runner.run_sync(agent, sys.stdin.read(), max_turns=50).final_output)
