"""The image of containers that see the programs of this machine: empty but for a small /etc; /usr is mounted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

USER_ID = 1000
"""Whom commands run as, by the name "agent"."""
_SYSTEM_FOLDERS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "magic", "mime.types", "protocols",
        "services")  # fmt: skip
_FOLDERS = {"etc": 0o755, "proc": 0o755, "dev": 0o755, "sys": 0o755, "run": 0o755, "opt": 0o755, "var": 0o755,
            "tmp": 0o1777, "var/tmp": 0o1777}  # fmt: skip
_WRITTEN = {
    "etc/passwd": f"root:x:0:0:root:/:/bin/bash\nagent:x:{USER_ID}:{USER_ID}:agent:/work:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": f"root:x:0:\nagent:x:{USER_ID}:\nnogroup:x:65534:\n",
}


def mounted_folders() -> Sequence[str]:
    """The machine's own, which are to be seen inside at the same place. Links to them are in the image."""
    return [f"/{name}" for name in _SYSTEM_FOLDERS if Path("/", name).is_dir() and not Path("/", name).is_symlink()]


def host_archive() -> bytes:
    """A tar for `import`."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, mode in _FOLDERS.items():
            archive.addfile(_folder(name, mode))
        archive.addfile(_folder("work", 0o755, USER_ID))
        for name in _SYSTEM_FOLDERS:
            path = Path("/", name)
            if path.is_symlink():
                archive.add(path, name)
            elif path.is_dir():
                archive.addfile(_folder(name, 0o755))
        for name in _ETC:
            if Path("/etc", name).exists():
                archive.add(Path("/etc", name), f"etc/{name}")
        for name, text in _WRITTEN.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return content.getvalue()


def _folder(name: str, mode: int, owner: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
    return entry
