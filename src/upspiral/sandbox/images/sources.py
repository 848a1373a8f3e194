"""What an image can be made on."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import ImageError
from upspiral.sandbox.images.archive import copy_folder, unpack_tar
from upspiral.sandbox.images.debian import MIRROR, bootstrap
from upspiral.sandbox.images.docker import import_docker_archive, import_from_docker
from upspiral.sandbox.images.hold import Hold
from upspiral.sandbox.images.image import ImageContent
from upspiral.sandbox.images.layer import make_fit
from upspiral.sandbox.images.store import Draft, ImageStore


@dataclass(frozen=True, slots=True)
class Sources:
    """Brings bases into a store and holds them."""

    store: ImageStore
    hold: Hold
    folder: Path
    """What paths are relative to."""
    cached: bool = True
    """Whether a Debian that was made before is taken again."""

    def get(self, base: str) -> ImageContent:
        """`base` as in a recipe. Raises ImageError."""
        kind, colon, rest = base.partition(":")
        if not colon:
            return self._image(base)
        if kind == "debian":
            return self._debian(rest)
        if kind == "docker":
            return import_from_docker(rest, self.store, self.hold)
        if kind == "oci":
            return import_docker_archive(self._path(rest), self.store, self.hold)
        if kind == "tar":
            return self._layer(lambda draft: self._unpack(draft, self._path(rest)))
        if kind == "folder":
            return self._layer(lambda draft: self._copy(draft, self._path(rest)))
        raise ImageError(
            f"base = {base!r} is not known; use debian:RELEASE, docker:NAME, oci:PATH, tar:PATH, folder:PATH or the "
            "name of an image"
        )

    def _image(self, name: str) -> ImageContent:
        with self.store.use(name) as used:
            return self.store.add(used.image.content, self.hold).content

    def _debian(self, release: str) -> ImageContent:
        if not re.fullmatch(r"[a-z]+", release):
            raise ImageError(f"debian:{release} is no release; use its name, such as debian:bookworm")
        key = hashlib.sha256(repr(("debian", release, MIRROR, platform.machine())).encode()).hexdigest()
        if self.cached and (layer := self.store.find_step(key, self.hold)):
            return ImageContent((layer,))
        with self.store.draft() as draft:
            bootstrap(release, draft.files)
            make_fit(draft.files, keep_owners=self.store.keep_owners)
            layer = self.store.install(draft, self.hold)
        self.store.remember_step(key, layer)
        return ImageContent((layer.digest,))

    def _layer(self, fill: Callable[[Draft], None]) -> ImageContent:
        with self.store.draft() as draft:
            fill(draft)
            return ImageContent((self.store.install(draft, self.hold).digest,))

    def _unpack(self, draft: Draft, path: Path) -> None:
        writer = draft.writer()
        try:
            with open(path, "rb") as file:
                unpack_tar(file, writer)
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error}") from error
        writer.finish()

    def _copy(self, draft: Draft, path: Path) -> None:
        if not path.is_dir():
            raise ImageError(f"there is no folder {path}")
        writer = draft.writer()
        copy_folder(path, writer)
        writer.finish()

    def _path(self, text: str) -> Path:
        return self.folder / Path(text).expanduser()
