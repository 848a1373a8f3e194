"""What a container is started with, and how its agent comes to its host."""

from __future__ import annotations

import asyncio
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from upspiral.errors import CapabilityError, SandboxError
from upspiral.sandbox import inside
from upspiral.sandbox.base import HOST_IMAGE, Limits, SandboxSpec
from upspiral.sandbox.connected import ConnectedSandbox, settings_for
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.container.doorway import SOCKET_NAME, Doorway
from upspiral.sandbox.container.engine import Abilities, Engine
from upspiral.sandbox.container.host_image import host_archive
from upspiral.sandbox.container.images import Images
from upspiral.sandbox.container.order import Origin, agent_settings, check_mounts, run_arguments

ALL, NONE = Abilities(memory=True, processes=True, cpus=True), Abilities(memory=False, processes=False, cpus=False)
IMAGE = Origin("sha256:0", {"PATH": "/image", "A": "image"}, "/app")


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path."""
    made = Path(tempfile.mkdtemp(prefix="door-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def arguments(spec: SandboxSpec, origin: Origin = IMAGE, abilities: Abilities = ALL) -> list[str]:
    return list(run_arguments("name", "owner", spec, origin, abilities, Path("/door")))


def test_limits_are_the_engine_s_where_it_has_them() -> None:
    spec = SandboxSpec(limits=Limits(memory_mb=100, processes=10, cpus=0.5))
    given = arguments(spec)
    assert {"--memory=124m", "--memory-swap=124m", "--pids-limit=12", "--cpus=0.5"} <= set(given)
    assert not {"AS", "DATA", "NPROC"} & set(agent_settings(spec, IMAGE, ALL).rlimits)
    without = arguments(replace(spec, limits=replace(spec.limits, cpus=None)), abilities=NONE)
    assert not any(each.startswith(("--memory", "--pids", "--cpus")) for each in without)
    assert {"AS", "NPROC"} <= set(agent_settings(spec, IMAGE, NONE).rlimits)


def test_a_container_has_no_network_and_little_power() -> None:
    for origin in (IMAGE, Origin("host", is_host=True)):
        given = arguments(SandboxSpec(), origin)
        assert {"--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--rm"} <= set(given)
        assert all(each.endswith(",readonly") for each in given if each.startswith("--mount="))
    assert "--cap-add=NET_RAW" not in arguments(SandboxSpec())


def test_the_environment_of_an_image_is_beneath_that_of_a_spec() -> None:
    env = agent_settings(SandboxSpec(env={"A": "spec"}), IMAGE, ALL).env
    assert (env["PATH"], env["A"], env["HOME"]) == ("/image", "spec", "/app")


def test_mounts_may_have_commas_and_quotes_in_their_names(folder: Path) -> None:
    awkward = folder / 'a,b "c"'
    awkward.mkdir()
    (mount,) = [each for each in arguments(SandboxSpec(mounts={str(awkward): "/opt/x"})) if "/opt/x" in each]
    (fields,) = csv.reader([mount.removeprefix("--mount=")])
    assert fields == ["type=bind", f"source={awkward}", "target=/opt/x", "readonly"]


def test_what_has_other_mounts_in_it_is_not_mounted(folder: Path) -> None:
    """It would be a way to write on the host: what is mounted below a read-only mount need not be that."""
    check_mounts(SandboxSpec(mounts={str(folder): "/opt/x", "/dev/null": "/opt/null"}))
    (folder / "link").symlink_to("/dev")
    for path in ("/", "/dev", str(folder / "link")):
        with pytest.raises(CapabilityError, match="is a mount of its own inside"):
            check_mounts(SandboxSpec(mounts={path: "/opt/x"}))


def test_the_machine_s_own_image_tells_nothing_of_the_machine(folder: Path) -> None:
    (folder / "image.tar").write_bytes(host_archive())
    subprocess.run(["tar", "-xf", "image.tar"], cwd=folder, check=True, timeout=60)
    assert {"passwd", "group"} <= set(os.listdir(folder / "etc"))
    assert not {"shadow", "hostname", "machine-id", "ssh"} & set(os.listdir(folder / "etc"))
    assert (folder / "work").is_dir() and (folder / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_an_agent_comes_to_its_doorway(folder: Path) -> None:
    """And tells of the kernel's kills by a file that it finds itself."""
    (folder / "events").write_text("oom 0\noom_kill 3\n")
    work = folder / "work"
    work.mkdir()

    async def check() -> None:
        doorway = Doorway(folder / "door")
        target = f"to:{doorway.folder / SOCKET_NAME}"
        agent = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", *inside.__path__, target)
        try:
            connected = await asyncio.wait_for(doorway.caller(), 60)
            doorway.close()
            assert not doorway.folder.exists()
            settings = replace(
                settings_for(SandboxSpec(), str(work)), oom_paths=(str(folder / "none"), str(folder / "events"))
            )
            settings = replace(settings, rlimits={})
            sandbox = ConnectedSandbox("one", await Connection.over(connected, settings), Limits())
            assert not (await sandbox.exec("pwd", timeout_s=60)).oom
            assert (await sandbox.exec(f"printf 'oom 0\\noom_kill 4\\n' > {folder}/events", timeout_s=60)).oom
            await sandbox.stop()
            assert await asyncio.wait_for(agent.wait(), 60) == 0
        finally:
            if agent.returncode is None:
                agent.kill()

    asyncio.run(check())


def test_an_agent_that_finds_a_closed_doorway_ends(folder: Path) -> None:
    async def check() -> None:
        Doorway(folder / "door").close()
        target = f"to:{folder / 'door' / SOCKET_NAME}"
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", *inside.__path__, target, stderr=asyncio.subprocess.DEVNULL
        )
        assert await asyncio.wait_for(agent.wait(), 60) != 0

    asyncio.run(check())


SLOW_ENGINE = """#!/bin/bash
# It finishes what it was told to make, whatever becomes of this program.
name=${!#}
case $1 in
    import | commit)
        cat > /dev/null
        setsid bash -c "touch $0.began; sleep 0.5; echo $name >> $0.images" < /dev/null > /dev/null 2>&1 &
        wait $! ;;
    rmi)
        grep -qxF "$name" "$0.images" || { echo "Error: No such image: $name" >&2; exit 1; }
        grep -vxF "$name" "$0.images" > "$0.rest"
        mv "$0.rest" "$0.images" ;;
esac
"""


def test_images_whose_making_is_given_up_are_removed(folder: Path) -> None:
    program, images_there = folder / "docker", folder / "docker.images"
    program.write_text(SLOW_ENGINE)
    program.chmod(0o755)

    async def check() -> None:
        images = Images(Engine.find("docker", str(program)), "label")
        for make in (images.origin_of(HOST_IMAGE), images.commit("container", IMAGE)):
            making = asyncio.ensure_future(make)
            while not (folder / "docker.began").exists():
                await asyncio.sleep(0.01)
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making
            (folder / "docker.began").unlink()
        await images.remove_all()
        await asyncio.sleep(1.0)  # longer than the engine takes to finish what nobody waits for
        assert images_there.read_text() == ""
        snapshot = await images.commit("container", IMAGE)
        assert len(images_there.read_text().splitlines()) == 1
        images_there.write_text("")  # as when somebody else has removed it
        await images.drop(snapshot)
        await images.remove_all()

    asyncio.run(asyncio.wait_for(check(), 60))


@pytest.mark.parametrize("said", ['{"host": {}}', "[]", "not JSON"])
def test_an_engine_by_another_s_name_is_told(folder: Path, said: str) -> None:
    (folder / "docker").write_text(f"#!/bin/sh\necho '{said}'\n")
    (folder / "docker").chmod(0o755)
    with pytest.raises(SandboxError, match="does not answer as docker does"):
        Engine.find("docker", str(folder / "docker")).abilities()


def test_an_engine_s_troubles_are_infrastructure(folder: Path) -> None:
    with pytest.raises(SandboxError, match="no program 'no-such-engine'"):
        Engine.find("docker", "no-such-engine")
    program = folder / "docker"
    program.write_text("#!/bin/sh\n[ $1 = sleep ] && exec sleep 1000\necho they say no >&2; exit 3\n")
    program.chmod(0o755)
    engine = Engine.find("docker", str(program))
    for ask in (lambda: engine.ask_now("x"), lambda: asyncio.run(engine.ask("x"))):
        with pytest.raises(SandboxError, match="docker x: they say no"):
            ask()
    with pytest.raises(SandboxError, match=r"no answer within 0\.2 s"):
        engine.ask_now("sleep", timeout_s=0.2)
    with pytest.raises(SandboxError, match=r"no answer within 0\.2 s"):
        asyncio.run(engine.ask("sleep", timeout_s=0.2))
