"""The soak of benchmarks/sandbox_soak.py in short: lives, faults and kills leave nothing, and nothing is made up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from upspiral.errors import SandboxError
from upspiral.sandbox.namespace.host import check_host


@pytest.mark.parametrize(
    ("cycles", "kills"), [(300, 6), pytest.param(20_000, 40, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_nothing_is_left_and_no_death_is_told_as_a_result(cycles: int, kills: int) -> None:
    try:
        check_host()
    except SandboxError as error:
        pytest.skip(f"the namespace backend cannot run here: {error}")
    command = [sys.executable, "benchmarks/sandbox_soak.py", "--server", "--cycles", str(cycles), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280 if cycles < 1000 else 2900)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["cycles"] >= cycles and sum(figures["kills"].values()) >= kills
    assert figures["kills"].keys() == {"owner", "keeper", "owner and keeper", "server", "server's owner"}
    assert figures["agents_killed"] > 0 and figures["errors"] > 0, "nothing broke: this tests nothing"
    told = {name: figures[name] for name in ("left_over", "wrong", "unexplained", "hung", "crashed")}
    assert told == dict.fromkeys(told, 0), figures
    assert figures["open_files"] <= 40, "what eight cycles hold at a time, and no more with every cycle"
