from pathlib import Path

import pytest

from tests.unit.dashboard.run_maker import RunMaker


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return RunMaker(tmp_path / "run").make()
