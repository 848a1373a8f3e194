"""Pictures of screens: right colours in the right places, and nothing but an error for what is no screen."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upspiral.errors import SandboxError
from upspiral.sandbox.screen_dump import png_of_dump

COLOURS = 2


def dump_of(rows: list[list[tuple[int, int, int]]], **changed: int) -> bytes:
    """As Xvfb writes it: a name behind the header, a colour map, then blue, green, red and a filler for each pixel."""
    width, height, name = len(rows[0]), len(rows), b"Xvfb main\0"
    fields = {"header": 100 + len(name), "version": 7, "format": 2, "depth": 24, "width": width, "height": height}
    fields |= {"offset": 0, "order": 0, "unit": 32, "bits": 0, "pad": 32, "pixel": 32, "line": width * 4, "class": 4}
    fields |= {"red": 0xFF0000, "green": 0xFF00, "blue": 0xFF, "channel": 8, "entries": 256, "colours": COLOURS}
    fields |= {"w": width, "h": height, "x": 0, "y": 0, "border": 0} | changed
    pixels = b"".join(bytes((blue, green, red, 99)) for row in rows for red, green, blue in row)
    return struct.pack(">25I", *fields.values()) + name + bytes(12 * COLOURS) + pixels


def rows_of(png: bytes) -> list[list[tuple[int, ...]]]:
    """Of a PNG of three bytes a pixel without filters, checked as it is read."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", png, at + 8 + size) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [8, 2, 0, 0, 0]
    content = zlib.decompress(chunks[b"IDAT"])
    assert len(content) == height * (1 + width * 3)
    rows = [content[at : at + 1 + width * 3] for at in range(0, len(content), 1 + width * 3)]
    assert all(row[0] == 0 for row in rows)
    return [[tuple(row[1 + 3 * x : 4 + 3 * x]) for x in range(width)] for row in rows]


def test_every_pixel_is_where_it_was() -> None:
    rows = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(1, 2, 3), (4, 5, 6), (254, 253, 252)]]
    assert rows_of(png_of_dump(dump_of(rows))) == rows


@pytest.mark.parametrize(
    "changed",
    [{"version": 6}, {"pixel": 8}, {"order": 1}, {"width": 0}, {"height": 1 << 20}, {"line": 0}, {"red": 0xFF},
     {"header": 1 << 31}, {"colours": 1 << 31}, {"height": 3}],
    ids=str,
)  # fmt: skip
def test_other_dumps_are_refused(changed: dict[str, int]) -> None:
    with pytest.raises(SandboxError):
        png_of_dump(dump_of([[(1, 2, 3)]] * 2, **changed))


@given(st.binary(max_size=300))
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(SandboxError):
        png_of_dump(content)
