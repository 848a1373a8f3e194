"""Every backend: what a sandbox may use. Whatever is tried, the sandbox answers afterwards."""

from __future__ import annotations

import os

import pytest

from tests.sandbox.conformance import Stage
from upspiral.sandbox.base import Limits


def test_a_fork_bomb(stage: Stage) -> None:
    stage.needs("commands")
    if os.geteuid() != 0 and stage.entry.name == "process":
        pytest.skip("without root the bomb is counted with all that this user runs, and its limit is not exact")
    done = stage.exec("bomb() { bomb | bomb & }; bomb; sleep 0.3; echo over", timeout_s=5)
    assert b"Resource temporarily unavailable" in done.stderr


def test_a_memory_bomb(stage: Stage) -> None:
    stage.needs("commands", "memory_limit")
    done = stage.exec("x=$(head -c 600M /dev/zero | tr '\\0' x); echo survived")
    assert done.stdout == b"" and done.exit_code != 0, done


def test_reserved_memory_need_not_count(stage: Stage) -> None:
    """As a JavaScript engine does it: 32 GB reserved, little of it written."""
    stage.needs("commands", "memory_limit")
    reserve = "python3 -c 'import mmap; mmap.mmap(-1, 32 << 30, prot=mmap.PROT_READ, flags=34); print(b\"x\" * 3)'"
    assert stage.exec(reserve, limits=Limits(memory_counts="writable")).stdout == b"b'xxx'\n"
    done = stage.exec(
        "x=$(head -c 600M /dev/zero | tr '\\0' x); echo survived", limits=Limits(memory_counts="writable")
    )
    assert done.stdout == b""


def test_a_cpu_limit(stage: Stage) -> None:
    stage.needs("commands")
    done = stage.exec("while :; do :; done", limits=Limits(cpu_s=1))
    assert not done.timed_out and done.exit_code in (137, 152) and done.wall_s < 30


def test_a_file_limit(stage: Stage) -> None:
    stage.needs("commands")
    done = stage.exec("head -c 10M /dev/zero > big; stat -c %s big", limits=Limits(file_mb=2))
    assert done.stdout.split() == [str(2 << 20).encode()]


def test_a_limit_on_open_files(stage: Stage) -> None:
    stage.needs("commands")
    done = stage.exec("ulimit -n; (exec 40<>/dev/null) || echo refused", limits=Limits(open_files=32))
    assert done.stdout == b"32\nrefused\n"


def test_no_core_is_left(stage: Stage) -> None:
    stage.needs("commands")
    done = stage.exec("ulimit -c; sh -c 'kill -ABRT $$'; ls -A")
    assert done.stdout == b"0\n"


def test_limits_cannot_be_raised(stage: Stage) -> None:
    stage.needs("commands", "robust_agent")
    done = stage.exec("ulimit -f unlimited || echo refused; ulimit -n 100000 || echo refused")
    assert done.stdout == b"refused\nrefused\n"


def test_the_disk_is_limited(stage: Stage) -> None:
    stage.needs("commands", "disk_quota")
    limits = Limits(disk_mb=16, file_mb=64, inodes=2000)
    done = stage.exec(
        "head -c 40M /dev/zero > big; rm -f big; for i in {1..4000}; do > $i || break; done", limits=limits
    )
    assert done.stderr.count(b"No space left on device") == 2
