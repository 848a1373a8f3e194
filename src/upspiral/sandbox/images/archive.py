"""What layers are unpacked from: tar archives, compressed or not, and folders of this machine."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Protocol, Self, cast

from upspiral.errors import ImageError
from upspiral.sandbox.images.layer import LayerWriter, clean_path

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_OTHER_MARK = ".wh..wh."
_BROKEN = (
    tarfile.TarError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, ValueError, LookupError, ArithmeticError,
    RecursionError,
)  # fmt: skip
"""What tarfile and the decompressors raise for bytes that nobody has checked."""
_ABOUT_THE_NEXT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                   tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_LARGEST_HEADER_BYTES = 1 << 20


class Header(tarfile.TarInfo):
    """As `tarinfo` of tarfile.open: an archive is refused where tarfile would take damage for its end, or a header of
    any size into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from None
            raise  # which is the end
        if header.size < 0 or (header.type in _ABOUT_THE_NEXT and header.size > _LARGEST_HEADER_BYTES):
            raise tarfile.ReadError(f"a header that says {header.size} bytes")
        return header


class Readable(Protocol):
    """A stream that gives up to so many bytes, and none at its end."""

    def read(self, size: int, /) -> bytes: ...


def unpack_tar(stream: BufferedReader, writer: LayerWriter) -> None:
    """Adds all members. Raises ImageError for an archive that is damaged or not to be trusted."""
    for member, content in _members(decompressed(stream)):
        _add(writer, member, content)


def unpack_docker_layer(stream: BufferedReader, writer: LayerWriter) -> str:
    """The same for a layer of a Docker or OCI image, which marks what it hides by names that begin with `.wh.`. Returns
    the SHA-256 of the uncompressed archive, which such an image calls the layer's diff id."""
    hashed = _Hashed(decompressed(stream))
    for member, content in _members(hashed):
        if not _is_mark(clean_path(member.name), writer):
            _add(writer, member, content)
    while hashed.read(1 << 20):  # what stands behind the archive's end counts too
        pass
    return hashed.digest.hexdigest()


def copy_folder(source: Path, writer: LayerWriter, *, place: str = "", owner: tuple[int, int] | None = None) -> None:
    """Adds a file, or a folder with everything in it, as `place`, which links of the layers below may lead to. `owner`:
    instead of the one each file has. Raises ImageError."""
    source = source.resolve()
    try:
        with tarfile.open(fileobj=io.BytesIO(), mode="w") as describer:
            for path in _walk(source):
                inside = os.path.normpath(os.path.join(place, path.relative_to(source)))
                inside = writer.real_path(inside, is_folder=path.is_dir() and not path.is_symlink())
                member = describer.gettarinfo(path, arcname=inside)
                if member is None:  # a socket
                    continue
                if owner is not None:
                    member.uid, member.gid = owner
                if member.isreg():
                    with open(path, "rb") as content:
                        writer.add(member, content)
                else:
                    writer.add(member, None)
    except OSError as error:
        raise ImageError(f"{source} could not be copied: {error}") from error


def decompressed(stream: BufferedReader) -> Readable:
    """The stream itself when it is not compressed by gzip, bzip2, xz or zstd."""
    magic = stream.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(stream)
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(stream)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return pyarrow.CompressedInputStream(stream, "zstd")
    return stream


def _members(stream: Readable) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|", tarinfo=Header) as archive:
            for member in archive:
                yield member, archive.extractfile(member) if member.isreg() else None
    except (OSError, *_BROKEN) as error:
        raise ImageError(f"the archive is damaged or no tar: {error}") from error


def _add(writer: LayerWriter, member: tarfile.TarInfo, content: IO[bytes] | None) -> None:
    try:
        writer.add(member, content)
    except _BROKEN as error:
        raise ImageError(f"the archive is damaged in {member.name}: {error}") from error
    except OSError as error:
        raise ImageError(f"{member.name} could not be unpacked: {error}") from error


def _is_mark(path: str, writer: LayerWriter) -> bool:
    folder, _, name = path.rpartition("/")
    if not name.startswith(_WHITEOUT):
        return False
    if name == _OPAQUE:
        writer.make_opaque(folder)
    elif not name.startswith(_OTHER_MARK):
        writer.remove(f"{folder}/{name.removeprefix(_WHITEOUT)}")
    return True


def _walk(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for name in sorted(os.listdir(path)):
            yield from _walk(path / name)


class _Hashed:
    """A stream that hashes what is read of it."""

    def __init__(self, stream: Readable) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        content = self._stream.read(size)
        self.digest.update(content)
        return content
