"""The report page: complete, self-contained, true to its inputs, and safe whatever models and tools wrote."""

import base64
import hashlib
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.unit.dashboard.run_maker import RunMaker
from upspiral.dashboard.report import write_report
from upspiral.dashboard.run_data import RunData
from upspiral.dashboard.selection import matched, paired_counts
from upspiral.dashboard.summary import headline
from upspiral.errors import StoreError
from upspiral.monitor.metrics import MetricsLog, read_metrics

LOADING_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """The tags and the visible words of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._raw = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def page_of(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text()
    return html, Page(html)


def test_the_page_loads_nothing_from_anywhere(run_folder: Path) -> None:
    html, page = page_of(run_folder)
    for _, attributes in page.tags:
        assert not LOADING_ATTRIBUTES & attributes.keys()
    assert "@import" not in html and "url(" not in html
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form"}


def test_only_its_own_script_may_run(run_folder: Path) -> None:
    html, page = page_of(run_folder)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_its_numbers_are_the_measured_ones(run_folder: Path) -> None:
    _, page = page_of(run_folder)
    evaluations = [line for line in read_metrics(run_folder) if line["kind"] == "eval"]
    for line in evaluations:
        interval = f"{line['success']}/{line['tasks']}, {100 * line['low']:.1f} to {100 * line['high']:.1f} %"
        assert interval in page.text
    gain = 100 * (evaluations[-1]["rate"] - evaluations[0]["rate"])
    assert f"{gain:+.1f} points" in page.text
    with RunData.open(run_folder) as run:
        assert run.store is not None
        ledger = run.store.ledger()
    row = f"whole run{ledger.sampled:,}{ledger.trained:,}{ledger.masked['evaluation']:,}"
    assert row in page.text.replace(" ", "").replace("wholerun", "whole run")
    assert ledger.difference == 0 and "✓ closed" in page.text


def test_charts_carry_every_point(run_folder: Path) -> None:
    html, _ = page_of(run_folder)
    hover = [unescape(found) for found in re.findall(r'data-hover="([^"]*)"', html)]
    steps = [line for line in read_metrics(run_folder) if line["kind"] == "step"]
    for line in steps:
        assert any(f'"step {line["step"]}"' in one and f'"{line["reward_mean"]:.3f}"' in one for one in hover)


def test_the_difference_is_paired_when_rollouts_and_metrics_agree(run_folder: Path) -> None:
    with RunData.open(run_folder) as run:
        first = headline(run)
        counts = paired_counts(matched(run))
        assert first is not None and first.paired
        assert counts.both + counts.before_only == first.before.successes
        assert counts.both + counts.after_only == first.after.successes
        assert first.low <= first.difference <= first.high
    with MetricsLog(run_folder) as log:
        last = [line for line in read_metrics(run_folder) if line["kind"] == "eval"][-1]
        log.append("eval", last["step"], {**last, "success": last["success"] - 1})
    with RunData.open(run_folder) as run:
        second = headline(run)
        assert second is not None and not second.paired


def test_rollouts_read_as_conversations_with_tokens(run_folder: Path) -> None:
    html, page = page_of(run_folder)
    assert "wrong, then right" in page.text and "still wrong" in page.text
    assert "$ grep -c ERROR logs/app-" in page.text
    assert "naïve 😀 files■" in page.text, "characters of several tokens must come out whole"
    assert re.search(r'data-advantage="-?0\.\d+"', html)
    assert "advantage +" in page.text
    tokens = [attributes["data-t"] or "" for tag, attributes in page.tags if tag == "b" and "data-t" in attributes]
    assert len(tokens) > 100
    assert all(re.fullmatch(r"\d+\|-\d+\.\d{4}\|\d+", token) for token in tokens)


def test_hostile_output_stays_text(tmp_path: Path) -> None:
    hostile = "<script>alert('{0}')</script><img src=x onerror=alert(1)>\"'</pre></style>"
    folder = RunMaker(tmp_path / "run", question=hostile, tool_output=hostile.format("tool")).make()
    with MetricsLog(folder) as log:
        log.note(3, "<script>alert('note')</script>")
    html, page = page_of(folder)
    assert html.count("<script>") == 1
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "<script>alert('tool')</script>" in page.text and "<script>alert('note')</script>" in page.text


def test_a_killed_run_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    folder = RunMaker(tmp_path / "run", steps=2, planned=40, evaluate_after=False).make()
    _, page = page_of(folder)
    assert "This run did not finish. It made 2 of 40 steps" in page.text
    assert "Held-out success, measured once" in page.text
    assert "A training group, side by side" in page.text


def test_a_run_killed_at_once_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.toml").write_text('name = "early"\nsteps = 5\n')
    _, page = page_of(tmp_path)
    assert "It made 0 of 5 steps and no evaluation" in page.text and "not measured" in page.text


@pytest.mark.parametrize(("ending", "finished"), [("finished", True), ("resumed", False)])
def test_a_run_that_stopped_early_on_purpose_is_finished(tmp_path: Path, ending: str, finished: bool) -> None:
    folder = RunMaker(tmp_path / "run", steps=2, planned=40).make()
    with MetricsLog(folder) as log:
        log.note(2, "the budget is spent", finished=True)
        if ending == "resumed":
            log.resumed(3)
    _, page = page_of(folder)
    assert ("This run did not finish" not in page.text) == finished


def test_without_a_tokenizer_messages_are_shown_plain(tmp_path: Path) -> None:
    folder = RunMaker(tmp_path / "run", model="/nowhere/model").make()
    html, page = page_of(folder)
    assert "tokenizer of /nowhere/model was not at hand" in page.text
    assert "$ grep -c ERROR" in page.text and "data-t=" not in html


def test_long_outputs_are_cut_and_counted(tmp_path: Path) -> None:
    folder = RunMaker(tmp_path / "run", tool_output="x" * 5000).make()
    html, page = page_of(folder)
    assert "1,000 more characters" in page.text and "x" * 4001 not in html


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no run folder"):
        write_report(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        write_report(tmp_path / "nowhere")


def test_a_page_that_cannot_be_written_leaves_the_old_one(run_folder: Path) -> None:
    (run_folder / "report.html").write_text("old")
    (run_folder / "report.html.partial").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="No space left"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_text() == "old"
