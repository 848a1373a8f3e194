"""The wire between a sandbox's agent and its host: frames, of which both ends know the same.

A frame is the length of its body (u32), the number of an operation (u32), a kind (u8) and a body. Numbers are given by
the side that opens an operation: the host below `INSIDE`, the agent (for callers of forwarded ports) from there on.

    kind      sent by    body    what it says
    SETTINGS  the host   JSON    first of all, to an agent that was not forked: how it should behave
    OPEN      either     JSON    begins an operation: {"do": NAME, ...}
    STARTED   the asked  JSON    it is under way: a program runs, a connection stands
    DATA      either     bytes   input of an operation; its output
    ERRORS    the asked  bytes   what a command wrote to stderr
    END       either     -       no more DATA from this side
    ACK       either     u32     so many bytes of DATA and ERRORS were used up; as many more may be sent
    CONTROL   the asker  JSON    {"signal": N} to a program; {"cancel": true} gives the operation up
    RESULT    the asked  JSON    how it ended; the last frame of an operation

Neither side sends more than `WINDOW_BYTES` of DATA and ERRORS in one operation ahead of their ACK, so that one slow
reader holds up nobody else. After its RESULT an operation's number is forgotten; what the other side sent before it
knew is dropped in silence.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

SETTINGS, OPEN, STARTED, DATA, ERRORS, END, ACK, CONTROL, RESULT = range(1, 10)

HEADER = struct.Struct("!IIB")
COUNT = struct.Struct("!I")
MAX_BODY_BYTES = 1 << 20
CHUNK_BYTES = 128 << 10
"""No DATA frame is longer when it is ours, so that others get their turn on a slow line."""
WINDOW_BYTES = 512 << 10
INSIDE = 1 << 31
"""Operation numbers from here on are the agent's."""


class FrameError(Exception):
    """What came is no frame of this protocol."""


def frame(kind: int, operation: int, body: bytes = b"") -> bytes:
    return HEADER.pack(len(body), operation, kind) + body


def first_settings(connection: socket.socket) -> dict[str, Any]:
    """Reads the frame that a new agent gets first of all, and nothing behind it. Raises FrameError for another one."""
    length, _, kind = HEADER.unpack(_exactly(connection, HEADER.size))
    if kind != SETTINGS or length > MAX_BODY_BYTES:
        raise FrameError(f"the first frame must be of kind {SETTINGS}, and one of kind {kind} came")
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise FrameError("the connection ended before the settings came")
        received += chunk
    return received


class Decoder:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, received: bytes) -> list[tuple[int, int, bytes]]:
        """(kind, operation, body) of every frame that is complete by now. Raises FrameError for anything else."""
        self._held += received
        held, position, found = self._held, 0, []
        with memoryview(held) as view:
            while len(held) - position >= HEADER.size:
                length, operation, kind = HEADER.unpack_from(held, position)
                if length > MAX_BODY_BYTES:
                    raise FrameError(f"a frame of {length} bytes; at most {MAX_BODY_BYTES} are allowed")
                if not SETTINGS <= kind <= RESULT:
                    raise FrameError(f"a frame of kind {kind}; there are {SETTINGS} to {RESULT}")
                start, end = position + HEADER.size, position + HEADER.size + length
                if end > len(held):
                    break
                found.append((kind, operation, bytes(view[start:end])))
                position = end
        del held[:position]
        return found
