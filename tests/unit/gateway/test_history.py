"""What a request continues, where the chat template does not write messages one after the other: it drops thinking (a
fork for each question, and on from there), or writes the system prompt beside the last question."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.model_families import make_family
from upspiral.gateway.history import Answered, History
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import Message, ToolSpec

BASH = ToolSpec("bash", "Run.", {"type": "object", "properties": {"command": {"type": "string"}}})


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """Drops the thinking of answers before the last question, as Qwen3 does."""
    return Renderer.from_folder(make_family(tmp_path_factory.mktemp("qwen"), "qwen"))


class Talk:
    """A rollout whose model says what the test wants, and whose agent sends no thinking back."""

    def __init__(self, renderer: Renderer, *, keeps_thinking: bool) -> None:
        self.history = History("r", renderer, keeps_thinking=keeps_thinking)
        self.tools = [BASH]
        self.messages = [Message("user", "one")]
        self.reasons: list[str] = []
        self._renderer = renderer

    @property
    def graph(self) -> TrajectoryGraph:
        return self.history.graph

    def answer(self, text: str, follow: str) -> None:
        prompt = self.history.prompt(self.messages, self.tools)
        parent, added = self.history.add_context(prompt)
        self.reasons += [node.reason for node in added[:1]]
        ids = [*self._renderer.encode_answer(text), self._renderer.stop_token_ids[0]]
        opening = self._renderer.generation_prompt_after(self.messages[-1].role)
        run = TokenRun.answer(opening, ids, [0.0] * len(ids), [0] * len(ids), "stop")
        said = self._renderer.parse(ids, "stop").message
        node = self.history.add_answer(parent, run, Answered(said), prompt)
        path = self.graph.path_ids(node.id)
        assert np.array_equal(path, np.concatenate([prompt.token_ids, run.token_ids]))
        self.messages.append(Message("assistant", said.text, None, said.tool_calls))
        result = Message("tool", follow, tool_call_id=said.tool_calls[0].id) if said.tool_calls else None
        self.messages.append(result or Message("user", follow))


# Compact JSON: rendering the call again would give other tokens, so nothing but the stored ones may be used.
CALL = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name":"bash","arguments":{"command":"ls"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("keeps_thinking", "reasons"),
    [(False, ["root", "template", "append", "append", "template"]), (True, ["root", *["append"] * 4])],
)
def test_one_fork_for_each_question(renderer: Renderer, keeps_thinking: bool, reasons: list[str]) -> None:
    talk = Talk(renderer, keeps_thinking=keeps_thinking)
    talk.answer("<think>\nLet me greet.\n</think>\n\nhello", "two")
    talk.answer(CALL, "3 files")
    talk.answer(CALL, "4 files")
    talk.answer("<think>\nDone.\n</think>\n\n7 files", "three")
    talk.answer("bye", "four")
    assert talk.reasons == reasons
    last = renderer.spell(talk.graph.path_ids(talk.graph.nodes[-1].id).tolist())
    assert last.count("Hm.") == (2 if keeps_thinking else 0)


def test_an_edit_that_the_template_writes_elsewhere_is_an_edit_once(tmp_path: Path) -> None:
    """Mistral's template writes the system prompt into the last question: the edited message has the same tokens as the
    one before it."""
    renderer = Renderer.from_folder(make_family(tmp_path, "mistral"))
    talk = Talk(renderer, keeps_thinking=True)
    talk.messages = [Message("system", "Be brief."), Message("user", "one")]
    talk.answer("hello", "two")
    talk.messages = [Message("system", "Be polite."), Message("user", "one")]
    talk.answer('[TOOL_CALLS] [{"name":"bash","arguments":{"command":"ls"}}]', "3 files")
    talk.answer("There are three.", "three")
    assert talk.reasons == ["root", "branch", "append"]
    last = renderer.spell(talk.graph.path_ids(talk.graph.nodes[-1].id).tolist())
    assert "Be polite." in last and "Be brief." not in last
    assert '{"name":"bash","arguments":{"command":"ls"}}' in last


def test_a_whole_prompt_that_goes_on_as_it_is_stored_is_no_fork(tmp_path: Path) -> None:
    """Mistral's questions can only be rendered whole. Where the tokens stay, nothing about the past has changed."""
    talk = Talk(Renderer.from_folder(make_family(tmp_path, "mistral")), keeps_thinking=True)
    talk.tools = []
    for number in range(3):
        talk.answer(f" answer {number}", f"question {number}")
    assert talk.reasons == ["root", "append", "append"]
    assert [node.parent for node in talk.graph.nodes] == [None, *range(5)]
    talk.answer("trimmed by the template", "more?")
    talk.answer(" last", "")
    assert talk.reasons[-1] == "template"


def test_an_answer_that_was_given_with_other_tools_is_no_edit(renderer: Renderer) -> None:
    """As an agent's request for a summary has none, and the one after it has all again."""
    talk = Talk(renderer, keeps_thinking=True)
    talk.answer("one", "two?")
    talk.tools = []
    talk.answer("two", "three?")
    talk.tools = [BASH]
    talk.answer("three", "four?")
    assert talk.reasons == ["root", "tools", "tools"]


def test_only_the_newest_paths_are_kept_whole(renderer: Renderer) -> None:
    """An agent that asks the same again and again has as many answers that nothing continues."""
    talk = Talk(renderer, keeps_thinking=True)
    for _ in range(40):
        talk.answer("same", "on")
        del talk.messages[1:]
    kept = talk.history._paths  # pyright: ignore[reportPrivateUsage]
    assert len(kept) <= 16 and max(kept) == talk.graph.next_id - 1
