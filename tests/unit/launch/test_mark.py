"""A rank that does not see the run folder says so before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from upspiral.errors import ConfigError
from upspiral.launch.ray.mark import Mark


def test_the_same_folder_passes_and_one_of_the_same_name_does_not(tmp_path: Path) -> None:
    mark = Mark.made(tmp_path)
    mark.check()
    Mark.made(tmp_path)  # as another run would, in the folder of another machine
    with pytest.raises(ConfigError, match=f"does not have the run folder {tmp_path}"):
        mark.check()
    with pytest.raises(ConfigError, match="where all nodes see it"):
        Mark(tmp_path / "nowhere", mark.text).check()
