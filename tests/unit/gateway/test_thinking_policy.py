"""Thinking policy "template": a conversation forks where the template drops thinking, and goes on from there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fixtures.model_families import make_family
from upspiral.gateway.history import Answered, History
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TokenRun
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
        self.messages = [Message("user", "one")]
        self.reasons: list[str] = []
        self._renderer = renderer

    def answer(self, text: str, follow: str) -> None:
        prompt = self.history.prompt(self.messages, [BASH])
        parent, added = self.history.add_context(prompt)
        self.reasons.append(added[0].reason)
        ids = [*self._renderer.encode_answer(text), self._renderer.stop_token_ids[0]]
        opening = self._renderer.generation_prompt_after(self.messages[-1].role)
        run = TokenRun.answer(opening, ids, [0.0] * len(ids), [0] * len(ids), "stop")
        said = self._renderer.parse(ids, "stop").message
        node = self.history.add_answer(parent, run, Answered(said), prompt)
        path = self.history.graph.path_ids(node.id)
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
    last = renderer.spell(talk.history.graph.path_ids(talk.history.graph.nodes[-1].id).tolist())
    assert last.count("Hm.") == (2 if keeps_thinking else 0)
