"""What a server of sandboxes tells Prometheus, beside what its pool tells."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = self._counter("answers", "Answers by HTTP status", "status")
        self.connections = self._counter("connections", "WebSockets that were opened to sandboxes")
        self._leases = Gauge("upspiral_sandbox_server_leases", "Sandboxes in clients' hands", registry=self._registry)

    def answered(self, status: int) -> None:
        self._answers.labels(str(status)).inc()

    def exposition(self, leases: int) -> bytes:
        self._leases.set(leases)
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"upspiral_sandbox_server_{name}", description, labels, registry=self._registry)
