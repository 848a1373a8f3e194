"""Where a run's processes are started when one machine is not enough."""
