"""Images in real sandboxes: what they look like inside, how recipes are built, and the way out."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures.small_image import make_small_root
from upspiral.errors import ImageError, SandboxError
from upspiral.sandbox.base import Allow, Sandbox, SandboxSpec
from upspiral.sandbox.images import Image, ImageBuilder, ImageStore, Recipe, UsedImage
from upspiral.sandbox.namespace import NamespaceBackend

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """With the image `small`."""
    folder = tmp_path_factory.mktemp("images")
    root = make_small_root(folder / "root")
    store = ImageStore(folder / "store")

    async def build() -> None:
        async with backend_of(store) as backend:
            builder = ImageBuilder(store, backend, progress=lambda _: None)
            await builder.build(Recipe(name="small", base=f"folder:{root}", env={"MOTTO": "small"}), folder)

    asyncio.run(build())
    return store


@asynccontextmanager
async def backend_of(store: ImageStore) -> AsyncIterator[NamespaceBackend]:
    backend = NamespaceBackend(images=store)
    try:
        if not backend.capabilities.images:
            pytest.skip("this machine's kernel does not layer images")
        yield backend
    finally:
        await backend.stop()


def within(store: ImageStore, spec: SandboxSpec, check: Callable[[Sandbox], Awaitable[None]]) -> None:
    async def run() -> None:
        async with backend_of(store) as backend, backend.acquire(spec) as sandbox:
            await check(sandbox)

    asyncio.run(run())


async def output(sandbox: Sandbox, command: str) -> str:
    done = await sandbox.exec(command, timeout_s=TIMEOUT_S)
    assert done.exit_code == 0, done
    return done.stdout.decode()


def test_a_sandbox_begins_with_its_image(store: ImageStore) -> None:
    async def check(sandbox: Sandbox) -> None:
        assert await output(sandbox, "cat /etc/motto; echo $MOTTO; id -u; echo *") == "small\nsmall\n0\n*\n"
        assert "python3" not in await output(sandbox, "ls /usr/bin")
        await output(sandbox, "echo x > /usr/bin/new; rm -r /srv/old; echo changed > /etc/motto")
        assert await output(sandbox, "cat /etc/motto /usr/bin/new; ls /srv") == "changed\nx\n"

    within(store, SandboxSpec(image="small"), check)

    async def check_again(sandbox: Sandbox) -> None:
        assert (
            await output(sandbox, "cat /etc/motto /srv/old/file; ls /usr/bin/new || echo none") == "small\nold\nnone\n"
        )

    within(store, SandboxSpec(image=store.image("small").digest), check_again)


def test_giving_files_and_groups_away_succeeds_without_effect(store: ImageStore) -> None:
    """As installers of packages do it, and programs such as xterm that start others with the groups of their user."""

    async def check(sandbox: Sandbox) -> None:
        assert await output(sandbox, "chown -R 5:6 /etc && stat -c %u:%g /etc/motto") == "0:0\n"
        assert await output(sandbox, "setpriv --groups 5,6 id -G") == "0\n"

    within(store, SandboxSpec(image="small"), check)


def test_an_image_that_is_not_there(store: ImageStore) -> None:
    async def run() -> None:
        async with backend_of(store) as backend:
            with pytest.raises(ImageError, match="did you mean small"):
                async with backend.acquire(SandboxSpec(image="smal")):
                    pass

    asyncio.run(run())


def test_a_recipe_is_built_in_sandboxes(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "local").write_text("from here\n")
    recipe = Recipe(
        name="built", base="small", files={"/opt/local": "local", "/bin/tool": "local"}, env={"WHO": "me"},
        workdir="/srv/app",
        commands=(
            "set -e; echo $WHO-$MOTTO > /etc/who; rm /etc/motto",
            "set -e; rm -r /srv/old; mkdir /srv/old; echo new > /srv/old/new",
            "set -e; ln -s who /etc/link; ln /etc/who /etc/hard; echo x > /tmp/x",
            "set -e; rm /usr/bin/sleep; mkdir /usr/bin/sleep",
        ),
    )  # fmt: skip

    async def run() -> None:
        async with backend_of(store) as backend:
            builder = ImageBuilder(store, backend, progress=lambda _: None)
            image = await builder.build(recipe, tmp_path)
            assert (await builder.build(recipe, tmp_path)).digest == image.digest
            async with backend.acquire(SandboxSpec(image="built")) as sandbox:
                shown = "cat /etc/who /etc/link /etc/hard /bin/tool; ls /srv/old /tmp; ls -d /usr/bin/sleep/"
                done = await sandbox.exec(f"{shown}; ls /etc/motto", timeout_s=TIMEOUT_S)
                assert done.stdout.decode().split() == [
                    "me-small", "me-small", "me-small", "from", "here", "/srv/old:", "new", "/tmp:", "/usr/bin/sleep/",
                ]  # fmt: skip
                assert b"/etc/motto" in done.stderr

    asyncio.run(run())


def test_a_step_that_fails_names_itself(store: ImageStore, tmp_path: Path) -> None:
    async def run() -> None:
        async with backend_of(store) as backend:
            builder = ImageBuilder(store, backend, progress=lambda _: None)
            with pytest.raises(ImageError, match=r"the step commands\.0 ended with 7; it said: why"):
                await builder.build(Recipe(name="bad", base="small", commands=("echo why; exit 7",)), tmp_path)

    asyncio.run(run())


def test_going_back_to_a_snapshot_of_another_image_is_being_in_that_image(store: ImageStore, tmp_path: Path) -> None:
    look = "echo $MOTTO $WHO $OWN; pwd; id -u"
    spec, at_home = SandboxSpec(image="other", env={"OWN": "own"}), "them own\n/srv/app\n0\n"

    async def run() -> None:
        async with backend_of(store) as backend, AsyncExitStack() as kept:
            builder = ImageBuilder(store, backend, progress=lambda _: None)
            recipe = Recipe(name="other", base="small", env={"MOTTO": "", "WHO": "them"}, workdir="/srv/app")
            await builder.build(recipe, tmp_path)
            other, small, host = [
                await kept.enter_async_context(backend.acquire(each))
                for each in (spec, replace(spec, image="small"), replace(spec, image="host"))
            ]
            assert await output(small, look) == "small own\n/work\n0\n"
            assert await output(host, look) == "own\n/work\n1000\n"
            assert await output(other, look) == at_home
            snapshot, former = await other.snapshot(), await small.snapshot()
            for sandbox in (small, host):
                await sandbox.restore(snapshot)
                assert await output(sandbox, look) == at_home
                assert await output(await fork_of(sandbox, kept), look) == at_home
            await small.restore(former)
            assert await output(small, look) == "small own\n/work\n0\n"

    async def fork_of(sandbox: Sandbox, kept: AsyncExitStack) -> Sandbox:
        (fork,) = await sandbox.fork()
        kept.push_async_callback(fork.stop)
        return fork

    asyncio.run(run())


def test_what_live_sandboxes_stand_on_is_not_collected(store: ImageStore, tmp_path: Path) -> None:
    async def run() -> None:
        async with backend_of(store) as backend:
            builder = ImageBuilder(store, backend, progress=lambda _: None)
            image = await builder.build(Recipe(name="short", base="small", commands=("echo a > /a",)), tmp_path)
            async with backend.acquire(SandboxSpec(image="short")) as sandbox:
                store.remove_name("short")
                store.collect()
                assert await output(sandbox, "cat /a") == "a\n"
                assert store.layer(image.layers[-1]).size.files == 1
        store.collect()
        with pytest.raises(ImageError):
            store.layer(image.layers[-1])

    asyncio.run(run())


def test_sandboxes_that_start_side_by_side_hold_their_image_once(store: ImageStore) -> None:
    """A hold that nobody remembers would keep the image from being collected for as long as this process lives."""

    class OnASlowDisk(ImageStore):
        def image(self, name: str) -> Image:
            found = super().image(name)
            time.sleep(0.05)
            return found

    async def run() -> None:
        async with backend_of(OnASlowDisk(store.folder)) as backend, AsyncExitStack() as kept:
            starts = (kept.enter_async_context(backend.acquire(SandboxSpec(image="small"))) for _ in range(4))
            await asyncio.gather(*starts)
            assert len(os.listdir(store.folder / "holds")) == 1
        assert os.listdir(store.folder / "holds") == []

    asyncio.run(run())


def test_a_start_that_a_stop_overtakes_holds_no_image(store: ImageStore) -> None:
    looking = threading.Event()

    class OnASlowDisk(ImageStore):
        def use(self, name: str) -> UsedImage:
            looking.set()
            time.sleep(0.5)
            return super().use(name)

    async def run() -> None:
        async with backend_of(OnASlowDisk(store.folder)) as backend, AsyncExitStack() as kept:
            start = asyncio.create_task(kept.enter_async_context(backend.acquire(SandboxSpec(image="small"))))
            assert await asyncio.to_thread(looking.wait, TIMEOUT_S)
            await backend.stop()
            with pytest.raises(SandboxError):
                await start
            assert os.listdir(store.folder / "holds") == []

    asyncio.run(run())


ASK = "exec 3<>/dev/tcp/127.0.0.1/3128; printf 'GET {url} HTTP/1.1\\r\\n\\r\\n' >&3; cat <&3"


@pytest.mark.parametrize("image", ["host", "small"])
def test_a_sandbox_reaches_what_its_list_has_and_nothing_else(store: ImageStore, image: str) -> None:
    """The destination is an address of this machine, which is allowed only because the list names it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nreached")
        await writer.drain()
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, backend_of(store) as backend:
            port = server.sockets[0].getsockname()[1]
            spec = SandboxSpec(image=image, network=Allow((f"127.0.0.1:{port}",)))
            async with backend.acquire(spec) as sandbox:
                assert await output(sandbox, "echo $https_proxy") == "http://127.0.0.1:3128\n"
                assert "reached" in await output(sandbox, ASK.format(url=f"http://127.0.0.1:{port}/"))
                assert " 403 " in await output(sandbox, ASK.format(url="http://127.0.0.1:1/"))
                direct = await sandbox.exec(f"exec 3<>/dev/tcp/127.0.0.1/{port}", timeout_s=TIMEOUT_S)
                assert direct.exit_code != 0
                (fork,) = await sandbox.fork()
                await sandbox.stop()
                assert "reached" in await output(fork, ASK.format(url=f"http://127.0.0.1:{port}/"))
                await fork.stop()

    asyncio.run(run())
