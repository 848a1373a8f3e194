"""The command line as a person meets it: one clear line for each mistake, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from upspiral import __version__
from upspiral.cli.main import run_command
from upspiral.cli.run import parse_flags
from upspiral.errors import ConfigError


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "agent.py").write_text("async def agent(task): ...\n")
    path = tmp_path / "tiny.toml"
    path.write_text('name = "tiny"\n[agent]\nfile = "agent.py"\n')
    return path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_dry_run_prints_the_resolved_config(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", str(run_file), "--steps", "3", "--dry-run", "--trainer.lr=1e-4"]) == 0
    printed = capsys.readouterr().out
    assert "steps = 3\n" in printed
    assert "lr = 0.0001\n" in printed
    again = run_file.parent / "again.toml"
    again.write_text(printed)
    assert run_command(["run", str(again), "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], 'Unknown command "rnu"'),
        (["run"], "requires an argument"),
        (["run", "nowhere.toml"], "no run file at nowhere.toml"),
        (["run", "FILE", "--trainer.lrr", "1"], "no such key; did you mean trainer.lr?"),
        (["run", "FILE", "--resum"], "--resum has no value"),
        (["run", "FILE", "extra"], "'extra' is no flag"),
        (["model", "get", "smollm"], "did you mean smollm2-135m?"),
        (["view", "nowhere"], "nowhere"),
        (["export", "nowhere", "--hf", "out"], "nowhere holds no training run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_command([str(run_file) if each == "FILE" else each for each in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert "Traceback" not in printed


def test_debug_lets_the_error_through(run_file: Path) -> None:
    with pytest.raises(ConfigError):
        run_command(["run", str(run_file), "--debug", "--no.such", "1"])


def test_help_of_run_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from upspiral.config.keys import all_keys

    assert run_command(["run", "--help"]) == 0
    printed = capsys.readouterr().out
    assert [key for key in all_keys() if f"--{key} " not in printed] == []


def test_flags_become_pairs() -> None:
    assert parse_flags(["--agent.max-calls", "3", "--name=a=b", "--trainer.lr", "-1"]) == [
        ("agent.max_calls", "3"),
        ("name", "a=b"),
        ("trainer.lr", "-1"),
    ]


def test_doctor_looks_at_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an empty cache the model is missing, which alone must give exit code 1 and say what to do."""
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path))
    assert run_command(["doctor"]) == 1
    printed = capsys.readouterr().out
    things = ("python", "cores", "memory", "disk", "torch", "deepspeed", "bfloat16", "sandbox", "model", "ports")
    assert [thing for thing in things if thing not in printed] == []
    assert "upspiral model get smollm2-135m" in printed
