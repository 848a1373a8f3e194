"""The size budgets: each kind of excess is found, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "tools" / "check_budgets.py"


def check(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout + done.stderr


def function(name: str, lines: int, parameters: str = "") -> str:
    return f"def {name}({parameters}):\n" + "    x = 1\n" * (lines - 1) + "\n\n"


def test_small_code_is_within_the_budgets(tmp_path: Path) -> None:
    (tmp_path / "noun.py").write_text(function("f", 5, "self, a, b, c, d, e, f"))
    code, text = check(tmp_path)
    assert code == 0
    assert "size budgets: kept" in text


def test_each_excess_is_named(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text(function("wide", 2, "a, b, *, c, d, e, f, g"))
    (tmp_path / "noun.py").write_text(function("long", 81) + "# filler\n" * 600)
    code, text = check(tmp_path)
    assert code == 1
    for part in (
        "utils.py: the name says nothing",
        "wide: 7 parameters",
        "long: 81 lines",
        "noun.py: 683 lines",
        "p90",
    ):
        assert part in text
