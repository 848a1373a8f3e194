"""A sandbox's way out, for backends that forward sockets: a proxy, a port that leads to it, variables that name it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.egress.proxy import EgressProxy, proxy_environment
from upspiral.sandbox.egress.record import EgressRecord

_FIRST_PORT = 3128
"""Where proxies usually are."""


@contextlib.asynccontextmanager
async def way_out(spec: SandboxSpec, folder: Path, log: Callable[[EgressRecord], None]) -> AsyncIterator[SandboxSpec]:
    """The spec that a sandbox is to be made of so that it reaches what `spec.network` allows, and nothing else.

    Every sandbox needs one of its own; a fork, too. The proxy ends with the context. `folder` is one that only this
    user may open; a socket lies there meanwhile. Raises ConfigError for an entry of the list that is not understood.
    """
    if spec.network == "none":
        yield spec
        return
    async with EgressProxy(spec.network, log, labels=spec.labels) as proxy:
        path = folder / f"egress-{secrets.token_hex(8)}"
        await proxy.start(path)
        port = next(each for each in range(_FIRST_PORT, 65536) if each not in spec.forward_sockets)
        yield replace(
            spec, network="none", env={**proxy_environment(port), **spec.env},
            forward_sockets={**spec.forward_sockets, port: str(path)},
        )  # fmt: skip
