"""What containers are made of: the engine's images, the machine's own programs, and snapshots."""

from __future__ import annotations

import asyncio
import json
import secrets

from upspiral.errors import ImageError, SandboxError
from upspiral.sandbox.base import HOST_IMAGE, WORKSPACE, Snapshot
from upspiral.sandbox.container.engine import Engine, RefusedError
from upspiral.sandbox.container.host_image import host_archive
from upspiral.sandbox.container.order import OWNER_LABEL, Origin

_COPY_TIMEOUT_S = 150.0


class Images:
    """Of one backend. What it makes carries the backend's label, and is removed at its end."""

    def __init__(self, engine: Engine, label: str):
        self._engine = engine
        self._label = label
        self._named: dict[str, Origin] = {}
        self._snapshots: dict[str, Origin] = {}
        self._made: list[str] = []
        """Later ones may stand on earlier ones."""
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
        await self._engine.ask("commit", "--pause=true", container, name, timeout_s=_COPY_TIMEOUT_S)
        self._made.append(name)
        self._snapshots[snapshot.id] = Origin(name, origin.env, origin.workdir, origin.is_host)
        return snapshot

    async def drop(self, snapshot: Snapshot) -> None:
        if (origin := self._snapshots.pop(snapshot.id, None)) is not None:
            self._dropped.add(origin.image)
            await self.collect()

    async def collect(self) -> None:
        """Removes dropped snapshots on which nothing stands any more: the engine knows, and refuses the others."""
        for name in [each for each in reversed(self._made) if each in self._dropped]:
            try:
                await self._engine.ask("rmi", name)
            except RefusedError:
                continue
            self._made.remove(name)
            self._dropped.discard(name)

    async def remove_all(self) -> None:
        """When the containers are gone."""
        while self._made:
            await self._engine.ask("rmi", "--force", self._made[-1])
            self._made.pop()
        self._named.clear()
        self._snapshots.clear()

    async def _host(self) -> Origin:
        name = f"{self._label}:{HOST_IMAGE}"
        content = await asyncio.to_thread(host_archive)
        label = f"LABEL {OWNER_LABEL}={self._label}"
        await self._engine.ask("import", "--change", label, "-", name, content=content)
        self._made.append(name)
        return Origin(name, is_host=True)

    async def _inspected(self, image: str) -> Origin:
        name = self._engine.name
        try:
            (told,) = json.loads(await self._engine.ask("image", "inspect", "--", image))
        except RefusedError as error:
            raise ImageError(f"{error}; `{name} pull {image}` gets an image, `{name} build` makes one") from error
        config = told["Config"]
        env = dict(each.split("=", 1) for each in config.get("Env") or [] if "=" in each)
        workdir = config.get("WorkingDir") or "/"
        return Origin(told["Id"], env, WORKSPACE if workdir == "/" else workdir)
