"""Generated questions about files, answered with shell commands."""
