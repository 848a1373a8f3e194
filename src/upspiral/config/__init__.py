"""The run file: pydantic models and the TOML loader."""
