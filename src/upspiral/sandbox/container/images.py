"""What containers are made of: the engine's images, the machine's own programs, and snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from typing import Any

from upspiral.errors import ImageError, SandboxError
from upspiral.sandbox.base import HOST_IMAGE, Snapshot
from upspiral.sandbox.container.engine import Engine, RefusedError
from upspiral.sandbox.container.host_image import host_archive
from upspiral.sandbox.container.order import OWNER_LABEL, Origin
from upspiral.sandbox.images.docker import settings_of

_COPY_TIMEOUT_S = 150.0
_NOT_THERE = ("no such image", "image not known")
"""What Docker and what Podman says of an image that it does not have."""


class Images:
    """Of one backend. What it makes carries the backend's label, and is removed at its end."""

    def __init__(self, engine: Engine, label: str):
        self._engine = engine
        self._label = label
        self._named: dict[str, Origin] = {}
        self._snapshots: dict[str, Origin] = {}
        self._made: list[str] = []
        """Also those that are being made. Later ones may stand on earlier ones."""
        self._under_way: dict[str, asyncio.Future[str]] = {}
        self._dropped: set[str] = set()
        self._turn = asyncio.Lock()

    async def origin_of(self, image: str | Snapshot) -> Origin:
        """Raises ImageError when the engine has no such image. What a name meant first it means to the end."""
        if isinstance(image, Snapshot):
            return self.origin_of_snapshot(image)
        async with self._turn:
            if image not in self._named:
                make = self._host() if image == HOST_IMAGE else self._inspected(image)
                self._named[image] = await make
            return self._named[image]

    def origin_of_snapshot(self, snapshot: Snapshot) -> Origin:
        origin = self._snapshots.get(snapshot.id)
        if origin is None:
            raise SandboxError(f"there is no {snapshot.id} here; it was dropped, or belongs to another backend")
        return origin

    async def commit(self, container: str, origin: Origin) -> Snapshot:
        snapshot = Snapshot(f"snapshot-{secrets.token_hex(8)}", "copied")
        name = f"{self._label}:{snapshot.id}"
        await self._make(name, "commit", "--pause=true", container, timeout_s=_COPY_TIMEOUT_S)
        self._snapshots[snapshot.id] = Origin(name, origin.env, origin.workdir, origin.is_host)
        return snapshot

    async def drop(self, snapshot: Snapshot) -> None:
        if (origin := self._snapshots.pop(snapshot.id, None)) is not None:
            self._dropped.add(origin.image)
            await self.collect()

    async def collect(self) -> None:
        """Removes dropped snapshots on which nothing stands any more: the engine knows, and refuses the others."""
        for name in [each for each in reversed(self._made) if each in self._dropped]:
            if name not in self._under_way:
                with contextlib.suppress(RefusedError):
                    await self._remove(name)

    async def remove_all(self) -> None:
        """When the containers are gone."""
        if self._under_way:
            await asyncio.wait(self._under_way.values())
        while self._made:
            await self._remove(self._made[-1], "--force")
        self._named.clear()
        self._snapshots.clear()

    async def _make(self, name: str, *order: str, **options: Any) -> None:
        """`order` is what the engine is told, without the name at its end.

        An engine finishes what it was told to make although whoever told it was cut off. So a name is noted before,
        and what was given up goes on and is removed later.
        """
        making = asyncio.ensure_future(self._engine.ask(*order, name, **options))
        self._made.append(name)
        self._under_way[name] = making
        making.add_done_callback(lambda _: self._under_way.pop(name))
        try:
            await asyncio.shield(making)
        except BaseException:
            self._dropped.add(name)
            raise

    async def _remove(self, name: str, *options: str) -> None:
        """Raises RefusedError when something stands on it."""
        try:
            await self._engine.ask("rmi", *options, name)
        except RefusedError as error:
            if not any(said in str(error).lower() for said in _NOT_THERE):
                raise
        self._dropped.discard(name)
        if name in self._made:  # two may be at it
            self._made.remove(name)

    async def _host(self) -> Origin:
        # A name of its own each time: one that was given up may still be under way.
        name = f"{self._label}:{HOST_IMAGE}-{secrets.token_hex(3)}"
        content = await asyncio.to_thread(host_archive)
        label = f"LABEL {OWNER_LABEL}={self._label}"
        await self._make(name, "import", "--change", label, "-", content=content)
        return Origin(name, is_host=True)

    async def _inspected(self, image: str) -> Origin:
        name = self._engine.name
        try:
            (told,) = json.loads(await self._engine.ask("image", "inspect", "--", image))
        except RefusedError as error:
            raise ImageError(f"{error}; `{name} pull {image}` gets an image, `{name} build` makes one") from error
        try:
            return Origin(told["Id"], *settings_of(told["Config"]))
        except ValueError as error:
            raise ImageError(f"image {image!r}: {error}") from error
