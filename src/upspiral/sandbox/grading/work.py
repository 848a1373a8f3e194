"""What an agent hands in: the files of its workspace, as bytes on the host, which nothing can change any more."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from upspiral.errors import CapabilityError
from upspiral.sandbox.base import WORKSPACE, Sandbox

MAX_WORK_BYTES = 1 << 28
_NEVER_TAKEN = re.compile(r"(^|/)(conftest\.py|__pycache__|[^/]*\.pyc)(/|$)")
"""Settings of pytest that run by themselves, and compiled files that Python takes for the source beside them."""
_MAX_NAMES_TOLD = 100


@dataclass(frozen=True, slots=True)
class Work:
    """An agent's files, as they came out of its sandbox: a tar that anybody may have made."""

    archive: bytes
    removed: Sequence[str]
    """Absolute paths."""
    is_whole: bool
    """The archive is the whole workspace, and its names are relative to that; else it is what was written since the
    sandbox began, from the root."""
    problem: str = ""
    """Why it cannot be graded. Then it fails: that is the agent's doing."""


async def hand_in(sandbox: Sandbox, *, max_bytes: int = MAX_WORK_BYTES) -> Work:
    """Takes the work out of the agent's sandbox, which can be stopped then. Raises SandboxError when that broke."""
    try:
        try:
            diff = await sandbox.diff()
            work = Work(diff.archive, diff.removed, is_whole=False)
        except CapabilityError:
            work = Work(await sandbox.download(WORKSPACE, max_bytes=max_bytes), (), is_whole=True)
    except OSError as error:
        return Work(b"", (), is_whole=False, problem=f"the work could not be taken: {error}")
    if len(work.archive) > max_bytes:
        return Work(b"", (), is_whole=False, problem=f"the work is larger than {max_bytes} bytes")
    return work


class WorkError(ValueError):
    """The work cannot be read, or is too large."""


@dataclass(slots=True)
class Sifted:
    """The part of a work that is laid out for grading: regular files, folders and symbolic links below the workspace,
    by names relative to it, without what might pass for a part of the exam."""

    archive: bytes = b""
    removed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """The first hundred names."""


def sift(work: Work, workspace: str, exam: Iterable[str], max_bytes: int = MAX_WORK_BYTES) -> Sifted:
    """`workspace`: where it really is. `exam`: paths relative to it. Raises WorkError."""
    sieve = _Sieve("" if work.is_whole else workspace.strip("/"), exam)
    sifted = Sifted()
    for path in work.removed:
        name = sieve.name(path)
        if name and name != ".":
            sifted.removed.append(name)
    buffer = io.BytesIO()
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(work.archive), mode="r:") as source,
            tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as target,
        ):
            _copy(source, target, sieve, sifted, max_bytes)
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError, KeyError, RecursionError) as error:
        raise WorkError(f"the work cannot be read: {error}") from error
    sifted.archive = buffer.getvalue()
    return sifted


def _copy(source: tarfile.TarFile, target: tarfile.TarFile, sieve: _Sieve, sifted: Sifted, room: int) -> None:
    regular: dict[str, tarfile.TarInfo] = {}
    for member in source:
        name = sieve.name(member.name)
        if member.isreg() and not _is_sparse(member):
            regular[member.name] = member
        if name is None or name == ".":
            continue
        content = _content(source, regular.get(member.linkname if member.islnk() else member.name), room)
        if not sieve.takes(name, is_folder=member.isdir()) or (
            content is None and not (member.isdir() or member.issym())
        ):
            if len(sifted.left_out) < _MAX_NAMES_TOLD:
                sifted.left_out.append(name)
            continue
        copy = tarfile.TarInfo(name)
        copy.mtime = int(time.time())
        if member.isdir():
            copy.type, copy.mode = tarfile.DIRTYPE, member.mode & 0o777 | 0o700
        elif member.issym():
            copy.type, copy.linkname = tarfile.SYMTYPE, member.linkname
        else:
            copy.mode, copy.size = member.mode & 0o777, len(content or b"")
        room -= copy.size + 2 * tarfile.BLOCKSIZE
        if room < 0:
            raise WorkError("it is too large")
        target.addfile(copy, io.BytesIO(content or b""))


def _content(source: tarfile.TarFile, member: tarfile.TarInfo | None, room: int) -> bytes | None:
    """Of a regular file, or of the one that a hard link leads to; None for what is neither."""
    file = source.extractfile(member) if member is not None else None
    return file.read(room + 1) if file is not None else None


def _is_sparse(member: tarfile.TarInfo) -> bool:
    """It may say that it holds more than there is room for."""
    return member.type == tarfile.GNUTYPE_SPARSE or member.sparse is not None


class _Sieve:
    """By names."""

    def __init__(self, prefix: str, exam: Iterable[str]):
        self._base = posixpath.normpath("/" + prefix.lstrip("/"))
        self._places, self._folders = set[str](), set[str]()
        for path in exam:
            self._places |= {path, _stem(path)} if path.endswith(".py") else {path}
            while path := path.rpartition("/")[0]:
                self._folders.add(path)

    def name(self, path: str) -> str | None:
        """Relative to the workspace; None for what is not in it. Raises WorkError."""
        if "\0" in path:  # whoever unpacks it would take what stands before that for the name
            raise WorkError(f"{path!r} is no path")
        normal = posixpath.normpath("/" + path.lstrip("/"))
        if normal == self._base:
            return "."
        base = self._base.rstrip("/") + "/"
        return normal[len(base) :] if normal.startswith(base) else None

    def takes(self, name: str, *, is_folder: bool) -> bool:
        """Not what lies in the place of a file of the exam, or beside a module of it under another ending, which an
        import might prefer; and nothing but folders where the exam has folders."""
        if _NEVER_TAKEN.search(name) or (name in self._folders and not is_folder):
            return False
        parts = name.split("/")
        above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return not any({path, _stem(path)} & self._places for path in above if path not in self._folders)


def _stem(path: str) -> str:
    """Up to the first point in the name: "a/b" of "a/b.cpython-311.so"."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('.')[0] or name}".lstrip("/")
