"""Requests to inference servers: deadlines, lines of a stream, and errors that say what the server said."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp
import orjson

from upspiral.errors import ContextLengthError, DeadlineError, EngineError, EngineGoneError, RequestError

TOKEN_DEADLINE_S = 900.0
"""As the embedded engine's: a full queue may stand before the next token."""
CALL_DEADLINE_S = 60.0
_LONGEST_LINE = 64 << 20
"""Routed experts of a long prompt are the longest."""


class Server:
    """The client's end of one server. Belongs to one event loop."""

    def __init__(self, url: str, *, key: str = "") -> None:
        """`key`: what the server wants as bearer token, if it wants one."""
        self.url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    async def get(self, path: str, *, deadline_s: float = CALL_DEADLINE_S) -> Any:
        """The JSON of an answer. Raises EngineGoneError when nobody answers at all, DeadlineError, and EngineError with
        what the server said; RequestError when it says that the request is wrong."""
        return await self._call("GET", path, None, deadline_s)

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, deadline_s: float = CALL_DEADLINE_S
    ) -> Any:
        """See `get`."""
        return await self._call("POST", path, body if body is not None else {}, deadline_s)

    async def served_model(self) -> tuple[str, int]:
        """Name and context length, as both vLLM and SGLang list them. Raises EngineError when none is listed."""
        listed = await self.get("/v1/models")
        try:
            return str(listed["data"][0]["id"]), int(listed["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"{self.url}/v1/models does not describe a model: {listed!r}") from error

    async def lines(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        """The JSON of each event of a stream of server-sent events; closing the generator ends the request. Raises as
        `get` does; EngineError also when the stream breaks."""
        begun, data = False, orjson.dumps(body)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_DEADLINE_S, sock_read=TOKEN_DEADLINE_S)
        try:
            async with self._opened(reuse=True).post(self.url + path, data=data, timeout=timeout) as answer:
                begun = True
                await self._check(answer, path)
                async for line in answer.content:
                    if line.startswith(b"data:") and (event := line[5:].strip()) != b"[DONE]":
                        yield orjson.loads(event)
        except RequestError:  # a ValueError, but no broken JSON
            raise
        except TimeoutError:
            raise DeadlineError(f"{self.url}{path} gave nothing for {TOKEN_DEADLINE_S:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            kind = EngineError if begun else EngineGoneError
            raise kind(f"{self.url}{path}: {error or type(error).__name__}") from error

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None, deadline_s: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        data = None if body is None else orjson.dumps(body)
        try:
            async with self._opened(reuse=False).request(method, self.url + path, data=data, timeout=timeout) as answer:
                await self._check(answer, path)
                content = await answer.read()
                return orjson.loads(content) if content else None
        except RequestError:  # a ValueError, but no broken JSON
            raise
        except TimeoutError:
            raise DeadlineError(f"{self.url}{path} did not answer within {deadline_s:.0f} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineGoneError(f"{self.url}{path}: {error or type(error).__name__}") from error
        except ValueError as error:
            raise EngineError(f"{self.url}{path} gave no JSON: {error}") from error

    async def _check(self, answer: aiohttp.ClientResponse, path: str) -> None:
        if answer.status < 400:
            return
        text = (await answer.text())[:2000]
        said = f"{self.url}{path} answered {answer.status}: {text}"
        if answer.status in (400, 422):
            raise (ContextLengthError if "context length" in text else RequestError)(said)
        if answer.status == 404:
            said += "; docs/cluster.md says how such a server has to be started"
        raise EngineError(said)

    def _opened(self, *, reuse: bool) -> aiohttp.ClientSession:
        """A server closes connections that are idle, at times as they are used again. Who streams may try that once
        more; what is done once has a connection of its own."""
        if reuse not in self._sessions:
            connector = _reused() if reuse else aiohttp.TCPConnector(limit=0, force_close=True)
            self._sessions[reuse] = aiohttp.ClientSession(
                headers={"content-type": "application/json", **self._headers},
                connector=connector, read_bufsize=1 << 18, max_line_size=_LONGEST_LINE,
            )  # fmt: skip
        return self._sessions[reuse]


def _reused() -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
