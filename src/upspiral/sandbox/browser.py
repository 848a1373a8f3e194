"""A Chromium inside a sandbox, driven by the DevTools protocol over a pair of pipes: no port and no network is needed.

What Chromium says comes from inside a sandbox, so it is untrusted: JSON of a bounded size, no field taken for granted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from upspiral.errors import CapabilityError, DeadlineError, PageError, SandboxError
from upspiral.sandbox.base import Limits, Process, Sandbox

BROWSER_LIMITS = Limits(
    memory_mb=2048, memory_counts="writable", processes=512, disk_mb=512, file_mb=512, open_files=4096, cpu_s=3600
)
"""What Chromium needs: by default it would be refused memory and threads."""
_MAX_MESSAGE_BYTES = 64 << 20
_MAX_LAST_WORDS_BYTES = 4000
_START_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 20.0
_NOT_FOUND = 127
_LOOK_AGAIN_S = 0.05
_LOADED = "new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', () => done()))"

# The debugging pipe is descriptors 3 and 4, which a spawned program does not have: its stdin and stdout become these.
_SCRIPT = """
for each in chromium chromium-browser google-chrome google-chrome-stable chrome headless_shell; do
    program=$(command -v "$each") && break
done
[ -n "$program" ] || exit 127
profile=$(mktemp -d) || exit
exec "$program" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
    --no-default-browser-check --disable-background-networking --disable-component-update --disable-sync \
    --disable-extensions --disable-quic \
    --hide-scrollbars --mute-audio --password-store=basic --user-data-dir="$profile" \
    --remote-debugging-pipe about:blank 3<&0 4>&1 </dev/null >/dev/null
"""


@contextlib.asynccontextmanager
async def open_browser(sandbox: Sandbox, *, width: int = 1280, height: int = 800) -> AsyncIterator[Browser]:
    """Starts Chromium, and ends it with the context. The sandbox should have BROWSER_LIMITS or more.

    Raises CapabilityError when there is no Chromium inside, SandboxError with its last words when it does not start.
    """
    browser = Browser(await sandbox.spawn(_SCRIPT), width, height)
    try:
        await browser.ask("Browser.getVersion", timeout_s=_START_TIMEOUT_S)
        yield browser
    finally:
        await browser.close()


class Browser:
    """One Chromium. Pages share its cookies. Made by `open_browser`."""

    def __init__(self, process: Process, width: int, height: int):
        self._process = process
        self._size = {"width": width, "height": height}
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_words = b""
        self._writing = asyncio.Lock()
        self._reading = asyncio.ensure_future(self._read())

    async def page(self) -> Page:
        """A new, empty one."""
        target = (await self.ask("Target.createTarget", url="about:blank")).get("targetId")
        session = (await self.ask("Target.attachToTarget", targetId=target, flatten=True)).get("sessionId")
        page = Page(self, str(target), str(session))
        await page.ask("Emulation.setDeviceMetricsOverride", **self._size, deviceScaleFactor=1, mobile=False)
        return page

    async def ask(
        self, method: str, *, session: str = "", timeout_s: float = 30.0, **parameters: Any
    ) -> dict[str, Any]:
        """Any method of the protocol. Raises PageError when it is refused, DeadlineError when there is no answer in
        time, SandboxError when Chromium has ended."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                async with self._writing:  # so that long messages do not mix
                    with contextlib.suppress(BrokenPipeError):  # it has ended, which is told below
                        await self._process.write(json.dumps(message).encode() + b"\0")
                await asyncio.wait([answer, self._reading], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise DeadlineError(f"Chromium did not answer {method} within {timeout_s:g} s") from None
        finally:
            del self._answers[number]
        if not answer.done():
            raise await self._why_it_ended()
        said = answer.result()
        if "error" in said:
            raise PageError(f"{method}: {str(said['error'])[:500]}")
        return _inner(said, "result")

    async def close(self) -> None:
        with contextlib.suppress(SandboxError):
            await self._process.kill()
            await asyncio.wait([self._reading], timeout=_CLOSE_TIMEOUT_S)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        """To the end of its output. Raises SandboxError for what is no message."""
        held = bytearray()
        async for name, content in self._process.output():
            if name == "stderr":
                self._last_words = (self._last_words + content)[-_MAX_LAST_WORDS_BYTES:]
                continue
            held += content
            if b"\0" in content:
                *messages, rest = held.split(b"\0")
                for message in messages:
                    self._take(bytes(message))
                held = bytearray(rest)
            if len(held) > _MAX_MESSAGE_BYTES:
                raise SandboxError(f"a message of Chromium is larger than {_MAX_MESSAGE_BYTES} bytes")

    def _take(self, content: bytes) -> None:
        try:
            message = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise SandboxError(f"Chromium wrote what is no message: {error}") from error
        if not isinstance(message, dict):
            raise SandboxError("Chromium wrote what is no message")
        number = message.get("id")  # events have none, and nobody waits for them
        if isinstance(number, int) and (answer := self._answers.get(number)) and not answer.done():
            answer.set_result(message)

    async def _why_it_ended(self) -> SandboxError:
        if not self._reading.cancelled() and isinstance(problem := self._reading.exception(), SandboxError):
            return problem
        code = (await self._process.wait(timeout_s=_CLOSE_TIMEOUT_S)).exit_code
        if code == _NOT_FOUND:
            return CapabilityError("there is no Chromium in this sandbox; recipes/images/browser.toml makes an image")
        words = self._last_words.decode(errors="replace").strip()
        return SandboxError(f"Chromium ended with exit code {code}: {words or 'it said nothing'}")


class Page:
    """One page of a browser."""

    def __init__(self, browser: Browser, target: str, session: str):
        self._browser = browser
        self._target = target
        self._session = session

    async def ask(self, method: str, *, timeout_s: float = 30.0, **parameters: Any) -> dict[str, Any]:
        """As `Browser.ask`, of this page."""
        return await self._browser.ask(method, session=self._session, timeout_s=timeout_s, **parameters)

    async def go(self, url: str, *, timeout_s: float = 30.0) -> None:
        """Returns when the page is loaded, pictures included. Raises PageError when it cannot be."""
        deadline = time.monotonic() + timeout_s
        said = await self.ask("Page.navigate", timeout_s=timeout_s, url=url)
        if problem := said.get("errorText"):
            raise PageError(f"{url[:200]}: {str(problem)[:200]}")
        while True:
            try:
                await self.evaluate(_LOADED, timeout_s=max(deadline - time.monotonic(), 0.0))
                return
            except PageError:  # it went on to another address meanwhile
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def evaluate(self, expression: str, *, timeout_s: float = 30.0) -> Any:
        """A JavaScript expression's value, as JSON can carry it; of a promise, what it comes to. Raises PageError for
        an exception."""
        said = await self.ask(
            "Runtime.evaluate", timeout_s=timeout_s, expression=expression, returnByValue=True, awaitPromise=True
        )
        if problem := said.get("exceptionDetails"):
            raise PageError(f"{expression[:200]}: {str(problem)[:500]}")
        return _inner(said, "result").get("value")

    async def screenshot(self, *, timeout_s: float = 30.0) -> bytes:
        """What is to be seen of the page, as PNG."""
        said = await self.ask("Page.captureScreenshot", timeout_s=timeout_s, format="png")
        try:
            return base64.b64decode(said["data"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise SandboxError(f"Chromium sent what is no picture: {error!r}") from error

    async def close(self) -> None:
        await self._browser.ask("Target.closeTarget", targetId=self._target)


def _inner(said: dict[str, Any], name: str) -> dict[str, Any]:
    """Nothing of what Chromium sends has to be what the protocol says."""
    inner = said.get(name)
    return inner if isinstance(inner, dict) else {}
