"""Running agents: worker processes and command lines."""
