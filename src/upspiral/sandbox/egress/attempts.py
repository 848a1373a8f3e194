"""Reaching one of several addresses without waiting long for those that keep silent (as in RFC 8305)."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Sequence

Connect = Callable[[str, int], Awaitable[tuple[StreamReader, StreamWriter]]]
"""To an address that was checked; OSError when it cannot be reached."""
_Attempt = asyncio.Future[tuple[StreamReader, StreamWriter]]

_HEAD_START_S = 0.25


async def reach_first(connect: Connect, addresses: Sequence[str], port: int) -> tuple[str, StreamReader, StreamWriter]:
    """Connects to the first that answers. Each is tried when the one before has failed, or has not answered for a
    moment. Raises the last OSError when all have failed."""
    waiting, attempts = list(reversed(addresses)), dict[_Attempt, str]()
    problem = OSError("there is no address")
    try:
        while waiting or attempts:
            if waiting:
                address = waiting.pop()
                attempts[asyncio.ensure_future(connect(address, port))] = address
            patience_s = _HEAD_START_S if waiting else None
            done, _ = await asyncio.wait(attempts, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                address = attempts.pop(attempt)
                try:
                    return (address, *attempt.result())
                except OSError as error:
                    problem = error
        raise problem
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close)


def _close(attempt: _Attempt) -> None:
    """One that came too late."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result()[1].transport.abort()
