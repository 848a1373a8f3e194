"""What the gateway tells Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from upspiral.engine.base import EngineStats
from upspiral.types import Node


class GatewayMetrics:
    """Counters of one gateway, in a registry of their own, so that two gateways in a process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests for answers by HTTP status", "status")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens sent to the engine")
        self._reused_tokens = self._counter("reused_tokens", "Prompt tokens taken as stored, not rendered again")
        self._sampled_tokens = self._counter("sampled_tokens", "Sampled tokens that were committed")
        self._undelivered_tokens = self._counter("undelivered_tokens", "Sampled tokens that no client received")
        self._nodes = self._counter("nodes", "Committed nodes by the reason why they hang where they do", "reason")
        self._parse_errors = self._counter("parse_errors", "Tool calls that could not be parsed")
        self._replays = self._counter("replays", "Retries that got the answer of the request they repeat")
        self._rollouts = Gauge("upspiral_live_rollouts", "Rollouts not yet sealed", registry=self._registry)
        self.recorded_tokens = 0
        """Sampled tokens in committed nodes, as a plain number for the ledger."""
        self._engine = Gauge("upspiral_engine", "State of the engine", ["figure"], registry=self._registry)

    def answered(self, status: int) -> None:
        self._requests.labels(str(status)).inc()

    def prompt(self, tokens: int, reused: int) -> None:
        self._prompt_tokens.inc(tokens)
        self._reused_tokens.inc(reused)

    def replayed(self) -> None:
        self._replays.inc()

    def committed(self, nodes: Sequence[Node], parse_errors: Sequence[str]) -> None:
        for node in nodes:
            self._nodes.labels(node.reason).inc()
            self._sampled_tokens.inc(node.num_sampled)
            self.recorded_tokens += node.num_sampled
            if not node.delivered:
                self._undelivered_tokens.inc(node.num_sampled)
        self._parse_errors.inc(len(parse_errors))

    def exposition(self, stats: EngineStats, live_rollouts: int) -> bytes:
        """Everything in Prometheus' text format."""
        self._rollouts.set(live_rollouts)
        figures = {
            "running": stats.running,
            "waiting": stats.waiting,
            "sampled_tokens": stats.sampled_tokens,
            "prefilled_tokens": stats.prefilled_tokens,
            "reused_tokens": stats.reused_tokens,
            **stats.extra,
        }
        for name, value in figures.items():
            self._engine.labels(name).set(value)
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"upspiral_gateway_{name}", description, labels, registry=self._registry)
