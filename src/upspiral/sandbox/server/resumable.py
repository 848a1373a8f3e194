"""A stream of bytes that outlives the connections which carry it.

Each end counts what it has received, and keeps what it has sent until the other end says that it came. When a
connection is lost and another takes its place, each end tells how much it has, and the other goes on from there: no
byte is lost, none comes twice, and whoever writes to the stream or reads from it does not notice.

    a message = how many bytes this end has received (u64), then bytes of the stream
"""

from __future__ import annotations

import struct

_RECEIVED = struct.Struct("!Q")
MESSAGE_BYTES = 256 << 10
"""The longest stretch of the stream in one message."""
UNCONFIRMED_BYTES = 2 << 20
"""Whoever has written so much that the other end has not confirmed waits."""
_CONFIRM_BYTES = UNCONFIRMED_BYTES // 8
MOST_MESSAGE_BYTES = MESSAGE_BYTES + _RECEIVED.size


class ResumeError(Exception):
    """The two ends do not speak of the same stream."""


class Resumable:
    """One end of such a stream, without any input or output."""

    def __init__(self) -> None:
        self.received = 0
        """Bytes of the stream that came, ever."""
        self._confirmed_to_other = 0
        """What the other end knows of that."""
        self._kept = bytearray()
        """Written and not yet confirmed."""
        self._kept_from = 0
        """Where in the stream `_kept` begins."""
        self._sent = 0
        """Up to where in the stream was sent over the connection that stands now ..."""
        self._ever_sent = 0
        """... and over any."""

    @staticmethod
    def received_by_other(message: bytes) -> int:
        """What the other end has, according to the first message of a connection. Raises ResumeError."""
        if len(message) < _RECEIVED.size:
            raise ResumeError(f"a message of {len(message)} bytes is too short")
        return _RECEIVED.unpack_from(message)[0]

    @property
    def unconfirmed_bytes(self) -> int:
        return len(self._kept)

    @property
    def is_full(self) -> bool:
        return len(self._kept) >= UNCONFIRMED_BYTES

    @property
    def has_news(self) -> bool:
        """Whether `next_message` has something to say."""
        return self._sent < self._end or self.received - self._confirmed_to_other >= _CONFIRM_BYTES

    def write(self, content: bytes) -> None:
        self._kept += content

    def forget(self) -> None:
        """The stream is over; what is kept will never be sent."""
        self._kept.clear()
        self._kept_from = self._sent

    def resume(self, other_received: int) -> None:
        """Another connection stands, and the other end has so much. Raises ResumeError when that cannot be."""
        self._confirm(other_received, self._ever_sent)
        self._sent = other_received

    def next_message(self) -> bytes:
        begin = self._sent - self._kept_from
        content = self._kept[begin : begin + MESSAGE_BYTES]
        self._sent += len(content)
        self._ever_sent = max(self._ever_sent, self._sent)
        self._confirmed_to_other = self.received
        return _RECEIVED.pack(self.received) + content

    def take(self, message: bytes) -> bytes:
        """The stream's bytes in a message. Raises ResumeError for what is none."""
        self._confirm(self.received_by_other(message), self._sent)
        content = message[_RECEIVED.size :]
        self.received += len(content)
        return content

    @property
    def _end(self) -> int:
        return self._kept_from + len(self._kept)

    def _confirm(self, received: int, sent: int) -> None:
        if not self._kept_from <= received <= sent:
            raise ResumeError(f"the other end claims {received} bytes; it can have {self._kept_from} to {sent}")
        del self._kept[: received - self._kept_from]
        self._kept_from = received
