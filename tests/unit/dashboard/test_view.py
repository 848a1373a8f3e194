"""The terminal viewer: tables of a run, a rollout as a conversation, and errors that name the nearest id."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.unit.dashboard.run_maker import RunMaker
from upspiral.dashboard.view import harmless, view
from upspiral.errors import StoreError
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Message, NodeCredit, Rollout, RolloutCredit, RolloutStatus


def shown(folder: Path, rollout_id: str | None = None, terminal: bool = False, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    view(folder, rollout_id, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_lists_evaluations_steps_and_rollouts(run_folder: Path) -> None:
    text = shown(run_folder)
    assert "3 of 3 steps, finished" in " ".join(text.split())  # a long model path wraps the line
    assert "held-out success" in text and "steps" in text
    assert "s1-g0-0" in text and "e3-008" in text and "How many lines of logs/app-" in text
    assert text.count("s2-g") == 12


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_and_only_the_instruction_gives_way(run_folder: Path, width: int) -> None:
    text = shown(run_folder, width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "finished" in text and "eval " in text


def test_a_terminal_gets_the_newest_rollouts(tmp_path: Path) -> None:
    folder = RunMaker(tmp_path / "run", steps=8, planned=8).make()
    text = shown(folder, terminal=True)
    assert "the newest 60 of" in text and "s1-g0-0" not in text


def test_a_rollout_reads_as_a_conversation(run_folder: Path) -> None:
    with_calls = shown(run_folder, "e0-001")
    assert "$ ls -la logs" in with_calls and "$ grep -c ERROR logs/app-" in with_calls
    assert "system  #0" in with_calls and "tool  #3" in with_calls
    assert "logprobs  '<' -" in with_calls, "a pipe has no colours, so it gets the numbers"
    assert "3 model calls" in with_calls and "masked" in with_calls.splitlines()[-1]


def test_a_terminal_gets_colours_with_a_legend(run_folder: Path) -> None:
    text = shown(run_folder, "e0-001", terminal=True)
    assert "token probability" in text and "least likely" in text and "logprobs" not in text


def test_advantages_stand_at_their_nodes_and_the_ledger_closes(run_folder: Path) -> None:
    store = TrajectoryStore(run_folder / "trajectories.db")
    credit = next(credit for step in (1, 2, 3) for credit in store.credits(step=step) if credit.masked is None)
    store.close()
    text = shown(run_folder, credit.rollout_id)
    assert text.count(f"advantage {credit.nodes[0].total:+.3f}") == len(credit.nodes)
    last = text.splitlines()[-1]
    assert "= trained" in last and last.rstrip().endswith("✓")


def test_the_start_of_an_id_is_enough_when_only_one_has_it(tmp_path: Path) -> None:
    folder = RunMaker(tmp_path / "run", steps=1, groups=1, tasks=1).make()
    assert "e1-000" in shown(folder, "e1")


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("s2-g0", r"it could be s2-g0-0, s2-g0-1"),
        ("s2-g0-9", r"did you mean s2-g0-"),
        ("zzzz", r"it has \d+, from e0-000"),
    ],
)
def test_an_unknown_rollout_names_the_nearest(run_folder: Path, wanted: str, hint: str) -> None:
    with pytest.raises(StoreError, match=hint):
        shown(run_folder, wanted)


def test_a_tree_shows_its_branches(run_folder: Path) -> None:
    store = TrajectoryStore(run_folder / "trajectories.db")
    store.create_rollout(Rollout("tree", "task", "group", step=1))
    graph = TrajectoryGraph("tree")
    root = graph.add(None, TokenRun.given([1, 2]), role="user", reason="root", message=Message("user", "pick one"))
    for reason, ids in (("append", [20, 21]), ("sibling", [30, 31])):
        run = TokenRun.answer([1], ids, np.log([0.5, 0.02]), [3, 3], "length")
        graph.add(root.id, run, role="assistant", reason=reason, message=Message("assistant", f"a {reason}"))
    store.commit("tree", graph.nodes)
    store.finish_rollout("tree", status=RolloutStatus.TRUNCATED, reason="max_calls", reward=0.0)
    credits = store.credits(step=1)
    store.record_step(
        1, [*credits, RolloutCredit("tree", "group", (NodeCredit(1, 0.75, -0.5), NodeCredit(2, 0.0, 0.0)))]
    )
    store.close()
    text = shown(run_folder, "tree")
    assert "truncated (max_calls)" in text and "a tree" in text
    assert "  assistant  #2  sibling, after #0" in text
    assert "advantage +0.250 (+0.750 and -0.500)" in " ".join(text.split())


def test_without_a_tokenizer_the_messages_are_shown(tmp_path: Path) -> None:
    folder = RunMaker(tmp_path / "run", model="/nowhere/model").make()
    text = shown(folder, "e0-000")
    assert "the tokenizer of /nowhere/model is not at hand" in text and "$ grep -c ERROR" in text


def test_what_a_model_wrote_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = RunMaker(
        tmp_path / "run", question="\x1b[2J\x1b]0;owned\x07{}", tool_output="\x1b[31mred\r\x9b1m\n"
    ).make()
    for text in (shown(folder), shown(folder, "e0-001")):
        assert not {"\x1b", "\x07", "\x9b", "\r"} & set(text)
    assert harmless("a\tb\n\x1b") == "a\tb\n␛"


def test_a_run_killed_at_once_says_nothing_was_measured(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.toml").write_text('name = "early"\nsteps = 5\n')
    assert "nothing measured yet" in shown(tmp_path)
    with pytest.raises(StoreError, match="it has no rollouts yet"):
        shown(tmp_path, "x")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no run folder"):
        shown(tmp_path)
