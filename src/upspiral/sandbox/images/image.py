"""What an image is: layers, the environment and the working directory that commands start with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from upspiral.sandbox.base import WORKSPACE
from upspiral.sandbox.images.layer import LayerSize


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the store."""

    digest: str
    size: LayerSize


@dataclass(frozen=True, slots=True)
class ImageContent:
    """All that decides what a sandbox begins with."""

    layers: tuple[str, ...] = ()
    """Digests, the bottom one first."""
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = WORKSPACE

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal; the same wherever and whenever it was made."""
        parts = (self.layers, sorted(self.env.items()), self.workdir)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


@dataclass(frozen=True, slots=True)
class Image:
    """What a sandbox can begin with."""

    digest: str
    content: ImageContent
    name: str = ""
    """Empty for one that was found by its digest."""
    source: str = ""
    """What it was made from, for people."""
    made_s: float = 0.0
    """When, in seconds since 1970."""

    @property
    def layers(self) -> tuple[str, ...]:
        return self.content.layers


@dataclass(frozen=True, slots=True)
class ImageName:
    """Which image a name means."""

    digest: str
    source: str
    made_s: float
