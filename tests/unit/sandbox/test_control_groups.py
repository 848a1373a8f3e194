"""Control groups as the keeper uses them, where this process may make some."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from upspiral.sandbox.namespace.keeper.control_groups import Group, mounted_hierarchies

FREEZERS = {1: "freezer.state", 2: "cgroup.freeze"}


@contextmanager
def a_group(version: int) -> Iterator[Group]:
    """One without limits, in every hierarchy of that version which the keeper would use."""
    places = sorted({place for name, place in mounted_hierarchies().items() if (name == "") == (version == 2)})
    if not places or not all(os.access(place, os.W_OK) for place in places):
        pytest.skip(f"no control group of version {version} can be made here")
    folders = [f"{place}/upspiral-test-{os.getpid()}" for place in places]
    group = Group(folders, "", f"{folders[0]}/{FREEZERS[version]}")
    try:
        for folder in folders:
            os.mkdir(folder)
        yield group
    finally:
        group.remove()
        assert not any(map(os.path.exists, folders))


@pytest.mark.parametrize("version", [1, 2])
def test_a_child_is_in_its_group_and_nobody_else_is(version: int) -> None:
    with a_group(version) as group:
        reader, writer = os.pipe()
        child = group.clone()
        if child == 0:
            try:
                group.enter()
                os.write(writer, b"in")
                signal.pause()
            finally:
                os._exit(0)
        try:
            os.close(writer)
            assert os.read(reader, 2) == b"in"
            members = [Path(folder, "cgroup.procs").read_text() for folder in group.folders]
        finally:
            os.close(reader)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert members == [f"{child}\n"] * len(group.folders)
