"""What several integration tests start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fixtures.started_ranks import StartedRanks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedRanks]:
    """For one trainer after another of a module."""
    from tests.fixtures.started_ranks import StartedRanks

    started = StartedRanks(2, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()
