"""The run: which rollouts to start, when a batch ships, how it resumes."""
