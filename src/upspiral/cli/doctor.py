"""`upspiral doctor`: what this machine has and lacks. It tries things instead of guessing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from upspiral.engine.vllm.environment import is_installed, vllm_python
from upspiral.kernel.build import load, missing_instructions
from upspiral.sandbox.survey import survey
from upspiral.weights.models import KNOWN_MODELS, cache_folder, cached_model

MEMORY_NEEDED_GB = 12
DISK_NEEDED_GB = 6
_FAST_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
_COLORS = {"ok": "green", "missing": "red", "note": "yellow"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    thing: str
    status: Literal["ok", "missing", "note"]
    """"note" costs speed or a feature, "missing" keeps `upspiral run` from working."""
    found: str
    advice: str = ""


def doctor() -> int:
    """Say what this machine has and lacks, and what to do about it. Exit code 1 when something is missing."""
    findings = list(examine())
    show(findings)
    return 1 if any(each.status == "missing" for each in findings) else 0


def show(findings: Sequence[Finding]) -> None:
    """Prints them as a table."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for each in findings:
        status = f"[{_COLORS[each.status]}]{each.status}[/]"
        # Escaped: "upspiral[train]" is no markup.
        table.add_row(status, each.thing, escape(f"{each.found}\n-> {each.advice}" if each.advice else each.found))
    Console().print(table)


def examine() -> Iterator[Finding]:
    """Every finding, cheapest first."""
    yield from _machine()
    yield from _packages()
    yield _bf16()
    yield _attention()
    yield from _sandboxes()
    yield _model()
    yield _vllm()
    yield _port()


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding("python", "missing" if old else "ok", version, "install Python 3.11 or newer" if old else "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", "ok" if cores > 1 else "note", str(cores), "" if cores > 1 else "the demo wants 2")
    memory_gb = psutil.virtual_memory().available / 1e9
    yield _enough("memory", memory_gb, MEMORY_NEEDED_GB, "close other programs, or lower trainer.tokens_per_microbatch")
    disk_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    yield _enough("disk", disk_gb, DISK_NEEDED_GB, f"free space on the disk of {Path.cwd()}")


def _enough(thing: str, free_gb: float, needed_gb: float, advice: str) -> Finding:
    found = f"{free_gb:.1f} GB free, the demo needs {needed_gb:.0f}"
    return Finding(thing, "ok", found) if free_gb >= needed_gb else Finding(thing, "note", found, advice)


def _packages() -> Iterator[Finding]:
    for name, extra in [("torch", "train"), ("transformers", "train"), ("gguf", "train"), ("openai", "agents")]:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", f"pip install 'upspiral[{extra}]'")
            continue
        yield _torch(version) if name == "torch" else Finding(name, "ok", version)
    yield _optional("deepspeed", "deepspeed")
    yield _megatron()


def _optional(name: str, kind: str) -> Finding:
    """A package that a kind of trainer needs, whose extra has the kind's name."""
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(
            name, "note", f'not installed; trainer.kind = "{kind}" needs it', f"pip install 'upspiral[{kind}]'"
        )


def _megatron() -> Finding:
    found = _optional("megatron-core", "megatron")
    if found.status != "ok" or import_module("torch").cuda.is_available():
        return found
    advice = 'Megatron is made for CUDA; train with trainer.kind = "local" or "fsdp" here'
    return Finding(found.thing, "note", f"{found.found}, without CUDA for tests of its logic only", advice)


def _torch(version: str) -> Finding:
    try:
        torch: Any = import_module("torch")
    except (ImportError, OSError) as error:
        return Finding("torch", "missing", f"{version} is installed and cannot be imported: {error}", "reinstall it")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    return Finding("torch", "ok", f"{version}, {device}")


def _bf16() -> Finding:
    flags = _cpu_flags()
    fast = [flag for flag in _FAST_BF16_FLAGS if flag in flags]
    if fast:
        return Finding("bfloat16", "ok", f"computed in hardware ({fast[0]})")
    advice = "if a run is slow, compare with --model.dtype float32"
    return Finding("bfloat16", "note", "this processor does not say that it computes bfloat16 in hardware", advice)


def _attention() -> Finding:
    if load("path_attention") is not None:
        return Finding("attention", "ok", "compiled for this processor")
    advice = "training and exact sampling are slower; needs g++ and a processor with AVX-512 and its bfloat16"
    return Finding("attention", "note", missing_instructions() or "there is no C++ compiler, or it failed", advice)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _sandboxes() -> Iterator[Finding]:
    """The backend that runs use, and the others, which `sandbox serve --backend` and programs of one's own can take."""
    first, *others = survey()
    if first.works:
        yield Finding("sandbox", "ok", f"{first.backend}, the default: {first.found}")
    else:
        usable = ", ".join(each.backend for each in others if each.works) or "none"
        advice = f"`upspiral run` needs this backend; for `upspiral sandbox serve --backend` here are: {usable}"
        yield Finding("sandbox", "missing", f"{first.backend}, the default: {first.found}", advice)
    yield Finding("other sandboxes", "ok", "\n".join(f"{each.backend}: {each.found}" for each in others))


def _model() -> Finding:
    name = next(iter(KNOWN_MODELS))
    if (folder := cached_model(name)) is not None:
        return Finding("model", "ok", f"{name} in {folder}")
    return Finding("model", "missing", f"{name} is not in {cache_folder()}", f"upspiral model get {name}")


def _vllm() -> Finding:
    if is_installed():
        return Finding("vllm", "ok", f"its environment's interpreter is {vllm_python()}")
    return Finding("vllm", "note", 'not installed; only engine.kind = "vllm" needs it', "upspiral engine install vllm")


def _port() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Finding("ports", "ok", f"a loopback port can be opened (tried {server.getsockname()[1]})")
    except OSError as error:
        return Finding("ports", "missing", f"no loopback port can be opened: {error}", "allow 127.0.0.1 for this user")
