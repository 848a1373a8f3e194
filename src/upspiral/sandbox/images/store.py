"""Images of this machine: layers by their content, what images are made of them, and who stands on what.

    layers/DIGEST/files      a layer, as it lies in an overlay; layer.json beside it has its size
    images/DIGEST.json       layers, environment and working directory; its digest is over these three
    names/NAME.json          which image a name means, what it was made from and when
    steps/DIGEST             the layer that a step of a recipe made, by image and step
    holds/                   what live processes stand on, each file locked by its process
    work/                    what is being made, each folder locked by its process

Everything appears whole by a rename, and is never changed afterwards. Processes may use one store at the same time:
what adds or holds takes the store's lock shared, and the collector takes it alone for as long as it decides.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from upspiral.errors import ImageError
from upspiral.sandbox.images.hold import Hold, held_digests, is_abandoned, locked, make_lock
from upspiral.sandbox.images.image import Image, ImageContent, ImageName, Layer
from upspiral.sandbox.images.layer import LayerSize, LayerWriter, measure, merge
from upspiral.sandbox.owner import remove_tree

MAX_LAYERS = 48
"""Deeper stacks are flattened: to look for a missing file asks every layer."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDERS = ("layers", "images", "names", "steps", "holds", "work")
_T = TypeVar("_T")


def store_folder() -> Path:
    """Beside the models: below UPSPIRAL_CACHE, or ~/.cache/upspiral."""
    return Path(os.environ.get("UPSPIRAL_CACHE") or Path.home() / ".cache" / "upspiral") / "images"


@dataclass(frozen=True, slots=True)
class Draft:
    """A layer that is being made, in a folder that nobody else touches."""

    folder: Path
    keep_owners: bool

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def writer(self, below: Sequence[Path] = ()) -> LayerWriter:
        return LayerWriter(self.files, below=below, keep_owners=self.keep_owners)


@dataclass(frozen=True, slots=True)
class UsedImage:
    """An image whose layers stay there until it is released, or the process ends."""

    image: Image
    lowers: Sequence[Path]
    """The folders of its layers, the topmost first, as overlayfs wants them (mounted with `userxattr`)."""
    hold: Hold

    @property
    def env(self) -> Mapping[str, str]:
        return self.image.content.env

    @property
    def workdir(self) -> str:
        return self.image.content.workdir

    def release(self) -> None:
        self.hold.release()

    def __enter__(self) -> UsedImage:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed."""

    images: int
    layers: int
    content_bytes: int
    unfinished: int
    """Works that processes have left which are gone."""


class ImageStore:
    """The images in one folder.

    Everything in a layer belongs to root inside, and to this user here: a sandbox has one id. `keep_owners` keeps those
    of archives, for a backend that gives sandboxes a range of ids; that takes root.
    """

    def __init__(self, folder: Path | None = None, *, keep_owners: bool = False) -> None:
        self.folder = folder or store_folder()
        self.keep_owners = keep_owners
        try:
            for name in _FOLDERS:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"no images can be kept in {self.folder} (UPSPIRAL_CACHE): {error}") from error

    def images(self) -> Sequence[Image]:
        """Those that have a name, by name."""
        with self._locked():
            return [self.image(path.stem) for path in sorted((self.folder / "names").glob("*.json"))]

    def image(self, name: str) -> Image:
        """By name or digest. Raises ImageError that names the nearest one."""
        named = self._read(f"names/{name}.json", ImageName) if _NAME.fullmatch(name) else None
        digest = named.digest if named else name
        content = self._read(f"images/{digest}.json", ImageContent) if _DIGEST.fullmatch(digest) else None
        if content is None and named is not None:
            raise ImageError(f"the image {name!r} is damaged; make it again")
        if content is None:
            near = get_close_matches(name, [path.stem for path in (self.folder / "names").glob("*.json")], n=1)
            hint = f"did you mean {near[0]}?" if near else "`upspiral image list` has what there is"
            raise ImageError(f"there is no image {name!r}; {hint}")
        return Image(digest, content, name, named.source, named.made_s) if named else Image(digest, content)

    def layer(self, digest: str) -> Layer:
        """Raises ImageError when it is not there."""
        size = self._read(f"layers/{digest}/layer.json", LayerSize) if _DIGEST.fullmatch(digest) else None
        if size is None:
            raise ImageError(f"the layer {digest!r} is not in {self.folder}; make its image again")
        return Layer(digest, size)

    def lowers(self, layers: Sequence[str]) -> Sequence[Path]:
        """The folders of layers that are given from the bottom up, the topmost first."""
        return [self.folder / "layers" / each / "files" for each in reversed(layers)]

    def use(self, name: str) -> UsedImage:
        """An image by name or digest, to start sandboxes of. Raises ImageError."""
        try:
            with contextlib.ExitStack() as exits:
                hold = exits.enter_context(self.hold())
                with self._locked():
                    image = self.image(name)
                    hold.add((image.digest, *image.layers))
                for digest in image.layers:
                    self.layer(digest)
                exits.pop_all()
        except OSError as error:
            raise ImageError(f"the images in {self.folder} cannot be used: {error}") from error
        return UsedImage(image, self.lowers(image.layers), hold)

    def hold(self) -> Hold:
        """One that holds nothing yet."""
        return Hold(self.folder)

    @contextlib.contextmanager
    def draft(self) -> Iterator[Draft]:
        """A new layer, thrown away when the context ends unless it was installed."""
        folder = self.folder / "work" / secrets.token_hex(8)
        with self._locked():
            folder.mkdir(mode=0o755)
            lock = make_lock(folder / "lock")
        try:
            (folder / "files").mkdir()
            (folder / "files").chmod(0o755)  # whatever the umask is: it is part of the digest
            yield Draft(folder, self.keep_owners)
        finally:
            remove_tree(folder)
            os.close(lock)

    def install(self, draft: Draft, hold: Hold) -> Layer:
        """Puts a finished draft among the layers and holds it. The same content is kept once."""
        digest, size = measure(draft.files, keep_owners=self.keep_owners)
        (draft.folder / "layer.json").write_bytes(msgspec.json.encode(size))
        with self._locked():
            hold.add([digest])
            try:
                (draft.folder / "lock").unlink()
                draft.folder.rename(self.folder / "layers" / digest)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # somebody has put the same there
                    raise
        return Layer(digest, size)

    def add(self, content: ImageContent, hold: Hold) -> Image:
        """An image without a name, held with its layers, which somebody has to hold already. Raises ImageError."""
        image = Image(content.digest, content)
        with self._locked():
            hold.add([image.digest, *content.layers])
            for layer in content.layers:
                self.layer(layer)
            self._write(f"images/{image.digest}.json", content)
        return image

    def set_name(self, image: Image, name: str, source: str) -> Image:
        """From now on the name means this image, which has to be held; `source` tells people what it was made from."""
        if not _NAME.fullmatch(name):
            raise ImageError(
                f"{name!r} is no name for an image; use small letters, digits, dots, dashes and underscores"
            )
        made_s = time.time()
        with self._locked():
            self._write(f"names/{name}.json", ImageName(image.digest, source, made_s))
        return Image(image.digest, image.content, name, source, made_s)

    def remove_name(self, name: str) -> None:
        """The next collection removes what only this name stood for. Raises ImageError when there is no such name."""
        with self._locked(alone=True):  # nobody who lists the names loses one meanwhile
            if f"{name}.json" not in self._names("names"):
                raise ImageError(f"no image has the name {name!r}; `upspiral image list` has what there is")
            (self.folder / "names" / f"{name}.json").unlink()

    def find_step(self, key: str, hold: Hold) -> str | None:
        """The layer that this step made when it was done before, held."""
        with self._locked():
            try:
                digest = (self.folder / "steps" / key).read_text()
                self.layer(digest)
            except (FileNotFoundError, ImageError):
                return None
            hold.add([digest])
            return digest

    def remember_step(self, key: str, layer: Layer) -> None:
        """So that `find_step` finds it for as long as the layer is there."""
        with self._locked():
            self._write(f"steps/{key}", layer.digest)

    def flatten(self, layers: Sequence[str], hold: Hold, *, below: Sequence[str] = ()) -> Layer:
        """One layer that shows what these show together, from the bottom up, on those that stay below; all have to be
        held. Files are shared with the layers by hard links."""
        with self.draft() as draft:
            merge(self.lowers(layers), draft.files, below=self.lowers(below), keep_owners=self.keep_owners)
            return self.install(draft, hold)

    def references(self) -> Counter[str]:
        """How many images and holds of live processes stand on each layer."""
        counts: Counter[str] = Counter()
        with self._locked(alone=True):
            for digest in self._names("images"):
                counts.update(self.image(digest.removesuffix(".json")).layers)
            for held in held_digests(self.folder):
                counts.update(held)
        return Counter({each: counts[each] for each in self._names("layers")})

    def collect(self) -> Collected:
        """Removes images without a name that no live process holds, layers that no image and no live process stands on,
        and what processes that are gone have left unfinished."""
        with self._locked(alone=True):
            held = set[str]().union(*held_digests(self.folder))
            unfinished = [path for path in (self.folder / "work").iterdir() if is_abandoned(path / "lock")]
            names = (self._read(f"names/{each}", ImageName) for each in self._names("names"))
            named = {name.digest for name in names if name is not None}
            images = [path for path in (self.folder / "images").glob("*.json") if path.stem not in named | held]
            for path in images:
                path.unlink()
            live = held.union(*(self.image(name.removesuffix(".json")).layers for name in self._names("images")))
            dead = [self.layer(digest) for digest in self._names("layers") if digest not in live]
            doomed = [self._doom(layer) for layer in dead]
            for step in (self.folder / "steps").iterdir():
                if not (self.folder / "layers" / step.read_text()).is_dir():
                    step.unlink()
        for path in (*unfinished, *doomed):
            path.unlink() if path.is_file() else remove_tree(path)
        return Collected(len(images), len(dead), sum(each.size.content_bytes for each in dead), len(unfinished))

    def _doom(self, layer: Layer) -> Path:
        """A layer among the unfinished works, from where it is removed without the lock."""
        place = self.folder / "work" / f"{layer.digest}-{secrets.token_hex(4)}"
        (self.folder / "layers" / layer.digest).rename(place)
        return place

    def _locked(self, *, alone: bool = False) -> contextlib.AbstractContextManager[None]:
        return locked(self.folder, alone=alone)

    def _names(self, folder: str) -> Sequence[str]:
        return sorted(os.listdir(self.folder / folder))

    def _read(self, place: str, kind: type[_T]) -> _T | None:
        try:
            return msgspec.json.decode((self.folder / place).read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ImageError(
                f"{self.folder / place} is damaged: {error}; remove it and make the image again"
            ) from error

    def _write(self, place: str, content: Any) -> None:
        """Whole or not at all. Under the store's lock."""
        encoded = content.encode() if isinstance(content, str) else msgspec.json.encode(content)
        draft = self.folder / "work" / secrets.token_hex(8)
        draft.write_bytes(encoded)
        draft.rename(self.folder / place)
