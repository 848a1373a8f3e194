"""The certificate of a template names what holds, what costs and what breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.model_families import FAMILIES, make_family
from upspiral.cli.main import run_command
from upspiral.rendering.certify import Certificate, Finding, certify
from upspiral.rendering.renderer import Renderer


def certificate_of(folder: Path) -> Certificate:
    return certify(Renderer.from_folder(folder))


def finding(certificate: Certificate, name: str) -> Finding:
    return next(each for each in certificate.findings if each.name == name)


def changed(folder: Path, family: str, old: str, new: str) -> Certificate:
    source = (make_family(folder, family) / "chat_template.jinja").read_text()
    assert old in source
    (folder / "chat_template.jinja").write_text(source.replace(old, new))
    return certificate_of(folder)


COSTS = {
    "llama3": {"text beside a call"},
    "deepseek": {"text beside a call"},
    "mistral": {
        "questions and answers",
        "tool turns",
        "parallel calls, results in a row",
        "text beside a call",
        "no arguments",
        "empty strings",
        "thinking before a new question",
        "an answer cut off, then a question",
        "a system message in the middle",
        "questions in a row",
        "a question after tool results",
        "answers in a row",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_family_costs(tmp_path: Path, family: str) -> None:
    certificate = certificate_of(make_family(tmp_path, family))
    assert certificate.trainable
    assert {each.name for each in certificate.findings if each.verdict != "holds"} == COSTS.get(family, set())
    assert len(certificate.findings) > 20
    assert all(each.advice and each.found for each in certificate.findings if each.verdict != "holds")


def test_a_template_that_changes_what_came_before_breaks(tmp_path: Path) -> None:
    certificate = changed(
        tmp_path, "qwen_xml", "{{- message.content | trim }}", "{{- message.content | trim if loop.last else '~' }}"
    )
    assert finding(certificate, "questions and answers").verdict != "holds"
    moved = changed(
        tmp_path / "b",
        "qwen_xml",
        "(message.content | trim) + '<|im_end|>\\n'",
        "(message.content if loop.last else '~') + '<|im_end|>\\n'",
    )
    assert not moved.trainable
    assert "changes what was rendered before it at token" in finding(moved, "what came before an answer stays").found


def test_python_spellings_of_arguments_are_named(tmp_path: Path) -> None:
    """Booleans that a template prints the way Python does."""
    certificate = changed(tmp_path, "glm", "(value if value is string else value | tojson)", "(value | string)")
    broken = finding(certificate, "booleans, numbers, null, lists, objects")
    assert broken.verdict == "costs" and "read back as" in broken.found
    assert certificate.trainable


def test_a_template_without_tools(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "glm")
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(source)
    certificate = certificate_of(folder)
    assert certificate.trainable and finding(certificate, "tools").verdict == "costs"
    assert dict(certificate.facts)["tool format"] == "none"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(["template", "check", str(make_family(tmp_path / "good", "glm"))]) == 0
    printed = capsys.readouterr().out
    assert "tool format" in printed and "glm" in printed and "<|observation|> (6)" in printed
    assert "This template can be trained on" in printed
    changed(
        tmp_path / "bad",
        "qwen_xml",
        "(message.content | trim) + '<|im_end|>\\n'",
        "(message.content if loop.last else '~') + '<|im_end|>\\n'",
    )
    assert run_command(["template", "check", str(tmp_path / "bad")]) == 1
    printed = capsys.readouterr().out
    assert "cannot be trained on" in printed and "breaks" in printed
    assert run_command(["template", "check", str(tmp_path / "none")]) == 2
