"""Images of Docker and of everything that writes OCI layouts: from their archives, or out of a Docker daemon."""

from __future__ import annotations

import json
import lzma
import platform
import posixpath
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol, cast

from upspiral.errors import ImageError
from upspiral.sandbox.base import WORKSPACE
from upspiral.sandbox.images.archive import Header, unpack_docker_layer
from upspiral.sandbox.images.hold import Hold
from upspiral.sandbox.images.image import ImageContent
from upspiral.sandbox.images.layer import clean_path
from upspiral.sandbox.images.store import ImageStore

_DEADLINE_S = 1800.0
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_LARGEST_JSON_BYTES = 16 << 20
_INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")


@dataclass(frozen=True, slots=True)
class _Described:
    """What an archive says of its image."""

    config: Mapping[str, Any]
    layers: Sequence[str]
    """Their paths in the archive, the bottom one first."""


class _Archive(Protocol):
    def open(self, path: str) -> BufferedReader:
        """Raises ImageError when it is not there."""
        ...

    def has(self, path: str) -> bool: ...


def import_docker_archive(path: Path, store: ImageStore, hold: Hold, *, tag: str = "") -> ImageContent:
    """The image of a `docker save` archive or an OCI layout, as a tar or a folder. `tag` chooses among several.

    Its environment and working directory are kept. Its user, entry point and volumes are not: commands say themselves
    what they run. Raises ImageError for an archive that is damaged, unsafe, or for another processor.
    """
    with _opened(path) as archive:
        try:
            described = _describe(archive, path, tag)
            places, diff_ids = list(described.layers), list(described.config["rootfs"]["diff_ids"])
            env, workdir = settings_of(described.config.get("config") or {})
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ImageError(f"{path}: its description is not that of an image ({error!r})") from error
        if len(diff_ids) != len(places):
            raise ImageError(f"{path}: {len(places)} layers, but {len(diff_ids)} in its configuration")
        layers: list[str] = []
        for place, diff_id in zip(places, diff_ids, strict=True):
            layers += _import_layer(archive.open(str(place)), diff_id, store, hold, layers)
    return ImageContent(tuple(layers), env, workdir)


def settings_of(config: Mapping[str, Any]) -> tuple[Mapping[str, str], str]:
    """Environment and working directory of what Docker calls an image's config. Raises ValueError for what no process
    can be given, TypeError and AttributeError for what is no config."""
    env = dict(each.split("=", 1) for each in config.get("Env") or [] if each.find("=") > 0)
    workdir = posixpath.join("/", config.get("WorkingDir") or "")
    for text in (*env, *env.values(), workdir):
        if "\0" in text:
            raise ValueError(f"{text!r} has a NUL")
        text.encode()  # half a surrogate pair is no text
    return env, WORKSPACE if workdir == "/" else workdir


def import_from_docker(reference: str, store: ImageStore, hold: Hold) -> ImageContent:
    """An image of the Docker daemon that this machine's `docker` reaches, pulled when it is not there."""
    docker = shutil.which("docker")
    if docker is None:
        raise ImageError(
            f"docker:{reference} needs the docker program; or give an archive of `docker save` as oci:FILE"
        )
    if _run([docker, "image", "inspect", reference]) is not None:
        problem = _run([docker, "pull", "--quiet", reference])
        if problem is not None:
            raise ImageError(f"docker has no image {reference} and could not pull it: {problem}")
    with store.draft() as draft:
        saved = draft.folder / "saved.tar"
        if (problem := _run([docker, "save", "--output", str(saved), reference])) is not None:
            raise ImageError(f"`docker save {reference}` failed: {problem}")
        return import_docker_archive(saved, store, hold)


def _import_layer(
    stream: BufferedReader, diff_id: str, store: ImageStore, hold: Hold, below: Sequence[str]
) -> Sequence[str]:
    """The layer's digest, or nothing when it is empty."""
    with stream, store.draft() as draft:
        writer = draft.writer(store.lowers(below))
        found = f"sha256:{unpack_docker_layer(stream, writer)}"
        if found != diff_id:
            raise ImageError(f"a layer is damaged: it should be {diff_id} and is {found}")
        if writer.is_empty:
            return []
        writer.finish()
        return [store.install(draft, hold).digest]


def _describe(archive: _Archive, path: Path, tag: str) -> _Described:
    if archive.has("manifest.json"):
        entry = _choose(_json(archive, "manifest.json"), tag, path)
        described = _Described(_json(archive, entry["Config"]), entry["Layers"])
    elif archive.has("index.json"):
        described = _describe_oci(archive, _json(archive, "index.json"), path)
    else:
        raise ImageError(
            f"{path} has neither manifest.json nor index.json; it is no archive of an image (a tar: tar:FILE)"
        )
    wanted = _architecture()
    if (found := described.config.get("architecture", wanted)) != wanted:
        raise ImageError(f"{path} is for {found}, and this machine is {wanted}")
    return described


def _choose(entries: Sequence[Mapping[str, Any]], tag: str, path: Path) -> Mapping[str, Any]:
    chosen = [each for each in entries if not tag or tag in (each.get("RepoTags") or [])]
    if len(chosen) == 1:
        return chosen[0]
    tags = ", ".join(sorted(tag for each in entries for tag in each.get("RepoTags") or [])) or "none"
    raise ImageError(
        f"{path} holds {len(entries)} images (tags: {tags}), {len(chosen)} of them fit; save the one you want"
    )


def _describe_oci(archive: _Archive, index: Mapping[str, Any], path: Path) -> _Described:
    # An attestation stands among the manifests as one of an unknown platform.
    fitting = [each for each in index.get("manifests", []) if _is_ours(each.get("platform") or {})]
    if len(fitting) != 1:
        raise ImageError(f"{path} holds {len(fitting)} images for {_architecture()}; one is needed")
    found = _json(archive, _blob(fitting[0]["digest"]))
    if fitting[0].get("mediaType") in _INDEX_TYPES or "manifests" in found:
        return _describe_oci(archive, found, path)
    return _Described(
        _json(archive, _blob(found["config"]["digest"])), [_blob(each["digest"]) for each in found["layers"]]
    )


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/', 1)}"


def _is_ours(made_for: Mapping[str, str]) -> bool:
    wanted = _architecture()
    return made_for.get("architecture", wanted) == wanted and made_for.get("os", "linux") == "linux"


def _architecture() -> str:
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


def _json(archive: _Archive, path: str) -> Any:
    with archive.open(path) as file:
        content = file.read(_LARGEST_JSON_BYTES)
    try:
        return json.loads(content)
    except ValueError as error:
        raise ImageError(f"{path} in the archive is no JSON: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    try:
        if path.is_dir():
            yield _Folder(path)
        else:
            with tarfile.open(path, tarinfo=Header) as archive:
                yield _Tar(archive)
    except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ImageError(f"{path} cannot be read as an archive: {error}") from error


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def has(self, path: str) -> bool:
        return path in self._archive.getnames()

    def open(self, path: str) -> BufferedReader:
        try:
            file = self._archive.extractfile(path)  # a link to another member is followed within the archive
        except (KeyError, RecursionError):
            file = None
        if file is None:
            raise ImageError(f"the archive has no {path!r}")
        return cast("BufferedReader", file)


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, path: str) -> bool:
        return (self._folder / path).is_file()

    def open(self, path: str) -> BufferedReader:
        try:
            return open(self._folder / clean_path(path), "rb")
        except OSError as error:
            raise ImageError(f"the layout has no {path!r}: {error}") from error


def _run(command: Sequence[str]) -> str | None:
    """What went wrong; None when nothing did."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            timeout=_DEADLINE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it took over {_DEADLINE_S:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip()[-600:] or f"exit code {done.returncode}")
