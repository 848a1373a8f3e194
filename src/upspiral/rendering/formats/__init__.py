"""How models write tool calls: one file a format. A format reads, writes and forces calls; it never tokenizes."""
