"""The parts of a run as actors of a Ray cluster."""
