"""Requests to a server of sandboxes, repeated where an answer was lost."""

from __future__ import annotations

import asyncio
import random
import secrets
from typing import TypeVar

import aiohttp
import msgspec

from upspiral.errors import ConfigError, SandboxError
from upspiral.sandbox.server.wire import KEY_HEADER, ErrorAnswer, raised, write_body

ANSWER_S = 30.0
"""How long a request that waits for nothing else may take, repetitions included."""
CREATE_S = 150.0
"""Creating waits in the server's queue."""
SNAPSHOT_S = 120.0
FORK_S = 120.0
"""Many at once, each with shells whose commands are run again."""
_ATTEMPT_S = 100.0
"""One attempt; an answer that takes longer is taken for lost."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)
_BETWEEN = (502, 503, 504)
"""What a proxy in between answers for a server that it does not reach."""
Answer = TypeVar("Answer")


class Api:
    """The server's end points. Every request may be repeated: what must not happen twice carries an idempotency key."""

    def __init__(self, url: str, token: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the address of a server of sandboxes begins with http:// or https://, not {url!r}")
        self.url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Each live sandbox keeps one: under a limit heartbeats would wait for the end of what they keep alive.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            # Nothing of the environment, such as a proxy, stands between.
            self._session = aiohttp.ClientSession(headers=self._headers, connector=connector, trust_env=False)
        return self._session

    async def get(self, path: str, answer: type[Answer], *, repeat_s: float | None = None) -> Answer:
        return self._read(await self._ask("GET", path, None, ANSWER_S, repeat_s=repeat_s), answer)

    async def post(self, path: str, body: object, answer: type[Answer], *, timeout_s: float = ANSWER_S) -> Answer:
        return self._read(await self._ask("POST", path, body, timeout_s), answer)

    async def post_for_nothing(self, path: str, body: object, timeout_s: float) -> None:
        await self._ask("POST", path, body, timeout_s)

    async def create(self, body: object, key: str, answer: type[Answer]) -> Answer:
        """Under a key that the caller knows, so that it can cancel what it does not wait for."""
        return self._read(await self._ask("POST", "/sandboxes", body, CREATE_S, key=key), answer)

    async def delete(self, path: str, *, repeat_s: float = ANSWER_S) -> None:
        """Asks again for `repeat_s` when connections are lost; an answer may take longer."""
        await self._ask("DELETE", path, None, ANSWER_S, repeat_s=repeat_s)

    async def close(self) -> None:
        """What is asked meanwhile, or afterwards, is a SandboxError."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def _ask(
        self, method: str, path: str, body: object, timeout_s: float, *, key: str = "", repeat_s: float | None = None
    ) -> bytes:
        headers = {KEY_HEADER: key or secrets.token_hex(16)} if method == "POST" else {}
        content = None if body is None else write_body(body)
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        gives_up_at = ends_at if repeat_s is None else loop.time() + repeat_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._attempt(method, path, content, headers, min(_ATTEMPT_S, ends_at - loop.time()))
            except _LOST as error:
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2) * random.uniform(0.5, 1.0)
                if loop.time() + pause_s >= gives_up_at:
                    waited_s = timeout_s - (ends_at - loop.time())
                    raise SandboxError(
                        f"the server of sandboxes at {self.url} gave no answer to {method} {path} within "
                        f"{waited_s:.0f} s: {str(error) or type(error).__name__}; does it run there "
                        "(`upspiral sandbox serve`)?"
                    ) from error
                await asyncio.sleep(pause_s)
            except aiohttp.ClientError as error:
                raise SandboxError(
                    f"{self.url} is no server of sandboxes ({error!r}); is it the right address?"
                ) from error

    def _read(self, content: bytes, kind: type[Answer]) -> Answer:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError as error:
            raise SandboxError(
                f"{self.url} answered what no server of sandboxes does ({error}); is it the right address?"
            ) from error

    async def _attempt(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> bytes:
        if self._closed:
            raise SandboxError(f"{method} {path}: the connection to {self.url} was closed")
        timeout = aiohttp.ClientTimeout(total=max(0.01, timeout_s))
        async with self.session.request(
            method, self.url + path, data=content, headers=headers, timeout=timeout
        ) as response:
            answered = await response.read()
            if response.status < 400:
                return answered
            raise _refusal(response.status, answered, self.url)


def _refusal(status: int, body: bytes, url: str) -> Exception:
    """What an answer of 4xx or 5xx means."""
    try:
        told = msgspec.json.decode(body, type=ErrorAnswer)
    except msgspec.MsgspecError:
        if status in _BETWEEN:
            return aiohttp.ClientPayloadError(f"the answer was {status}, and not of the server itself")
        return SandboxError(f"{url} answered {status} and no error of a server of sandboxes; is it the right address?")
    return raised(told)
