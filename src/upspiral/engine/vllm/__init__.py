"""vLLM as an engine: its server in an environment of its own, spoken to over HTTP by token ids."""
