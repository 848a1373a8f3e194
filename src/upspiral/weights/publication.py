"""The weights of one version where engines can read them: a folder with a manifest.

docs/design/010-outgrow.md says which names and forms the tensors have, 013-publication.md what is in the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class PublisherSettings:
    """Where and how a trainer publishes; it can be pickled."""

    root: Path
    """Each publication is a folder in it, `v000007`."""
    form: Literal["full", "delta"] = "full"
    """"delta": only what changed since the version before, without loss; every refresh and the first are whole."""
    keep: int = 2
    """How many of the newest publications stay, those that they need not included."""


@dataclass(frozen=True, slots=True)
class Publication:
    """One version, complete and readable. It can be pickled."""

    folder: Path
    version: int
    base: int | None
    """Of which version this is the difference; None: it is whole."""
    num_bytes: int
    """That were written for it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Tells an engine with old weights: what a version's log-probabilities are."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Of all tokens but the first, each after those before it: natural log at temperature 1, no filter."""
