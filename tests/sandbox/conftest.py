"""The stage of the conformance suite, once for each backend."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.conformance import BACKENDS, Entry, Stage, stage_of

PARAMS = [pytest.param(each, marks=pytest.mark.slow if each.is_slow else (), id=each.name) for each in BACKENDS]


@pytest.fixture(params=PARAMS)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    entry: Entry = request.param
    with stage_of(entry) as made:
        yield made


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """On the host, and as far as its modes go anybody may read in it."""
    with tempfile.TemporaryDirectory(prefix="open-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
