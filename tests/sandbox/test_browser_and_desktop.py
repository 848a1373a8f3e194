"""A real Chromium and a real screen, in a sandbox without a network."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.unit.sandbox.test_screen_dump import rows_of
from upspiral.errors import SandboxError
from upspiral.sandbox.base import Command, Limits, Sandbox, SandboxSpec
from upspiral.sandbox.browser import BROWSER_LIMITS, open_browser
from upspiral.sandbox.desktop import open_desktop
from upspiral.sandbox.namespace import NamespaceBackend

TIMEOUT_S = 60.0
FONTS = b"<?xml version='1.0'?><fontconfig><dir>/usr/share/fonts</dir><cachedir>/tmp/fonts</cachedir></fontconfig>"
"""What an image of its own has in /etc/fonts; the machine's programs come without."""
PAGE = (
    "data:text/html,<title>hello</title><body style='margin:0;background:rgb(255,0,0)'>"
    "<div style='position:absolute;left:0;top:0;width:50px;height:50px;background:rgb(0,0,255)'></div>"
    "<script>document.title += ' world'</script>"
)
PAINT = """
import os, socket, struct
link = socket.socket(socket.AF_UNIX)
link.settimeout(20)
link.connect("/tmp/.X11-unix/X" + os.environ["DISPLAY"][1:])
replies = link.makefile("rb")
link.sendall(struct.pack("<cxHHHHxx", b"l", 11, 0, 0, 0))
head = replies.read(8)
assert head[0] == 1, head
setup = replies.read(4 * struct.unpack_from("<H", head, 6)[0])
vendor, formats = struct.unpack_from("<H", setup, 16)[0], setup[21]
(root,) = struct.unpack_from("<I", setup, 32 + (vendor + 3) // 4 * 4 + 8 * formats)
link.sendall(struct.pack("<BxHIII", 2, 4, root, 2, 0x00FF8000))  # the root window's background
link.sendall(struct.pack("<BBHIhhHH", 61, 0, 4, root, 0, 0, 10, 5))  # which clearing paints
link.sendall(struct.pack("<BxH", 43, 1))  # whose answer comes when the others are done
assert replies.read(32)[0] == 1
"""


@contextlib.asynccontextmanager
async def any_sandbox(spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    try:
        backend = NamespaceBackend()
    except SandboxError as error:
        pytest.skip(f"no namespaces here: {error}")
    try:
        async with backend.acquire(spec) as sandbox:
            yield sandbox
    finally:
        await backend.stop()


def within(spec: SandboxSpec, check: Callable[[Sandbox], Awaitable[None]]) -> None:
    async def body() -> None:
        async with any_sandbox(spec) as sandbox:
            await check(sandbox)

    asyncio.run(asyncio.wait_for(body(), 180))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_without_a_network() -> None:
    async def check(sandbox: Sandbox) -> None:
        begin = time.monotonic()
        async with open_browser(sandbox, width=320, height=200) as browser:
            page = await browser.page()
            await page.go(PAGE)
            ready_s = time.monotonic() - begin
            assert await page.evaluate("document.title") == "hello world"
            fetched = await page.evaluate("fetch('http://127.0.0.1:1').catch(error => 'no ' + error.name)")
            assert fetched == "no TypeError"
            picture = await page.screenshot()
            assert picture.startswith(b"\x89PNG") and struct.unpack_from(">II", picture, 16) == (320, 200)
            drawn = "new Promise(done => {{ let image = new Image(); image.onload = () => {{ let canvas = "
            drawn += "document.createElement('canvas').getContext('2d'); canvas.drawImage(image, 0, 0); done("
            drawn += "[[10, 10], [100, 100]].map(([x, y]) => [...canvas.getImageData(x, y, 1, 1).data])) }}; "
            drawn += "image.src = 'data:image/png;base64,{}' }})"
            seen = await page.evaluate(drawn.format(base64.b64encode(picture).decode()))
            assert seen == [[0, 0, 255, 255], [255, 0, 0, 255]], seen
        left = await sandbox.exec("pgrep -c chrom || true", timeout_s=TIMEOUT_S)
        assert left.stdout == b"0\n"
        print(f"page after {ready_s:.2f} s")

    # The program itself first, where Debian's /usr/bin/chromium is a script that reads files in /etc.
    path = "/usr/lib/chromium:/usr/local/bin:/usr/bin:/bin"
    files, env = {"fonts.conf": FONTS}, {"FONTCONFIG_FILE": "/work/fonts.conf", "PATH": path}
    within(SandboxSpec(limits=BROWSER_LIMITS, files=files, env=env), check)


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="needs Xvfb")
def test_a_screen() -> None:
    async def check(sandbox: Sandbox) -> None:
        async with open_desktop(sandbox, width=64, height=48) as desktop:
            before = rows_of(await desktop.screenshot())
            assert (len(before), len(before[0])) == (48, 64)
            assert before[0][0] == (0, 0, 0)
            paint = Command("exec python3 -I -", stdin=PAINT.encode(), env={"DISPLAY": desktop.display})
            painted = await sandbox.exec(paint, timeout_s=TIMEOUT_S)
            assert painted.exit_code == 0, painted
            after = rows_of(await desktop.screenshot())
            orange = [(x, y) for y in range(48) for x in range(64) if after[y][x] == (255, 128, 0)]
            assert orange == [(x, y) for y in range(5) for x in range(10)]
        assert (await sandbox.exec("pgrep -c Xvfb || true", timeout_s=TIMEOUT_S)).stdout == b"0\n"

    within(SandboxSpec(limits=Limits(memory_counts="writable")), check)


@pytest.mark.skipif(shutil.which("Xvfb") is None or shutil.which("xdotool") is None, reason="needs Xvfb and xdotool")
def test_a_mouse() -> None:
    async def check(sandbox: Sandbox) -> None:
        async with open_desktop(sandbox) as desktop:
            assert (await desktop.xdotool("mousemove", "123", "45")).exit_code == 0
            where = await desktop.xdotool("getmouselocation")
            assert where.stdout.startswith(b"x:123 y:45 "), where

    within(SandboxSpec(limits=Limits(memory_counts="writable")), check)
