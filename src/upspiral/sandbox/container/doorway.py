"""Where a container's agent comes to: a unix socket in a folder of its own, which is mounted read-only inside.

The agent connects and the host listens. So a container needs no folder of the host that it may write to, and one that
comes up after its start was given up finds nobody, and ends.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path

SOCKET_NAME = "s"
"""Short: the path of a socket has 107 bytes at most."""


class Doorway:
    """Open for one caller, from its making until `close`."""

    def __init__(self, folder: Path):
        """Raises OSError when the folder cannot be made, or its path is too long."""
        self.folder = folder
        folder.mkdir()
        folder.chmod(0o711)  # the agent may be another user; others cannot pass the folder above
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        try:
            self._listener.bind(str(folder / SOCKET_NAME))
            os.chmod(folder / SOCKET_NAME, 0o666)
            self._listener.listen(1)
        except BaseException:
            self.close()
            raise

    async def caller(self) -> socket.socket:
        connected, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        return connected

    def close(self) -> None:
        """Nothing is left of it; who is connected stays so."""
        self._listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)
