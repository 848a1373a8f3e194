"""upspiral trains any agent with reinforcement learning, exactly as the agent runs in production."""

__version__ = "0.1.0"
