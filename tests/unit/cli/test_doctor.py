"""`upspiral doctor` on sandboxes: which backend there is and why, and what to do where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from upspiral.cli.doctor import Finding, examine, show
from upspiral.errors import SandboxError
from upspiral.sandbox.namespace.host import check_host
from upspiral.sandbox.survey import survey

_TOLD = """
import dataclasses, json
from upspiral.sandbox.survey import survey
print(json.dumps([dataclasses.astuple(each) for each in survey()]))
"""


def test_what_works_is_tried_and_described() -> None:
    try:
        check_host()
    except SandboxError as error:
        pytest.skip(f"the namespace backend cannot run here: {error}")
    told = {each.backend: each for each in survey()}
    assert list(told) == ["namespace", "process", "docker", "podman"]
    assert told["namespace"].works and told["process"].works
    who = "as root" if os.geteuid() == 0 else f"as user {os.geteuid()}"
    for word in (who, "a command ran in", "control groups"):
        assert word in told["namespace"].found
    for word in ("code that you trust", "Landlock"):
        assert word in told["process"].found
    for name in ("docker", "podman"):
        assert told[name].works or name in told[name].found
        if shutil.which(name) is None:
            assert f"there is no program {name!r}" in told[name].found


def test_where_there_are_no_namespaces_it_says_what_to_do() -> None:
    forbidden = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbidden, "sh", sys.executable, "-c", _TOLD]
    source = str(Path(__file__).parents[3] / "src")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": source}
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespace to forbid others in: {done.stderr}")
    assert done.returncode == 0, done.stderr
    backend, works, found = json.loads(done.stdout)[0]
    assert (backend, works) == ("namespace", False)
    assert "sudo sysctl user.max_user_namespaces" in found


def test_an_engine_that_does_not_answer_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "docker"
    engine.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2; exit 1\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    (docker,) = (each for each in survey() if each.backend == "docker")
    assert not docker.works and "Cannot connect to the Docker daemon" in docker.found


def test_an_engine_by_another_s_name_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "docker"
    engine.write_text("#!/bin/sh\necho '{\"host\": {}}'\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    (docker,) = (each for each in survey() if each.backend == "docker")
    assert not docker.works and "does not answer as docker does" in docker.found


def test_square_brackets_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are markup to the library that prints the table."""
    monkeypatch.setenv("COLUMNS", "200")
    show([Finding("torch", "missing", "not [b]installed[/b]", "pip install 'upspiral[train]'")])
    printed = capsys.readouterr().out
    assert "not [b]installed[/b]" in printed and "-> pip install 'upspiral[train]'" in printed


def test_megatron_without_cuda_is_for_tests() -> None:
    torch = pytest.importorskip("torch", reason="needs the [train] extra")
    if find_spec("megatron") is None or torch.cuda.is_available():
        pytest.skip("needs the [megatron] extra, and no CUDA")
    found = next(each for each in examine() if each.thing == "megatron-core")
    assert found.status == "note" and "for tests of its logic only" in found.found and "fsdp" in found.advice
