"""Layers that sandboxes and snapshots stand on, and who stands on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from upspiral.sandbox.namespace.keeper import syscalls
from upspiral.sandbox.namespace.keeper.identity import Identity
from upspiral.sandbox.namespace.keeper.merged import FOLDER_FLAGS


@dataclass(eq=False, slots=True)
class Layer:
    """What one sandbox had written when it was sealed or copied: a tmpfs in the keeper's sight, never written again."""

    mounted_at: str
    num_bytes: int = 0
    num_inodes: int = 0
    standing: int = 0
    """Sandboxes and snapshots that stand on it."""

    @property
    def folder(self) -> str:
        return f"{self.mounted_at}/u"

    @classmethod
    def at(cls, place: str) -> Layer:
        """Where one is to be mounted."""
        os.mkdir(place, 0o755)
        return cls(place)

    def measured(self) -> Layer:
        """Once it is mounted and filled."""
        space = os.statvfs(self.mounted_at)
        self.num_bytes = (space.f_blocks - space.f_bfree) * space.f_frsize
        self.num_inodes = space.f_files - space.f_ffree
        return self

    def open(self) -> int:
        return os.open(self.folder, FOLDER_FLAGS)

    def discard(self) -> None:
        with suppress(OSError):  # it may not have been mounted yet
            syscalls.unmount(self.mounted_at)
        os.rmdir(self.mounted_at)


@dataclass(frozen=True, slots=True)
class Stack:
    """What a sandbox begins with: layers, top first, above its image."""

    identity: Identity
    image: Sequence[str]
    """Folders, top first; none: the machine's own programs."""
    layers: Sequence[Layer] = field(default=())

    def topped(self, layer: Layer) -> Stack:
        return Stack(self.identity, self.image, [layer, *self.layers])

    def hold(self) -> None:
        for layer in self.layers:
            layer.standing += 1

    def release(self) -> None:
        """Layers that no one stands on any more are gone."""
        for layer in self.layers:
            layer.standing -= 1
            if layer.standing == 0:
                layer.discard()
