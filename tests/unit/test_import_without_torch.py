"""The base install has no torch: every module outside the training rooms must import where torch is not to be had."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import upspiral

NEEDS_TORCH = (
    "upspiral.trainer",
    "upspiral.algorithm.loss",
    "upspiral.engine.embedded",
    "upspiral.kernel.layer",
    "upspiral.kernel.path_attention",
    "upspiral.kernel.product",
    "upspiral.kernel.rows",
    "upspiral.launch.ray",
    "upspiral.loop",
    "upspiral.weights.load",
    "upspiral.weights.adapter",
    "upspiral.weights.cpu",
    "upspiral.weights.fused",
    "upspiral.weights.families",
    "upspiral.weights.experts",
    "upspiral.weights.model_files",
    "upspiral.weights.exact",
    "upspiral.weights.growing_file",
    "upspiral.weights.mirror",
    "upspiral.weights.probe",
    "upspiral.weights.publisher",
    "upspiral.weights.receiver",
    "upspiral.weights.safetensors_files",
    "upspiral.weights.shared_folder",
    "upspiral.weights.shelf",
)

PROGRAM = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "safetensors", "gguf", "accelerate", "peft", "openai"}:
            raise ImportError(f"refused: {name}", name=name)

sys.meta_path.insert(0, Refuse())
failures = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failures[name] = str(error)
print(json.dumps(failures))
"""


def all_modules() -> list[str]:
    return ["upspiral", *(info.name for info in pkgutil.walk_packages(upspiral.__path__, "upspiral.", onerror=None))]


ELSEWHERE = "upspiral.engine.vllm.inside"
"""Copied into an environment of its own, beside what it imports."""


def needs_torch(name: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in NEEDS_TORCH)


def test_every_base_module_imports_without_torch() -> None:
    base = [name for name in all_modules() if not needs_torch(name) and not name.startswith(ELSEWHERE)]
    assert len(base) > 30
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(base)], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == {}


def test_the_refusal_works() -> None:
    """Otherwise the test above would pass for the wrong reason."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(["torch", "transformers"])],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert set(json.loads(done.stdout)) == {"torch", "transformers"}
