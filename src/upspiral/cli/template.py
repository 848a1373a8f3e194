"""`upspiral template`: whether a model's chat template can be trained on."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLORS = {"holds": "green", "costs": "yellow", "breaks": "red"}


def check(model: str, /) -> int:
    """Try a model's chat template on hard conversations and say what holds. Needs the tokenizer, no weights.

    Exit code 1 when the template cannot be trained on.

    Parameters
    ----------
    model
        A name from `upspiral model list`, a local Hugging Face folder, or a hub id.
    """
    # Imported here so that `upspiral --help` stays instant.
    from upspiral.rendering.certify import certify
    from upspiral.rendering.renderer import Renderer
    from upspiral.weights.models import resolve_model

    certificate = certify(Renderer.from_folder(resolve_model(model, weights=False)))
    console = Console()
    console.print(f"template: {certificate.template}", markup=False, highlight=False, soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in certificate.facts:
        facts.add_row(name, escape(value))
    console.print(facts)
    findings = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for each in certificate.findings:
        said = f"{each.found}\n-> {each.advice}" if each.found else ""
        findings.add_row(f"[{_COLORS[each.verdict]}]{each.verdict}[/]", each.name, escape(said))
    console.print(findings)
    counts = {verdict: sum(each.verdict == verdict for each in certificate.findings) for verdict in _COLORS}
    summary = "can be trained on" if certificate.trainable else "cannot be trained on"
    console.print(f"This template {summary}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0 if certificate.trainable else 1
