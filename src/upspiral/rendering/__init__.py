"""Messages to token ids and back; the only place that tokenizes."""
