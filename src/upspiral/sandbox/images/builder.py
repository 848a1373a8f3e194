"""Makes images by recipes: each step runs once, in a sandbox of what is there so far, and what it wrote is a layer."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader, BytesIO
from pathlib import Path
from tarfile import DIRTYPE, TarInfo

from upspiral.errors import ImageError
from upspiral.sandbox.base import Allow, Command, Diff, ExecResult, Limits, SandboxBackend, SandboxSpec
from upspiral.sandbox.egress.policy import Policy
from upspiral.sandbox.images.archive import copy_folder, unpack_tar
from upspiral.sandbox.images.hold import Hold
from upspiral.sandbox.images.image import Image, ImageContent, Layer
from upspiral.sandbox.images.layer import clean_path, look_up, real_path
from upspiral.sandbox.images.recipe import MIRRORS, Recipe, Step, steps_after_files, steps_before_files
from upspiral.sandbox.images.sources import Sources
from upspiral.sandbox.images.store import MAX_LAYERS, ImageStore

_OF_THE_SANDBOX = ("dev", "proc", "sys", "run", "tmp", "etc/resolv.conf", "etc/hosts", "etc/hostname")
"""What every sandbox has of its own: it is no part of an image."""
_KEPT_OUTPUT_BYTES = 256 * 1024
_SHOWN_OUTPUT_BYTES = 2000
_ROOT = (0, 0)
_CERTIFICATES = "/opt/upspiral/certificates.pem"
_CERTIFICATE_VARIABLES = (
    "SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BuildMachine:
    """What steps need because of where they run; it does not change what they make, and is no part of any digest."""

    networks: tuple[str, ...] = ()
    """Ranges that package registries may lie in although they are not public."""
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def behind(cls, networks: tuple[str, ...], certificates: Path | None) -> BuildMachine:
        """One whose way to the registries leads through private networks, or past TLS certificates of its own. Raises
        ConfigError and ImageError."""
        Policy(Allow((), networks))  # which says what is no network, before anything is made
        if certificates is None:
            return cls(networks)
        if not certificates.is_file():
            raise ImageError(f"there is no file of certificates {certificates}")
        mounts = {str(certificates.resolve()): _CERTIFICATES}
        return cls(networks, dict.fromkeys(_CERTIFICATE_VARIABLES, _CERTIFICATES), mounts)


class ImageBuilder:
    """Makes images in a store with a backend that reads the same store."""

    def __init__(
        self,
        store: ImageStore,
        backend: SandboxBackend,
        *,
        machine: BuildMachine | None = None,
        cached: bool = True,
        progress: Callable[[str], None] = print,
    ) -> None:
        """`cached`: whether steps that were done before are left out. `progress` gets lines for people."""
        self._store = store
        self._backend = backend
        self._machine = machine or BuildMachine()
        self._cached = cached
        self._progress = progress

    async def build(self, recipe: Recipe, folder: Path) -> Image:
        """`folder` is what the recipe's paths are relative to. Raises ImageError that names the step."""
        given = _given_files(recipe, folder)
        with self._store.hold() as hold:
            self._progress(f"base {recipe.base}")
            sources = Sources(self._store, hold, folder, self._cached)
            content = await asyncio.to_thread(sources.get, recipe.base)
            content = replace(content, env={**content.env, **recipe.env})
            for step in steps_before_files(recipe):
                content = await self._run(content, step, recipe, hold)
            if given:
                content = await asyncio.to_thread(self._add_files, content, given, hold)
            for step in steps_after_files(recipe):
                content = await self._run(content, step, recipe, hold)
            if "workdir" in recipe.model_fields_set:
                content = await asyncio.to_thread(self._set_workdir, content, recipe.workdir, hold)
            if len(content.layers) > MAX_LAYERS:
                flat = await asyncio.to_thread(self._store.flatten, content.layers, hold)
                content = replace(content, layers=(flat.digest,))
            return self._store.set_name(self._store.add(content, hold), recipe.name, recipe.base)

    async def _run(self, content: ImageContent, step: Step, recipe: Recipe, hold: Hold) -> ImageContent:
        key = _step_key(content, step)
        if self._cached and (known := self._store.find_step(key, hold)):
            self._progress(f"{step.name}: done before")
            return _on_top(content, known)
        self._progress(f"{step.name}: running")
        spec = self._spec(self._store.add(content, hold), recipe)
        async with self._backend.acquire(spec) as sandbox:
            command = Command(step.script, cwd="/", output_bytes=_KEPT_OUTPUT_BYTES)
            result = await sandbox.exec(command, timeout_s=recipe.timeout_s)
            if result.exit_code != 0:
                raise ImageError(_failure(step, recipe, result))
            diff = await sandbox.diff()
        layer = await asyncio.to_thread(self._add_diff, content, diff, hold)
        self._store.remember_step(key, layer)
        self._progress(f"{step.name}: {layer.size.files} files, {layer.size.content_bytes / 1e6:.1f} MB")
        return _on_top(content, layer.digest)

    def _spec(self, image: Image, recipe: Recipe) -> SandboxSpec:
        limits = Limits(
            memory_mb=recipe.memory_mb, memory_counts="writable", processes=1024, disk_mb=recipe.disk_mb,
            inodes=1_000_000, file_mb=recipe.disk_mb, cpu_s=int(recipe.timeout_s) + 1, open_files=4096,
            lifetime_s=recipe.timeout_s + 600,
        )  # fmt: skip
        return SandboxSpec(
            image=image.digest, env={"HOME": "/root", **self._machine.env}, limits=limits,
            network=Allow((*MIRRORS, *recipe.hosts), self._machine.networks), mounts=self._machine.mounts,
            labels={"image": recipe.name},
        )  # fmt: skip

    def _add_diff(self, content: ImageContent, diff: Diff, hold: Hold) -> Layer:
        with self._store.draft() as draft:
            writer = draft.writer(self._store.lowers(content.layers))
            unpack_tar(BufferedReader(BytesIO(diff.archive)), writer)
            for path in _OF_THE_SANDBOX:  # only now: what stays may be linked to files there
                writer.leave_out(path)
            for path in diff.removed:
                if not _is_of_the_sandbox(path):
                    writer.remove(path)
            writer.finish()
            return self._store.install(draft, hold)

    def _add_files(self, content: ImageContent, given: Mapping[str, Path], hold: Hold) -> ImageContent:
        with self._store.draft() as draft:
            writer = draft.writer(self._store.lowers(content.layers))
            for inside, source in given.items():
                copy_folder(source, writer, place=inside, owner=_ROOT)
            writer.finish()
            layer = self._store.install(draft, hold)
        self._progress(f"files: {layer.size.files} files, {layer.size.content_bytes / 1e6:.1f} MB")
        return _on_top(content, layer.digest)

    def _set_workdir(self, content: ImageContent, workdir: str, hold: Hold) -> ImageContent:
        """The folder is made when no step has made it."""
        content = replace(content, workdir=workdir)
        lowers = self._store.lowers(content.layers)
        path = real_path(lowers, clean_path(workdir), is_folder=True)
        if look_up(lowers, path) is not None:
            return content
        with self._store.draft() as draft:
            writer = draft.writer(lowers)
            folder = TarInfo(path)
            folder.type, folder.mode = DIRTYPE, 0o755
            writer.add(folder, None)
            writer.finish()
            return _on_top(content, self._store.install(draft, hold).digest)


def _given_files(recipe: Recipe, folder: Path) -> Mapping[str, Path]:
    """The path inside -> what is to be there. Raises ImageError, before steps that take minutes are run in vain."""
    given = {inside: folder / Path(local).expanduser() for inside, local in recipe.files.items()}
    for inside, source in given.items():
        if not source.exists():
            raise ImageError(f"files.{inside}: there is no {source}")
    return given


def _on_top(content: ImageContent, layer: str) -> ImageContent:
    return replace(content, layers=(*content.layers, layer))


def _step_key(content: ImageContent, step: Step) -> str:
    """The same step on the same image makes the same: that is what steps are left out by."""
    return hashlib.sha256(json.dumps([content.digest, step.script]).encode()).hexdigest()


def _is_of_the_sandbox(path: str) -> bool:
    return any(path.strip("/") == each or path.strip("/").startswith(f"{each}/") for each in _OF_THE_SANDBOX)


def _failure(step: Step, recipe: Recipe, result: ExecResult) -> str:
    how = (
        f"was stopped after {recipe.timeout_s:g} s (timeout_s)"
        if result.timed_out
        else f"ended with {result.exit_code}"
    )
    if result.oom:
        how += ", and the kernel killed something for want of memory (memory_mb)"
    said = (result.stdout + result.stderr)[-_SHOWN_OUTPUT_BYTES:].decode(errors="replace").strip() or "nothing"
    return f"image {recipe.name}: the step {step.name} {how}; it said: {said}"
