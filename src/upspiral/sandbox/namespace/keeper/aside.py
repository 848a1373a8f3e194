"""What takes the keeper too long: done by a child of it, while it goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from upspiral.sandbox.namespace.keeper import syscalls
from upspiral.sandbox.namespace.keeper.copying import copy_layers
from upspiral.sandbox.namespace.keeper.merged import FOLDER_FLAGS
from upspiral.sandbox.namespace.keeper.syscalls import MountFlag, Namespace

_TIMEOUT_S = 120.0

Message = dict[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Aside:
    """A child at work."""

    process: int
    handle: int
    """Of the process (pidfd)."""
    reader: int
    """Can be read from when the child is done, or dead."""
    deadline: float

    @classmethod
    def start(cls, work: Callable[[], Message]) -> Aside:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            child = os.fork()
            if child == 0:
                _work(work, writer)
            try:
                return cls(child, os.pidfd_open(child), reader, time.monotonic() + _TIMEOUT_S)
            except OSError:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def answer(self) -> Message:
        """To be called once. `problem` is in it when the work failed."""
        with os.fdopen(self.reader, "rb") as pipe:
            content = pipe.read()
        os.waitpid(self.process, 0)
        os.close(self.handle)
        try:
            return json.loads(content)
        except ValueError:
            return {"problem": "it took too long, or was killed"}


def _work(work: Callable[[], Message], writer: int) -> NoReturn:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        syscalls.die_with_parent(signal.SIGKILL)
        try:
            answer = work()
        except OSError as error:
            answer = {"problem": str(error)}
        content = json.dumps(answer).encode()
        while content:
            content = content[os.write(writer, content) :]
    finally:
        os._exit(0)


def copy_to_layer(layers: Sequence[int], place: str) -> Message:
    """Makes a new layer, mounted at `place`, of what open folders of layers, top first, show together.

    It has room for as much as they may hold together; what they do hold is limited by the disks that they were.
    """
    syscalls.mount("tmpfs", place, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, "size=100%,nr_inodes=0,mode=755")
    os.mkdir(f"{place}/u", 0o755)
    target = os.open(f"{place}/u", FOLDER_FLAGS)
    copy_layers(layers, target)
    return {}


def write_difference(
    layers: Sequence[int], image: Sequence[str], output: BinaryIO, owner: int, made: Collection[str]
) -> Sequence[str]:
    """Writes a tar. Returns the paths that were removed."""
    from upspiral.sandbox.namespace.keeper.difference import Difference  # costs memory that sandboxes need not have

    root = os.open(_view(image), FOLDER_FLAGS)
    try:
        difference = Difference(output, owner, made)
        difference.compare(layers, root)
    finally:
        os.close(root)
    return difference.removed


def _view(image: Sequence[str]) -> str:
    """A folder that shows what the layers of an image, top first, show together. This process alone sees it."""
    if len(image) < 2:
        return image[0] if image else "skeleton"
    syscalls.unshare(Namespace.MOUNT)
    syscalls.mount("tmpfs", "t", "tmpfs", 0, "mode=700")
    for number, folder in enumerate(image):
        os.mkdir(f"t/{number}")
        syscalls.bind(folder, f"t/{number}")
    os.mkdir("t/m")
    lower = ":".join(f"t/{number}" for number in range(len(image)))
    syscalls.mount("overlay", "t/m", "overlay", MountFlag.READ_ONLY, f"lowerdir={lower},userxattr")
    return "t/m"
