"""The host's end of a keeper: its process, and requests to it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import upspiral
from upspiral.errors import CapabilityError, SandboxError
from upspiral.sandbox.namespace.keeper import MAX_MESSAGE_BYTES
from upspiral.sandbox.open_files import enough_for_a_sandbox, too_many

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 15.0
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, sys.stdin.read() or sys.exit()); "
    "from upspiral.sandbox.namespace.keeper.main import main; main({descriptor})"
)
"""The path comes by standard input, because everybody in a sandbox can read the command line. None comes of a host that
has ended."""

Message = Mapping[str, Any]


class KeeperProcess:
    """Starts in the constructor, which raises SandboxError with the cause. `on_ended` hears of sandboxes that ended
    unasked: their name, why, and whether their time was over. Requests belong to the event loop that runs when they
    are made."""

    def __init__(self, label: str, folder: Path, parent_group: str | None, on_ended: Callable[[str, str, bool], None]):
        self._on_ended = on_ended
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._to_be_sealed: dict[int, Callable[[], None]] = {}
        self._outgoing: deque[tuple[bytes, Sequence[int], int]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._death = ""
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = _start(there)
        except OSError as error:
            self._socket.close()
            raise SandboxError(f"{sys.executable} could not be started as a keeper of sandboxes: {error}") from error
        finally:
            there.close()
        # A keeper ends with the thread that started it, and only the main one is sure to last as long as the process.
        lasting = threading.current_thread() is threading.main_thread()
        place = str(folder.absolute())
        host = {"label": label, "folder": place, "parent_group": parent_group, "dies_with_parent": lasting}
        self.abilities = self._introduce(host)

    def _introduce(self, host: Message) -> Message:
        try:
            self._socket.settimeout(_START_TIMEOUT_S)
            self._socket.send(json.dumps(host).encode())
            answer = json.loads(self._socket.recv(MAX_MESSAGE_BYTES) or b'{"problem": "it died"}')
            if "problem" in answer:
                raise SandboxError(answer["problem"])
        except (OSError, SandboxError) as error:
            self.kill()
            raise SandboxError(str(error) or f"no answer within {_START_TIMEOUT_S:.0f} s") from error
        return answer

    def try_out(self, order: Message) -> None:
        """Makes a sandbox and ends it, before anything else is asked. Raises SandboxError when it cannot be made."""
        here, there = socket.socketpair()
        try:
            with here, there:
                request = json.dumps({"number": 0, "do": "create", "order": order}).encode()
                socket.send_fds(self._socket, [request], [there.fileno()])
                answer = json.loads(self._socket.recv(MAX_MESSAGE_BYTES) or b'{"problem": "it died"}')
            if "problem" in answer:
                raise SandboxError(answer["problem"])
            self._socket.recv(MAX_MESSAGE_BYTES)  # that it has ended
        except OSError as error:
            raise SandboxError(f"the keeper made no sandbox within {_START_TIMEOUT_S:.0f} s: {error}") from error
        self._socket.setblocking(False)

    @property
    def is_dead(self) -> bool:
        return bool(self._death)

    async def ask(
        self,
        do: str,
        *,
        timeout_s: float,
        descriptors: Sequence[int] = (),
        when_sealed: Callable[[], None] | None = None,
        **said: object,
    ) -> Message:
        """Raises SandboxError when the keeper says that it failed, says nothing in time, or has died. `when_sealed` is
        called when a snapshot can be stood on, should that be before the answer."""
        number = next(self._numbers)
        content = json.dumps({"number": number, "do": do, **said}).encode()
        if len(content) > MAX_MESSAGE_BYTES:
            raise CapabilityError(
                f"environment, mounts and forwarded sockets of a sandbox take {len(content)} bytes; "
                f"at most {MAX_MESSAGE_BYTES} are possible"
            )
        self._attach()
        if self._death:
            raise SandboxError(self._death)
        copies: list[int] = []
        try:
            with enough_for_a_sandbox():
                copies.extend(map(os.dup, descriptors))
        except BaseException:
            _close_all(copies)
            raise
        answered = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        if when_sealed is not None:
            self._to_be_sealed[number] = when_sealed
        self._outgoing.append((content, copies, number))
        self._flush()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await answered
        except TimeoutError:
            raise SandboxError(f"the keeper of the sandboxes did not answer {do!r} within {timeout_s:.0f} s") from None
        finally:
            self._waiting.pop(number, None)
            self._to_be_sealed.pop(number, None)
        if "most_open_files" in answer:
            raise too_many(f"the keeper of the sandboxes has {answer['most_open_files']}")
        if "problem" in answer:
            raise SandboxError(answer["problem"])
        return answer

    def close(self) -> None:
        """Ends it and all of its sandboxes; `wait` for that."""
        self._die("the sandbox backend was stopped")
        self._socket.close()

    def wait(self) -> None:
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Safe to call twice. Its sandboxes die with it, as the kernel does it."""
        self._die("the keeper of the sandboxes was killed because it did not answer")
        self._socket.close()
        self._process.kill()
        self._process.wait(_STOP_TIMEOUT_S)

    def _attach(self) -> None:
        """To the loop that runs now. An earlier one may be closed."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop and not self._death:
            self._detach()
            self._loop = loop
            loop.add_reader(self._socket.fileno(), self._receive)

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
        self._loop = None

    def _flush(self) -> None:
        assert self._loop is not None
        while self._outgoing:
            content, copies, number = self._outgoing[0]
            try:
                if number in self._waiting:  # whoever asked may have given up
                    socket.send_fds(self._socket, [content], copies)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._flush)
                return
            except OSError:
                self._die("the keeper of the sandboxes has died")
                return
            self._outgoing.popleft()
            _close_all(copies)
        self._loop.remove_writer(self._socket.fileno())

    def _receive(self) -> None:
        while True:
            try:
                content = self._socket.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                content = b""
            if not content:
                self._die("the keeper of the sandboxes has died")
                return
            message: Message = json.loads(content)
            if "ended" in message:
                self._on_ended(message["ended"], message["problem"], message["is_over"])
            elif "sealed" in message:
                if (when_sealed := self._to_be_sealed.get(message["number"])) is not None:
                    when_sealed()
            elif (answered := self._waiting.get(message["number"])) is not None and not answered.done():
                answered.set_result(message)

    def _die(self, why: str) -> None:
        self._detach()
        self._death = self._death or why
        while self._outgoing:
            _close_all(self._outgoing.popleft()[1])
        for answered in self._waiting.values():
            if not answered.done():
                answered.set_result({"problem": self._death})


def _start(control: socket.socket) -> subprocess.Popen[bytes]:
    descriptor = control.fileno()
    code = _BOOTSTRAP.format(descriptor=descriptor)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[descriptor],
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(str(Path(upspiral.__file__).parent.parent).encode())
    return process


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
