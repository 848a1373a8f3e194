"""What a person reads after a run: the report page and the rollout viewer."""
