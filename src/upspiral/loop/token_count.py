"""The engine's own count of sampled tokens against what the gateway recorded: two witnesses of one ledger."""

from __future__ import annotations

from upspiral.engine.base import Engine
from upspiral.errors import LedgerError
from upspiral.gateway.server import Gateway
from upspiral.types import Ledger

CANCELLED = "cancelled_in_flight"
"""Tokens that the engine sampled after its reader had gone: nobody was shown them and no node holds them."""


class TokenCount:
    """Counts from its construction on."""

    def __init__(self, engine: Engine, gateway: Gateway) -> None:
        self._engine = engine
        self._gateway = gateway
        self._sampled_before = engine.stats().sampled_tokens
        self._recorded_before = gateway.recorded_tokens

    def unrecorded(self) -> Ledger:
        """What the engine sampled and no node holds, as dropped. Raises LedgerError when nodes hold more tokens than
        the engine sampled."""
        sampled = self._engine.stats().sampled_tokens - self._sampled_before
        recorded = self._gateway.recorded_tokens - self._recorded_before
        if recorded > sampled:
            raise LedgerError(
                f"the gateway recorded {recorded} sampled tokens, but the engine sampled only {sampled}; "
                "this is a bug in the gateway, please report it with trajectories.db"
            )
        lost = sampled - recorded
        return Ledger(lost, dropped={CANCELLED: lost}) if lost else Ledger()
