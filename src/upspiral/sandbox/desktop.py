"""A screen inside a sandbox that is in memory alone (Xvfb), its pictures, and hands for its mouse and keyboard."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator

from upspiral.errors import CapabilityError, SandboxError
from upspiral.sandbox.base import Command, ExecResult, Process, Sandbox
from upspiral.sandbox.screen_dump import png_of_dump

_START_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 20.0
_MAX_DUMP_BYTES = 256 << 20
_MAX_SAID_BYTES = 4000
_NOT_FOUND = 127

# Xvfb chooses a free display and writes its number when it is ready; its screen lies in a file. -noreset: what programs
# have painted stays when the last of them has ended.
_SCRIPT = """
command -v Xvfb >/dev/null || exit 127
folder=$(mktemp -d) && echo "$folder" || exit
exec Xvfb -displayfd 1 -fbdir "$folder" -screen 0 SIZEx24 -nolisten tcp -noreset
"""


@contextlib.asynccontextmanager
async def open_desktop(sandbox: Sandbox, *, width: int = 1024, height: int = 768) -> AsyncIterator[Desktop]:
    """Starts Xvfb, and ends it with the context. A window manager, where one is wanted, is for the caller to start.

    Raises CapabilityError when there is no Xvfb inside, SandboxError with what it said when it does not start.
    """
    process = await sandbox.spawn(_SCRIPT.replace("SIZE", f"{width}x{height}"))
    said = _Said()
    reading = asyncio.ensure_future(said.follow(process))
    try:
        await asyncio.wait([reading, said.is_ready], timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not said.is_ready.done():
            raise await _not_started(process, said, has_ended=reading.done())
        folder, number = said.is_ready.result()
        yield Desktop(sandbox, f":{number}", f"{folder}/Xvfb_screen0")
    finally:
        with contextlib.suppress(SandboxError):
            await process.kill()
            await asyncio.wait([reading], timeout=_CLOSE_TIMEOUT_S)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


class Desktop:
    """One screen. Made by `open_desktop`."""

    def __init__(self, sandbox: Sandbox, display: str, dump: str):
        self.display = display
        """For the environment variable DISPLAY of programs that are to be seen."""
        self._sandbox = sandbox
        self._dump = dump

    async def screenshot(self) -> bytes:
        """PNG. The file that it is read from may be painted on meanwhile, as a screen that is photographed."""
        dump = await self._sandbox.read(self._dump, max_bytes=_MAX_DUMP_BYTES)
        return await asyncio.to_thread(png_of_dump, dump)

    async def xdotool(self, *arguments: str, timeout_s: float = 30.0) -> ExecResult:
        """Moves, clicks and types: `await desktop.xdotool("mousemove", "100", "200", "click", "1")`."""
        script = f"exec xdotool {shlex.join(arguments)}"
        return await self._sandbox.exec(Command(script, env={"DISPLAY": self.display}), timeout_s=timeout_s)


class _Said:
    """What Xvfb writes. Somebody has to read it as long as it runs."""

    def __init__(self) -> None:
        self.is_ready: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
        """The folder of its screen and the number of its display."""
        self.complaints = b""
        self._lines = b""

    async def follow(self, process: Process) -> None:
        async for name, content in process.output():
            if name == "stderr":
                self.complaints = (self.complaints + content)[-_MAX_SAID_BYTES:]
            elif not self.is_ready.done():
                self._lines = (self._lines + content.replace(b"\0", b""))[:_MAX_SAID_BYTES]
                folder, _, rest = self._lines.partition(b"\n")
                number, end, _ = rest.partition(b"\n")
                if end and number.strip().isdigit():
                    self.is_ready.set_result((folder.decode(errors="replace"), int(number)))


async def _not_started(process: Process, said: _Said, *, has_ended: bool) -> SandboxError:
    with contextlib.suppress(TimeoutError):
        # How it ended is told after the end of its output.
        code = (await process.wait(timeout_s=_CLOSE_TIMEOUT_S if has_ended else 0.0)).exit_code
        if code == _NOT_FOUND:
            return CapabilityError("there is no Xvfb in this sandbox; recipes/images/desktop.toml makes an image")
        complaints = said.complaints.decode(errors="replace").strip()
        return SandboxError(f"Xvfb ended with exit code {code}: {complaints or 'it said nothing'}")
    return SandboxError(f"Xvfb was not ready within {_START_TIMEOUT_S:g} s")
