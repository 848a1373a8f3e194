"""`upspiral agent`: fetch agents that we can start into the cache, list what is known."""

from __future__ import annotations

import sys

from upspiral.agent.launchers.registry import LAUNCHERS
from upspiral.agent.packages import agent_packages, cached_agent, get_agent


def get_agents(*names: str) -> None:
    """Fetch agents into the cache and print their folders. Does nothing for those that are there.

    Parameters
    ----------
    names
        Names from `upspiral agent list`; none: all of them.
    """
    for name in names or LAUNCHERS:
        print(get_agent(name, progress=lambda line: print(line, file=sys.stderr, flush=True)))


def list_agents() -> None:
    """List the agents that `agent.kind` can name. Any other program works as `agent.command` or `agent.file`."""
    for name in LAUNCHERS:
        packages = agent_packages(name)
        print(f"{name}  {packages.version}  {packages.about}  [{cached_agent(name) or 'not fetched'}]")
