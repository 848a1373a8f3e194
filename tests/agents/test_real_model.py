"""Agents with a real model behind them: upspiral's own engine, sampling from the default model on the CPU.

A model of 135 million parameters solves nothing here. At temperature 0 it copies the call it is shown, though, so that
the calls which go out to the agents and come back are of a model's own tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.agents.stage import TASK, Model, Played, Terms, check_exact, hermes, play_with, require
from upspiral.config.models import EngineConfig, ModelConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.gateway.request import SessionPolicy
from upspiral.rendering.renderer import Renderer
from upspiral.types import RolloutStatus
from upspiral.weights.load import LoadedModel, load_model
from upspiral.weights.models import cached_model

MODEL = ModelConfig().path
CONTEXT_LENGTH = 8192
"""All that the model was made for. opencode is the only command line agent whose prompt leaves room in it."""
MAX_CALLS = 3
SHELLS = {"mini-swe-agent": "bash", "opencode": "bash"}
"""How agents call their shell, where not "shell"."""


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = cached_model(MODEL)
    if folder is None:
        pytest.skip(f"model {MODEL} is not fetched: upspiral model get {MODEL}")
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, dtype=ModelConfig().dtype, device="cpu")


def play_for_real(work: Path, agent: str, folder: Path, loaded: LoadedModel) -> Played:
    call = hermes(SHELLS.get(agent, "shell"), {"command": "pwd"})
    task = replace(TASK, instruction=f"Repeat the following text exactly and write nothing else:\n{call}")
    policy = SessionPolicy(max_calls=MAX_CALLS, max_completion_tokens=48, temperature=0.0, seed=0)
    engine = EmbeddedEngine(loaded, EngineConfig(context_length=CONTEXT_LENGTH, max_running=2, cache_slots=4), seed=0)
    model = Model(Renderer.from_folder(folder), engine)
    return play_with(work, agent, model, Terms(policy, task, CONTEXT_LENGTH, timeout_s=180.0))


def check_ended(played: Played) -> None:
    """By itself or at the limit of calls; nothing broke, and nobody waited for a deadline."""
    ended = played.rollout
    assert ended.status is RolloutStatus.FINISHED or ended.reason == "max_calls", ended.reason
    assert 1 <= len(played.calls) <= MAX_CALLS
    assert all(call.answer_ids for call in played.calls)


@pytest.mark.parametrize("agent", ["langgraph", "openai-agents", "pydantic-ai"])
def test_a_model_calls_tools_and_each_turn_continues_its_own_tokens(
    tmp_path: Path, agent: str, folder: Path, loaded: LoadedModel
) -> None:
    require(agent)
    played = play_for_real(tmp_path, agent, folder, loaded)
    check_ended(played)
    check_exact(played)
    assert [node.role for node in played.graph.nodes][:4] == ["system", "user", "assistant", "tool"]
    assert [node.reason for node in played.graph.nodes] == ["root"] + ["append"] * (len(played.graph.nodes) - 1)


@pytest.mark.parametrize(
    "agent",
    [
        "mini-swe-agent",
        "smolagents",
        # A prompt of 7,400 tokens takes the engine half a minute on one core.
        pytest.param("opencode", marks=pytest.mark.slow),
    ],
)
def test_an_agent_that_rewrites_what_it_was_answered_loses_no_token(
    tmp_path: Path, agent: str, folder: Path, loaded: LoadedModel
) -> None:
    require(agent)
    played = play_for_real(tmp_path, agent, folder, loaded)
    check_ended(played)
    check_exact(played)
    assert len(played.calls) > 1
