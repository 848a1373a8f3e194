"""The stage of the conformance suite, once for each backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sandbox.conformance import BACKENDS, Entry, Stage, stage_of


@pytest.fixture(params=BACKENDS, ids=lambda entry: entry.name)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    entry: Entry = request.param
    with stage_of(entry) as made:
        yield made
