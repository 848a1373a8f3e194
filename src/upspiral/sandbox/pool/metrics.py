"""What a pool tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class PoolMetrics:
    """Figures of one pool, in a registry of their own, so that two pools in a process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.create_s = self._histogram("create", "Making a sandbox, failed attempts not counted")
        self.exec_s = self._histogram("exec", "A command from asking to its result")
        acquire = self._histogram("acquire", "From asking for a sandbox to having it, files written", "warm")
        self.acquire_warm_s, self.acquire_cold_s = acquire.labels("yes"), acquire.labels("no")
        self._failures = self._counter("failures", "Failures of the infrastructure by what was done", "what")
        self._refused = self._counter("refused", "Requests that were told to come back, by why", "why")
        self.made = self._counter("made", "Sandboxes that were made, forks included")
        self.stopped = self._counter("stopped", "Sandboxes of those that were stopped")
        self._now = Gauge("upspiral_sandbox_pool", "Sandboxes and requests", ["state"], registry=self._registry)

    def failed(self, what: str) -> None:
        self._failures.labels(what).inc()

    def refused(self, why: str) -> None:
        self._refused.labels(why).inc()

    def exposition(self, **states: int) -> bytes:
        """Everything in Prometheus' text format."""
        for name, value in states.items():
            self._now.labels(name).set(value)
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"upspiral_sandbox_{name}", description, labels, registry=self._registry)

    def _histogram(self, name: str, description: str, *labels: str) -> Histogram:
        return Histogram(
            f"upspiral_sandbox_{name}_seconds", description, labels, buckets=_BUCKETS_S, registry=self._registry
        )
