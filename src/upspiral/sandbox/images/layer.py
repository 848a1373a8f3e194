"""A layer: a folder that lies in an overlay as it is, made of archives without believing them, known by its content.

What a layer hides of those below it is written as overlayfs with `userxattr` reads it, which needs no root: a whiteout
is a character device 0/0, which Linux lets anybody make since 5.8, and a folder that replaces those below carries the
attribute `user.overlay.opaque`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarInfo
from typing import IO, Any, Literal

from upspiral.errors import ImageError

OPAQUE = "user.overlay.opaque"
_HIGHEST_MTIME_S = 1 << 33
_MOST_LINKS = 40
"""On one way, as for Linux."""
_MOST_HOLES_BYTES = 1 << 30
"""Holes of sparse files are written out, and an archive of a few bytes can have any number of them."""
_FOLDER_DEFAULT = (0o755, 0, 0, 0.0)

Kind = Literal["folder", "file", "link", "whiteout"]


def clean_path(name: str) -> str:
    """A member's path without a slash before it; empty for the root. Raises ImageError when it leads out."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise ImageError(f"the archive has {name!r}, which leads out of it; it was not unpacked")
    return "/".join(parts)


class LayerWriter:
    """Fills an empty folder, which nobody else may touch, with members of archives in the order in which they come.

    Everything above a member is a folder that this writer made itself: a link in an archive is never gone through.
    Devices, FIFOs and sockets are left out and counted. Of permissions, setuid and setgid of programs are dropped
    (nothing in a sandbox gains rights by them, and outside they would be a danger), and the owner can always read.
    Everything belongs to this user, unless owners are kept, which takes root.
    """

    def __init__(self, folder: Path, *, below: Sequence[Path] = (), keep_owners: bool = False) -> None:
        """`below`: the layers under this one, the topmost first; folders that an archive does not name take their
        attributes from there."""
        self.skipped = 0
        self._folder = folder
        self._below = below
        self._keep_owners = keep_owners
        self._kinds: dict[str, Kind] = {"": "folder"}
        self._attributes: dict[str, tuple[int, int, int, float]] = {}
        self._removed: set[str] = set()
        self._opaque: set[str] = set()
        self._hole_bytes = 0

    @property
    def is_empty(self) -> bool:
        return len(self._kinds) == 1 and not self._removed and not self._opaque

    def add(self, member: TarInfo, content: IO[bytes] | None) -> None:
        """`content` is that of a regular file. A later member of the same path replaces an earlier one. Raises
        ImageError for what leads out of the archive, and OSError."""
        path = clean_path(member.name)
        if member.isdir():
            self._add_folder(path, member)
            return
        if not path:
            raise ImageError("the archive has a root that is no folder")
        if not (member.isreg() or member.issym() or member.islnk()):
            self.skipped += 1
            return
        self._make_way(path)
        place = self._folder / path
        if member.issym():
            place.symlink_to(member.linkname)
            self._kinds[path] = "link"
        elif member.islnk():
            self._add_hard_link(place, member)
            self._kinds[path] = self._kinds[clean_path(member.linkname)]
            return
        else:
            assert content is not None
            self._count_holes(member)
            with open(place, "xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            self._kinds[path] = "file"
        self._set(place, member)

    def real_path(self, path: str, *, is_folder: bool) -> str:
        """Where something has to be added to be seen at `path`: the layers below may have links on the way, such as
        /bin, which a folder of that name would replace with all that is behind them. Of archives this is not asked:
        their folders are what they say."""
        return real_path((self._folder, *self._below), path, is_folder=is_folder) if self._below else path

    def leave_out(self, path: str) -> None:
        """As if no archive had had it, nor anything below it. Hard links to it stay."""
        if path in self._kinds:
            self._make_way(path)

    def remove(self, path: str) -> None:
        """Hides what the layers below have there, unless this layer puts something else in its place."""
        self._removed.add(clean_path(path))

    def make_opaque(self, path: str) -> None:
        """Hides what the layers below have in a folder."""
        self._opaque.add(clean_path(path))

    def finish(self) -> None:
        """Writes what is hidden, and the attributes of folders. Nothing can be added afterwards.

        Only what would show is hidden: overlayfs lists a whiteout that has nothing under it.
        """
        if "" in self._opaque:  # overlayfs does not look whether the root of a layer is
            self._removed.update(name for layer in self._below for name in os.listdir(layer))
        for path in sorted(self._removed - {""}):
            if self._kinds.get(path) == "folder":
                self._opaque.add(path)
            elif path not in self._kinds and look_up(self._below, path) is not None and self._is_seen(path):
                self._make_parents(path)
                make_whiteout(self._folder / path)
                self._kinds[path] = "whiteout"
        for path in sorted(self._opaque - {""}):
            status = look_up(self._below, path)
            if status is not None and stat.S_ISDIR(status.st_mode):
                self._make_parents(f"{path}/.")
                set_opaque(self._folder / path)
        for path in sorted((path for path, kind in self._kinds.items() if kind == "folder"), reverse=True):
            mode, uid, gid, mtime_s = self._attributes.get(path) or self._attributes_below(path)
            place = self._folder / path
            if self._keep_owners:
                os.chown(place, uid, gid)
            place.chmod(mode & 0o3777 | 0o700)
            os.utime(place, (mtime_s, mtime_s))

    def _is_seen(self, path: str) -> bool:
        """Whether this layer lets it show through."""
        above = [each for each in _parents(path) if each]
        return all(self._kinds.get(each, "folder") == "folder" and each not in self._opaque for each in above)

    def _add_folder(self, path: str, member: TarInfo) -> None:
        self._attributes[path] = (member.mode, member.uid, member.gid, _mtime(member))
        if self._kinds.get(path) != "folder":
            self._make_way(path)
            (self._folder / path).mkdir(mode=0o700)
            self._kinds[path] = "folder"

    def _count_holes(self, member: TarInfo) -> None:
        if member.issparse():
            pieces: Any = member.sparse  # (where it begins, how long it is)
            self._hole_bytes += max(0, member.size - sum(size for _, size in pieces))
            if self._hole_bytes > _MOST_HOLES_BYTES:
                raise ImageError(f"the archive has more than {_MOST_HOLES_BYTES} bytes of holes, up to {member.name}")

    def _add_hard_link(self, place: Path, member: TarInfo) -> None:
        target = clean_path(member.linkname)
        if self._kinds.get(target) not in ("file", "link"):
            raise ImageError(
                f"{member.name} is a hard link to {member.linkname}, which the archive does not have before it"
            )
        os.link(self._folder / target, place, follow_symlinks=False)

    def _set(self, place: Path, member: TarInfo) -> None:
        if self._keep_owners:
            os.chown(place, member.uid, member.gid, follow_symlinks=False)
        if not member.issym():
            place.chmod(member.mode & 0o777 | 0o400)
        os.utime(place, (_mtime(member), _mtime(member)), follow_symlinks=False)

    def _make_way(self, path: str) -> None:
        """The folders above a new member are there, and nothing is in its place."""
        self._make_parents(path)
        kind = self._kinds.pop(path, None)
        if kind == "folder":
            shutil.rmtree(self._folder / path)
            below = f"{path}/"
            self._kinds = {each: kind for each, kind in self._kinds.items() if not each.startswith(below)}
        elif kind is not None:
            (self._folder / path).unlink()

    def _make_parents(self, path: str) -> None:
        for parent in _parents(path):
            kind = self._kinds.get(parent)
            if kind is None:
                (self._folder / parent).mkdir(mode=0o700)
                self._kinds[parent] = "folder"
                self._attributes[parent] = self._attributes_below(parent)
            elif kind != "folder":
                raise ImageError(f"the archive goes to {path!r} through {parent!r}, a {kind}; it was not unpacked")

    def _attributes_below(self, path: str) -> tuple[int, int, int, float]:
        status = look_up(self._below, path)
        if status is None or not stat.S_ISDIR(status.st_mode):
            return _FOLDER_DEFAULT
        return status.st_mode, status.st_uid, status.st_gid, status.st_mtime


def _parents(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def look_up(layers: Sequence[Path], path: str) -> os.stat_result | None:
    """Of what a stack shows at a path, the topmost layer first; None when there is nothing. No link is followed."""
    place = _find(layers, path)
    return place.lstat() if place is not None else None


def real_path(layers: Sequence[Path], path: str, *, is_folder: bool) -> str:
    """Where a path leads in what a stack shows, through links on its way and, for a folder, through one at its end.
    Never out of the stack. What is not there leads to itself."""
    waiting, found, num_links = path.split("/")[::-1], list[str](), 0
    while waiting:
        part = waiting.pop()
        if part in ("", "."):
            continue
        if part == "..":
            found[-1:] = []
            continue
        found.append(part)
        place = _find(layers, "/".join(found)) if waiting or is_folder else None
        if place is not None and place.is_symlink():
            if (num_links := num_links + 1) > _MOST_LINKS:
                raise ImageError(f"{path!r} leads through more than {_MOST_LINKS} links")
            target = os.readlink(place)
            found = [] if target.startswith("/") else found[:-1]
            waiting += target.split("/")[::-1]
    return "/".join(found)


def _find(layers: Sequence[Path], path: str) -> Path | None:
    """Where that lies which a stack shows at a path."""
    for layer in layers:
        hides = False
        for each in (*_parents(path), path):
            try:
                status = (layer / each).lstat()
            except FileNotFoundError:
                break
            if not stat.S_ISDIR(status.st_mode):
                return layer / each if each == path and not is_whiteout(status) else None
            hides = hides or is_opaque(layer / each)
        else:
            return layer / path
        if hides:
            return None
    return None


def _mtime(member: TarInfo) -> float:
    mtime_s = float(member.mtime)
    return min(max(mtime_s, 0.0), _HIGHEST_MTIME_S) if mtime_s == mtime_s else 0.0  # an archive may say "nan"


def is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def make_whiteout(place: Path) -> None:
    os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(0, 0))


def is_opaque(folder: Path) -> bool:
    try:
        return os.getxattr(folder, OPAQUE, follow_symlinks=False) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise


def set_opaque(folder: Path) -> None:
    try:
        os.setxattr(folder, OPAQUE, b"y", follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise ImageError(
            f"{folder}: this file system has no user attributes; keep images on ext4, xfs or btrfs"
        ) from None


@dataclass(frozen=True, slots=True)
class LayerSize:
    """How much is in a layer; what has several names counts once as content."""

    files: int
    content_bytes: int


def measure(folder: Path, *, keep_owners: bool) -> tuple[str, LayerSize]:
    """The digest of a layer and its size.

    The digest (SHA-256, hexadecimal) is over paths, kinds, permissions, targets of links and contents, in the order of
    paths; over owners where they are kept; and not over times. Raises ImageError for what cannot be in a layer.
    """
    digest = hashlib.sha256()
    files = content_bytes = 0
    counted: set[tuple[int, int]] = set()
    for path, status in _walk(folder):
        owner = f"{status.st_uid}:{status.st_gid}" if keep_owners else "0:0"
        kind, about = _describe(folder / path, status)
        mode = "" if kind in ("link", "whiteout") else f"{stat.S_IMODE(status.st_mode):o}"
        owner = "" if kind == "whiteout" else owner
        fields = (os.fsencode(path), kind.encode(), mode.encode(), owner.encode(), about)
        digest.update(b"".join(b"%d:%s" % (len(field), field) for field in fields))
        if kind == "file":
            files += 1
            content_bytes += 0 if (status.st_dev, status.st_ino) in counted else status.st_size
            counted.add((status.st_dev, status.st_ino))
    return digest.hexdigest(), LayerSize(files, content_bytes)


def make_fit(folder: Path, *, keep_owners: bool) -> None:
    """Makes a folder that something else has filled what a LayerWriter would have made of it."""
    for path, status in list(_walk(folder)):
        place = folder / path
        if not keep_owners and (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(place, os.geteuid(), os.getegid(), follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            place.chmod(status.st_mode & 0o3777 | 0o700)
        elif stat.S_ISREG(status.st_mode):
            place.chmod(status.st_mode & 0o777 | 0o400)
        elif not stat.S_ISLNK(status.st_mode):
            place.unlink()


def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The root first, then by the bytes of names, each folder before what is in it."""
    waiting = [""]
    while waiting:
        path = waiting.pop()
        status = (folder / path).lstat()
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            names = sorted(os.listdir(folder / path), key=os.fsencode, reverse=True)
            waiting += [f"{path}/{name}" if path else name for name in names]


def _describe(place: Path, status: os.stat_result) -> tuple[Kind, bytes]:
    if stat.S_ISDIR(status.st_mode):
        return "folder", b"opaque" if is_opaque(place) else b""
    if stat.S_ISREG(status.st_mode):
        with open(place, "rb") as file:
            return "file", hashlib.file_digest(file, "sha256").digest()
    if stat.S_ISLNK(status.st_mode):
        return "link", os.fsencode(os.readlink(place))
    if is_whiteout(status):
        return "whiteout", b""
    raise ImageError(f"{place} is no file, folder or link; a layer holds nothing else")


def merge(layers: Sequence[Path], target: Path, *, below: Sequence[Path] = (), keep_owners: bool) -> None:
    """Makes one layer of several, the topmost first, in an empty folder; `below` is what will lie under it. Files are
    shared by hard links."""
    waiting, filled = [_Merged(layers, target, "", below)], list[_Merged]()
    while waiting:
        folder = waiting.pop()
        waiting += folder.fill()
        filled.append(folder)
    for folder in reversed(filled):  # what is made in a folder changes its time
        folder.finish(keep_owners)


@dataclass(frozen=True, slots=True)
class _Merged:
    """A folder that is made of several."""

    sources: Sequence[Path]
    """The folder as the layers have it, the topmost first, as far down as it is seen."""
    target: Path
    path: str
    below: Sequence[Path]
    """The layers under it that show through."""

    def fill(self) -> Iterator[_Merged]:
        """Returns the folders in it, which are made and empty."""
        entries: dict[str, list[Path]] = {}
        for source in self.sources:
            for name in os.listdir(source):
                entries.setdefault(name, []).append(source / name)
        for name, places in entries.items():
            target, path = self.target / name, f"{self.path}/{name}" if self.path else name
            status = places[0].lstat()
            if is_whiteout(status):
                if look_up(self.below, path) is not None:
                    make_whiteout(target)
            elif not stat.S_ISDIR(status.st_mode):
                os.link(places[0], target, follow_symlinks=False)
            else:
                target.mkdir(mode=0o700)
                seen, hides = _seen(places)
                under = look_up(self.below, path) if hides else None
                if under is not None and stat.S_ISDIR(under.st_mode):
                    set_opaque(target)
                yield _Merged(seen, target, path, () if hides else self.below)

    def finish(self, keep_owners: bool) -> None:
        status = self.sources[0].lstat()
        if keep_owners:
            os.chown(self.target, status.st_uid, status.st_gid)
        self.target.chmod(stat.S_IMODE(status.st_mode))
        os.utime(self.target, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _seen(places: Sequence[Path]) -> tuple[Sequence[Path], bool]:
    """Those of the folders that show through, and whether the last of them hides what is further down."""
    seen: list[Path] = []
    for place in places:
        if not stat.S_ISDIR(place.lstat().st_mode):
            return seen, True
        seen.append(place)
        if is_opaque(place):
            return seen, True
    return seen, False
