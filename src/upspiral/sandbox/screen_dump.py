"""A screen as Xvfb keeps it in a file (an X window dump, XWD version 7), and as PNG."""

from __future__ import annotations

import struct
import zlib

from upspiral.errors import SandboxError

_HEADER = struct.Struct(">25I")
"""header size, version, format, depth, width, height, x offset, byte order, bitmap unit, bit order and pad, bits a
pixel, bytes a line, visual class, three masks, bits of a channel, colour map entries, colours, the window's five."""
_COLOUR_BYTES = 12
_MAX_SIDE = 1 << 14
_RGB = (0xFF0000, 0xFF00, 0xFF)


def png_of_dump(dump: bytes) -> bytes:
    """Of a dump with four bytes a pixel, as a screen of depth 24 has it. Raises SandboxError for anything else: a dump
    comes from inside a sandbox."""
    if len(dump) < _HEADER.size:
        raise SandboxError(f"a screen dump of {len(dump)} bytes; its header alone has {_HEADER.size}")
    fields = _HEADER.unpack_from(dump)
    start = fields[0] + fields[19] * _COLOUR_BYTES
    width, height, line_bytes = fields[4], fields[5], fields[12]
    usual = fields[1] == 7 and fields[7] == 0 and fields[11] == 32 and fields[14:17] == _RGB
    if not usual or not 0 < width <= _MAX_SIDE or not 0 < height <= _MAX_SIDE or line_bytes != width * 4:
        raise SandboxError(f"a screen dump of a kind that is not known: {fields[:17]}; use a depth of 24")
    pixels = dump[start : start + line_bytes * height]
    if len(pixels) < line_bytes * height:
        raise SandboxError(f"a screen dump of {width} x {height} is cut short at {len(dump)} bytes")
    colours = bytearray(width * height * 3)
    for channel in range(3):  # blue, green, red and a filler lie in memory
        colours[channel::3] = pixels[2 - channel :: 4]
    return _png(width, height, bytes(colours))


def _png(width: int, height: int, colours: bytes) -> bytes:
    """Of three bytes a pixel. A zero before each row: it is not filtered."""
    row_bytes = width * 3
    rows = b"".join(b"\0" + colours[at : at + row_bytes] for at in range(0, row_bytes * height, row_bytes))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
