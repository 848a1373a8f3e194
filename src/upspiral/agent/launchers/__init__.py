"""Agents that others made, started unmodified inside a sandbox: one file an agent."""
