"""What is said to a browser and heard from it, with a stand-in that speaks the same protocol over the same pipes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from upspiral.errors import CapabilityError, DeadlineError, PageError, SandboxError
from upspiral.sandbox.base import Sandbox, SandboxSpec
from upspiral.sandbox.browser import Browser, open_browser
from upspiral.sandbox.desktop import open_desktop
from upspiral.sandbox.process import ProcessBackend

STAND_IN = """#!/usr/bin/env python3
import base64, json, os, sys, time

assert "--remote-debugging-pipe" in sys.argv
print("noise", "x" * 10_000)
print("complaints", file=sys.stderr, flush=True)
url = ""

def answer(message):
    global url
    method, parameters = message["method"], message["params"]
    if method == "Target.createTarget":
        return {"result": {"targetId": "T"}}
    if method == "Target.attachToTarget":
        return {"result": {"sessionId": "S" + parameters["targetId"]}}
    if method == "Emulation.setDeviceMetricsOverride":
        assert (parameters["width"], parameters["height"]) == (640, 480)
    if method.startswith("Page.") or method.startswith("Runtime."):
        assert message["sessionId"] == "ST"
    if method == "Page.navigate":
        url = parameters["url"]
        return {"result": {"errorText": "net::ERR"} if url == "bad:" else {"frameId": "F"}}
    if method == "Page.captureScreenshot":
        if url == "odd:":
            return {"result": {"data": "\u00e9"}}
        return {"result": {"data": base64.b64encode(b"\\x89PNG" + url.encode() * 300_000).decode()}}
    if method == "Runtime.evaluate":
        expression = parameters["expression"]
        if expression == "throw":
            return {"result": {"exceptionDetails": {"text": "Uncaught"}}}
        return {"result": {"result": {"value": len(expression)}}}
    if method == "garbage":
        return None
    if method == "end":
        sys.exit(7)
    if method == "silence":
        time.sleep(1000)
    if method == "unknown":
        return {"error": {"code": -32601, "message": "not found"}}
    return {"result": {}}

held = b""
while chunk := os.read(3, 65536):
    held += chunk
    while b"\\0" in held:
        request, _, held = held.partition(b"\\0")
        message = json.loads(request)
        said = answer(message)
        event = json.dumps({"method": "Some.event", "params": {}}).encode() + b"\\0"
        reply = b"garbage" if said is None else json.dumps({"id": message["id"], **said}).encode()
        reply = event + reply + b"\\0"
        while reply:
            reply = reply[os.write(4, reply):]
"""


@pytest.fixture
def root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="browser-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def in_sandbox(check: Callable[[Sandbox], Awaitable[None]], root: Path, **env: str) -> None:
    async def body() -> None:
        backend = ProcessBackend(root, allow_network=True)
        try:
            async with backend.acquire(SandboxSpec(env=env)) as sandbox:
                await check(sandbox)
        finally:
            await backend.stop()

    asyncio.run(asyncio.wait_for(body(), 120))


def with_browser(check: Callable[[Browser], Awaitable[None]], root: Path) -> None:
    async def body(sandbox: Sandbox) -> None:
        await sandbox.write("programs/chromium", STAND_IN.encode(), mode=0o755)
        async with open_browser(sandbox, width=640, height=480) as browser:
            await check(browser)
        gone = "pgrep -u $(id -u) -f remote-debugging-pipe || echo gone"
        assert (await sandbox.exec(gone, timeout_s=60)).stdout == b"gone\n"

    in_sandbox(body, root, PATH="programs:/usr/local/bin:/usr/bin:/bin")


def test_a_page(root: Path) -> None:
    async def check(browser: Browser) -> None:
        page = await browser.page()
        await page.go("data:text/html,hi")
        values = await asyncio.gather(*(page.evaluate("x" * size) for size in (1, 400_000, 3, 200_000)))
        assert values == [1, 400_000, 3, 200_000]
        picture = await page.screenshot()
        assert picture == b"\x89PNG" + b"data:text/html,hi" * 300_000
        await page.close()

    with_browser(check, root)


def test_what_fails_on_a_page_is_not_infrastructure(root: Path) -> None:
    async def check(browser: Browser) -> None:
        page = await browser.page()
        with pytest.raises(PageError, match="net::ERR"):
            await page.go("bad:")
        with pytest.raises(PageError, match="Uncaught"):
            await page.evaluate("throw")
        with pytest.raises(PageError, match="not found"):
            await browser.ask("unknown")
        assert await page.evaluate("12") == 2

    with_browser(check, root)


def test_a_picture_that_is_none(root: Path) -> None:
    async def check(browser: Browser) -> None:
        page = await browser.page()
        await page.go("odd:")
        with pytest.raises(SandboxError, match="no picture"):
            await page.screenshot()

    with_browser(check, root)


def test_a_browser_that_ends_or_babbles_is(root: Path) -> None:
    async def end(browser: Browser) -> None:
        for method in ("end", "more"):
            with pytest.raises(SandboxError, match=r"exit code 7: complaints"):
                await browser.ask(method)

    async def babble(browser: Browser) -> None:
        with pytest.raises(SandboxError, match="no message"):
            await browser.ask("garbage")

    async def hang(browser: Browser) -> None:
        with pytest.raises(DeadlineError, match=r"silence within 0\.3 s"):
            await browser.ask("silence", timeout_s=0.3)

    for check in (end, babble, hang):
        with_browser(check, root)


def test_a_sandbox_without_the_programs(root: Path) -> None:
    async def check(sandbox: Sandbox) -> None:
        with pytest.raises(CapabilityError, match="no Chromium"):
            async with open_browser(sandbox):
                pass
        with pytest.raises(CapabilityError, match="no Xvfb"):
            async with open_desktop(sandbox):
                pass

    in_sandbox(check, root, PATH="/nowhere")
