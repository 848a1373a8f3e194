"""What a run will take before it is started: memory of every process, seconds of every part of a step."""
